# SPDX-License-Identifier: BSD-3-Clause
"""Derivatives of attention as Functions that may be differentiated and mapped themselves.

Reverse mode runs the operator `backward`. What differentiates once more, and forward mode, runs
composed in torch operations (`second_order`). A third derivative is refused.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler's imports Dynamo at once
from torch.autograd import Function, forward_ad

from . import operators
from .bias_gradient import bias_gradient
from .blocks import Inputs, Settings
from .second_order import Tangent, second_order, tangents

Optional = Tensor | None


def transforms_are_on() -> bool:
    """Whether a transform of torch.func is on.

    Which of its levels a tensor belongs to is seen by Functions alone, not by `requires_grad`.
    """
    return torch._C._are_functorch_transforms_active()


# As torch.compiler.assume_constant_result does, which would import Dynamo: seconds.
transforms_are_on._dynamo_marked_constant = True  # type: ignore[attr-defined]


@_disable_dynamo  # Dynamo would lose the levels of the tensors
def apply(function: Any, *arguments: Any) -> Any:
    """`Function.apply`, which has no types."""
    return function.apply(*arguments)


def first_order(
    dout: Optional,
    dlse: Optional,
    inputs: tuple[Optional, ...],
    results: tuple[Tensor, Tensor],
    settings: tuple[Any, ...],
    deterministic: bool | None,
    needs: tuple[bool, ...],
) -> tuple[Optional, ...]:
    """dq, dk, dv and dbias, each if it is needed; differentiable where that may be asked for."""
    if (dout is None and dlse is None) or not any(needs):
        return None, None, None, None
    dout = _or_zeros(dout, results[0])
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0 or transforms_are_on():
        result: tuple[Optional, ...] = apply(
            _Backward, dout, dlse, *inputs, *results, *settings, deterministic, *needs
        )
        return result
    return _gradients(dout, dlse, inputs, results, settings, deterministic, needs)


def _gradients(
    dout: Tensor,
    dlse: Optional,
    inputs: tuple[Optional, ...],
    results: tuple[Tensor, ...],
    settings: tuple[Any, ...],
    deterministic: bool,
    needs: tuple[bool, ...],
) -> tuple[Optional, ...]:
    """What `first_order` returns, differentiable no more; written for little host time."""
    q, k, v, bias, rng = inputs
    out, lse = results
    scale, alignment, left, right, dropout_p = settings
    needs_dq, needs_dk, needs_dv, needs_dbias = needs
    dq = dk = dv = dbias = None
    if needs_dq or needs_dk or needs_dv:
        # Arguments that the operator has defaults for are left out.
        modifiers = () if bias is None and rng is None else (bias, rng, dropout_p)
        dq, dk, dv = operators.backward(
            dout,
            dlse,
            q,
            k,
            v,
            out,
            lse,
            scale,
            alignment,
            left,
            right,
            deterministic,
            needs_dq,
            needs_dk,
            needs_dv,
            *modifiers,
        )
    if needs_dbias:
        dbias = bias_gradient(dout, dlse, q, k, v, bias, rng, *settings)
    return (
        dq if needs_dq else None,
        dk if needs_dk else None,
        dv if needs_dv else None,
        dbias,
    )


def _or_zeros(dout: Optional, out: Tensor) -> Tensor:
    """The gradient of out; where there is none, zeros that take the memory of one row."""
    return out.new_zeros(out.shape[3:]).expand(out.shape) if dout is None else dout


def _sum(a: Optional, b: Optional) -> Optional:
    if a is None or b is None:
        return b if a is None else a
    return a + b


@_disable_dynamo
def mapped_rule(
    function: type[Function],
    info: Any,
    in_dims: tuple[int | None, ...],
    arguments: tuple[Any, ...],
    bias_at: int,
    apart: bool = False,
) -> tuple[tuple[Optional, ...], tuple[int | None, ...]]:
    """The rule of torch.vmap, `apart` where the bias has a gradient or a tangent in each sample."""
    call = partial(apply, function)
    return operators.mapped(call, info.batch_size, in_dims, arguments, bias_at, apart)


class _Backward(Function):
    """The gradients of attention where they are differentiated themselves.

    (dout, dlse, q, k, v, bias, rng, out, lse, settings, deterministic, which four are needed).
    `out` and `lse` count as functions of the inputs: all derivatives flow through these.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        dout, dlse = arguments[:2]
        inputs, results, settings = arguments[2:7], arguments[7:9], arguments[9:14]
        return _gradients(dout, dlse, inputs, results, settings, arguments[14], arguments[15:])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Optional, ...]) -> None:
        ctx.save_for_backward(*inputs[:9])
        ctx.save_for_forward(*inputs[:9])
        ctx.settings = inputs[9:14]
        ctx.others = inputs[14:]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, *cotangents: Optional) -> tuple[Optional, ...]:
        if all(x is None for x in cotangents):
            return (None,) * 19
        dout, dlse, *inputs, _, _ = ctx.saved_tensors
        *gradients, gdout, gdlse = apply(
            _SecondOrder, dout, dlse, *inputs, *cotangents, *ctx.settings, ctx.needs_input_grad[5]
        )
        return gdout, None if dlse is None else gdlse, *gradients, *(None,) * 12

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> tuple[Optional, ...]:
        dout, dlse, *inputs, out, lse = ctx.saved_tensors
        deterministic, *needs = ctx.others
        # The Hessian is symmetric: forward mode over the gradient is reverse mode over it.
        second: tuple[Optional, ...] = (None, None, None, None)
        if any(x is not None for x in moved[2:6]):
            second = apply(_SecondOrder, dout, dlse, *inputs, *moved[2:6], *ctx.settings, needs[3])
        first = first_order(
            moved[0],
            moved[1],
            tuple(inputs),
            (out, lse),
            ctx.settings,
            deterministic,
            tuple(needs),
        )
        pairs = zip(second[:4], first, needs, strict=True)
        return tuple(_sum(a, b) if needed else None for a, b, needed in pairs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        return mapped_rule(_Backward, info, in_dims, arguments, bias_at=5, apart=arguments[-1])


def forward_mode(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The tangents of out and lse from what `_Tangents` takes."""
    result: tuple[Tensor, Tensor] = apply(_Tangents, *arguments)
    return result


class _Tangents(Function):
    """Forward mode: to the tangents of out and lse.

    (q, k, v, bias, rng, out, lse, tangents of q, k, v and bias, settings, deterministic)
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        return tangents(
            Inputs(*arguments[:5]), Tangent(*arguments[7:11]), Settings(*arguments[11:16])
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs[:11])
        ctx.settings, ctx.deterministic = inputs[11:16], inputs[16]
        ctx.set_materialize_grads(False)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dout: Optional, dlse: Optional) -> tuple[Optional, ...]:
        """<dout, out'> + <dlse, lse'> is what reverse mode differentiates: (E37)-(E39) again."""
        if dout is None and dlse is None:
            return (None,) * 17
        q, k, v, bias, rng, out, lse, *moved = ctx.saved_tensors
        inputs = q, k, v, bias, rng
        dout = _or_zeros(dout, out)
        *gradients, _, _ = apply(
            _SecondOrder, dout, dlse, *inputs, *moved, *ctx.settings, ctx.needs_input_grad[3]
        )
        asked = tuple(ctx.needs_input_grad[7:11])
        of_moved = first_order(
            dout, dlse, inputs, (out, lse), ctx.settings, ctx.deterministic, asked
        )
        return *gradients, None, None, *of_moved, *(None,) * 6

    @staticmethod
    def jvp(ctx: Any, *moved: Any) -> NoReturn:
        raise NotImplementedError(
            "forward mode over forward mode is not built for attention: use reverse mode for one "
            "of the two derivatives, as torch.func.hessian does."
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        apart = arguments[10] is not None
        return mapped_rule(_Tangents, info, in_dims, arguments, bias_at=3, apart=apart)


class _SecondOrder(Function):
    """The gradients of (E37)-(E39), which end here.

    (dout, dlse, q, k, v, bias, rng, tangents of q, k, v and bias, settings, whether that of the
    bias is needed) to the gradients of q, k, v, bias, rng, dout and dlse.
    """

    @staticmethod
    def forward(*arguments: Any) -> tuple[Optional, ...]:
        dout, dlse, *inputs = arguments[:7]
        tangent, settings = Tangent(*arguments[7:11]), Settings(*arguments[11:16])
        gq, gk, gv, gbias, gdout, gdlse = second_order(
            dout, dlse, Inputs(*inputs), tangent, settings, arguments[16]
        )
        return gq, gk, gv, gbias, None, gdout, gdlse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Optional, ...]) -> None:
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
        apart = arguments[10] is not None or arguments[16]
        return mapped_rule(_SecondOrder, info, in_dims, arguments, bias_at=5, apart=apart)


def refuse_third() -> NoReturn:
    """Say where derivatives end."""
    raise NotImplementedError(
        "the third derivative of attention is not built: out and lse can be differentiated twice "
        "with respect to q, k, v and bias."
    )
