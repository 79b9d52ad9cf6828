"""A shuffle that is computed, not stored: the place of any one element costs a few operations.

A Feistel network is a permutation of ``[0, 2**bits)`` whatever its round function does; walking
along its cycle until a number below ``size`` comes up makes it one of ``[0, size)`` (Black and
Rogaway 2002, "Ciphers with arbitrary finite domains", section 3). Nothing is materialised, any
place is reached in O(1), and the inverse is the same network run backwards.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.uint64]

ROUNDS = 8
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUND_SALTS = np.arange(1, ROUNDS + 1, dtype=np.uint64) * _GOLDEN
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def mixed(x: Numbers) -> Numbers:
    """Spread every bit over all 64 (the finaliser of SplitMix64; Steele et al. 2014)."""
    x = x ^ (x >> np.uint64(30))  # a new array; what follows needs only one more
    x *= _MIX1
    shifted = x >> np.uint64(27)
    x ^= shifted
    x *= _MIX2
    np.right_shift(x, np.uint64(31), out=shifted)
    x ^= shifted
    return x


def key_of(*facts: object) -> np.uint64:
    """A 64-bit key from anything that has one written form."""
    digest = hashlib.sha256(repr(facts).encode()).digest()
    return np.uint64(int.from_bytes(digest[:8], "little"))


def subkeys(key: Numbers, number: Numbers) -> Numbers:
    """Independent keys by number, elementwise."""
    return mixed(key + (number + np.uint64(1)) * _GOLDEN)


def permute(index: Numbers, size: Numbers, key: Numbers, inverse: bool = False) -> Numbers:
    """Where each index goes in the permutation of ``[0, size)`` that its key names.

    Args:
        index: numbers below ``size``, ``[n]``.
        size: size of each element's domain, at least 1, ``[n]``.
        key: names each element's permutation, ``[n]``.
        inverse: go the other way.
    """
    left_bits, right_bits = _halves(size)
    walked = _network(index, left_bits, right_bits, key, inverse)
    outside = np.flatnonzero(walked >= size)
    while len(outside):
        again = _network(
            walked[outside], left_bits[outside], right_bits[outside], key[outside], inverse
        )
        walked[outside] = again
        outside = outside[again >= size[outside]]
    return walked


def _halves(size: Numbers) -> tuple[Numbers, Numbers]:
    """Bits of the two halves; their domain is less than twice ``size`` (at least 4 numbers)."""
    # The exponent of a float is its number of bits; frexp is exact below 2**53.
    bits = np.maximum(np.frexp((size - np.uint64(1)).astype(np.float64))[1], 2).astype(np.uint64)
    left = bits >> np.uint64(1)
    return left, bits - left


def _network(
    x: Numbers, left_bits: Numbers, right_bits: Numbers, key: Numbers, inverse: bool
) -> Numbers:
    one = np.uint64(1)
    left_mask, right_mask = (one << left_bits) - one, (one << right_bits) - one
    left, right = x >> right_bits, x & right_mask
    order = range(ROUNDS - 1, -1, -1) if inverse else range(ROUNDS)
    for number in order:
        # Halves take turns: each round changes one by the other, so it can be undone. The rounds'
        # functions are one generator's, SplitMix64's, each a step further from its seed, the key.
        step = key + _ROUND_SALTS[number]
        if number % 2 == 0:
            left = (left ^ mixed(right + step)) & left_mask
        else:
            right = (right ^ mixed(left + step)) & right_mask
    return (left << right_bits) | right


@dataclass(frozen=True)
class Shuffle:
    """How far apart in the shards neighbours of the order may lie.

    A dataset is cut into blocks of consecutive samples; the blocks are shuffled, ``window`` of
    them are opened together, and the samples of a window are shuffled among themselves. Small
    blocks mix better, large ones read more nearly in sequence. A dataset of at most
    ``block * window`` samples is shuffled as a whole.

    Attributes:
        block: consecutive samples that stay together, samples.
        window: blocks whose samples are mixed.
    """

    block: int = 64
    window: int = 256


class EpochOrder:
    """The order of several datasets in any epoch; O(1) for each place.

    Args:
        counts: samples of each dataset, at least 1.
        names: identity of each dataset; its order depends on nothing else of it.
        seed: of all orders.
        shuffle: locality.
    """

    def __init__(self, counts: list[int], names: list[str], seed: int, shuffle: Shuffle) -> None:
        self._counts = np.array(counts, dtype=np.uint64)
        self._keys = np.array([key_of(seed, name) for name in names], dtype=np.uint64)
        self._block = np.uint64(shuffle.block)
        self._window = np.uint64(shuffle.window)
        self._blocks = (self._counts + self._block - np.uint64(1)) // self._block

    def samples(self, dataset: np.ndarray, cursor: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The samples at places of the endless sequence of epochs.

        Args:
            dataset: number of the dataset, ``[n]`` integers.
            cursor: how many samples of it were drawn before, ``[n]`` integers.

        Returns:
            Row in the dataset ``[n]`` int64, and epoch ``[n]`` int64.
        """
        cursor = cursor.astype(np.uint64)
        epoch, place = np.divmod(cursor, self._counts[dataset])
        key = subkeys(self._keys[dataset], epoch)
        short = self._short_slots(dataset, epoch)
        start, size = self._window_of(dataset, place, short)
        within = permute(place - start, size, subkeys(key, start + np.uint64(1)))
        slot, offset = self._slot(dataset, start + within, short)
        block = permute(slot, self._blocks[dataset], key)
        return (block * self._block + offset).astype(np.int64), epoch.astype(np.int64)

    def _short_slots(self, dataset: np.ndarray, epoch: Numbers) -> Numbers:
        """The slots at which the last, mostly shorter blocks of datasets come in epochs."""
        span = np.uint64(len(self._counts))
        pairs, inverse = np.unique(epoch * span + dataset.astype(np.uint64), return_inverse=True)
        each, number = np.divmod(pairs, span)
        blocks, key = self._blocks[number], subkeys(self._keys[number], each)
        return permute(blocks - np.uint64(1), blocks, key, inverse=True)[inverse]

    def _slot(self, dataset: np.ndarray, place: Numbers, short: Numbers) -> tuple[Numbers, Numbers]:
        """Slot of a place in the row of shuffled blocks, and the offset in its block."""
        lacking = self._blocks[dataset] * self._block - self._counts[dataset]
        begins = short * self._block
        after = place >= begins + (self._block - lacking)
        shifted = place + np.where(after, lacking, np.uint64(0))
        return np.divmod(shifted, self._block)

    def _begin(self, dataset: np.ndarray, slot: Numbers, short: Numbers) -> Numbers:
        """The place at which a slot begins."""
        lacking = self._blocks[dataset] * self._block - self._counts[dataset]
        return slot * self._block - np.where(slot > short, lacking, np.uint64(0))

    def _window_of(
        self, dataset: np.ndarray, place: Numbers, short: Numbers
    ) -> tuple[Numbers, Numbers]:
        """First place and number of places of the window that a place lies in."""
        slot, _ = self._slot(dataset, place, short)
        first = slot // self._window * self._window
        last = np.minimum(first + self._window, self._blocks[dataset])
        start = self._begin(dataset, first, short)
        return start, self._begin(dataset, last, short) - start
