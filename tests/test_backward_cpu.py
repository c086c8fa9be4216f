# SPDX-License-Identifier: BSD-3-Clause
"""The gradients of the CPU kernels: what the operator itself promises, for each instruction set.

Its checks run by each instruction set: see instruction_sets.py.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from instruction_sets import for_each_set, run
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from tolerance import assert_bitwise_equal

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("dq", "dk", "dv")
NAN = math.nan


class Sizes(NamedTuple):
    S_q: int
    S_kv: int
    D: int = 32
    D_v: int = 32
    B: int = 1
    H: int = 2
    H_kv: int = 2


# Around the tiles (96 rows, 192 keys), their blocks (12 rows, 32 keys), and below all of them.
PROBLEMS = (
    (Sizes(97, 193, 40, 24), FULL),
    (Sizes(200, 401, 64, 64, 2, 2, 1), CAUSAL),
    (Sizes(109, 77, 16, 48), CAUSAL),  # rows that see no key
    (Sizes(77, 209, 33, 15), CAUSAL_TOP_LEFT),  # keys that no row sees
    (Sizes(150, 230, 24, 24, 1, 3, 1), Mask(left=40, right=9)),
    (Sizes(13, 260, 80, 3, 1, 6, 2), Mask("top_left", left=2, right=100)),  # sets of two heads
    (Sizes(3, 70, 7, 9, 2, 4, 1), CAUSAL),
    (Sizes(100, 9, 20, 20), FULL),
)


class Call(NamedTuple):
    """Inputs of the backward pass, from which `gradients` takes out and lse."""

    dout: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Mask = FULL
    dlse: Tensor | None = None


def call_of(sizes: Sizes, mask: Mask, dtype: torch.dtype, spread: float = 1.0) -> Call:
    generator = torch.Generator().manual_seed(7)
    S_q, S_kv, D, D_v, B, H, H_kv = sizes
    shapes = (B, H, S_q, D_v), (B, H, S_q, D), (B, H_kv, S_kv, D), (B, H_kv, S_kv, D_v)
    dout, q, k, v = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    lse_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    dlse = torch.randn(B, H, S_q, generator=generator).to(lse_dtype)
    return Call(dout, q * spread, k, v, mask, dlse)


def gradients(
    call: Call, needs: tuple[bool, bool, bool] = (True, True, True), scale: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    dout, q, k, v, mask, dlse = call
    attention = torch.ops.online_attention
    out, lse = attention.forward(q, k, v, scale, *mask.op_arguments, False)
    return attention.backward(
        dout, dlse, q, k, v, out, lse, scale, *mask.op_arguments, False, *needs
    )


def by_autograd(call: Call, dtype: torch.dtype, scale: float | None = None) -> tuple[Tensor, ...]:
    """Softmax attention in torch's own operators, differentiated by torch, all in `dtype`."""
    dout, q, k, v, mask, dlse = call
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    wide_k, wide_v = (x.repeat_interleave(group, dim=1) for x in leaves[1:])
    visible = mask.visible(q.shape[2], k.shape[2])
    some = visible.any(dim=-1, keepdim=True)
    scores = leaves[0] @ wide_k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    scores = scores.masked_fill(~visible, -math.inf).masked_fill(~some, 0)
    out = torch.softmax(scores, dim=-1) * some @ wide_v
    loss = (out * dout.to(dtype)).sum()
    if dlse is not None:
        lse = torch.logsumexp(scores if dtype == torch.float64 else scores.float(), dim=-1)
        loss = loss + (lse * dlse * some[:, 0]).sum()
    return torch.autograd.grad(loss, leaves)


def norm(x: Tensor) -> float:
    return float(x.double().norm())


