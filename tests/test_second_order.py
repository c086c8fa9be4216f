# SPDX-License-Identifier: BSD-3-Clause
"""Second derivatives and forward mode: by differences, against torch, in parts, with poison."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import oracle
from cases import Case, Inputs, normal
from gradients import attend, cotangents_of
from online_attention import attention, blocks
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from rows import Target

pytestmark = pytest.mark.usefixtures("one_thread")
FP64 = {"dtypes": (torch.float64,)}
MASKS = [FULL, CAUSAL, CAUSAL_TOP_LEFT, Mask(left=2, right=1), Mask("top_left", left=0, right=0)]


def finite(results: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """An lse of -inf has no difference quotient."""
    out, lse = results
    return out, lse.masked_fill(lse == -math.inf, 0)


@st.composite
def small_problems(draw) -> Case:
    group, H_kv = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    S_kv = draw(st.integers(0, 6))
    # Without a key, one column gives a tensor a stride of 0, which gradcheck does not take.
    narrowest = 1 if S_kv else 2
    D, D_v = draw(st.integers(narrowest, 4)), draw(st.integers(narrowest, 4))
    return Case("drawn", draw(st.integers(1, 5)), S_kv, D, D_v, 1,
                H_kv * group, H_kv, draw(st.sampled_from(MASKS)),
                draw(st.one_of(st.none(), st.floats(-1.5, 1.5))))  # fmt: skip


@pytest.mark.targets(**FP64)
@settings(max_examples=15)
@given(case=small_problems(), seed=st.integers(0, 99))
def test_gradcheck(target: Target, case: Case, seed: int):
    if not target.takes_case(case):
        return
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64, target.device, 1, seed)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return finite(attend(q, k, v, case.mask, case.scale))

    assert gradcheck(function, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize("which", ["out", "lse"])
@pytest.mark.parametrize("mask", [FULL, CAUSAL], ids=["full", "causal"])
def test_gradcheck_of_one_output_in_every_element(target: Target, which: str, mask: Mask):
    """The slow mode, batched gradients too, in which another output is not there."""
    case = Case("grouped", 3, 4, 2, 2, 1, 2, 1)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64, target.device, 2)]

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return getattr(attend(q, k, v, mask), which)

    if which == "lse":
        leaves[2].requires_grad_(False)
    assert gradcheck(function, leaves, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(function, leaves, check_fwd_over_rev=True)


# --- against torch's autograd over the plain formula


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> tuple[Tensor, ...]:
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    hidden = ~mask.visible(q.shape[2], k.shape[2]).to(q.device)
    scores = q @ k.mT * oracle.default_scale(q, scale)
    scores = scores.masked_fill(hidden & ~hidden.all(-1, keepdim=True), -math.inf)
    lse = torch.logsumexp(scores, -1)
    return torch.softmax(scores, -1).masked_fill(hidden, 0) @ v, lse


def seconds(function, inputs: Inputs, mask: Mask, scale: float | None) -> list[Tensor]:
    """Gradients of a number made of the gradients, to the inputs and to both cotangents."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    cotangents = [x.requires_grad_() for x in cotangents_of(inputs)]
    directions = normal(*(tuple(x.shape) for x in inputs), dtype=torch.float64, seed=9)
    results = function(*leaves, mask, scale)
    first = torch.autograd.grad(results, leaves, cotangents, create_graph=True)
    number = sum((g * d.to(g)).sum() for g, d in zip(first, directions, strict=True))
    return list(torch.autograd.grad(number, [*leaves, *cotangents]))


CASES = [
    Case("grouped", 17, 23, 5, 3, B=2, H=6, H_kv=2, mask=CAUSAL),
    Case("window", 19, 23, 4, mask=Mask(left=5, right=2), scale=0.7),
    Case("top-left", 9, 21, 3, mask=CAUSAL_TOP_LEFT, scale=-0.4),
    Case("full", 7, 31, 8),
]


