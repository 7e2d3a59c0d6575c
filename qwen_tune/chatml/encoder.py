"""Texts into token ids, and character ranges into the tokens that are supervised.

A text is encoded whole and ranges are mapped onto it afterwards: segments that are encoded apart and joined differ from
what a server sees wherever white space meets a boundary. The checkpoint's own tokenizer is the authority. Most texts go
through a faster encoder, which has first to give the same ids for some hundred probes, and for one in so many
samples ever after; where it does not, all is encoded anew by the tokenizer alone.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from qwen_tune.chatml.fast_encoder import FastEncoder, FastEncoderError, Ids, TokenSizes
from qwen_tune.chatml.template import (
    END_OF_TURN,
    IGNORED,
    ChatTemplate,
    RenderedSample,
    TokenizedExample,
    render_samples,
)
from qwen_tune.errors import ExampleError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_tune.chatml.conversation import Conversation
    from qwen_tune.recipe.schema import DataSpec

NOT_ENDED = f"the tokenizer does not end the answer with {END_OF_TURN}"
CHECKED_EVERY = 500  # samples
WORTH_A_START = 1 << 20  # characters

# Characters on which versions of the Unicode tables differ, found by comparing all code points in several
# neighbourhoods: after the basic plane only letters of mathematics, emoji and Han are left to the fast encoder.
UNSETTLED = frozenset("\u088f\u0c5c\u0cdc\ua7ce\ua7cf\ua7d2\ua7d4\ua7f1")
UNSETTLED_BEHIND = re.compile("[\U00010000-\U0001d3ff\U0001d800-\U0001efff\U0001fc00-\U0001ffff\U0002a6e0-\U0010ffff]")

ASCII = bytes(range(128))

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class EncodedSamples:
    """Samples one after the other.

    `ids` and `loss_mask` have one entry a token of all samples; `lengths`, `straddling` (tokens that hold the end of a
    prompt and the start of an answer: they are context) and `ended` (whether each answer's last token is the end of a
    turn) one entry a sample.
    """

    ids: Ids
    loss_mask: Mask
    lengths: npt.NDArray[np.int64]
    straddling: npt.NDArray[np.int64]
    ended: Mask


class Encoder:
    """Encodes samples of one tokenizer.

    The fast encoder takes a second to start, so it is looked for when there is work enough (`fast` False: never).
    """

    def __init__(self, template: ChatTemplate, tokenizer_json: str | None = None, *, fast: bool = True) -> None:
        self.tokenizer: PreTrainedTokenizerBase = template.tokenizer
        self.end_of_turn_id = template.end_of_turn_id
        self._control_tokens = template.control_tokens
        self._normalizes = self.tokenizer.backend_tokenizer.normalizer is not None
        self._sizes = TokenSizes(self.tokenizer)
        self._json = tokenizer_json
        self._fast: FastEncoder | None = None
        self._looked_for_fast = not fast
        self._settled: set[str] = set()  # characters beyond ASCII that both encoders know alike
        self._joining: set[str] = set()  # those of which that holds in NFC
        self._encoded = self._characters = 0

    def expect(self, characters: int) -> None:
        """Says how much there is to encode, so that the fast encoder starts before it if that is worth it."""
        self._characters += characters
        if self._characters > WORTH_A_START and not self._looked_for_fast:
            self._fast = FastEncoder.proven(self.tokenizer, self._json)
            self._looked_for_fast = True

    def encode(self, samples: Sequence[RenderedSample]) -> EncodedSamples:
        """Encodes samples in their order.

        Raises:
            FastEncoderError: What was encoded so far, by this call or others before it, may be wrong.
        """
        self.expect(sum(len(sample.text) for sample in samples))
        ids: list[Ids] = []
        exact: dict[int, list[tuple[int, int]]] = {}  # character ranges of the tokens of what was not encoded fast
        for index, sample in enumerate(samples):
            found = self._encode_fast(sample)
            if found is None:
                tokens, exact[index] = self._encode_exactly(sample)
                found = np.array(tokens, dtype=np.uint32)
            ids.append(found)
        return self._with_ranges(samples, ids, exact)

    def _encode_fast(self, sample: RenderedSample) -> Ids | None:
        text = sample.text
        if self._fast is None or sample.literals or not self._is_settled(text):
            return None
        try:
            ids = self._fast.encode(text)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # how Rust's failed assertions arrive here
                raise
            self._fast = None
            return None
        self._encoded += 1
        if self._encoded % CHECKED_EVERY == 1 and ids.tolist() != self._encode_exactly(sample)[0]:
            raise FastEncoderError
        return ids

    def _with_ranges(
        self, samples: Sequence[RenderedSample], ids: Sequence[Ids], exact: Mapping[int, list[tuple[int, int]]]
    ) -> EncodedSamples:
        """Maps the ranges of all samples at once, through the bytes that each token stands for."""
        lengths = np.fromiter(map(len, ids), np.int64, len(samples))
        joined = np.concatenate(ids) if ids else np.empty(0, np.uint32)
        token_ends = np.cumsum(lengths)
        # Where each token begins, in bytes from the first sample on; one more for the end.
        begins = np.zeros(len(joined) + 1, np.int64)
        np.cumsum(self._sizes.of(joined), out=begins[1:])
        offsets = begins[token_ends - lengths].tolist()
        places: list[int] = []  # beginning and end of each range in turn
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

    def _is_settled(self, text: str) -> bool:
        """Whether both encoders know all characters of a text alike."""
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

    def _encode_exactly(self, sample: RenderedSample) -> tuple[list[int], list[tuple[int, int]]]:
        """The checkpoint's own ids, and the characters that each stands for."""
        tokenizer = self.tokenizer.backend_tokenizer
        if not sample.literals:
            encoding = tokenizer.encode(sample.text, add_special_tokens=False)
            return encoding.ids, encoding.offsets
        # Control tokens part a text: what lies between two of them is encoded by itself in any case. So it can be
        # encoded with a tokenizer that takes what only looks like one for text.
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