def assert_right(call: Call, scale: float | None = None, *, one_key: bool = False) -> None:
    """At most twice the error of torch's own arithmetic, in the norm of each gradient.

    Where a single key outweighs all others, dS is a difference of equal numbers, which PyTorch may
    compute as exactly 0: there dq and dk may have the rounding errors of what cancels.
    """
    dtype = call.q.dtype
    ours = gradients(call, scale=scale)
    exact = by_autograd(call, torch.float64, scale)
    plain = by_autograd(call, dtype, scale)
    # fp64 has itself for an oracle. A sum of few terms may be exact by luck.
    floor = (64 if dtype == torch.float64 else 4) * torch.finfo(dtype).eps
    dp = norm(call.dout) * largest_row(call.v) / math.sqrt(call.q.shape[-1])
    cancels = (dp * largest_row(call.k), dp * largest_row(call.q), 0) if one_key else (0, 0, 0)
    for name, a, e, p, c in zip(NAMES, ours, exact, plain, cancels, strict=True):
        assert a.dtype == dtype
        assert a.shape == e.shape
        assert bool(a.isfinite().all()), f"{name} is not finite"
        error, bound = norm(a - e), 2 * norm(p - e) + floor * (norm(e) + c) + 1e-300
        assert error <= bound, f"{name}, {dtype}: error {error:.3g} is over {bound:.3g}"


def largest_row(x: Tensor) -> float:
    return float(x.double().norm(dim=-1).max())


def check_accuracy() -> None:
    for (sizes, mask), dtype in itertools.product(PROBLEMS, DTYPES):
        assert_right(call_of(sizes, mask, dtype))
    for dtype in DTYPES:
        assert_right(call_of(Sizes(1, 1, 1, 1), FULL, dtype), one_key=True)


def check_scales() -> None:
    for dtype, scale in itertools.product(DTYPES, (-0.3, 0.0, 1e-60, 2.5)):
        assert_right(call_of(Sizes(50, 60), CAUSAL, dtype), scale)


def check_huge_scores() -> None:
    """Up to 1e8 and beyond, where the lse alone says nothing about P."""
    for spread, dtype in itertools.product((1e2, 1e4, 1e8, 1e30), (torch.float32, torch.bfloat16)):
        assert_right(call_of(Sizes(70, 250), CAUSAL, dtype, spread), one_key=True)
    assert_right(call_of(Sizes(3, 12), CAUSAL, torch.float32, 1e8), one_key=True)
    # 14 rows in all: forward multiplies them where keys lie, backward packs the keys.
    for sizes in (Sizes(7, 90, 40, H_kv=1), Sizes(7, 90, 135, H_kv=1)):
        assert_right(call_of(sizes, CAUSAL, torch.float32, 1e8), one_key=True)
    # Many equal scores: each weighs 1/n, though the lse cannot tell. (Nor can the oracle's.)
    call = call_of(Sizes(40, 300), FULL, torch.float32)._replace(dlse=None)
    for score in (1e4, -1e4, 1e8, -1e8, 1e30):
        k = torch.ones_like(call.k)
        q = torch.full_like(call.q, score / 8)
        ours, exact = (f(call._replace(q=q, k=k)) for f in (gradients, in_double))
        for name, a, e in zip(NAMES[1:], ours[1:], exact[1:], strict=True):
            assert norm(a - e) <= 1e-5 * norm(e), f"{name} for scores of {score:g}"


def in_double(call: Call) -> tuple[Tensor, ...]:
    return by_autograd(call, torch.float64)


def check_poison() -> None:
    """A poisoned key, or row, changes exactly the gradients of what sees it."""
    masks = CAUSAL, Mask(left=20, right=3), Mask("top_left", left=0, right=0)
    for dtype, mask, index in itertools.product(DTYPES, masks, (0, 31, 63)):
        call = call_of(Sizes(66, 70, H_kv=1), mask, dtype)
        clean = gradients(call)
        visible = mask.visible(66, 70)
        rows_see, seen = visible[:, index], visible[index]
        for poison in (NAN, math.inf):
            for field in ("k", "v"):
                x = getattr(call, field).clone()
                x[:, :, index] = poison
                dq, dk, dv = gradients(call._replace(**{field: x}))
                assert_equal(dq[:, :, ~rows_see], clean[0][:, :, ~rows_see], f"dq, {field}")
                untouched = ~visible[rows_see].any(dim=0)
                untouched[index] = bool(~rows_see.any())
                assert_equal(dk[:, :, untouched], clean[1][:, :, untouched], f"dk, {field}")
                assert_equal(dv[:, :, untouched], clean[2][:, :, untouched], f"dv, {field}")
                if field == "v":  # P is as before
                    assert_equal(dv, clean[2], "dv, v")
                assert bool(rows_see.any()) == bool((~dq.isfinite()).any())
            for field in ("q", "dout"):
                x = getattr(call, field).clone()
                x[:, 0, index] = poison
                dq, dk, dv = gradients(call._replace(**{field: x}))
                others = torch.arange(66) != index
                assert_equal(dq[:, 0, others], clean[0][:, 0, others], f"dq, {field}")
                assert_equal(dq[:, 1], clean[0][:, 1], f"dq, {field}")
                assert_equal(dk[:, :, ~seen], clean[1][:, :, ~seen], f"dk, {field}")
                assert_equal(dv[:, :, ~seen], clean[2][:, :, ~seen], f"dv, {field}")
                assert bool((~dk[:, :, seen].isfinite()).any(dim=-1).all()), f"dk, {field}"


