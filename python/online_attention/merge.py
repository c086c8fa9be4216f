# SPDX-License-Identifier: BSD-3-Clause
"""The exact merge of attentions over disjoint sets of keys."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .checks import DEVICES
from .merge_autograd import merge_parts

Parts = Sequence[Tensor] | Tensor
HALVES = (torch.float16, torch.bfloat16)


def merge(outs: Parts, lses: Parts) -> tuple[Tensor, Tensor]:
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

    Parts are read in place, whatever their strides, if their last dimension is contiguous; ``out``
    keeps the memory order of the first. Sums are taken in the dtype of ``lse``, in the order of the
    parts, and rounded once: results and gradients are the same from run to run. Autocast does not
    change it. Inputs must be on one device; dtypes may differ and are promoted as torch does.

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
    shape = _check_parts(outs, "outs")
    rows = _check_parts(lses, "lses")
    if shape[:-1] != rows or _count(outs) != _count(lses):
        raise ValueError(
            "outs must have the shape of lses with D_v added, but the parts have shapes "
            f"{tuple(shape)} and {tuple(rows)}, of which there are {_count(outs)} and "
            f"{_count(lses)}."
        )
    _check_devices(outs, lses)
    out_dtype, lse_dtype = _dtype(outs), _dtype(lses)
    wide = torch.float64 if torch.float64 in (out_dtype, lse_dtype) else torch.float32
    computed = out_dtype if wide == torch.float32 and out_dtype in HALVES else wide
    out, lse = merge_parts(
        _prepared(outs, computed, (*_rows(rows), shape[-1])), _prepared(lses, wide, _rows(rows))
    )
    if len(rows) != 3:
        out, lse = out.reshape(shape), lse.reshape(rows)
    return (out if computed == out_dtype else out.to(out_dtype)), lse


def _count(parts: Parts) -> int:
    return parts.shape[0] if isinstance(parts, Tensor) else len(parts)


def _rows(rows: Sequence[int]) -> tuple[int, ...]:
    """The leading dimensions as (B, H, S_q)."""
    if len(rows) <= 3:
        return (*(1,) * (3 - len(rows)), *rows)
    return (math.prod(rows[:-2]), *rows[-2:])


def _prepared(parts: Parts, dtype: torch.dtype, shape: Sequence[int]) -> Parts:
    """The parts in this dtype and shape, as they are if they have it: a copy only where needed."""
    if isinstance(parts, Tensor):
        parts = parts if parts.dtype == dtype else parts.to(dtype)
        return parts if parts.dim() == 1 + len(shape) else parts.reshape(parts.shape[0], *shape)
    if parts[0].dim() != len(shape):
        parts = [part.reshape(shape) for part in parts]
    return [part if part.dtype == dtype else part.to(dtype) for part in parts]


def _dtype(parts: Parts) -> torch.dtype:
    if isinstance(parts, Tensor):
        return parts.dtype
    return functools.reduce(torch.promote_types, (part.dtype for part in parts))


def _check_parts(parts: Parts, name: str) -> torch.Size:
    """Check a sequence of parts or stacked ones, and return the shape of one."""
    if isinstance(parts, Tensor):
        if parts.dim() == 0 or parts.shape[0] == 0:
            raise ValueError(f"{name} must hold at least one part, but is empty.")
        shape, dtypes = parts.shape[1:], [parts.dtype]
    else:
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
        shape, dtypes = parts[0].shape, [part.dtype for part in parts]
    for dtype in dtypes:
        if not dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, but is {dtype}: convert it.")
    return shape


def _check_devices(outs: Parts, lses: Parts) -> None:
    first = outs if isinstance(outs, Tensor) else outs[0]
    if first.device.type not in DEVICES:
        raise ValueError(
            f"outs must be on a device of type {' or '.join(sorted(DEVICES))}, but is on "
            f"{first.device}."
        )
    for parts, name in ((outs, "outs"), (lses, "lses")):
        for index, part in enumerate([parts] if isinstance(parts, Tensor) else parts):
            if part.device != first.device:
                raise ValueError(
                    f"outs and lses must be on one device, but outs[0] is on {first.device} and "
                    f"{name}[{index}] is on {part.device}: move it."
                )
