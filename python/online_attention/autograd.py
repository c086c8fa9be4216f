# SPDX-License-Identifier: BSD-3-Clause
"""The derivatives of attention, as torch's autograd and torch.func ask for them.

Reverse mode runs the operator `backward`. What differentiates once more, and forward mode, runs
composed in torch operations (`second_order`). A third derivative is refused.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler's imports Dynamo at once
from torch.autograd import Function, forward_ad

from . import operators
from .operators import folded, unfolded
from .second_order import Settings, Tangent, second_order, tangents

Optional = Tensor | None


def is_active(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether a derivative of the result may be asked for."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    return forward_ad._current_level >= 0 or _transforms_are_on()


def _transforms_are_on() -> bool:
    """Whether a transform of torch.func is on.

    Which of its levels a tensor belongs to is seen by Functions alone, not by `requires_grad`.
    """
    return torch._C._are_functorch_transforms_active()


# As torch.compiler.assume_constant_result does, which would import Dynamo: seconds.
_transforms_are_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    """The operator `forward`, differentiable; `deterministic` None follows torch's mode."""
    arguments = (q, k, v, scale, alignment, left, right, deterministic)
    result: tuple[Tensor, Tensor]
    if forward_ad._current_level >= 0 or _transforms_are_on():
        if torch.compiler.is_dynamo_compiling():
            # Without fullgraph=True torch.compile runs the call eagerly instead.
            raise NotImplementedError(
                "torch.compile cannot trace attention inside torch.func or forward mode: compile "
                "without fullgraph=True."
            )
        if torch.compiler.is_exporting() and _is_only_mapped():
            # An exported graph holds operators, which have a rule of their own.
            result = operators.forward(*arguments[:-1], deterministic is True)
        else:
            result = _apply(_TransformedAttention, *arguments)
    elif torch.compiler.is_dynamo_compiling():
        result = _Attention.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        result = _apply_eagerly(*arguments)
    return result


def _is_only_mapped() -> bool:
    vmap = torch._C._functorch.TransformType.Vmap
    levels = torch._C._functorch.get_interpreter_stack() or []
    return forward_ad._current_level < 0 and all(level.key() == vmap for level in levels)


@_disable_dynamo  # Dynamo would lose the levels of the tensors
def _apply(function: Any, *arguments: Any) -> Any:
    """`Function.apply`, which has no types."""
    return function.apply(*arguments)


def _first_order(
    dout: Optional,
    dlse: Optional,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    settings: Settings,
    deterministic: bool | None,
    needs: tuple[bool, ...],
) -> tuple[Optional, ...]:
    """dq, dk and dv, each if it is needed; differentiable where that may be asked for."""
    if (dout is None and dlse is None) or not any(needs):
        return None, None, None
    dout = _or_zeros(dout, out)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (dout, dlse, q, k, v, out, lse, *settings, deterministic, *needs)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or _transforms_are_on():
        result: tuple[Optional, ...] = _apply(_Backward, *arguments)
        return result
    return _asked(operators.backward(*arguments), needs)


def _or_zeros(dout: Optional, out: Tensor) -> Tensor:
    """The gradient of out; where there is none, zeros that take the memory of one row."""
    return out.new_zeros(out.shape[3:]).expand(out.shape) if dout is None else dout


def _sum(a: Optional, b: Optional) -> Optional:
    if a is None or b is None:
        return b if a is None else a
    return a + b


def _asked(gradients: tuple[Tensor, ...], needs: tuple[bool, ...]) -> tuple[Optional, ...]:
    dq, dk, dv = gradients
    return dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None


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
        ctx.settings = scale, alignment, left, right
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        dq, dk, dv = _first_order(
            dout, dlse, q, k, v, out, lse, ctx.settings, ctx.deterministic, needs
        )
        return dq, dk, dv, None, None, None, None, None


# What `Function.apply` calls where no transform is on. The rest of it, Python code for tensors of
# torch.func, would be a fifth of the host time of a call.
_apply_eagerly: Any = super(Function, _Attention).apply


@_disable_dynamo
def _mapped(
    function: type[Function], info: Any, in_dims: tuple[int | None, ...], arguments: tuple[Any, ...]
) -> tuple[tuple[Optional, ...], tuple[int | None, ...]]:
    """The rule of torch.vmap: the mapped dimension becomes a part of the batch."""
    operands = (
        folded(x, dim, info.batch_size) if isinstance(x, Tensor) else x
        for x, dim in zip(arguments, in_dims, strict=True)
    )
    results = _apply(function, *operands)
    return (
        tuple(None if x is None else unfolded(x, info.batch_size) for x in results),
        tuple(None if x is None else 0 for x in results),
    )


