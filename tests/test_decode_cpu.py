# SPDX-License-Identifier: BSD-3-Clause
"""Few queries on the CPU: rows multiplied in place, and keys split in parts that are joined.

Its checks run by each instruction set: see instruction_sets.py.
"""

from __future__ import annotations

import itertools
import math
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attend import KEEP_ALL, Dropout, assert_right, attend, rounding_magnitude
from cases import Inputs, normal
from instruction_sets import for_each_set, run
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Attention, Mask
from philox import factors_of
from tolerance import assert_bitwise_equal

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
RNG = torch.tensor([0x123456789ABCDEF, -5])
PART = 512  # the fewest keys of a part
TILE = 128  # parts begin at multiples
MOST_QUERIES = 16

# Two parts and an odd rest; whole vectors of values, and not.
S_KV, D, D_V = 2 * PART + 75, 40, 48


def inputs_of(
    dtype: torch.dtype, S_q: int, S_kv: int = S_KV, H: int = 2, H_kv: int = 1, D_v: int = D_V
) -> Inputs:
    return Inputs(*normal((1, H, S_q, D), (1, H_kv, S_kv, D), (1, H_kv, S_kv, D_v), dtype=dtype))


def assert_same(a: Attention, b: Attention, name: str = "") -> None:
    assert_bitwise_equal(a.out, b.out, f"out {name}")
    assert_bitwise_equal(a.lse, b.lse, f"lse {name}")


def check_rows() -> None:
    """Each number of rows that fills its blocks of 8, 4, 2 and 1 in another way."""
    for dtype in DTYPES:
        for S_q, H, D_v in ((1, 1, 48), (1, 3, 48), (2, 2, 35), (7, 1, 48), (8, 2, 48), (16, 2, 9)):
            inputs = inputs_of(dtype, S_q, H=H, D_v=D_v)
            assert_right(attend(*inputs, CAUSAL), inputs, CAUSAL)


def check_rows_in_lanes() -> None:
    """From 9 rows a kv head on, of single and double precision; head dims off every unit."""
    for dtype in (torch.float32, torch.float64):
        for S_q, H, S_kv, D in ((9, 1, 17, 40), (5, 3, 131, 3), (12, 1, 300, 130), (8, 2, 80, 261)):
            inputs = Inputs(
                *normal((2, H, S_q, D), (2, 1, S_kv, D), (2, 1, S_kv, D_V), dtype=dtype)
            )
            for mask in (FULL, CAUSAL, Mask(left=5, right=3)):
                assert_right(attend(*inputs, mask), inputs, mask)


def check_masks() -> None:
    """Parts that no row sees, that some rows see, that are cut."""
    masks = (FULL, CAUSAL_TOP_LEFT, Mask(left=70, right=0), Mask(left=PART, right=-1))
    for dtype in DTYPES:
        for mask in masks:
            inputs = inputs_of(dtype, 5)
            magnitude = rounding_magnitude(inputs, None)
            assert_right(attend(*inputs, mask), inputs, mask, magnitude=magnitude)


def check_bias_and_dropout() -> None:
    for S_q, dtype in itertools.product((3, 6), DTYPES):
        factors = factors_of(RNG, 0.3, 1, 2, S_q, S_KV)
        inputs = inputs_of(dtype, S_q)
        (drawn,) = normal((1, 2, S_q, S_KV), dtype=dtype, seed=9)
        for bias in (drawn < 0.5, drawn.masked_fill(drawn > 1, -math.inf)):
            ours = attend(*inputs, CAUSAL, bias=bias, dropout=Dropout(RNG, 0.3))
            magnitude = float(factors.max()) * rounding_magnitude(inputs, None, bias)
            assert_right(ours, inputs, CAUSAL, None, magnitude, bias, factors)


def check_hidden() -> None:
    """NaN in hidden keys and values changes no bit, wherever the parts begin."""
    for S_q, dtype in itertools.product((3, 6), DTYPES):
        q, k, v = inputs_of(dtype, S_q)
        hidden = torch.zeros(1, 1, S_q, S_KV, dtype=torch.bool)
        hidden[..., :130] = hidden[..., PART - 3 : PART + 2] = hidden[..., -3:] = True
        hidden[:, :, 1, :] = hidden[:, :, 2:, 700] = True  # a row without keys, a key of one
        clean = attend(q, k, v, bias=~hidden)
        bad_k, bad_v = k.clone(), v.clone()
        everywhere = hidden.all(2)[0, 0]
        bad_k[:, :, everywhere], bad_v[:, :, everywhere] = math.nan, math.inf
        assert_same(attend(q, bad_k, bad_v, bias=~hidden), clean, str(dtype))
        bad_v[:, :, 700] = math.nan
        of_some = attend(q, bad_k, bad_v, bias=~hidden).out
        assert_bitwise_equal(of_some[:, :, 1:], clean.out[:, :, 1:], str(dtype))
        assert of_some[:, :, 0].isnan().all()
        assert (clean.lse[:, :, 1] == -math.inf).all()
        assert (clean.out[:, :, 1] == 0).all()


