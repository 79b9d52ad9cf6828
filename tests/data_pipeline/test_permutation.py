"""The computed shuffle: a permutation at any size, fair, as local as it says, and free of cost."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.planning.permutation import EpochOrder, Shuffle, permute
from tests.data_pipeline.plans import shuffles


def order_of(size: int, shuffle: Shuffle | None = None, seed: int = 0) -> EpochOrder:
    return EpochOrder([size], ["a"], seed, shuffle or Shuffle())


def epochs_of(order: EpochOrder, size: int, epochs: int) -> np.ndarray:
    """Rows in their order, ``[epochs, size]``."""
    cursor = np.arange(epochs * size)
    return order.samples(np.zeros(len(cursor), dtype=np.int64), cursor)[0].reshape(epochs, size)


def chi_square_limit(freedom: int) -> float:
    """What one fair draw in ten thousand exceeds (Wilson and Hilferty 1931)."""
    part = 2 / (9 * freedom)
    return freedom * (1 - part + 3.72 * math.sqrt(part)) ** 3


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_a_permutation_is_one_and_can_be_undone(size: int, key: int) -> None:
    index = np.arange(size, dtype=np.uint64)
    every, keys = np.full(size, size, np.uint64), np.full(size, key, np.uint64)
    shuffled = permute(index, every, keys)
    assert sorted(shuffled.tolist()) == list(range(size))
    assert permute(shuffled, every, keys, inverse=True).tolist() == index.tolist()


@given(st.integers(1, 2**50), st.lists(st.integers(0, 2**50), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_huge_permutations_can_be_undone(size: int, places: list[int]) -> None:
    index = np.array([place % size for place in places], dtype=np.uint64)
    every, keys = np.full(len(index), size, np.uint64), np.full(len(index), 7, np.uint64)
    shuffled = permute(index, every, keys)
    assert (shuffled < size).all()
    assert permute(shuffled, every, keys, inverse=True).tolist() == index.tolist()


@given(st.integers(1, 1500), shuffles, st.integers(0, 9), st.integers(0, 2**40))
@settings(max_examples=80, deadline=None)
def test_every_epoch_has_every_sample_once(
    size: int, shuffle: Shuffle, seed: int, epoch: int
) -> None:
    order = EpochOrder([7, size], ["a", "b"], seed, shuffle)
    cursor = np.arange(epoch * size, (epoch + 2) * size)
    row, number = order.samples(np.ones(len(cursor), dtype=np.int64), cursor)
    assert number.tolist() == [epoch] * size + [epoch + 1] * size
    assert sorted(row[:size].tolist()) == sorted(row[size:].tolist()) == list(range(size))


@given(
    st.lists(st.integers(1, 90), min_size=1, max_size=5),
    shuffles,
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 500)), min_size=1, max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_a_place_is_the_same_whatever_is_asked_with_it(
    sizes: list[int], shuffle: Shuffle, places: list[tuple[int, int]]
) -> None:
    names = [f"n{i}" for i in range(len(sizes))]
    dataset = np.array([number % len(sizes) for number, _ in places])
    cursor = np.array([cursor for _, cursor in places])
    row, _ = EpochOrder(sizes, names, 4, shuffle).samples(dataset, cursor)
    for number, place, found in zip(dataset, cursor, row, strict=True):
        # Nor does it matter which other datasets there are.
        alone = EpochOrder([sizes[number]], [names[number]], 4, shuffle)
        assert alone.samples(np.array([0]), np.array([place]))[0].tolist() == [found]


@given(st.integers(1, 2000), st.integers(1, 40), st.integers(1, 8), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_window_is_some_whole_blocks_and_nothing_else(
    size: int, block: int, window: int, seed: int
) -> None:
    row = epochs_of(order_of(size, Shuffle(block, window), seed), size, 1)[0]
    blocks, place = -(-size // block), 0
    last = size - (blocks - 1) * block
    while place < size:
        number = min(window, blocks)
        length = number * block
        touched = set((row[place : place + length] // block).tolist())
        if len(touched) > number or place + length > size:  # the last, shorter block is in it
            length -= block - last
            touched = set((row[place : place + length] // block).tolist())
        assert len(touched) == number
        members = [r for b in touched for r in range(b * block, min(size, (b + 1) * block))]
        assert sorted(row[place : place + length].tolist()) == sorted(members)
        place, blocks = place + length, blocks - number


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_orders_of_a_small_dataset_are_as_likely(size: int) -> None:
    orders = math.factorial(size)
    epochs = 250 * orders
    found = Counter(map(tuple, epochs_of(order_of(size), size, epochs).tolist()))
    assert set(found) == set(itertools.permutations(range(size)))
    assert sum((n - 250) ** 2 / 250 for n in found.values()) < chi_square_limit(orders - 1)


@pytest.mark.parametrize(
    ("size", "shuffle"),
    [(5, Shuffle()), (8, Shuffle()), (13, Shuffle()), (31, Shuffle(4, 64)), (24, Shuffle(3, 2))],
)
def test_every_sample_is_as_likely_at_every_place(size: int, shuffle: Shuffle) -> None:
    epochs = 100 * size
    row = epochs_of(order_of(size, shuffle), size, epochs)
    at = np.zeros((size, size))
    np.add.at(at, (np.arange(size)[None, :], row), 1)
    statistic = ((at - 100) ** 2 / 100).sum()
    assert statistic < chi_square_limit((size - 1) ** 2)


def test_pairs_of_neighbours_are_as_likely_as_others_in_one_window() -> None:
    """Blocks lie together in a shard; in the order they do not if one window holds them all."""
    size, epochs = 30, 3000
    row = epochs_of(order_of(size, Shuffle(5, 64)), size, epochs)
    same = (row[:, 1:] // 5 == row[:, :-1] // 5).mean()
    expected = 4 / 29  # four of the other 29 are of the same block
    assert abs(same - expected) < 4 * math.sqrt(expected / (epochs * (size - 1)))
    # In windows of one block they are all there is.
    row = epochs_of(order_of(size, Shuffle(5, 1)), size, 200)
    assert (row[:, 1:] // 5 == row[:, :-1] // 5).mean() == pytest.approx(24 / 29)


def test_orders_differ_by_seed_name_and_epoch() -> None:
    shuffle = Shuffle(16, 64)
    one = epochs_of(order_of(500, shuffle), 500, 2)
    other = epochs_of(order_of(500, shuffle, seed=1), 500, 1)
    named = EpochOrder([500], ["b"], 0, shuffle).samples(np.zeros(500, int), np.arange(500))[0]
    for row in (one[1], other[0], named):
        assert (one[0] == row).mean() < 0.05


@pytest.mark.parametrize("size", [10**4, 10**8, 10**14])
def test_nothing_grows_with_the_size(size: int) -> None:
    tracemalloc.start()
    order = order_of(size)
    cursor = np.array([0, size - 1, size, 5 * size + size // 2])
    row, epoch = order.samples(np.zeros(4, dtype=np.int64), cursor)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert epoch.tolist() == [0, 0, 1, 5]
    assert ((row >= 0) & (row < size)).all()
    assert most < 64 * 1024


def test_the_order_is_the_one_that_saved_runs_have() -> None:
    """Where this changes, runs under way would go on in another order: raise ``plan.ORDER``."""
    order = EpochOrder([100, 10**9], ["a", "b"], 3, Shuffle(4, 8))
    cursor = [*range(10), 100, 101, 0, 1, 10**9 - 1, 10**9, 10**12, 5]
    row, _ = order.samples(np.array([0] * 12 + [1] * 6), np.array(cursor))
    assert row.tolist() == [
        94, 6, 59, 44, 56, 9, 51, 11, 91, 93, 80, 29,
        684250428, 951766095, 958204694, 632379032, 393289251, 951766094,
    ]  # fmt: skip
