# SPDX-License-Identifier: BSD-3-Clause
"""Dropout's random numbers (csrc/core/dropout.h): known answers, and which of them a pair takes."""

from __future__ import annotations

import math
from types import ModuleType

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from philox import OUTCOMES, kept_pairs, philox, threshold_of

WORDS = st.integers(0, 2**32 - 1)
ALL_ONES = 2**32 - 1
# Those of Random123, the library of the generator's authors.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ALL_ONES,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(
    whitebox: ModuleType, counter: tuple[int, ...], key: int, words: tuple[int, ...]
):
    assert tuple(whitebox.philox4x32(counter, key)) == words
    assert tuple(int(x) for x in philox([np.asarray(c) for c in counter], key)) == words


@given(counter=st.tuples(WORDS, WORDS, WORDS, WORDS), key=st.integers(0, 2**64 - 1))
def test_the_tests_own_philox_is_the_same(whitebox: ModuleType, counter: tuple[int, ...], key: int):
    due = [int(x) for x in philox([np.asarray(c) for c in counter], key)]
    assert whitebox.philox4x32(counter, key) == due


@given(group=st.integers(0, (2**31 - 1024) // 32 - 1))
def test_the_keys_of_a_group_take_each_number_of_its_calls_once(whitebox: ModuleType, group: int):
    keys = range(32 * group, 32 * group + 32)
    taken = {(whitebox.Dropout.call_of(key), whitebox.Dropout.element_of(key)) for key in keys}
    assert taken == {(4 * group + call, element) for call in range(4) for element in range(8)}


def test_a_lane_of_the_tensor_cores_layout_takes_one_call(whitebox: ModuleType):
    """Lane l of four holds the keys 2 l and 2 l + 1 of every eight."""
    for lane in range(4):
        held = [8 * octet + 2 * lane + i for octet in range(4) for i in range(2)]
        assert [whitebox.Dropout.call_of(key) for key in held] == [lane] * 8
        assert [whitebox.Dropout.element_of(key) for key in held] == list(range(8))


@example(p=0.0)
@example(p=math.nextafter(1, 0))
@example(p=0.5 / OUTCOMES)
@example(p=math.nextafter(0.5 / OUTCOMES, 0))
@given(p=st.floats(0, 1, exclude_max=True))
def test_the_probability_is_rounded_to_16_bits_below_1(whitebox: ModuleType, p: float):
    dropout = whitebox.Dropout(p)
    assert dropout.threshold == threshold_of(p)
    assert (
        abs(dropout.threshold / OUTCOMES - p)
        <= (0.5 if dropout.threshold < OUTCOMES - 1 else 1) / OUTCOMES
    )
    assert dropout.threshold < OUTCOMES
    kept = (OUTCOMES - dropout.threshold) / OUTCOMES
    assert dropout.keep_scale * kept == pytest.approx(1, rel=1e-15)


@given(
    key=st.integers(0, 2**64 - 1),
    last=st.integers(0, 2**64 - 1),
    p=st.floats(0, 1, exclude_max=True),
)
def test_pairs_one_by_one_are_those_of_whole_calls(
    whitebox: ModuleType, key: int, last: int, p: float
):
    dropout = whitebox.Dropout(p, key, last)
    signed = [x - 2**64 if x >= 2**63 else x for x in (key, last)]
    kept = kept_pairs(torch.tensor(signed), p, 1, 2, 2, 37)
    for _, head, q_idx, kv_idx in np.ndindex(*kept.shape):
        assert dropout.keeps(head, q_idx, kv_idx) == bool(kept[0, head, q_idx, kv_idx])
