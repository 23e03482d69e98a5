"""Micro-batches in lists, one list for each optimizer step."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from batchless.train import batched


@given(items=st.lists(st.integers(), max_size=30), k=st.integers(1, 40))
def test_lists_of_k_in_order_with_nothing_lost(items, k):
    groups = list(batched(items, k))
    assert list(itertools.chain.from_iterable(groups)) == items
    assert all(len(group) == k for group in groups[:-1])
    assert all(1 <= len(group) <= k for group in groups)
    assert len(batched(items, k)) == len(groups)


def test_a_generator_is_grouped_but_has_no_length():
    assert list(batched((number for number in range(5)), 2)) == [[0, 1], [2, 3], [4]]
    with pytest.raises(TypeError, match="generator"):
        len(batched((number for number in range(5)), 2))


def test_no_more_is_taken_from_the_loader_than_a_list_needs():
    numbers = itertools.count()
    groups = iter(batched(numbers, 3))
    assert next(groups) == [0, 1, 2]
    assert next(numbers) == 3


def test_one_item_a_list():
    assert list(batched("abc", 1)) == [["a"], ["b"], ["c"]]


def test_k_beyond_the_loader_gives_one_list():
    assert list(batched([1, 2], 100)) == [[1, 2]]
    assert len(batched([1, 2], 100)) == 1


def test_an_empty_loader_gives_no_list():
    assert list(batched([], 3)) == []
    assert len(batched([], 3)) == 0


def test_each_epoch_iterates_the_loader_again():
    groups = batched([1, 2, 3], 2)
    assert list(groups) == list(groups) == [[1, 2], [3]]


def test_a_data_loader():
    loader = DataLoader(TensorDataset(torch.arange(7)), batch_size=2)
    groups = list(batched(loader, 3))
    assert len(batched(loader, 3)) == len(groups) == 2
    assert [[images.tolist() for (images,) in group] for group in groups] == [[[0, 1], [2, 3], [4, 5]], [[6]]]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_a_loader_of_a_stream_has_no_length_but_is_grouped():
    groups = batched(DataLoader(Stream(), batch_size=1), 2)
    assert [[item.tolist() for item in group] for group in groups] == [[[0], [1]], [[2]]]
    with pytest.raises(TypeError):
        len(groups)


@pytest.mark.parametrize("k", [0, -3])
def test_k_below_one_is_refused(k):
    with pytest.raises(ValueError, match=f"1 or more.*{k}"):
        batched([1, 2], k)
