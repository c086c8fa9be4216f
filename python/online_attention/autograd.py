# SPDX-License-Identifier: BSD-3-Clause
"""The derivatives of attention as torch's autograd sees them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from . import operators

Gradients = tuple[Tensor | None, ...]


class _Attention(Function):
    """Attention in eager mode and in compiled graphs: reverse mode."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        alignment: int,
        left: int,
        right: int,
        deterministic: bool | None,
    ) -> tuple[Tensor, Tensor]:
        out, lse = operators.forward(
            q, k, v, scale, alignment, left, right, deterministic is True
        )
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, alignment, left, right
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Any:  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        if dout is None:
            dout = out.new_zeros(out.shape[3]).expand(out.shape)
        deterministic = ctx.deterministic
        if deterministic is None:
            deterministic = torch.are_deterministic_algorithms_enabled()
        needs = ctx.needs_input_grad[:3]
        dq, dk, dv = operators.backward(
            dout, dlse, q, k, v, out, lse, *ctx.settings, deterministic, *needs
        )
        return (
            dq if needs[0] else None,
            dk if needs[1] else None,
            dv if needs[2] else None,
            *(None,) * 5,
        )


def is_active(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether some derivative of the result may be asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return forward_ad._current_level >= 0


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    alignment: int,
    left: int,
    right: int,
    deterministic: bool | None,
) -> tuple[Tensor, Tensor]:
    """The operator `forward`, differentiable."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError("forward mode is not built yet.")
    result: tuple[Tensor, Tensor] = _Attention.apply(
        q, k, v, scale, alignment, left, right, deterministic
    )
    return result
