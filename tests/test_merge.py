# SPDX-License-Identifier: BSD-3-Clause
"""Merging attentions over parts of the keys: equal to the whole, empty-safe, any form of input."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

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


def parts_and_lses(target: Target, parts: int, rows: tuple[int, ...], columns: int):
    """Stacked parts of random numbers, the lses in the type that belongs to the dtype."""
    outs, lses = normal(
        (parts, *rows, columns), (parts, *rows), dtype=target.dtype, device=target.device
    )
    return outs, 2 * lses.to(target.lse_dtype)


def exact_merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """In fp64, for rows that some part sees."""
    outs, lses = outs.double(), lses.double()
    weights = torch.softmax(lses, 0)[..., None]
    return torch.where(weights == 0, 0, weights * outs).sum(0), torch.logsumexp(lses, 0)


def tolerance(target: Target) -> dict[str, float]:
    """Of results of order 1 that were rounded once and summed in fp32 or fp64."""
    eps = torch.finfo(target.dtype).eps
    return {"rtol": 4 * eps, "atol": 8 * eps}


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


@given(cuts=st.lists(st.integers(0, 61), min_size=2, max_size=6), data=st.data())
@pytest.mark.targets(dtypes=(torch.float32, torch.float64))
def test_any_grouping_equals_the_whole(target: Target, cuts: list[int], data: st.DataObject):
    """Merges of merges: neighbours of any order are replaced by their merge until one is left."""
    inputs = Case("group", 3, 61, H=2).inputs(target.dtype, target.device, target.head_dim)
    parts = data.draw(st.permutations(parts_of(inputs, cuts)))
    while len(parts) > 1:
        begin = data.draw(st.integers(0, len(parts) - 2))
        end = data.draw(st.integers(begin + 2, len(parts)))
        group = Attention(*merge(*zip(*parts[begin:end], strict=True)))
        parts = [*parts[:begin], group, *parts[end:]]
    assert_right(parts[0], inputs, magnitude=8.0)


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


@pytest.mark.parametrize("size", [3e38, -3e38, 1e30, 1e4, -1e4])
def test_large_lse_of_single_precision_keep_their_weights(target: Target, size: float):
    """1e4 * log2(e) is rounded by 1e-3: weights must come from differences."""
    outs, offsets = parts_and_lses(target, 4, rows=(6,), columns=8)
    lses = (offsets.float() + size).to(target.lse_dtype)
    due, due_lse = exact_merge(outs, lses)
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out.double(), due, **tolerance(target))
    torch.testing.assert_close(lse.double(), due_lse, rtol=1e-6, atol=0)


def test_opposite_extremes_and_results_near_the_largest_number():
    largest = torch.finfo(torch.float32).max
    out, lse = merge(torch.tensor([[1.0], [2.0]]), torch.tensor([-largest, largest]))
    assert (out.item(), lse.item()) == (2.0, largest)
    out, _ = merge(torch.full((4, 1), 0.99 * largest), torch.zeros(4))
    assert out.item() == pytest.approx(0.99 * largest)


@pytest.mark.parametrize("parts", [47, 48, 49, 131])
def test_many_parts(target: Target, parts: int):
    """More than travel in the parameters of one CUDA kernel."""
    outs, lses = parts_and_lses(target, parts, rows=(2, 3), columns=24)
    lses[1::3, 0] = -INF
    outs[1::3, 0] = math.nan
    due, due_lse = exact_merge(outs, lses)
    for form in ((outs, lses), (outs.unbind(), lses.unbind()), (outs.unbind(), lses)):
        out, lse = merge(*form)
        torch.testing.assert_close(out.double(), due, **tolerance(target))
        torch.testing.assert_close(lse.double(), due_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [0, 1, 3, 8, 31, 32, 40, 64, 128, 136, 256, 257, 1000])
def test_every_number_of_columns(target: Target, columns: int):
    outs, lses = parts_and_lses(target, 3, rows=(2, 5), columns=columns)
    due, due_lse = exact_merge(outs, lses)
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out.double(), due, **tolerance(target))
    torch.testing.assert_close(lse.double(), due_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "rows", [(), (5,), (3, 5), (2, 3, 5), (2, 2, 3, 5), (1, 2, 2, 3, 5), (0, 4)]
)
def test_every_number_of_dimensions(target: Target, rows: tuple[int, ...]):
    outs, lses = parts_and_lses(target, 3, rows=rows, columns=7)
    due, due_lse = exact_merge(outs, lses)
    for form in ((outs, lses), (outs.unbind(), lses.unbind())):
        out, lse = merge(*form)
        assert (out.shape, lse.shape) == ((*rows, 7), rows)
        torch.testing.assert_close(out.double(), due, **tolerance(target))
        torch.testing.assert_close(lse.double(), due_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)], ids=str)
def test_parts_of_different_strides(target: Target, order: tuple[int, ...]):
    outs, lses = parts_and_lses(target, 4, rows=(2, 3, 5), columns=8)
    due, due_lse = merge(outs, lses)
    back = [order.index(dim) for dim in range(4)]
    parts = [
        outs[0].permute(order).contiguous().permute(back),
        outs[1].repeat_interleave(2, 3)[..., ::2],
        outs[2].transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([outs[3], outs[3]], 2)[:, :, 1],
    ]
    strided = [lses[0], lses[1].mT.contiguous().mT, lses[2].repeat_interleave(3, 2)[..., ::3]]
    out, lse = merge(parts, [*strided, lses[3].transpose(0, 2).contiguous().transpose(0, 2)])
    assert_bitwise_equal(out, due)
    assert_bitwise_equal(lse, due_lse)
    assert out.stride(3) == 1
    if order[3] == 3:
        assert out.stride() == parts[0].stride()


def test_broadcast_parts(target: Target):
    outs, lses = parts_and_lses(target, 2, rows=(1, 1, 5), columns=8)
    due, due_lse = merge(outs, lses)
    out, lse = merge([o.expand(2, 3, 5, 8) for o in outs], [x.expand(2, 3, 5) for x in lses])
    assert_bitwise_equal(out, due.expand(2, 3, 5, 8))
    assert_bitwise_equal(lse, due_lse.expand(2, 3, 5))
    assert out.is_contiguous()


def test_visible_nan_reaches_its_own_row_alone(target: Target):
    outs, lses = parts_and_lses(target, 3, rows=(4, 5), columns=16)
    due, due_lse = merge(outs, lses)
    outs[1, 2, 3, 9] = math.nan
    out, lse = merge(outs, lses)
    assert out[2, 3, 9].isnan()
    assert out.isnan().sum() == 1
    assert_bitwise_equal(lse, due_lse)
    out[2, 3, 9] = due[2, 3, 9]
    assert_bitwise_equal(out, due)


def test_result_does_not_depend_on_threads_or_batch(target: Target):
    outs, lses = parts_and_lses(target, 3, rows=(7, 3, 129), columns=40)
    due, due_lse = merge(outs, lses)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        out, lse = merge(outs, lses)
    finally:
        torch.set_num_threads(threads)
    assert_bitwise_equal(out, due)
    assert_bitwise_equal(lse, due_lse)
    one, one_lse = merge(outs[:, 5:6], lses[:, 5:6])
    assert_bitwise_equal(one, due[5:6])
    assert_bitwise_equal(one_lse, due_lse[5:6])


def test_mixed_precision_sums_in_the_wider_type():
    outs, lses = normal((2, 3, 5), (2, 3), dtype=torch.float64)
    out, lse = merge(outs.float(), lses)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float64)
    due, due_lse = merge(outs.float().double(), lses)
    assert_bitwise_equal(out, due.float())
    assert_bitwise_equal(lse, due_lse)


def test_dtypes_are_promoted():
    outs, lses = normal((2, 3, 5), (2, 3), dtype=torch.float16)
    out, lse = merge(outs, lses)
    assert (out.dtype, lse.dtype) == (torch.float16, torch.float32)
    out, lse = merge([outs[0], outs[1].float()], lses.bfloat16())
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert_bitwise_equal(out, merge(outs.float(), lses.bfloat16().float())[0])
    out, lse = merge([outs[0].double(), outs[1]], lses)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
    assert_bitwise_equal(out, merge(outs.double(), lses.double())[0])


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
        (torch.ones(2, 3), torch.ones(3), ValueError, "outs must have the shape of lses"),
        (torch.ones(()), torch.ones(()), ValueError, "outs must hold at least one part"),
        ([torch.ones(2, 3, device="meta")], [torch.ones(2)], ValueError, "device of type .*cpu"),
        (
            [torch.ones(2, 3)],
            [torch.ones(2, device="meta")],
            ValueError,
            r"on one device, but outs\[0\] is on cpu and lses\[0\] is on meta",
        ),
    ],
)
def test_errors(outs, lses, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        merge(outs, lses)


ONE, ROW = torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2)


@pytest.mark.parametrize(
    ("outs", "lses", "text"),
    [
        ([ONE], [], "outs and lses must hold one tensor for each part"),
        ([ONE], [ROW, ROW], "but hold 1 and 2"),
        ([ONE[0]], [ROW], "4 dimensions"),
        ([ONE.int()], [ROW], "must be float16, bfloat16, float32 or float64"),
        ([ONE, ONE.half()], [ROW, ROW], r"outs\[1\] has the wrong dtype"),
        ([ONE, ONE], [ROW, ROW.double()], r"lses\[1\] has the wrong dtype"),
        ([ONE, ONE[..., :2]], [ROW, ROW], r"outs\[1\] must have the shape \(1, 1, 2, 3\)"),
        ([ONE], [ROW[0]], r"lses\[0\] must have the shape \(1, 1, 2\)"),
    ],
)
def test_operator_refuses_in_a_sentence(outs, lses, text: str):
    with pytest.raises(ValueError, match=text):
        torch.ops.online_attention.merge(outs, lses)
    with pytest.raises(ValueError, match=text):
        torch.ops.online_attention.merge_backward(None, None, outs, lses, True, True)
