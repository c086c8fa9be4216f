# SPDX-License-Identifier: BSD-3-Clause
"""Memory layouts: the values decide the result, the strides never; outputs follow the query."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attend import assert_right, attend
from cases import Case, Inputs
from layouts import LAYOUTS, between_nan, permuted
from oracle import CAUSAL, Attention
from rows import Target
from tolerance import assert_bitwise_equal

CASE = Case("strided", 37, 67, B=2, H=6, H_kv=3, mask=CAUSAL)
# What the copy engine cannot address the Hopper kernel leaves to one that rounds otherwise, and
# heads that are broadcast it does not pack.
OTHER_KERNEL = {"cuda.hopper.wgmma"}


def assert_same_attention(target: Target, ours: Attention, inputs: Inputs, due: Attention) -> None:
    """Bit for bit, where another layout takes no other kernel."""
    if target.row in OTHER_KERNEL:
        assert_right(ours, inputs, CAUSAL)
        return
    assert_bitwise_equal(ours.out, due.out)
    assert_bitwise_equal(ours.lse, due.lse, "lse")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["q", "k", "v", "all"])
def test_layout_of_an_input_changes_no_bit(target: Target, layout: str, which: str):
    inputs = CASE.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, CAUSAL)
    names = ("q", "k", "v")
    moved = [
        LAYOUTS[layout](x) if which in (name, "all") else x
        for name, x in zip(names, inputs, strict=True)
    ]
    assert_same_attention(target, attend(*moved, CAUSAL), inputs, due)


@given(layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3), seed=st.integers(0, 99))
def test_any_mix_of_layouts_changes_no_bit(target: Target, layouts: tuple[str, ...], seed: int):
    inputs = Case("mix", 5, 9, B=2, H=4, H_kv=2).inputs(
        target.dtype, target.device, target.head_dim, seed
    )
    due = attend(*inputs)
    ours = attend(*(LAYOUTS[layout](x) for layout, x in zip(layouts, inputs, strict=True)))
    assert_bitwise_equal(ours.out, due.out)
    assert_bitwise_equal(ours.lse, due.lse, "lse")


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_expanded_input_is_its_copy(target: Target, dim: int, which: int):
    inputs = list(CASE.inputs(target.dtype, target.device, target.head_dim))
    inputs[which] = inputs[which].narrow(dim, 0, 1).expand_as(inputs[which])
    assert 0 in inputs[which].stride()
    ours = attend(*inputs, CAUSAL)
    due = attend(*(x.contiguous() for x in inputs), CAUSAL)
    assert_same_attention(target, ours, Inputs(*inputs), due)


@pytest.mark.parametrize("order", ["bs3hd", "b3hsd", "bshd3"])
def test_slices_of_packed_qkv(target: Target, order: str):
    B, H, S, D = 2, 3, 33, target.head_dim
    sizes = {"b": B, "s": S, "h": H, "d": D, "3": 3}
    packed = torch.randn([sizes[letter] for letter in order]).to(target.dtype).to(target.device)
    q, k, v = packed.permute([order.index(letter) for letter in "3bhsd"]).unbind(0)
    ours = attend(q, k, v, CAUSAL)
    due = attend(q.contiguous(), k.contiguous(), v.contiguous(), CAUSAL)
    assert_bitwise_equal(ours.out, due.out)


def test_chunks_of_one_projection(target: Target):
    """(B, S, 3 H D) cut in three along its last dimension, heads folded out after."""
    B, H, S, D = 2, 3, 33, target.head_dim
    projection = torch.randn(B, S, 3 * H * D).to(target.dtype).to(target.device)
    q, k, v = (x.view(B, S, H, D).transpose(1, 2) for x in projection.chunk(3, dim=-1))
    ours = attend(q, k, v, CAUSAL)
    due = attend(q.contiguous(), k.contiguous(), v.contiguous(), CAUSAL)
    assert_bitwise_equal(ours.out, due.out)


@pytest.mark.parametrize("stride", [0, 1, 7, 10**12])
def test_stride_of_a_dimension_of_size_one_is_never_used(target: Target, stride: int):
    D = target.head_dim
    x = torch.randn(D).to(target.dtype).to(target.device)
    odd = x.as_strided((1, 1, 1, D), (stride, stride, stride, 1))
    due = attend(*[x.view(1, 1, 1, D)] * 3)
    ours = attend(odd, odd, odd)
    assert_bitwise_equal(ours.out, due.out)


# --- where the outputs lie


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (1, 2, 0, 3), (2, 1, 0, 3)]
)
@pytest.mark.parametrize("d_v", [-1, 0, 2])
def test_output_keeps_the_memory_order_of_the_query(
    target: Target, order: tuple[int, ...], d_v: int
):
    if not target.takes(target.head_dim, target.head_dim + d_v):
        d_v = 0
    case = Case("order", 5, 7, D_v=target.head_dim + d_v, B=2, H=3)
    q, k, v = case.inputs(target.dtype, target.device, target.head_dim)
    ours = attend(permuted(order)(q), k, v)
    assert ours.out.permute(order).is_contiguous()
    assert ours.lse.is_contiguous()


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_output_of_an_expanded_query_is_dense(target: Target, dim: int):
    q, k, v = Case("dense", 5, 7, B=2, H=3).inputs(target.dtype, target.device, target.head_dim)
    out = attend(q.narrow(dim, 0, 1).expand_as(q), k, v).out
    assert out.is_contiguous()


def test_output_of_a_query_with_gaps_is_dense(target: Target):
    q, k, v = Case("gaps", 5, 7, B=2, H=3).inputs(target.dtype, target.device, target.head_dim)
    out = attend(between_nan(q.transpose(1, 2)).transpose(1, 2), k, v).out
    assert out.transpose(1, 2).is_contiguous()
