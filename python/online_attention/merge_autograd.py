# SPDX-License-Identifier: BSD-3-Clause
"""The operators under `merge` and their derivatives. Equations (E..) are those of algorithm.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad

from .operators import empty_in_order_of, folded, memory_order, unfolded

_merge = torch.ops.online_attention.merge.default
_merge_backward = torch.ops.online_attention.merge_backward.default


def merge_parts(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> Any:
    """Merge parts of shapes (B, H, S_q, D_v) and (B, H, S_q), as sequences or stacked.

    All outs are of one dtype, all lses of its accumulation type.
    """
    outs_stacked, lses_stacked = isinstance(outs, Tensor), isinstance(lses, Tensor)
    tensors = (*((outs,) if outs_stacked else outs), *((lses,) if lses_stacked else lses))
    # Inside torch.vmap a tensor that requires a gradient says that it does not.
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not (transformed or needs_gradient):
        return _merge(*_parts(outs_stacked, lses_stacked, tensors))
    if not torch.compiler.is_compiling():
        return _MergeWithTangents.apply(  # type: ignore[no-untyped-call]
            outs_stacked, lses_stacked, *tensors
        )
    # Dynamo refuses functions with a forward-mode rule, and mistakes the arguments of others where
    # a transform hides that they require a gradient.
    if transformed:
        return composed_merge(*_parts(outs_stacked, lses_stacked, tensors))
    return _Merge.apply(outs_stacked, lses_stacked, *tensors)  # type: ignore[no-untyped-call]


class _Merge(torch.autograd.Function):
    """Takes outs, then lses, either as tensors or as one stacked tensor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outs_stacked: bool, lses_stacked: bool, *tensors: Tensor) -> Any:
        return _merge(*_parts(outs_stacked, lses_stacked, tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        outs_stacked, lses_stacked, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.stacked = outs_stacked, lses_stacked
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
        outs_stacked, lses_stacked = ctx.stacked
        tensors = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        n_outs = _number_of_outs(outs_stacked, lses_stacked, tensors)
        needs_d_outs = dout is not None and any(needed[:n_outs])
        needs_d_lses = (dout is not None or dlse is not None) and any(needed[n_outs:])
        outs, lses = _parts(outs_stacked, lses_stacked, tensors)
        gradients = merge_gradients if _must_compose(dout, dlse) else _merge_backward
        d_outs, d_lses = gradients(dout, dlse, outs, lses, needs_d_outs, needs_d_lses)
        return (
            None,
            None,
            *_as_given(d_outs, outs_stacked, needs_d_outs, needed[:n_outs]),
            *_as_given(d_lses, lses_stacked, needs_d_lses, needed[n_outs:]),
        )


class _MergeWithTangents(_Merge):
    @staticmethod
    def jvp(ctx: Any, _: None, __: None, *tangents: Tensor | None) -> tuple[Tensor, Tensor]:
        """The differential of (E13): with w_r constant in the first sum, that of (E33) in dual."""
        outs_stacked, lses_stacked = ctx.stacked
        outs, lses = _parts(outs_stacked, lses_stacked, ctx.saved_tensors)
        n_outs = _number_of_outs(outs_stacked, lses_stacked, tangents)
        of_outs = _tangents(tangents[:n_outs], outs_stacked, len(outs))
        of_lses = _tangents(tangents[n_outs:], lses_stacked, len(lses))
        wide = lses[0].dtype
        weights, empty = merge_weights(lses)[0], [lse == -torch.inf for lse in lses]
        values = [_visible(out.to(wide), at) for out, at in zip(outs, empty, strict=True)]
        out = _weighted_sum(weights, values)
        out_tangent, lse_tangent = torch.zeros_like(out), torch.zeros_like(lses[0])
        for r, (of_out, of_lse) in enumerate(zip(of_outs, of_lses, strict=True)):
            if of_out is not None:
                out_tangent = out_tangent + weights[r].unsqueeze(-1) * _visible(
                    of_out.to(wide), empty[r]
                )
            if of_lse is not None:
                moved = weights[r] * torch.where(empty[r], 0, of_lse)
                lse_tangent = lse_tangent + moved
                out_tangent = out_tangent + moved.unsqueeze(-1) * (values[r] - out)
        return out_tangent.to(outs[0].dtype), lse_tangent


def _must_compose(*gradients: Tensor | None) -> bool:
    """Whether a gradient must be composed of operations that torch knows.

    Either it will be differentiated itself, or `torch.autograd.grad(is_grads_batched=True)` maps
    over it, for which operators cannot have a rule.
    """
    return torch.is_grad_enabled() or (
        not torch.compiler.is_compiling()
        and any(g is not None and is_legacy_batchedtensor(g) for g in gradients)
    )


def merge_weights(lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(E13) w_r, stacked, and lse. An empty part has w_r = 0."""
    stacked = torch.stack(tuple(lses))
    m = stacked.detach().amax(0)  # nothing depends on it
    base = torch.where(m == -torch.inf, 0, m)
    empty = stacked == -torch.inf
    p = torch.where(empty, 0, torch.where(empty, 0, stacked - base).exp())
    l = p.sum(0)
    none = l == 0
    l = torch.where(none, 1, l)
    return torch.where(empty, 0, p / l), torch.where(none, -torch.inf, base + l.log())


def composed_merge(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`_merge` composed of differentiable operations."""
    weights, lse = merge_weights(lses)
    values = [
        _visible(out.to(lse.dtype), part == -torch.inf)
        for out, part in zip(outs, lses, strict=True)
    ]
    return _weighted_sum(weights, values).to(outs[0].dtype), lse


def merge_gradients(
    dout: Tensor | None,
    dlse: Tensor | None,
    outs: Sequence[Tensor],
    lses: Sequence[Tensor],
    needs_d_outs: bool,
    needs_d_lses: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """`_merge_backward` composed of differentiable operations, None for what is not needed.

    d_outs may be needed only if dout is given.
    What an empty part multiplies is replaced by 0 before, so that derivatives are 0, not NaN.
    """
    wide = lses[0].dtype
    weights, empty = merge_weights(lses)[0], [lse == -torch.inf for lse in lses]
    douts = [] if dout is None else [_visible(dout.to(wide), at) for at in empty]
    d_outs = d_lses = None
    if needs_d_outs:  # (E32)
        d_outs = torch.stack([w.unsqueeze(-1) * d for w, d in zip(weights, douts, strict=True)])
        d_outs = d_outs.to(outs[0].dtype)
    if needs_d_lses:  # (E33), with <dout, out> as the weighted sum of the <dout, out_r>
        dots = [torch.zeros_like(lse) for lse in lses]
        if dout is not None:
            values = [_visible(out.to(wide), at) for out, at in zip(outs, empty, strict=True)]
            dots = [(d * value).sum(-1) for d, value in zip(douts, values, strict=True)]
        whole = sum(w * dot for w, dot in zip(weights, dots, strict=True))
        inner = [(dot if dlse is None else dlse + dot) - whole for dot in dots]
        inner = [torch.where(at, 0, x) for x, at in zip(inner, empty, strict=True)]
        d_lses = torch.stack([w * x for w, x in zip(weights, inner, strict=True)])
    return d_outs, d_lses


def _visible(values: Tensor, empty: Tensor) -> Tensor:
    return torch.where(empty.unsqueeze(-1), 0, values)


def _weighted_sum(weights: Tensor, values: Sequence[Tensor]) -> Tensor:
    total = weights[0].unsqueeze(-1) * values[0]
    for w, value in zip(weights[1:], values[1:], strict=True):
        total = total + w.unsqueeze(-1) * value
    return total


def _number_of_outs(outs_stacked: bool, lses_stacked: bool, tensors: Sequence[Any]) -> int:
    """How many of the tensors are outs; the rest are lses."""
    if outs_stacked:
        return 1
    return len(tensors) - 1 if lses_stacked else len(tensors) // 2


def _parts(
    outs_stacked: bool, lses_stacked: bool, tensors: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    n_outs = _number_of_outs(outs_stacked, lses_stacked, tensors)
    outs, lses = tensors[:n_outs], tensors[n_outs:]
    return (
        list(outs[0].unbind() if outs_stacked else outs),
        list(lses[0].unbind() if lses_stacked else lses),
    )


def _tangents(given: Sequence[Tensor | None], stacked: bool, parts: int) -> Sequence[Tensor | None]:
    if not stacked:
        return given
    return [None] * parts if given[0] is None else given[0].unbind()


def _as_given(
    gradients: Tensor | None, stacked: bool, are_needed: bool, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Stacked gradients in the form in which the inputs came."""
    if gradients is None or not are_needed:
        return [None] * len(needed)
    if stacked:
        return [gradients]
    return [g if need else None for g, need in zip(gradients.unbind(), needed, strict=True)]


@torch.library.register_fake("online_attention::merge")
def _merge_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    return empty_in_order_of(outs[0], outs[0].shape[3]), lses[0].new_empty(lses[0].shape)


@torch.library.register_fake("online_attention::merge_backward")
def _merge_backward_fake(
    dout: Tensor | None,
    dlse: Tensor | None,
    outs: list[Tensor],
    lses: list[Tensor],
    needs_d_outs: bool,
    needs_d_lses: bool,
) -> tuple[Tensor, Tensor]:
    first, order = outs[0], [*memory_order(outs[0]), 3]
    d_outs, d_lses = first.new_empty(0), lses[0].new_empty(0)
    if needs_d_outs:
        d_outs = first.new_empty([len(outs), *(first.shape[dim] for dim in order)])
        d_outs = d_outs.permute([0, *(1 + order.index(dim) for dim in range(4))])
    if needs_d_lses:
        d_lses = lses[0].new_empty((len(lses), *lses[0].shape))
    return d_outs, d_lses


def _fold_all(tensors: list[Tensor], dims: list[int | None], size: int) -> list[Tensor]:
    return [folded(tensor, dim, size) for tensor, dim in zip(tensors, dims, strict=True)]


@torch.library.register_vmap("online_attention::merge")
def _merge_vmap(
    info: Any, in_dims: tuple[Any, ...], outs: list[Tensor], lses: list[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    out, lse = _merge(_fold_all(outs, in_dims[0], size), _fold_all(lses, in_dims[1], size))
    return (unfolded(out, size), unfolded(lse, size)), (0, 0)


@torch.library.register_vmap("online_attention::merge_backward")
def _merge_backward_vmap(
    info: Any,
    in_dims: tuple[Any, ...],
    dout: Tensor | None,
    dlse: Tensor | None,
    outs: list[Tensor],
    lses: list[Tensor],
    needs_d_outs: bool,
    needs_d_lses: bool,
) -> tuple[tuple[Tensor, Tensor], tuple[int | None, int | None]]:
    size = info.batch_size
    parts = _fold_all(outs, in_dims[2], size)
    gradients = _merge_backward(
        None if dout is None else folded(dout, in_dims[0], size),
        None if dlse is None else folded(dlse, in_dims[1], size),
        parts,
        _fold_all(lses, in_dims[3], size),
        needs_d_outs,
        needs_d_lses,
    )
    sizes = (size, parts[0].shape[0] // size)
    d_outs, d_lses = (
        gradient.unflatten(1, sizes) if needed else gradient
        for gradient, needed in zip(gradients, (needs_d_outs, needs_d_lses), strict=True)
    )
    return (d_outs, d_lses), (1 if needs_d_outs else None, 1 if needs_d_lses else None)
