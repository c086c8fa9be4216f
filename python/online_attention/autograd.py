# SPDX-License-Identifier: BSD-3-Clause
"""Attention as torch's autograd and torch.func see it; its derivatives are in `derivatives`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler's imports Dynamo at once
from torch.autograd import Function, forward_ad

from . import operators
from .derivatives import apply, first_order, forward_mode, mapped_rule, transforms_are_on

Optional = Tensor | None


def is_active(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a derivative of the result may be asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return forward_ad._current_level >= 0 or transforms_are_on()


def needs_gradient(bias: Optional) -> bool:
    """Whether the gradient of a bias may be asked for."""
    return bias is not None and bias.requires_grad and torch.is_grad_enabled()


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    alignment: int,
    left: int,
    right: int,
    deterministic: bool | None,
    *modifiers: Any,
) -> tuple[Tensor, Tensor]:
    """The operator `forward`, differentiable; `deterministic` None follows torch's mode.

    The modifiers are all of bias, rng and dropout_p, or none.
    """
    result: tuple[Tensor, Tensor]
    if forward_ad._current_level >= 0 or transforms_are_on():
        if torch.compiler.is_dynamo_compiling():
            # Without fullgraph=True torch.compile runs the call eagerly instead.
            raise NotImplementedError(
                "torch.compile cannot trace attention inside torch.func or forward mode: compile "
                "without fullgraph=True."
            )
        settings = (scale, alignment, left, right)
        if torch.compiler.is_exporting() and _is_only_mapped():
            # An exported graph holds operators, which have a rule of their own.
            result = operators.forward(q, k, v, *settings, deterministic is True, *modifiers)
        else:
            bias, rng, dropout_p = modifiers or (None, None, 0.0)
            result = apply(
                _TransformedAttention, q, k, v, bias, rng, *settings, dropout_p, deterministic
            )
    elif torch.compiler.is_dynamo_compiling():
        # Dynamo traces no Function that is given the same tensor twice.
        v = v.view_as(v) if v is q or v is k else v
        k = k.view_as(k) if k is q else k
        function: Any = _ModifiedAttention if modifiers else _Attention
        result = function.apply(q, k, v, scale, alignment, left, right, deterministic, *modifiers)
    elif modifiers:
        result = _apply_eagerly_modified(
            q, k, v, scale, alignment, left, right, deterministic, *modifiers
        )
    else:
        result = _apply_eagerly(q, k, v, scale, alignment, left, right, deterministic)
    return result


def _is_only_mapped() -> bool:
    vmap = torch._C._functorch.TransformType.Vmap
    levels = torch._C._functorch.get_interpreter_stack() or []
    return forward_ad._current_level < 0 and all(level.key() == vmap for level in levels)


class _Attention(Function):
    """Attention in reverse mode: the route of training, eager and compiled."""

    @staticmethod
    def forward(
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
        out, lse = operators.forward(q, k, v, scale, alignment, left, right, deterministic is True)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = scale, alignment, left, right, 0.0
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        inputs, needs = (q, k, v, None, None), (*ctx.needs_input_grad[:3], False)
        dq, dk, dv, _ = first_order(
            dout, dlse, inputs, (out, lse), ctx.settings, ctx.deterministic, needs
        )
        return dq, dk, dv, None, None, None, None, None


class _ModifiedAttention(Function):
    """The same with a bias or dropout, whose arguments would cost other calls host time."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None,
        alignment: int,
        left: int,
        right: int,
        deterministic: bool | None,
        bias: Optional,
        rng: Optional,
        dropout_p: float,
    ) -> tuple[Tensor, Tensor]:
        settings = (scale, alignment, left, right)
        out, lse = operators.forward(
            q, k, v, *settings, deterministic is True, bias, rng, dropout_p
        )
        ctx.save_for_backward(q, k, v, bias, rng, out, lse)
        ctx.settings = *settings, dropout_p
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        q, k, v, bias, rng, out, lse = ctx.saved_tensors
        inputs = (q, k, v, bias, rng)
        needs = (*ctx.needs_input_grad[:3], ctx.needs_input_grad[8])
        dq, dk, dv, dbias = first_order(
            dout, dlse, inputs, (out, lse), ctx.settings, ctx.deterministic, needs
        )
        return dq, dk, dv, None, None, None, None, None, dbias, None, None


# What `Function.apply` calls where no transform is on. The rest of it, Python code for tensors of
# torch.func, would be a fifth of the host time of a call.
_apply_eagerly: Any = super(Function, _Attention).apply
_apply_eagerly_modified: Any = super(Function, _ModifiedAttention).apply


class _TransformedAttention(Function):
    """Attention under torch.func and in forward mode.

    Apart from `_Attention`, because a `setup_context` costs host time in every call, and Dynamo
    takes no Function with a `jvp`.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, bias, rng, *settings, dropout_p, deterministic = arguments
        result: tuple[Tensor, Tensor] = operators.forward(
            q, k, v, *settings, deterministic is True, bias, rng, dropout_p
        )
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:5], *output)
        ctx.save_for_forward(*inputs[:5], *output)
        ctx.settings, ctx.deterministic = inputs[5:10], inputs[10]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        *inputs, out, lse = ctx.saved_tensors
        gradients = first_order(
            dout,
            dlse,
            tuple(inputs),
            (out, lse),
            ctx.settings,
            ctx.deterministic,
            ctx.needs_input_grad[:4],
        )
        return *gradients, *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> tuple[Tensor, Tensor]:
        return forward_mode(*ctx.saved_tensors, *moved[:4], *ctx.settings, ctx.deterministic)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return mapped_rule(_TransformedAttention, info, in_dims, arguments, bias_at=3)
