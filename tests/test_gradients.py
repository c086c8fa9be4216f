# SPDX-License-Identifier: BSD-3-Clause
"""First derivatives, for every row of the support table."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cases
from cases import Case, Inputs, normal
from gradients import (
    Cotangents,
    Gradients,
    assert_right,
    attend,
    check_case,
    cotangents_of,
    differentiate,
)
from online_attention import attention, scaled_dot_product_attention
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from rows import Target
from test_forward import problems
from test_strides import LAYOUTS, OTHER_KERNEL
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")
HEAD_DIM_CASES = [
    *[Case(f"d{d}", 33, 65, D=d, mask=CAUSAL) for d in cases.HEAD_DIMS],
    *[Case(f"d{d}-dv{d_v}", 33, 65, D=d, D_v=d_v) for d, d_v in cases.UNEQUAL_HEAD_DIMS],
]
# As many queries as kernels with wide tiles ask for.
LONGER_HEAD_DIM_CASES = [
    Case(f"d{d}-dv{d_v}-{name}", 130, 193, H=2, H_kv=1, D=d, D_v=d_v, mask=mask)
    for d, d_v in [(192, 128), (192, 192), (256, 256), (136, 40), (72, 248)]
    for name, mask in [("full", FULL), ("causal", CAUSAL)]
]
GROUPED = Case("grouped", 37, 67, B=2, H=6, H_kv=3, mask=CAUSAL)


def assert_same(a: Gradients, b: Gradients) -> None:
    for name, x, y in zip(Gradients._fields, a, b, strict=True):
        assert_bitwise_equal(x, y, name)


# --- values


@pytest.mark.small
@pytest.mark.cases(cases.SMALL)
def test_small(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(cases.FULL_CASES)
def test_full(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(HEAD_DIM_CASES)
def test_head_dims(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(LONGER_HEAD_DIM_CASES)
def test_head_dims_of_longer_heads(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(cases.SMALL_SPLIT)
def test_few_queries_and_many_keys(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.small
@pytest.mark.parametrize("which", ["out", "lse"])
@pytest.mark.cases([GROUPED, Case("full", 33, 31), Case("more-queries", 70, 7, mask=CAUSAL)])
def test_loss_on_one_output(target: Target, case: Case, which: str):
    check_case(target, case, which)


@settings(max_examples=15)
@given(data=st.data())
def test_any_problem(target: Target, data: st.DataObject):
    case, seed = data.draw(problems(target))
    check_case(target, dataclasses.replace(case, B=1), seed=seed)


@pytest.mark.parametrize("score", [-1e4, 1e4])
def test_scores_far_from_zero(target: Target, score: float):
    """Every score of a row is about -10000 or 10000, and so is its lse."""
    q, k, v = Case("far", 9, 33).inputs(target.dtype, target.device, target.head_dim)
    if target.head_dim > 1:
        q[..., -1], k[..., -1] = 8, score / 8
    else:
        q, k = torch.full_like(q, 8), torch.full_like(k, score / 8)
    inputs = Inputs(q, k, v)
    cotangents = cotangents_of(inputs)
    ours = differentiate(inputs, cotangents, scale=1.0)
    assert all(x.isfinite().all() for x in ours)
    assert_right(ours, inputs, cotangents, scale=1.0)


@pytest.mark.parametrize("is_causal", [False, True])
def test_drop_in_has_the_gradients_of_torchs_function(target: Target, is_causal: bool):
    inputs = Case("any", 17, 23, H=4, H_kv=2).inputs(target.dtype, target.device, target.head_dim)
    leaves = [x.requires_grad_() for x in inputs]
    dout = cotangents_of(inputs).dout
    out = scaled_dot_product_attention(*leaves, is_causal=is_causal, enable_gqa=True)
    ours = Gradients(*torch.autograd.grad(out, leaves, dout))
    mask = CAUSAL_TOP_LEFT if is_causal else FULL
    assert_right(ours, Inputs(*(x.detach() for x in inputs)), Cotangents(dout, None), mask)


def test_broadcast_inputs_of_the_drop_in_get_summed_gradients(target: Target):
    if target.dtype != torch.float64:
        pytest.skip("one dtype shows it")
    q, k = normal((2, 3, 5, target.head_dim), (7, target.head_dim), dtype=target.dtype)
    q, k = (x.to(target.device).requires_grad_() for x in (q, k))
    ours = torch.autograd.grad(scaled_dot_product_attention(q, k, k).square().sum(), (q, k))
    theirs = torch.nn.functional.scaled_dot_product_attention(q, k, k).square().sum()
    torch.testing.assert_close(ours, torch.autograd.grad(theirs, (q, k)))


@pytest.mark.cuda
@pytest.mark.targets(device="cuda")
def test_cuda_agrees_with_the_cpu(target: Target):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    on_cpu = differentiate(
        Inputs(*(x.cpu() for x in inputs)), Cotangents(*(x.cpu() for x in cotangents)), CAUSAL
    )
    tolerance = (8 if inputs.q.element_size() < 4 else 64) * torch.finfo(target.dtype).eps
    for x, y in zip(differentiate(inputs, cotangents, CAUSAL), on_cpu, strict=True):
        atol = tolerance * float(y.abs().max())
        torch.testing.assert_close(x.cpu(), y, rtol=tolerance, atol=atol)


# --- what is asked for


@pytest.mark.small
@pytest.mark.parametrize("asks", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1)], ids=str)
def test_gradients_only_for_inputs_that_ask(target: Target, asks: tuple[int, ...]):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    due = differentiate(inputs, cotangents, CAUSAL, deterministic=True)
    leaves = [x.clone().requires_grad_(bool(ask)) for x, ask in zip(inputs, asks, strict=True)]
    torch.autograd.backward(attend(*leaves, CAUSAL, None, True), cotangents)
    for leaf, ask, name, x in zip(leaves, asks, Gradients._fields, due, strict=True):
        assert (leaf.grad is not None) == bool(ask)
        if ask:
            assert_bitwise_equal(leaf.grad, x, name)


def test_nothing_is_recorded_where_nothing_asks(target: Target):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    assert attention(*inputs).grad_fn is None
    leaves = [x.requires_grad_() for x in inputs]
    with torch.no_grad():
        assert attention(*leaves).grad_fn is None
    assert attention(*leaves).grad_fn is not None


def test_gradients_have_the_form_of_their_inputs(target: Target):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    for x, gradient in zip(inputs, differentiate(inputs, cotangents_of(inputs)), strict=True):
        assert (gradient.shape, gradient.dtype, gradient.device) == (x.shape, x.dtype, x.device)


# --- empty rows and hidden values


@pytest.mark.parametrize("sizes", [(70, 7), (4, 0), (0, 5)], ids=str)
def test_rows_that_see_no_key_have_gradient_zero(target: Target, sizes: tuple[int, int]):
    inputs = Case("empty", *sizes).inputs(target.dtype, target.device, target.head_dim)
    dq, dk, dv = differentiate(inputs, cotangents_of(inputs), CAUSAL)
    seen = CAUSAL.visible(*sizes).to(target.device)
    assert not dq[:, :, ~seen.any(1)].any()
    assert not dk[:, :, ~seen.any(0)].any()
    assert not dv[:, :, ~seen.any(0)].any()


MASKS = {
    "causal": CAUSAL,
    "causal-top-left": CAUSAL_TOP_LEFT,
    "window": Mask(left=20, right=3),
    "window-of-one": Mask(left=0, right=0),
}
POISONED = {"q": ("q", 33), "k": ("k", 38), "v": ("v", 38), "dout": ("dout", 33)}


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize(("name", "index"), POISONED.values(), ids=POISONED)
def test_poison_reaches_exactly_who_sees_it(
    target: Target, mask: Mask, name: str, index: int, poison: float
):
    """A row of q or dout, or a key or value: all others keep every bit."""
    inputs = Case("poison", 66, 70).inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs, which="both")
    due = differentiate(inputs, cotangents, mask, deterministic=True)
    place = {**inputs._asdict(), **cotangents._asdict()}[name]
    place[:, :, index] = poison
    dq, dk, dv = differentiate(inputs, cotangents, mask, deterministic=True)
    visible = mask.visible(66, 70).to(target.device)
    bad_rows = torch.zeros(66, dtype=torch.bool, device=target.device)
    if name in ("q", "dout"):
        bad_rows[index] = True
    else:
        bad_rows = visible[:, index].clone()
    bad_keys = visible[bad_rows].any(0)
    assert_bitwise_equal(dq[:, :, ~bad_rows], due.dq[:, :, ~bad_rows], "dq")
    assert_bitwise_equal(dk[:, :, ~bad_keys], due.dk[:, :, ~bad_keys], "dk")
    if name == "v":  # no gradient of its own depends on it
        assert_bitwise_equal(dv, due.dv, "dv")
    else:
        assert_bitwise_equal(dv[:, :, ~bad_keys], due.dv[:, :, ~bad_keys], "dv")
    if math.isnan(poison):
        assert dq[:, :, bad_rows].isnan().all()
        assert dk[:, :, bad_keys].isnan().all()
        assert name == "v" or dv[:, :, bad_keys].isnan().all()


@pytest.mark.small
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_keys_that_nobody_sees_may_hold_anything(target: Target, poison: float):
    inputs = Case("hidden", 9, 70, H=4, H_kv=2).inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    due = differentiate(inputs, cotangents, CAUSAL_TOP_LEFT, deterministic=True)
    inputs.k[:, :, 9:], inputs.v[:, :, 9:] = poison, poison
    ours = differentiate(inputs, cotangents, CAUSAL_TOP_LEFT, deterministic=True)
    assert_same(ours, due)
    assert not ours.dk[:, :, 9:].any()
    assert not ours.dv[:, :, 9:].any()


def inside_nan(x: Tensor) -> Tensor:
    """A copy of `x` narrowed out of a buffer that is NaN before, after and between its parts."""
    B, H, S, D = x.shape
    room = torch.full((B + 2, H + 1, S + 130, D + 24), math.nan, dtype=x.dtype, device=x.device)
    view = room.narrow(0, 1, B).narrow(1, 0, H).narrow(2, 0, S).narrow(3, 0, D)
    view.copy_(x)
    return view


@pytest.mark.small
@pytest.mark.parametrize("sizes", [(1, 1), (15, 67), (64, 64), (65, 130)], ids=str)
def test_memory_behind_odd_lengths_is_never_used(target: Target, sizes: tuple[int, int]):
    inputs = Case("odd", *sizes).inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    due = differentiate(inputs, cotangents, CAUSAL, deterministic=True)
    padded = Inputs(*(inside_nan(x) for x in inputs))
    dout = Cotangents(inside_nan(cotangents.dout), cotangents.dlse)
    assert_same(differentiate(padded, dout, CAUSAL, deterministic=True), due)


# --- memory layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["inputs", "dout"])
def test_layout_changes_no_bit(target: Target, layout: str, which: str):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    due = differentiate(inputs, cotangents, CAUSAL, deterministic=True)
    if which == "inputs":
        inputs = Inputs(*(LAYOUTS[layout](x) for x in inputs))
    else:
        cotangents = Cotangents(LAYOUTS[layout](cotangents.dout), cotangents.dlse)
    ours = differentiate(inputs, cotangents, CAUSAL, deterministic=True)
    if target.row in OTHER_KERNEL:
        assert_right(ours, inputs, cotangents, CAUSAL)
    else:
        assert_same(ours, due)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3)], ids=str)
def test_gradients_keep_the_memory_order_of_their_inputs(target: Target, order: tuple[int, ...]):
    inverse = [order.index(dim) for dim in range(4)]
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    inputs = Inputs(*(x.permute(order).contiguous().permute(inverse) for x in inputs))
    for gradient in differentiate(inputs, cotangents_of(inputs), CAUSAL):
        assert gradient.permute(order).is_contiguous()


def test_expanded_cotangents_are_their_copies(target: Target):
    """`out.sum().backward()` hands in one number for all elements."""
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    dout, dlse = cotangents_of(inputs)
    one, two = (dout[:1, :1, :1, :1] * 0 + 1).expand_as(dout), dlse[:1, :1, :1].expand_as(dlse)
    due = differentiate(inputs, Cotangents(one.contiguous(), two.contiguous()), CAUSAL, None, True)
    assert_same(differentiate(inputs, Cotangents(one, two), CAUSAL, None, True), due)
    leaves = [x.requires_grad_() for x in inputs]
    attention(*leaves, causal=True, deterministic=True).sum().backward()
    only_out = differentiate(inputs, Cotangents(one, None), CAUSAL, None, True)
    assert_same(Gradients(*(x.grad for x in leaves)), only_out)


def test_one_tensor_as_query_key_and_value(target: Target):
    (x,) = normal((2, 3, 9, target.head_dim), dtype=target.dtype, device=target.device)
    dq, dk, dv = differentiate(Inputs(x, x, x), Cotangents(x, None), CAUSAL)
    leaf = x.clone().requires_grad_()
    attention(leaf, leaf, leaf, causal=True).backward(x)
    torch.testing.assert_close(leaf.grad, dq + dk + dv)


# --- the same bits


@pytest.mark.cases([GROUPED, Case("long", 129, 300, H=4, H_kv=1)])
def test_runs_are_bitwise_equal(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    choices = (None, False, True) if target.device == "cpu" else (True,)
    for deterministic in choices:
        first = differentiate(inputs, cotangents, case.mask, None, deterministic)
        for _ in range(3):
            assert_same(differentiate(inputs, cotangents, case.mask, None, deterministic), first)


@pytest.mark.usefixtures("deterministic_mode")
def test_deterministic_mode_of_torch_is_followed(target: Target):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    due = differentiate(inputs, cotangents, CAUSAL, None, True)
    assert_same(differentiate(inputs, cotangents, CAUSAL), due)


def test_deterministic_mode_may_begin_after_the_forward_pass(target: Target):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for _ in range(2):
        outputs = attention(*leaves, causal=True, return_lse=True)
        torch.use_deterministic_algorithms(True)
        try:
            results.append(Gradients(*torch.autograd.grad(outputs, leaves, cotangents)))
        finally:
            torch.use_deterministic_algorithms(False)
    assert_same(*results)


def test_gradients_do_not_depend_on_the_batch(target: Target):
    case = Case("batch", 67, 130, B=3, H=4, H_kv=2, mask=CAUSAL)
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    whole = differentiate(inputs, cotangents, CAUSAL, deterministic=True)
    for b in range(case.B):
        part = Inputs(*(x[b : b + 1] for x in inputs))
        dout, dlse = (x[b : b + 1] for x in cotangents)
        alone = differentiate(part, Cotangents(dout, dlse), CAUSAL, deterministic=True)
        assert_same(alone, Gradients(*(x[b : b + 1] for x in whole)))


@pytest.mark.targets(device="cpu")
def test_number_of_threads_changes_no_bit(target: Target):
    inputs = GROUPED.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(differentiate(inputs, cotangents, CAUSAL))
    for result in results[1:]:
        assert_same(result, results[0])
