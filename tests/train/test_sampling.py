"""Batches of rows of about equal length, in an order that a resumed run finds again (see also test_resume.py)."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.train.sampling import ByLength


def order(rows, lengths, seed, epoch):
    """What a process that begins in this epoch sees, whatever was drawn before."""
    torch.rand(epoch + 1)
    sampler = ByLength(rows, lengths, seed)
    sampler.set_epoch(epoch)
    return list(sampler)


@given(st.integers(1, 7), st.lists(st.integers(1, 50), min_size=1, max_size=80), st.integers(0, 9), st.integers(0, 3))
def test_every_row_comes_once_and_the_order_follows_from_seed_and_epoch(rows, lengths, seed, epoch):
    got = order(rows, lengths, seed, epoch)
    assert sorted(got) == list(range(len(lengths)))
    assert got == order(rows, lengths, seed, epoch)
    assert lengths[got[0]] == max(lengths)


def test_seeds_and_epochs_have_orders_of_their_own():
    lengths = [1 + n % 9 for n in range(60)]
    orders = {tuple(order(4, lengths, seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (7, 0), (7, 1))}
    assert len(orders) == 4


def test_little_is_padded():
    """Sorted wholly within 50 steps, batches of 8 out of lengths up to 64 could not be padded less."""
    lengths = random.Random(0).choices(range(1, 65), k=400)
    got = order(8, lengths, 0, 0)
    longest = [max(lengths[row] for row in got[start : start + 8]) for start in range(0, 400, 8)]
    assert sum(longest) * 8 < 1.1 * sum(lengths)
