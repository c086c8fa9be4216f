# SPDX-License-Identifier: BSD-3-Clause
"""Many queries on the CPU: the forward pass by each instruction set.

Its checks run by each instruction set: see instruction_sets.py.
"""

from __future__ import annotations

import math

import pytest
import torch

from attend import assert_right, attend
from cases import Inputs, normal
from instruction_sets import for_each_set, run
from online_attention import attention
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from tolerance import assert_bitwise_equal

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def inputs_of(dtype: torch.dtype, S_q: int, S_kv: int, D: int, D_v: int, H: int = 1) -> Inputs:
    return Inputs(*normal((1, H, S_q, D), (1, 1, S_kv, D), (1, 1, S_kv, D_v), dtype=dtype))


def check_sizes() -> None:
    """Blocks of rows, panels and tiles of keys, and head dims, whole and with a rest."""
    for dtype in DTYPES:
        for S_q, S_kv, D, D_v in ((18, 17, 16, 16), (60, 129, 33, 64), (203, 320, 64, 40)):
            inputs = inputs_of(dtype, S_q, S_kv, D, D_v)
            assert_right(attend(*inputs), inputs)


def check_masks() -> None:
    """Diagonals that cut panels anywhere, rows that see nothing, ranges that begin late."""
    for dtype in DTYPES:
        for mask in (CAUSAL, CAUSAL_TOP_LEFT, Mask(left=40, right=3)):
            for S_q, S_kv in ((75, 170), (90, 70)):
                inputs = inputs_of(dtype, S_q, S_kv, 24, 24, H=2)
                assert_right(attend(*inputs, mask), inputs, mask)


def check_hidden() -> None:
    """NaN and infinity behind the diagonal reach no row that does not see them."""
    for dtype in DTYPES:
        q, k, v = inputs_of(dtype, 100, 100, 16, 16)
        clean = attend(q, k, v, CAUSAL)
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[..., 50:, :], bad_v[..., 50:, :] = math.nan, math.inf
        poisoned = attend(q, bad_k, bad_v, CAUSAL)
        assert_bitwise_equal(poisoned.out[..., :50, :], clean.out[..., :50, :], str(dtype))
        assert_bitwise_equal(poisoned.lse[..., :50], clean.lse[..., :50], str(dtype))
        assert poisoned.out[..., 50:, :].isnan().all()


def check_weights() -> None:
    """Each exponential by itself: values are unit vectors, so that out holds the weights."""
    for dtype, epsilon in ((torch.float32, 2.0**-24), (torch.float64, 2.0**-53)):
        scores = torch.cat((torch.linspace(-100, 0, 499), torch.tensor([-math.inf]))).to(dtype)
        q, k = torch.ones(1, 1, 20, 1, dtype=dtype), scores[None, None, :, None]
        v = torch.eye(500, dtype=dtype)[None, None]
        visible = torch.ones(20, 500, dtype=torch.bool)
        visible[:, -1] = False
        ours = attention(q, k.nan_to_num(neginf=0), v, scale=1.0, bias=visible)[0, 0, 0].double()
        due = scores.double().softmax(0)
        # The power of 2 is rounded once; the exponential, the sum and the quotient to a last bit.
        limit = (scores.double().abs() * 1.5 + 6) * 2 * epsilon
        normal_numbers = (due > 2.0**-125) & visible[0]
        error = (ours / due - 1).abs()[normal_numbers]
        assert (error <= limit[normal_numbers]).all(), (error / limit[normal_numbers]).max()
        assert ours[-1] == 0
        assert (ours[~normal_numbers] <= 2.0**-124).all()


def check_tail_of_weights() -> None:
    """Weights below the smallest normal number are 0, and never anything else."""
    k = torch.tensor([0.0, -88.0, -95.0, -104.0, -1e4, -3e38])[None, None, :, None]
    v = torch.eye(6)[None, None]
    out = attention(torch.ones(1, 1, 20, 1), k.expand(1, 1, 6, 1), v, scale=1.0)
    more = torch.cat((k, torch.full((1, 1, 20, 1), -1e30)), 2)
    packed = attention(torch.ones(1, 1, 20, 1), more, torch.eye(26)[None, None], scale=1.0)
    for weights in (out[0, 0], packed[0, 0, :, :6]):
        assert (weights[:, 2:] == 0).all()
        assert ((weights[:, 1] == 0) | ((weights[:, 1] / math.exp(-88) - 1).abs() < 1e-5)).all()
        assert (weights[:, 0] == 1).all()


CHECKS = (check_sizes, check_masks, check_hidden, check_weights, check_tail_of_weights)
test_widest_instruction_set, test_instruction_set = for_each_set(__file__, CHECKS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_change_no_bit(dtype: torch.dtype) -> None:
    """A row's result is the same whichever rows share its block and its tile."""
    q, k, v = inputs_of(dtype, 230, 230, 40, 40)
    for mask, ranges in ((FULL, ((0, 17), (37, 60), (5, 230))), (CAUSAL, ((7, 230), (200, 230)))):
        whole = attend(q, k, v, mask)
        for first, end in ranges:
            some = attend(q[..., first:end, :], k, v, mask)
            assert_bitwise_equal(some.out, whole.out[..., first:end, :], f"rows from {first}")
            assert_bitwise_equal(some.lse, whole.lse[..., first:end], f"rows from {first}")


if __name__ == "__main__":
    run(CHECKS)
