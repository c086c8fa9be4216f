# SPDX-License-Identifier: BSD-3-Clause
"""Merging attentions over parts of the keys: equal to the whole, differentiable, empty-safe."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attend import assert_right, attend
from cases import Case, normal
from online_attention import merge
from oracle import CAUSAL, Attention
from rows import Target
from tolerance import assert_bitwise_equal

INF = math.inf


def parts_of(inputs, cuts: list[int]) -> list[Attention]:
    q, k, v = inputs
    edges = [0, *sorted(cuts), k.shape[2]]
    return [
        attend(q, k[:, :, begin:end], v[:, :, begin:end])
        for begin, end in itertools.pairwise(edges)
    ]


@given(cuts=st.lists(st.integers(0, 131), max_size=6), data=st.data())
@pytest.mark.targets(dtypes=(torch.float32, torch.float64))
def test_any_cut_in_any_order_equals_the_whole(
    target: Target, cuts: list[int], data: st.DataObject
):
    inputs = Case("cut", 7, 131, H=4, H_kv=2).inputs(target.dtype, target.device, target.head_dim)
    parts = data.draw(st.permutations(parts_of(inputs, cuts)))
    merged = Attention(*merge(*zip(*parts, strict=True)))
    # Each part was rounded once in this dtype: allow that beside the error of plain PyTorch.
    assert_right(merged, inputs, magnitude=4.0)


@pytest.mark.parametrize("cuts", [[64], [1], [130], [0, 131], [40, 41, 42], list(range(5, 131, 5))])
def test_parts_of_every_dtype_merge_to_the_whole(target: Target, cuts: list[int]):
    inputs = Case("cut", 67, 131, H=4, H_kv=2).inputs(target.dtype, target.device, target.head_dim)
    outs, lses = zip(*parts_of(inputs, cuts), strict=True)
    merged = Attention(*merge(outs, lses))
    assert merged.out.dtype == inputs.q.dtype
    assert merged.lse.dtype == lses[0].dtype
    assert_right(merged, inputs, magnitude=4.0)
    stacked = merge(torch.stack(outs), torch.stack(lses))
    assert_bitwise_equal(stacked[0], merged.out)
    assert_bitwise_equal(stacked[1], merged.lse)


def test_causal_chunk_and_its_prefix(target: Target):
    """A prompt in two chunks: the second sees the first whole and itself causally."""
    q, k, v = Case("prefix", 40, 107).inputs(target.dtype, target.device, target.head_dim)
    prefix = attend(q, k[:, :, :67], v[:, :, :67])
    itself = attend(q, k[:, :, 67:], v[:, :, 67:], CAUSAL)
    merged = Attention(*merge([prefix.out, itself.out], [prefix.lse, itself.lse]))
    assert_right(merged, Case("", 40, 107).inputs(target.dtype, target.device, target.head_dim),
                 CAUSAL, magnitude=4.0)  # fmt: skip


def test_one_part_is_itself(target: Target):
    inputs = Case("one", 5, 9).inputs(target.dtype, target.device, target.head_dim)
    whole = attend(*inputs)
    out, lse = merge([whole.out], [whole.lse])
    assert_bitwise_equal(out, whole.out)
    assert_bitwise_equal(lse, whole.lse)


def test_empty_part_contributes_nothing_whatever_its_output_holds():
    out, lse = normal((2, 3, 5), (2, 3), dtype=torch.float32)
    for garbage in (math.nan, INF, 7.0):
        empty = torch.full_like(out, garbage), torch.full_like(lse, -INF)
        for order in ([empty, (out, lse)], [(out, lse), empty], [empty, (out, lse), empty]):
            merged_out, merged_lse = merge(*zip(*order, strict=True))
            assert_bitwise_equal(merged_out, out)
            assert_bitwise_equal(merged_lse, lse)


def test_row_empty_in_every_part_is_empty():
    outs = torch.full((3, 2, 5), math.nan)
    lses = torch.full((3, 2), -INF)
    out, lse = merge(outs, lses)
    assert_bitwise_equal(out, torch.zeros(2, 5))
    assert (lse == -INF).all()


def test_nan_lse_reaches_its_own_row_alone():
    outs, lses = normal((3, 4, 5), (3, 4), dtype=torch.float32)
    due, due_lse = merge(outs, lses)
    lses[1, 2] = math.nan
    out, lse = merge(outs, lses)
    others = [0, 1, 3]
    assert out[2].isnan().all()
    assert lse[2].isnan()
    assert_bitwise_equal(out[others], due[others])
    assert_bitwise_equal(lse[others], due_lse[others])


@pytest.mark.parametrize("offset", [1e4, -1e4, 1e30])
def test_large_lse_do_not_overflow(offset: float):
    outs, lses = normal((3, 4, 5), (3, 4), dtype=torch.float64)
    lses = lses if abs(offset) < 1e5 else torch.zeros_like(lses)
    due, _ = merge(outs, lses)
    out, lse = merge(outs, lses + offset)
    torch.testing.assert_close(out, due, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(lse, torch.logsumexp(lses, 0) + offset, rtol=1e-14, atol=0)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_gradient_of_merge(parts: int):
    outs, lses = normal((parts, 2, 3, 4), (parts, 2, 3), dtype=torch.float64)
    outs.requires_grad_()
    lses.requires_grad_()
    assert torch.autograd.gradcheck(merge, (outs, lses))
    assert torch.autograd.gradgradcheck(merge, (outs, lses))


def test_gradient_with_empty_parts_is_finite_and_zero_for_them():
    outs, lses = normal((3, 2, 4), (3, 2), dtype=torch.float64)
    outs[1], lses[1, 0], lses[:, 1] = math.nan, -INF, -INF  # part 1 of row 0; all of row 1
    outs[0, 1], outs[2, 1] = math.nan, math.nan
    outs.requires_grad_()
    lses.requires_grad_()
    out, lse = merge(outs, lses)
    (out.sum() + lse[0]).backward()
    assert torch.equal(lses.grad[:, 1], torch.zeros(3))
    assert torch.equal(outs.grad[:, 1], torch.zeros(3, 4))
    assert lses.grad[1, 0] == 0
    assert torch.equal(outs.grad[1, 0], torch.zeros(4))
    weights = torch.softmax(lses[:, 0].detach(), 0)
    torch.testing.assert_close(outs.grad[:, 0], weights[:, None].expand(3, 4))
    assert lses.grad.isfinite().all()


def test_mixed_precision_sums_in_the_wider_type():
    outs, lses = normal((2, 3, 5), (2, 3), dtype=torch.float64)
    out, lse = merge(outs.float(), lses)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float64)
    due, due_lse = merge(outs.float().double(), lses)
    assert_bitwise_equal(out, due.float())
    assert_bitwise_equal(lse, due_lse)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "text"),
    [
        ([], [], ValueError, "outs must hold at least one part"),
        (torch.ones(0, 2, 3), torch.ones(0, 2), ValueError, "outs must hold at least one part"),
        ([torch.ones(2, 3)], [], ValueError, "lses must hold at least one part"),
        ([torch.ones(2, 3)], [torch.ones(3)], ValueError, "outs must have the shape of lses"),
        ([torch.ones(2, 3)] * 2, [torch.ones(2)], ValueError, "outs must have the shape of lses"),
        ([torch.ones(2, 3), torch.ones(3, 3)], [torch.ones(2)] * 2, ValueError, r"outs\[1\] has"),
        ([torch.ones(2, 3), None], [torch.ones(2)] * 2, TypeError, r"outs\[1\] is a NoneType"),
        ([torch.ones(2, 3).int()], [torch.ones(2)], TypeError, "outs must be floating point"),
        ([torch.ones(2, 3)], [torch.ones(2).long()], TypeError, "lses must be floating point"),
    ],
)
def test_errors(outs, lses, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        merge(outs, lses)
