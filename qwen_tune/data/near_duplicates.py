"""Almost equal conversations, found by sketches of their texts without comparing every pair.

A text, without case and punctuation, is cut into runs: the sixteen bytes from the start of each word (about three
words; in scripts without spaces, from each character). The share of runs that two texts have in common (Jaccard
similarity) is estimated from the smallest hash in each of a few bins (one-permutation MinHash: Li, Owen and Zhang, "One
Permutation Hashing", 2012); candidates are texts that agree in a band of bins (locality-sensitive hashing).
"""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

BINS = 64
BAND = 4
SIMILAR = 0.8
"""Smallest share of bins in which two texts must agree, of the bins that are filled in either."""

SHORTEST_RUNS = 12
"""Texts of fewer words are compared as a whole only: a single word can make the difference in a short text."""

RUN = 16
CHUNK = 1 << 16  # texts whose sketches are in memory at once
EMPTY = np.uint16(0xFFFF)

Sketches = npt.NDArray[np.uint16]
"""(texts, BINS): the smallest hash in each bin, `EMPTY` if there is none."""

_SPACE = 32
_FIRST_OF_SEVERAL = 0xC0  # smallest first byte of a character of several bytes
_REDUCED = bytearray(range(256)).lower()
for _character in (string.whitespace + string.punctuation).encode():
    _REDUCED[_character] = _SPACE


def sketch(texts: Sequence[bytes]) -> Sketches:
    """The sketches of texts in UTF-8, shape (texts, BINS)."""
    ends = np.cumsum(np.fromiter((len(text) + RUN for text in texts), np.int64, len(texts)))
    # A gap after every text, so that no run reaches into the next text.
    gap = bytes([_SPACE]) * RUN
    joined = gap.join(texts).translate(bytes(_REDUCED)) + gap + b" "
    data = np.frombuffer(joined, np.uint8)[:-RUN]
    begins_word = (data > _SPACE) & (np.concatenate(([np.uint8(_SPACE)], data[:-1])) == _SPACE)
    places = np.flatnonzero(begins_word | (data >= _FIRST_OF_SEVERAL))
    owner = np.searchsorted(ends, places, side="right")
    runs = np.lib.stride_tricks.as_strided(np.frombuffer(joined, np.uint8), (len(data), RUN), (1, 1))[places]
    halves = runs.view(np.uint64)
    hashes = halves[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ halves[:, 1] * np.uint64(0xC2B2AE3D27D4EB4F)
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    bins = (hashes >> np.uint64(58)).astype(np.int64)
    values = ((hashes >> np.uint64(40)) & np.uint64(0xFFFF)).astype(np.uint16)
    table = np.full(len(texts) * BINS, EMPTY, np.uint16)
    np.minimum.at(table, owner * BINS + bins, values)
    sketches = table.reshape(len(texts), BINS)
    sketches[np.bincount(owner, minlength=len(texts)) < SHORTEST_RUNS] = EMPTY
    return sketches


def near_groups(digests: npt.NDArray[np.uint64], sketches: Sketches) -> npt.NDArray[np.int64]:
    """Groups of equal and almost equal texts.

    Args:
        digests: A hash of each whole text; equal texts have equal ones.
        sketches: Their sketches, (texts, BINS).

    Returns:
        For each text the first text of its group. Similarity is transitive here: a chain of similar texts is one group.
    """
    _, first, same = np.unique(digests, return_index=True, return_inverse=True)
    root = first[same].astype(np.int64)
    first.sort()
    kept = first[_filled(sketches, first)]
    for band in range(0, BINS, BAND):
        keys = np.ascontiguousarray(sketches[kept, band : band + BAND]).view(np.uint64).ravel()
        order = np.argsort(keys, kind="stable")
        is_filled = keys[order] != np.uint64(0xFFFFFFFFFFFFFFFF)
        members = kept[order]
        # Each candidate is compared with the first of its bucket, and with its neighbour in it.
        begins = np.concatenate(([True], keys[order][1:] != keys[order][:-1]))
        heads = members[np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))]
        neighbours = np.concatenate((members[:1], members[:-1]))
        for other in (heads, neighbours):
            # Most similar texts were joined in earlier bands.
            pairs = np.flatnonzero(is_filled & ~begins & (root[other] != root[members]))
            alike = pairs[_similarity(sketches, members[pairs], other[pairs]) >= SIMILAR]
            for one, two in zip(members[alike].tolist(), other[alike].tolist(), strict=True):
                _join(root, one, two)
        while (root[root] != root).any():
            root = root[root]
    return root


def _filled(sketches: Sketches, texts: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Which of some texts have a sketch."""
    filled = np.zeros(len(texts), bool)
    for start in range(0, len(texts), CHUNK):
        filled[start : start + CHUNK] = (sketches[texts[start : start + CHUNK]] != EMPTY).any(axis=1)
    return filled


def _similarity(
    sketches: Sketches, one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    shares = np.zeros(len(one))
    for start in range(0, len(one), CHUNK):
        part = slice(start, start + CHUNK)
        left, right = sketches[one[part]], sketches[other[part]]
        filled = (left != EMPTY) | (right != EMPTY)
        shares[part] = ((left == right) & filled).sum(axis=1) / np.maximum(filled.sum(axis=1), 1)
    return shares


def _root(root: npt.NDArray[np.int64], index: int) -> int:
    while (above := int(root[index])) != index:
        root[index] = root[above]
        index = above
    return index


def _join(root: npt.NDArray[np.int64], one: int, other: int) -> None:
    one, other = _root(root, one), _root(root, other)
    root[max(one, other)] = min(one, other)
