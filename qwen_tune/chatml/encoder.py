"""Encodes texts to token ids, and maps character ranges to the tokens that are supervised.

A text is encoded as a whole and the ranges are mapped to its tokens afterwards: segments encoded separately differ from
what a server sees where white space meets a boundary. The checkpoint's own tokenizer is the reference. Most texts go
through a faster encoder, which must first give the same ids for some hundred probes, and then for one sample in
`CHECKED_EVERY`; if it does not, everything is encoded again by the tokenizer.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from qwen_tune.chatml.fast_encoder import FastEncoder, FastEncoderError, Ids, TokenSizes
from qwen_tune.chatml.template import (
    END_OF_TURN,
    ChatTemplate,
    RenderedSample,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_ENDED = f"the tokenizer does not end the answer with {END_OF_TURN}"
CHECKED_EVERY = 500  # samples
WORTH_A_START = 1 << 20  # characters

# Characters on which versions of the Unicode tables differ, found by comparing all code points in several contexts.
# Beyond the basic plane, only mathematical letters, emoji and Han characters go to the fast encoder.
UNSETTLED = frozenset("\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1")
UNSETTLED_PLANES = re.compile("[\U00010000-\U0001d3ff\U0001d800-\U0001efff\U0001fc00-\U0001ffff\U0002a6e0-\U0010ffff]")

ASCII = bytes(range(128))

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedSamples:
    """Several samples, concatenated.

    Per token: `ids` and `loss_mask`. Per sample: `lengths`, `straddling` (how many tokens hold both the end of a prompt
    and the start of an answer; they are context) and `ended` (whether each answer's last token is the end of a turn).
    """

    ids: Ids
    loss_mask: Mask
    lengths: npt.NDArray[np.int64]
    straddling: npt.NDArray[np.int64]
    ended: Mask


class Encoder:
    """Encodes samples for one tokenizer; `fast` is the fast encoder in use, or None."""

    def __init__(
        self,
        template: ChatTemplate,
        tokenizer_json: str | None = None,
        *,
        fast: FastEncoder | Literal["auto"] | None = "auto",
    ) -> None:
        """Loads the sizes of the tokens.

        Args:
            template: The checkpoint's chat template, with its tokenizer.
            tokenizer_json: The tokenizer as JSON, if the caller has it.
            fast: A fast encoder, None for none, or "auto" to start one, which takes a second, once there is enough to
                encode.
        """
        self.tokenizer: PreTrainedTokenizerBase = template.tokenizer
        self.end_of_turn_id = template.end_of_turn_id
        self._control_tokens = template.control_tokens
        self._normalizes = self.tokenizer.backend_tokenizer.normalizer is not None
        self._sizes = TokenSizes(self.tokenizer)
        self._json = tokenizer_json
        self.fast = None if fast == "auto" else fast
        self._may_start_fast = fast == "auto"
        self._settled: set[str] = set()  # characters beyond ASCII that both encoders treat alike
        self._joining: set[str] = set()  # characters that they treat alike only in NFC
        self._encoded = self._characters = 0

    def expect(self, characters: int) -> None:
        """Announces how much will be encoded, so that the fast encoder is started first if that is worth it."""
        self._characters += characters
        if self._characters > WORTH_A_START and self._may_start_fast:
            self.fast = FastEncoder.verified(self.tokenizer, self._json)
            self._may_start_fast = False

    def encode(self, samples: Sequence[RenderedSample]) -> EncodedSamples:
        """Encodes samples in their order.

        Raises:
            FastEncoderError: What was encoded so far, by this call or earlier ones, may be wrong.
        """
        self.expect(sum(len(sample.text) for sample in samples))
        ids: list[Ids] = []
        exact: dict[int, list[tuple[int, int]]] = {}  # character ranges of the tokens, by sample
        for index, sample in enumerate(samples):
            found = self._encode_fast(sample)
            if found is None:
                tokens, exact[index] = self.encode_exactly(sample)
                found = np.array(tokens, dtype=np.uint32)
            ids.append(found)
        return self._with_ranges(samples, ids, exact)

    def _encode_fast(self, sample: RenderedSample) -> Ids | None:
        text = sample.text
        if self.fast is None or sample.literals or not self.agree_on(text):
            return None
        try:
            ids = self.fast.encode(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # a failed assertion in Rust
                raise
            self.fast = None
            return None
        self._encoded += 1
        if self._encoded % CHECKED_EVERY == 1 and ids.tolist() != self.encode_exactly(sample)[0]:
            raise FastEncoderError
        return ids

    def _with_ranges(
        self, samples: Sequence[RenderedSample], ids: Sequence[Ids], exact: Mapping[int, list[tuple[int, int]]]
    ) -> EncodedSamples:
        """Maps the ranges of all samples at once, by the number of bytes of each token."""
        lengths = np.fromiter(map(len, ids), np.int64, len(samples))
        joined = np.concatenate(ids) if ids else np.empty(0, np.uint32)
        token_ends = np.cumsum(lengths)
        # The start of each token in bytes of all samples, and the end.
        begins = np.zeros(len(joined) + 1, np.int64)
        np.cumsum(self._sizes.of(joined), out=begins[1:])
        offsets = begins[token_ends - lengths].tolist()
        places: list[int] = []  # start and end of each range, alternating
        owners: list[int] = []
        for index, sample in enumerate(samples):
            if index in exact:
                continue
            offset = offsets[index]
            for span in sample.spans if sample.text.isascii() else _in_bytes(sample.text, sample.spans):
                places += (offset + span[0], offset + span[1])
                owners.append(index)
        bytes_at = np.array(places, np.int64).reshape(-1, 2)
        first = np.searchsorted(begins, bytes_at[:, 0], side="left")
        last = np.maximum(np.searchsorted(begins, bytes_at[:, 1], side="right") - 1, first)
        straddles = begins[np.minimum(first, len(joined))] > bytes_at[:, 0]
        if any(samples[index].spans for index in exact):
            more = [
                (index, *_token_range(offsets_of, span, int(token_ends[index] - lengths[index])))
                for index, offsets_of in exact.items()
                for span in samples[index].spans
            ]
            owners += [index for index, _, _, _ in more]
            first = np.append(first, [begin for _, begin, _, _ in more])
            last = np.append(last, [end for _, _, end, _ in more])
            straddles = np.append(straddles, [straddling for _, _, _, straddling in more])
        loss_mask = np.zeros(len(joined), bool)
        for begin, end in zip(first.tolist(), last.tolist(), strict=True):
            loss_mask[begin:end] = True
        # Nothing precedes a sample's first token, so nothing can predict it.
        loss_mask[(token_ends - lengths)[lengths > 0]] = False
        owner = np.array(owners, np.int64)
        open_ended = (
            (last == first) | (joined[np.maximum(last - 1, 0)] != self.end_of_turn_id) if len(joined) else first
        )
        return EncodedSamples(
            joined,
            loss_mask,
            lengths,
            straddling=np.bincount(owner, straddles, len(samples)).astype(np.int64),
            ended=np.bincount(owner, open_ended, len(samples)) == 0,
        )

    def agree_on(self, text: str) -> bool:
        """Whether both encoders treat all characters of a text alike."""
        if text.isascii():
            return True
        met = set(text.encode().translate(None, ASCII).decode())
        if met <= self._settled:
            return True
        for character in met - self._settled - self._joining:
            if _is_settled_alone(character):
                (self._joining if _joins(character) else self._settled).add(character)
        if met <= self._settled:
            return True
        is_known = met <= self._settled | self._joining
        return is_known and (not self._normalizes or unicodedata.is_normalized("NFC", text))

    def encode_exactly(self, sample: RenderedSample) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of the checkpoint's tokenizer, and the character range of each."""
        tokenizer = self.tokenizer.backend_tokenizer
        if not sample.literals:
            encoding = tokenizer.encode(sample.text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        # The text between control tokens is encoded independently in any case. So it can be encoded with a tokenizer
        # that treats what only looks like a control token as text.
        literals = set(sample.literals)
        borders = [match.span() for match in self._control_tokens.finditer(sample.text)]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        position = 0
        for start, stop in [*(span for span in borders if span not in literals), (len(sample.text),) * 2]:
            tokenizer.encode_special_tokens = True
            between = tokenizer.encode(sample.text[position:start], add_special_tokens=False)
            tokenizer.encode_special_tokens = False
            token = tokenizer.encode(sample.text[start:stop], add_special_tokens=False)
            ids += between.ids + token.ids
            offsets += [(position + begin, position + end) for begin, end in between.offsets]
            offsets += [(start, stop)] * len(token.ids)
            position = stop
        return ids, offsets


def _is_settled_alone(character: str) -> bool:
    """Whether both encoders treat a single character alike."""
    return (
        character not in UNSETTLED
        and UNSETTLED_PLANES.match(character) is None
        and unicodedata.is_normalized("NFC", character)
    )


def _joins(character: str) -> bool:
    """Whether NFC may combine a character with its neighbours: a mark, or a part of a Korean syllable."""
    return unicodedata.category(character)[0] == "M" or "\u1100" <= character <= "\u11ff"


def _token_range(offsets: Sequence[tuple[int, int]], span: tuple[int, int], base: int) -> tuple[int, int, bool]:
    """The range of tokens within a range of characters, plus `base`, and whether a token straddles its start."""
    begin = bisect_left(offsets, span[0], key=lambda place: place[0])
    end = max(begin, bisect_right(offsets, span[1], key=lambda place: place[1]))
    return base + begin, base + end, begin > 0 and offsets[begin - 1][1] > span[0]


def _in_bytes(text: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Character ranges as ranges of bytes in UTF-8."""
    converted = []
    position = size = 0
    for start, stop in spans:
        begin = size + len(text[position:start].encode())
        size = begin + len(text[start:stop].encode())
        position = stop
        converted.append((begin, size))
    return converted
