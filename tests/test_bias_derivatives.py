# SPDX-License-Identifier: BSD-3-Clause
"""All derivatives with a bias: by differences, against the formula, mapped, and where they end."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jvp, vmap

from cases import Case, normal
from online_attention import attention
from rows import Target
from test_bias_gradient import FP64, formula, loss

pytestmark = pytest.mark.usefixtures("one_thread")

DIFFERENTIATED = [((2, 4, 3, 4), 0.0), ((1, 4, 3, 4), 0.4), ((2, 1, 1, 4), 0.0), ((3, 1), 0.4)]


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize(("shape", "dropout_p"), DIFFERENTIATED, ids=str)
def test_gradcheck(target: Target, shape: tuple[int, ...], dropout_p: float):
    if not target.takes(3, 2):
        pytest.skip("an earlier row takes this head dim")
    inputs = Case("any", 3, 4, 3, 2, B=2, H=4, H_kv=2).inputs(target.dtype, target.device, 3)
    (bias,) = normal(shape, dtype=target.dtype, device=target.device, seed=3)
    leaves = [x.requires_grad_() for x in (*inputs, bias)]
    hidden = bias.detach() > 0.8
    fixed = [~hidden, bias.detach().masked_fill(hidden, -math.inf)]

    def results(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        out, lse = attention(q, k, v, bias=bias, causal=True, dropout_p=dropout_p, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert gradcheck(results, leaves, check_forward_ad=True, fast_mode=True)
    assert gradgradcheck(results, leaves, check_fwd_over_rev=True, fast_mode=True)
    for constant in fixed:

        def of_inputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor = constant) -> tuple:
            return results(q, k, v, bias)

        assert gradcheck(of_inputs, leaves[:3], check_forward_ad=True, fast_mode=True)
        assert gradgradcheck(of_inputs, leaves[:3], check_fwd_over_rev=True, fast_mode=True)


def loss_by_formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    if bias.dtype == torch.bool:
        bias = torch.zeros((), dtype=q.dtype, device=q.device).masked_fill(~bias, -math.inf)
    out, lse = formula(q, k, v, bias)
    return out.square().sum() + lse.sin().sum()


ALL = (0, 1, 2, 3)


@pytest.mark.targets(**FP64)
def test_derivatives_of_torch_func(target: Target):
    if not target.takes(2, 2):
        pytest.skip("an earlier row takes this head dim")
    inputs = Case("any", 3, 4, 2, 2, H=2, H_kv=1).inputs(target.dtype, target.device, 2)
    (bias,) = normal((2, 1, 4), dtype=target.dtype, device=target.device, seed=4)
    x = (*inputs, bias)
    torch.testing.assert_close(hessian(loss, ALL)(*x), hessian(loss_by_formula, ALL)(*x))
    moved = tuple(y.sin() for y in x)
    for transform in (lambda f: f, lambda f: grad(f, ALL)):
        ours, due = jvp(transform(loss), x, moved), jvp(transform(loss_by_formula), x, moved)
        torch.testing.assert_close(ours, due)


MAPPED = [
    ((5, 2, 3, 4, 6), 0),
    ((2, 5, 1, 1, 6), 1),  # a copy would be needed to fold it
    ((1, 3, 4, 6), None),
    ((2, 3, 4, 6), None),
    ((5, 6), 0),
]


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize(("shape", "dim"), MAPPED, ids=str)
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_vmap(target: Target, shape: tuple[int, ...], dim: int | None, kind: str):
    D = target.head_dim
    q, k, v, bias = normal((5, 2, 3, 4, D), (2, 3, 6, D), (2, 3, 6, D), shape,
                           dtype=target.dtype, device=target.device)  # fmt: skip
    if kind == "boolean":
        bias = bias < 1
    dims, which = (0, None, None, dim), ALL[:3] if kind == "boolean" else ALL
    for transform in (lambda f: f, lambda f: grad(f, which)):
        ours = vmap(transform(loss), dims)(q, k, v, bias)
        torch.testing.assert_close(ours, vmap(transform(loss_by_formula), dims)(q, k, v, bias))

    def of_sum(f) -> tuple[Tensor, ...]:
        return grad(lambda *x: vmap(f, dims)(*x).sum(), which)(q, k, v, bias)

    torch.testing.assert_close(of_sum(loss), of_sum(loss_by_formula))


def test_third_derivative_is_refused():
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    bias = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    out = attention(x, x, x, bias=bias).square().sum()
    (first,) = torch.autograd.grad(out, bias, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), bias, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice with respect to q, k, v and bias"):
        second.sum().backward()