def check_visible_infinity() -> None:
    """An infinite value that is seen is in the output: as the last key of an odd number, too."""
    for dtype in DTYPES:
        q, k, v = inputs_of(dtype, 1)
        for key in (0, PART, S_KV - 1):
            infinite = v.clone()
            infinite[..., key, 5] = math.inf
            out = attend(q, k, infinite).out
            assert (out[..., 5] == math.inf).all()
            assert torch.isfinite(out[..., :5]).all()
            assert torch.isfinite(out[..., 6:]).all()


def check_strides() -> None:
    """Keys and values in (B, S, H, D) memory, and the same row again and again."""
    for dtype in DTYPES:
        q, k, v = inputs_of(dtype, 2, H=4, H_kv=2)
        apart = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v)]
        assert_same(attend(q, *apart), attend(q, k, v), str(dtype))
        one = [x[:, :, :1].expand(-1, -1, S_KV, -1) for x in (k, v)]
        assert_same(attend(q, *one), attend(q, *(x.contiguous() for x in one)), str(dtype))


CHECKS = (
    check_rows,
    check_rows_in_lanes,
    check_masks,
    check_bias_and_dropout,
    check_hidden,
    check_visible_infinity,
    check_strides,
)
test_widest_instruction_set, test_instruction_set = for_each_set(__file__, CHECKS)


LENGTHS = (PART, PART + 1, 2 * PART, 32 * PART, 32 * PART + 1)


@pytest.mark.parametrize("S_kv", LENGTHS)
@pytest.mark.parametrize("S_q", [1, MOST_QUERIES, MOST_QUERIES + 1])
def test_edges_of_the_split(S_q: int, S_kv: int) -> None:
    inputs = inputs_of(torch.float32, S_q, S_kv)
    assert_right(attend(*inputs, CAUSAL), inputs, CAUSAL)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_and_batch_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = normal((3, 4, 2, D), (3, 2, S_KV, D), (3, 2, S_KV, D_V), dtype=dtype)
    (bias,) = normal((1, 1, 2, S_KV), dtype=dtype, seed=9)
    for given_bias, dropout in ((None, KEEP_ALL), (bias, Dropout(RNG, 0.2))):
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(attend(q, k, v, CAUSAL, bias=given_bias, dropout=dropout))
        for result in results[1:]:
            assert_same(result, results[0], f"with threads, {dtype}")
    whole = attend(q, k, v, CAUSAL)
    for b in range(3):
        for h_kv in range(2):
            heads = slice(2 * h_kv, 2 * h_kv + 2)
            alone = attend(q[b : b + 1, heads], k[b : b + 1, h_kv : h_kv + 1],
                           v[b : b + 1, h_kv : h_kv + 1], CAUSAL)  # fmt: skip
            assert_bitwise_equal(alone.out[0], whole.out[b, heads])
            assert_bitwise_equal(alone.lse[0], whole.lse[b, heads])


@given(S_q=st.integers(1, 2 * MOST_QUERIES), S_kv=st.integers(0, 2**31 - 1024))
def test_parts_cover_each_key_once(whitebox: ModuleType, S_q: int, S_kv: int) -> None:
    """By whole tiles, in order, none empty, and with few queries alone."""
    split = whitebox.KeySplit(whitebox.Shape(B=1, H=1, H_kv=1, S_q=S_q, S_kv=S_kv, D=1, D_v=1))
    assert (split.count > 1) == (S_q <= MOST_QUERIES and S_kv > PART)
    assert 1 <= split.count <= 32
    end = 0
    for part in range(split.count):
        range_ = split.part_of(0, S_kv, part)
        assert range_[0] == end
        assert range_[0] % TILE == 0
        assert range_[1] > range_[0] or S_kv == 0
        end = range_[1]
    assert end == S_kv


@given(S_kv=st.integers(PART + 1, 50_000), begin=st.integers(0, 50_000), end=st.integers(0, 50_000))
def test_parts_of_a_range(whitebox: ModuleType, S_kv: int, begin: int, end: int) -> None:
    split = whitebox.KeySplit(whitebox.Shape(B=1, H=1, H_kv=1, S_q=1, S_kv=S_kv, D=1, D_v=1))
    end = min(end, S_kv)
    parts = [split.part_of(begin, end, part) for part in range(split.count)]
    seen = [range(*part) for part in parts if part[0] < part[1]]
    assert sum(map(len, seen)) == max(0, end - begin)
    if seen:
        assert (seen[0].start, seen[-1].stop) == (begin, end)
        for a, b in itertools.pairwise(seen):
            assert a.stop == b.start


if __name__ == "__main__":
    run(CHECKS)
