# SPDX-License-Identifier: BSD-3-Clause
"""The two operators under `attention`, and what torch needs to know of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _C, checks

# Loading _C registers the operators, after `import torch` has loaded the libraries it links.
assert _C is not None
forward = torch.ops.online_attention.forward.default
backward = torch.ops.online_attention.backward.default

TOP_LEFT, BOTTOM_RIGHT = 0, 1
UNBOUNDED = -1


def memory_order(tensor: Tensor) -> list[int]:
    """Dimensions 0, 1 and 2 of a result from the slowest to the fastest, as in the tensor."""
    strides = tensor.stride()[:3]
    order = [0, 1, 2]
    if 0 not in strides:  # a broadcast tensor has no memory order to keep
        order.sort(key=lambda dim: strides[dim], reverse=True)
    return order


def empty_in_order_of(like: Tensor, columns: int) -> Tensor:
    """Dense, shaped like the tensor but for its last dimension, in its memory order."""
    sizes = (*like.shape[:3], columns)
    order = [*memory_order(like), 3]
    empty = like.new_empty([sizes[dim] for dim in order])
    return empty.permute([order.index(dim) for dim in range(4)])


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the lse of inputs of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("online_attention::forward")
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *settings: Any) -> tuple[Tensor, Tensor]:
    checks.check_tensors(checks.NAMES, q, k, v)
    checks.check_shapes(checks.NAMES, q, k, v)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return empty_in_order_of(q, v.shape[3]), lse


@torch.library.register_fake("online_attention::backward")
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    asked = others[-3:]
    return tuple(
        empty_in_order_of(x, x.shape[3]) if needed else x.new_empty(0)
        for x, needed in zip((q, k, v), asked, strict=True)
    )


def folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of `torch.vmap` made a part of the batch."""
    if dim is None:
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def unfolded(tensor: Tensor, size: int) -> Tensor:
    """A result of folded tensors, its mapped dimension first again."""
    return tensor.view(size, tensor.shape[0] // size, *tensor.shape[1:])


@torch.library.register_vmap("online_attention::forward")
def _forward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    tensors = [folded(x, dim, size) for x, dim in zip(arguments[:3], in_dims, strict=False)]
    results = forward(*tensors, *arguments[3:])
    return tuple(unfolded(x, size) for x in results), (0, 0)


@torch.library.register_vmap("online_attention::backward")
def _backward_vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    size = info.batch_size
    tensors = [
        None if x is None else folded(x, dim, size)
        for x, dim in zip(arguments[:7], in_dims, strict=False)
    ]
    results = backward(*tensors, *arguments[7:])
    asked = arguments[-3:]
    return (
        tuple(unfolded(x, size) if a else x for x, a in zip(results, asked, strict=True)),
        tuple(0 if a else None for a in asked),
    )
