"""Gigatoken, a byte-pair encoder that caches the ids of every word, and its check against the tokenizer."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import psutil

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LARGEST_GROWTH = 400 << 20  # bytes of memory after which the encoder, whose cache is unbounded, is restarted
MEMORY_CHECKED_EVERY = 32 << 20  # characters

Ids = npt.NDArray[np.uint32]


class FastEncoderError(Exception):
    """The fast encoder gave other ids than the checkpoint's tokenizer; all its results are in doubt."""


class FastEncoder:
    """Encodes texts for one tokenizer; use `verified` to create it.

    `starts` counts how often it was started, which empties its cache.
    """

    def __init__(self, tokenizer_json: str) -> None:
        self.starts = 0
        self._json = tokenizer_json
        self._start()

    def _start(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._encoder: Any = None  # frees the memory of the old one first
        self._encoder = load_hf_json(self._json)
        self.starts += 1
        self._characters = 0
        self._memory = _memory()

    def encode(self, text: str) -> Ids:
        self._characters += len(text)
        if self._characters > MEMORY_CHECKED_EVERY:
            self._characters = 0
            if _memory() > self._memory + LARGEST_GROWTH:
                self._start()
        ids: Ids = self._encoder.encode(text)
        return ids

    @classmethod
    def verified(cls, tokenizer: PreTrainedTokenizerBase, tokenizer_json: str | None = None) -> FastEncoder | None:
        """The fast encoder for a tokenizer if it is installed, can read it, and gives its ids for all probes."""
        backend = tokenizer.backend_tokenizer
        if backend.normalizer is not None and type(backend.normalizer).__name__ != "NFC":
            return None
        try:
            fast = cls(tokenizer_json or backend.to_str())
            texts = probes(list(tokenizer.get_added_vocab()))
            exact = backend.encode_batch_fast(texts, add_special_tokens=False)
            sizes = TokenSizes(tokenizer)
            for text, one in zip(texts, exact, strict=True):
                found = fast.encode(text)
                # Ranges are found by the sizes of tokens, so these must add up as well.
                if found.tolist() != one.ids or sizes.of(found).sum() != len(text.encode()):
                    return None
        except BaseException as error:  # whatever the reason, the tokenizer itself will do
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return None
        return fast


def probes(added_tokens: Sequence[str]) -> list[str]:
    """Texts on which encoders are known to differ: scripts, white space, contractions, digits, control tokens."""
    pieces = [
        *"aZ09 \t\n\r.,;:!?'\"-_/\\()[]{}<>|@#$%^&*+=~`",
        *"éßñøÅжЯωאبहไ中文語한日々ｱ０①½²♥€…—“”·\u00a0\u200b\u200d\u3000\ufeff🙂👩🏽",
        *[
            "'s",
            "'LL",
            "'t",
            "the ",
            " Hello",
            "\n\n",
            "\r\n",
            "    ",
            "\t\t",
            "3.14",
            "1234567",
            "https://",
            "def f(x):",
        ],
        *added_tokens,
    ]
    chosen = random.Random(2507)
    texts = ["".join(chosen.choices(pieces, k=chosen.randint(1, 24))) for _ in range(800)]
    return ["", *pieces, *(text for text in texts if unicodedata.is_normalized("NFC", text))]


def _memory() -> int:
    """Resident bytes of this process, which may be a fork of the one that created the encoder."""
    return int(psutil.Process().memory_info().rss)


class TokenSizes:
    """The number of bytes in UTF-8 of each id's text, computed when the id first occurs."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._added = {id_: len(token.encode()) for token, id_ in tokenizer.get_added_vocab().items()}
        self._sizes = np.zeros(len(tokenizer), np.int32)

    def of(self, ids: Ids) -> npt.NDArray[np.int32]:
        sizes = self._sizes[ids]
        if not sizes.all():
            for id_ in np.unique(ids[sizes == 0]).tolist():
                # In a byte-level vocabulary a character is a byte.
                self._sizes[id_] = self._added.get(id_) or len(self._tokenizer.id_to_token(id_))
            sizes = self._sizes[ids]
        return sizes