@pytest.mark.cases(CASES)
def test_second_derivatives_are_those_of_the_formula(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    due = seconds(plain, Inputs(*(x.double() for x in inputs)), case.mask, case.scale)
    ours = seconds(attend, inputs, case.mask, case.scale)
    eps = torch.finfo(target.dtype).eps
    for mine, x in zip(ours, due, strict=True):
        # The drawn cotangents are rounded to the dtype, and so are the results.
        torch.testing.assert_close(mine.double(), x, rtol=16 * eps,
                                   atol=16 * eps * float(x.abs().max()))  # fmt: skip


@pytest.mark.cases(CASES)
def test_tangents_are_those_of_the_formula(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    directions = case.inputs(target.dtype, target.device, target.head_dim, seed=3)

    def jvp(function, *which: Inputs) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda *x: tuple(function(*x, case.mask, case.scale)), *which)[1]

    ours = jvp(attend, tuple(inputs), tuple(directions))
    due = jvp(plain, tuple(x.double() for x in inputs), tuple(x.double() for x in directions))
    eps = torch.finfo(target.dtype).eps
    for mine, x in zip(ours, due, strict=True):
        torch.testing.assert_close(mine.double(), x, rtol=16 * eps,
                                   atol=16 * eps * float(x.abs().max()))  # fmt: skip


@pytest.mark.targets(dtypes=(torch.float64,))
@pytest.mark.parametrize("block_bytes", [1, 800, 2500])
@pytest.mark.cases(CASES)
def test_blocks_change_nothing(
    target: Target, case: Case, block_bytes: int, monkeypatch: pytest.MonkeyPatch
):
    """Rows and batch elements in parts are what keeps memory linear."""
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    due = seconds(attend, inputs, case.mask, case.scale)
    monkeypatch.setitem(blocks.BLOCK_BYTES, target.device, block_bytes)
    parts = list(blocks.blocks(blocks.Inputs(*inputs), blocks.Settings(None, 1, -1, -1)))
    assert len(parts) > 1
    covered = torch.zeros(inputs.q.shape[0], inputs.q.shape[2])
    for part in parts:
        covered[part.batch, part.rows] += 1
    assert (covered == 1).all()
    torch.testing.assert_close(seconds(attend, inputs, case.mask, case.scale), due)


@pytest.mark.cuda
@pytest.mark.targets(device="cuda", dtypes=(torch.float16, torch.float32))
def test_memory_is_linear_in_the_lengths(target: Target):
    """All scores of this problem would take 4 GiB, in one of several tensors of that size."""
    inputs = Case("long", 16384, 16384, H=4).inputs(target.dtype, target.device, target.head_dim)
    leaves = [x.requires_grad_() for x in inputs]
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    first = torch.autograd.grad(attention(*leaves).sum(), leaves, create_graph=True)
    torch.autograd.grad(sum(x.sum() for x in first), leaves)
    torch.func.jvp(lambda q: attention(q, *inputs[1:]), (inputs.q,), (inputs.q,))
    assert torch.cuda.max_memory_allocated() - before < 1 << 31


# --- hidden values, empty rows, sizes of 0


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("mask", [CAUSAL, Mask(left=3, right=1)], ids=["causal", "window"])
@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
def test_poison_stays_with_who_sees_it(target: Target, mask: Mask, name: str, poison: float):
    inputs = Case("poison", 12, 14, H=4, H_kv=2).inputs(
        target.dtype, target.device, target.head_dim
    )

    def run(poisoned: bool) -> list[Tensor]:
        leaves = [x.clone() for x in inputs]
        dout, dlse = cotangents_of(inputs)
        if poisoned:
            dict(zip(["q", "k", "v", "dout"], [*leaves, dout], strict=True))[name][:, :, 6] = poison
        leaves = [x.requires_grad_() for x in leaves]
        dout.requires_grad_()
        results = attend(*leaves, mask)
        first = torch.autograd.grad(results, leaves, (dout, dlse), create_graph=True)
        directions = [torch.ones_like(x) for x in first]
        return list(torch.autograd.grad(first, [*leaves, dout], directions))

    visible = mask.visible(12, 14).to(target.device)
    bad_rows = torch.arange(12, device=target.device) == 6
    if name in ("k", "v"):
        bad_rows = visible[:, 6]
    bad_keys = visible[bad_rows].any(0)
    due, ours = run(False), run(True)
    for x, y, bad in zip(ours, due, (bad_rows, bad_keys, bad_keys, bad_rows), strict=True):
        torch.testing.assert_close(x[:, :, ~bad], y[:, :, ~bad])
    if math.isnan(poison):
        assert ours[0][:, :, bad_rows].isnan().all()
        assert ours[1][:, :, bad_keys].isnan().all()
        assert name == "v" or ours[2][:, :, bad_keys].isnan().all()
        assert name == "dout" or ours[3][:, :, bad_rows].isnan().all()


@pytest.mark.parametrize("sizes", [(9, 4), (3, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("B", [0, 2])
def test_empty_rows_and_sizes(target: Target, sizes: tuple[int, int], B: int):
    inputs = Case("empty", *sizes, B=B).inputs(target.dtype, target.device, target.head_dim)
    seen = CAUSAL.visible(*sizes).any(1).to(target.device)
    gq, gk, gv, gdout, gdlse = seconds(attend, inputs, CAUSAL, None)
    for x in (gq, gdout, gdlse):
        assert not x[:, :, ~seen].any()
    assert all(x.isfinite().all() for x in (gq, gk, gv, gdout, gdlse))
    _, tangents = torch.func.jvp(lambda *x: tuple(attend(*x, CAUSAL)), tuple(inputs), tuple(inputs))
    assert not tangents[0][:, :, ~seen].any()
    assert not tangents[1][:, :, ~seen].any()


@pytest.mark.targets(dtypes=(torch.float16,))
def test_autocast_does_not_round_the_composed_products(target: Target):
    x = torch.randn(1, 2, 9, target.head_dim, device=target.device).half().float()
    due = torch.func.jvp(lambda q: attention(q, x, x), (x,), (x,))[1]
    with torch.autocast(target.device, dtype=torch.float16):
        ours = torch.func.jvp(lambda q: attention(q, x, x), (x,), (x,))[1]
    torch.testing.assert_close(ours, due.half(), rtol=2e-3, atol=2e-3)


# --- where derivatives end

X = torch.randn(1, 2, 3, 4, dtype=torch.float64)
THIRD = "the third derivative of attention is not built"


def test_third_derivative_is_refused():
    x = X.clone().requires_grad_()
    (first,) = torch.autograd.grad(attention(x, X, X).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=THIRD):
        second.sum().backward()


def test_third_derivative_of_torch_func_is_refused():
    def loss(q: Tensor) -> Tensor:
        return attention(q, X, X).square().sum()

    with pytest.raises(NotImplementedError, match=THIRD):
        torch.func.jacrev(torch.func.hessian(loss))(X)
    with pytest.raises(NotImplementedError, match=THIRD):
        torch.func.jvp(torch.func.grad(torch.func.grad(loss_of_gradient(loss))), (X,), (X,))


def loss_of_gradient(loss):
    return lambda q: torch.func.grad(loss)(q).sum()


def test_forward_mode_over_forward_mode_is_refused():
    with pytest.raises(NotImplementedError, match="use reverse mode for one of the two"):
        torch.func.jacfwd(torch.func.jacfwd(lambda q: attention(q, X, X).sum()))(X)


# --- dual numbers


@pytest.mark.targets(**FP64)
def test_dual_numbers(target: Target):
    q, k, v = Case("dual", 5, 7, H=4, H_kv=2).inputs(target.dtype, target.device, target.head_dim)
    due, tangent = torch.func.jvp(lambda q: attention(q, k, v, causal=True), (q,), (q.cos(),))
    with forward_ad.dual_level():
        ours = attention(forward_ad.make_dual(q, q.cos()), k, v, causal=True)
        primal, ours = forward_ad.unpack_dual(ours)
        torch.testing.assert_close(ours, tangent)
        torch.testing.assert_close(primal, due)
        assert forward_ad.unpack_dual(attention(q, k, v)).tangent is None


@pytest.mark.targets(**FP64)
def test_forward_mode_over_reverse_mode_without_torch_func(target: Target):
    (x,) = normal((1, 2, 5, target.head_dim), dtype=target.dtype, device=target.device)
    x.requires_grad_()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x.detach().cos())
        loss = attention(dual, x, x).square().sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        ours = forward_ad.unpack_dual(gradient).tangent
    x = x.detach()

    def gradients(q: Tensor) -> Tensor:
        grad = torch.func.grad(lambda *qkv: attention(*qkv).square().sum(), (0, 1, 2))
        return sum(grad(q, x, x))

    torch.testing.assert_close(ours, torch.func.jvp(gradients, (x,), (x.cos(),))[1])
