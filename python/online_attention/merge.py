# SPDX-License-Identifier: BSD-3-Clause
"""The exact merge of attentions over disjoint sets of keys."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(
    outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attentions of the same queries over disjoint sets of keys into one.

    The parts may come from tiles of a sequence, from other devices, or from a cached prefix; the
    result is the attention over all their keys, in whatever order the parts are given.

    Args:
        outs: The outputs of the parts, each ``(..., S_q, D_v)``: a sequence, or one tensor with the
            parts along its first dimension.
        lses: Their log-sum-exps, each ``(..., S_q)``, in the same form.

    Returns:
        ``(out, lse)``: ``out`` of the shape and dtype of one part, ``lse`` of the shape of one part
        in float32 (float64 if any input is float64). Both are differentiable in every input. A part
        with ``lse = -inf`` saw no key: it contributes nothing, and its gradients are 0. A row that
        is empty in every part has ``out = 0`` and ``lse = -inf``.

    Example:
        >>> import torch
        >>> from online_attention import attention, merge
        >>> q = torch.randn(1, 4, 10, 64)
        >>> k, v = torch.randn(2, 1, 4, 300, 64)
        >>> parts = [attention(q, k[:, :, keys], v[:, :, keys], return_lse=True)
        ...          for keys in (slice(0, 100), slice(100, 300))]
        >>> out, lse = merge(*zip(*parts))
        >>> torch.allclose(out, attention(q, k, v), atol=1e-6)
        True
    """
    stacked_outs, stacked_lses = _stacked(outs, "outs"), _stacked(lses, "lses")
    if stacked_outs.shape[:-1] != stacked_lses.shape:
        raise ValueError(
            "outs must have the shape of lses with D_v added, but the parts have shapes "
            f"{tuple(stacked_outs.shape[1:])} and {tuple(stacked_lses.shape[1:])}, of which there "
            f"are {stacked_outs.shape[0]} and {stacked_lses.shape[0]}."
        )
    double = torch.float64 in (stacked_outs.dtype, stacked_lses.dtype)
    dtype = torch.float64 if double else torch.float32
    lse_parts, out_parts = stacked_lses.to(dtype), stacked_outs.to(dtype)

    # The algebra of csrc/core/softmax_row.h: every part is a row state (m, l) = (lse, 1). Nothing
    # depends on the reference point m, so no gradient flows through it.
    empty = lse_parts == -torch.inf
    m = lse_parts.detach().amax(0)
    base = torch.where(m == -torch.inf, 0, m)
    weights = (lse_parts - base).exp()
    l = weights.sum(0)
    none = l == 0
    l = torch.where(none, 1, l)
    lse = torch.where(none, -torch.inf, base + l.log())
    out_parts = torch.where(empty.unsqueeze(-1), 0, out_parts)
    out = ((weights / l).unsqueeze(-1) * out_parts).sum(0)
    return out.to(stacked_outs.dtype), lse


def _stacked(parts: Sequence[Tensor] | Tensor, name: str) -> Tensor:
    if not isinstance(parts, Tensor):
        for index, part in enumerate(parts):
            if not isinstance(part, Tensor):
                raise TypeError(
                    f"{name} must hold tensors, but {name}[{index}] is a {type(part).__name__}."
                )
            if part.shape != parts[0].shape:
                raise ValueError(
                    f"{name} must hold tensors of one shape, but {name}[0] has shape "
                    f"{tuple(parts[0].shape)} and {name}[{index}] has {tuple(part.shape)}."
                )
        if len(parts) == 0:
            raise ValueError(f"{name} must hold at least one part, but is empty.")
        parts = torch.stack(tuple(parts))
    if parts.dim() == 0 or parts.shape[0] == 0:
        raise ValueError(f"{name} must hold at least one part, but is empty.")
    if not parts.is_floating_point():
        raise TypeError(f"{name} must be floating point, but is {parts.dtype}: convert it.")
    return parts