def assert_equal(a: Tensor, b: Tensor, what: str) -> None:
    assert torch.equal(a, b), what


def check_needs() -> None:
    """A gradient is the same, bit by bit, whatever else is asked for."""
    for dtype in DTYPES:
        call = call_of(Sizes(130, 210, H_kv=1), CAUSAL, dtype)
        every = gradients(call)
        for needs in itertools.product((False, True), repeat=3):
            for need, some, all_ in zip(needs, gradients(call, needs), every, strict=True):
                assert_equal(some, all_ if need else all_.new_empty(0), f"{needs}")


def check_heads_together_and_alone() -> None:
    """No bit changes where heads are so many that a task takes more keys of each."""
    heads = 4 * (os.cpu_count() or 1)
    for dtype, S_kv in itertools.product(DTYPES, (33, 64, 100, 192)):
        for mask in (FULL, CAUSAL, Mask(left=9, right=-1)):
            call = call_of(Sizes(70, S_kv, 17, 16, 1, heads, heads), mask, dtype)
            call.k[:, :, S_kv - 20] = math.inf  # enters dq by itself, and not every row's
            together = gradients(call)
            for h in (0, heads - 1):
                alone = Call(*(x if isinstance(x, Mask) else x[:, h : h + 1] for x in call))
                for name, a, b in zip(NAMES, gradients(alone), together, strict=True):
                    assert_bitwise_equal(a, b[:, h : h + 1], f"{name}, {dtype}, {S_kv} keys")


CHECKS = (
    check_accuracy,
    check_scales,
    check_huge_scores,
    check_poison,
    check_needs,
    check_heads_together_and_alone,
)
test_widest_instruction_set, test_instruction_set = for_each_set(__file__, CHECKS)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", [FULL, CAUSAL, Mask(left=100, right=50)])
def test_number_of_threads_and_batch_change_no_bit(mask: Mask, dtype: torch.dtype) -> None:
    call = call_of(Sizes(300, 1000, B=2, H=2, H_kv=1), mask, dtype)
    torch.set_num_threads(1)
    due = gradients(call)
    for threads in (2, 3, 7, 7, 7):
        torch.set_num_threads(threads)
        for name, a, b in zip(NAMES, gradients(call), due, strict=True):
            assert_equal(a, b, f"{name} with {threads} threads")
    alone = Call(*(x if isinstance(x, Mask) or x is None else x[1:] for x in call))
    for name, a, b in zip(NAMES, gradients(alone), due, strict=True):
        assert_equal(a, b[1:], f"{name} of one batch element")


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    """(B, S, H, D) memory, rows with gaps, one key for a whole batch: read in place."""
    call = call_of(Sizes(50, 210, 40, 24, 2, 4, 2), CAUSAL, dtype)
    due = gradients(call)
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in call[:4]]
    padded = [torch.nn.functional.pad(x, (0, 5, 2, 3), value=NAN)[..., 2:-3, :-5] for x in call[:4]]
    for tensors in (transposed, padded):
        ours = gradients(call._replace(**dict(zip(Call._fields, tensors, strict=False))))
        for name, a, b, x in zip(NAMES, ours, due, tensors[1:], strict=True):
            assert_equal(a, b, name)
            if tensors is transposed:
                assert a.stride() == x.stride()
    expanded = call._replace(k=call.k[:1].expand_as(call.k))
    copied = call._replace(k=call.k[:1].repeat(2, 1, 1, 1))
    for name, a, b in zip(NAMES, gradients(expanded), gradients(copied), strict=True):
        assert_equal(a, b, name)


if __name__ == "__main__":
    run(CHECKS)
