"""Gigatoken, a byte-pair encoder that keeps the ids of every word it has met, and what it has to prove."""

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

LARGEST_GROWTH = 400 << 20  # bytes of memory after which the encoder, which never forgets a word, starts anew
LOOKED_AT_EVERY = 32 << 20  # characters

Ids = npt.NDArray[np.uint32]


class FastEncoderError(Exception):
    """The fast encoder gives other ids than the checkpoint's tokenizer; all that it has encoded is in doubt."""


class FastEncoder:
    """Encodes texts of one tokenizer; see `proven`."""

    def __init__(self, tokenizer_json: str) -> None:
        self._json = tokenizer_json
        self._start()

    def _start(self) -> None:
        from gigatoken.gigatoken_rs import load_hf_json

        self._encoder: Any = None  # gone before there is another
        self._encoder = load_hf_json(self._json)
        self._characters = 0
        self._memory = _memory()

    def encode(self, text: str) -> Ids:
        """The ids of one text."""
        self._characters += len(text)
        if self._characters > LOOKED_AT_EVERY:
            self._characters = 0
            if _memory() > self._memory + LARGEST_GROWTH:
                self._start()
        ids: Ids = self._encoder.encode(text)
        return ids

    @classmethod
    def proven(cls, tokenizer: PreTrainedTokenizerBase, tokenizer_json: str | None = None) -> FastEncoder | None:
        """The fast encoder of a tokenizer if it is there, can read it, and gives its ids for all probes."""
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
                # Ranges are found by the tokens' sizes, so these have to add up as well.
                if found.tolist() != one.ids or sizes.of(found).sum() != len(text.encode()):
                    return None
        except BaseException as error:  # whatever it cannot read, the tokenizer can
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            return None
        return fast


def probes(added_tokens: Sequence[str]) -> list[str]:
    """Texts in which encoders have been known to differ: scripts, white space, contractions, digits, control tokens."""
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
    """Bytes of memory of this process, which may be a fork of the one that began."""
    return int(psutil.Process().memory_info().rss)


class TokenSizes:
    """How many bytes of UTF-8 each id stands for, detected as ids occur."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._added = {id_: len(token.encode()) for token, id_ in tokenizer.get_added_vocab().items()}
        self._sizes = np.zeros(len(tokenizer), np.int32)

    def of(self, ids: Ids) -> npt.NDArray[np.int32]:
        """The size of each id."""
        sizes = self._sizes[ids]
        if not sizes.all():
            for id_ in np.unique(ids[sizes == 0]).tolist():
                # A byte-level vocabulary spells every byte with one character.
                self._sizes[id_] = self._added.get(id_) or len(self._tokenizer.id_to_token(id_))
            sizes = self._sizes[ids]
        return sizes