class _TransformedAttention(Function):
    """Attention under torch.func and in forward mode.

    Apart from `_Attention`, because a `setup_context` costs host time in every call, and Dynamo
    takes no Function with a `jvp`.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        *operands, deterministic = arguments
        result: tuple[Tensor, Tensor] = operators.forward(*operands, deterministic is True)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *settings, deterministic = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.save_for_forward(q, k, v, *output)
        ctx.settings = tuple(settings)
        ctx.deterministic = deterministic
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        return _Attention.backward(ctx, dout, dlse)

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> tuple[Tensor, Tensor]:
        q, k, v, out, lse = ctx.saved_tensors
        result: tuple[Tensor, Tensor] = _apply(
            _Tangents, q, k, v, out, lse, *moved[:3], *ctx.settings, ctx.deterministic
        )
        return result

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _mapped(_TransformedAttention, info, in_dims, arguments)


class _Backward(Function):
    """The gradients of attention where they are differentiated themselves.

    `out` and `lse` count as functions of q, k and v: all derivatives flow through these.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        return _asked(operators.backward(*arguments), arguments[-3:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Optional, ...]) -> None:
        ctx.save_for_backward(*inputs[:7])
        ctx.save_for_forward(*inputs[:7])
        ctx.settings = inputs[7:11]
        ctx.others = inputs[11:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
        if all(x is None for x in cotangents):
            return (None,) * 15
        dout, dlse, q, k, v, _, _ = ctx.saved_tensors
        gq, gk, gv, gdout, gdlse = _apply(
            _SecondOrder, dout, dlse, q, k, v, *cotangents, *ctx.settings
        )
        return gdout, None if dlse is None else gdlse, gq, gk, gv, *(None,) * 10

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> tuple[Optional, ...]:
        dout, dlse, q, k, v, out, lse = ctx.saved_tensors
        # The Hessian is symmetric: forward mode over the gradient is reverse mode over it.
        second: tuple[Optional, ...] = (None, None, None)
        if any(x is not None for x in moved[2:5]):
            second = _apply(_SecondOrder, dout, dlse, q, k, v, *moved[2:5], *ctx.settings)
        deterministic, *needs = ctx.others
        first = _first_order(
            moved[0], moved[1], q, k, v, out, lse, ctx.settings, deterministic, tuple(needs)
        )
        pairs = zip(second[:3], first, needs, strict=True)
        return tuple(_sum(a, b) if needed else None for a, b, needed in pairs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _mapped(_Backward, info, in_dims, arguments)


class _Tangents(Function):
    """Forward mode: (q, k, v, out, lse, tangents of q, k and v, ...) to tangents of out and lse."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        q, k, v, _, _, *moved = arguments[:8]
        return tangents(q, k, v, Tangent(*moved), Settings(*arguments[8:12]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:8])
        ctx.settings = inputs[8:12]
        ctx.deterministic = inputs[12]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        """<dout, out'> + <dlse, lse'> is what reverse mode differentiates: (E37)-(E39) again."""
        if dout is None and dlse is None:
            return (None,) * 13
        q, k, v, out, lse, *moved = ctx.saved_tensors
        dout = _or_zeros(dout, out)
        gq, gk, gv, _, _ = _apply(_SecondOrder, dout, dlse, q, k, v, *moved, *ctx.settings)
        asked = tuple(ctx.needs_input_grad[5:8])
        of_moved = _first_order(
            dout, dlse, q, k, v, out, lse, ctx.settings, ctx.deterministic, asked
        )
        return gq, gk, gv, None, None, *of_moved, *(None,) * 5

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> NoReturn:
        raise NotImplementedError(
            "forward mode over forward mode is not built for attention: use reverse mode for one "
            "of the two derivatives, as torch.func.hessian does."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _mapped(_Tangents, info, in_dims, arguments)


class _SecondOrder(Function):
    """The gradients of (E37)-(E39), which end here."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        dout, dlse, q, k, v = arguments[:5]
        tangent, settings = Tangent(*arguments[5:8]), Settings(*arguments[8:])
        return second_order(dout, dlse, q, k, v, tangent, settings)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *cotangents: Optional) -> NoReturn:
        refuse_third()

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> NoReturn:
        refuse_third()

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return _mapped(_SecondOrder, info, in_dims, arguments)


def refuse_third() -> NoReturn:
    """Say where derivatives end."""
    raise NotImplementedError(
        "the third derivative of attention is not built: out and lse can be differentiated twice "
        "with respect to q, k and v."
    )