def tokenize(conversation: Conversation, template: ChatTemplate, data: DataSpec) -> list[TokenizedExample]:
    """The samples of one conversation, rendered by Jinja and encoded by the checkpoint's tokenizer alone.

    `preparation` does the same for many examples at once.

    Raises:
        ExampleError: See `render_samples`.
    """
    samples = render_samples(conversation, template, data)
    encoded = _exact_encoder(template).encode(samples)
    if data.loss_on != "all" and not encoded.ended.all():
        raise ExampleError(NOT_ENDED)
    labels = np.where(encoded.loss_mask, encoded.ids.astype(np.int64), IGNORED)
    ends = np.cumsum(encoded.lengths)
    return [
        TokenizedExample(
            conversation.source,
            conversation.source_name,
            encoded.ids[end - length : end].tolist(),
            labels[end - length : end].tolist(),
            straddling=int(straddling),
        )
        for end, length, straddling in zip(ends, encoded.lengths, encoded.straddling, strict=True)
    ]


@lru_cache(maxsize=8)
def _exact_encoder(template: ChatTemplate) -> Encoder:
    return Encoder(template, fast=False)


def _is_settled_alone(character: str) -> bool:
    """Whether both encoders know a character alike where it stands alone."""
    return (
        character not in UNSETTLED
        and UNSETTLED_BEHIND.match(character) is None
        and unicodedata.is_normalized("NFC", character)
    )


def _joins(character: str) -> bool:
    """Whether NFC may change what a character is beside others: a mark, or a piece of a Korean syllable."""
    return unicodedata.category(character)[0] == "M" or "\u1100" <= character <= "\u11ff"


def _token_range(offsets: Sequence[tuple[int, int]], span: tuple[int, int], base: int) -> tuple[int, int, bool]:
    """The tokens that lie in a range of characters (numbered from `base` on), and whether one straddles its start."""
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
