# SPDX-License-Identifier: BSD-3-Clause
"""The two operators under `attention`, and what torch needs to know of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    checks.check_tensors(checks.NAMES[:3], q, k, v)
    checks.check_shapes(checks.NAMES[:3], q, k, v)
    bias = _at(settings, 5)
    if bias is not None:
        checks.check_bias(checks.NAMES, q, k, bias)
    lse = q.new_empty(q.shape[:3], dtype=lse_dtype(q.dtype))
    return empty_in_order_of(q, v.shape[3]), lse


@torch.library.register_fake("online_attention::backward")
def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *others: Any
) -> tuple[Tensor, ...]:
    asked = others[7:10]
    return tuple(
        empty_in_order_of(x, x.shape[3]) if needed else x.new_empty(0)
        for x, needed in zip((q, k, v), asked, strict=True)
    )


def _at(arguments: Sequence[Any], index: int) -> Any:
    """An argument that the dispatcher leaves out where it has its default, None."""
    return arguments[index] if index < len(arguments) else None


def folded(tensor: Tensor, dim: int | None, size: int) -> Tensor:
    """The mapped dimension of `torch.vmap` made a part of the batch."""
    if dim is None:
        return tensor.expand(size, *tensor.shape).flatten(0, 1)
    return tensor.movedim(dim, 0).flatten(0, 1)


def unfolded(tensor: Tensor, size: int) -> Tensor:
    """A result of folded tensors, its mapped dimension first again."""
    return tensor.view(size, tensor.shape[0] // size, *tensor.shape[1:])


def mapped(
    call: Callable[..., Sequence[Tensor | None]],
    size: int,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
    bias_at: int,
    apart: bool = False,
) -> tuple[tuple[Tensor | None, ...], tuple[int | None, ...]]:
    """The rule of `torch.vmap`: the mapped dimension becomes a part of the batch.

    Samples run one after the other, each on its own, if they are to be kept `apart`; with dropout,
    which would drop other pairs in a larger batch; and with a bias that would have to be copied.
    The first argument is a tensor with the batch; bias and rng are the ones at `bias_at`.
    """
    bias, bias_dim = _at(arguments, bias_at), _at(in_dims, bias_at)
    dims = list(in_dims[: len(arguments)])
    batch = arguments[0].shape[1 if dims[0] == 0 else 0]
    if apart or _at(arguments, bias_at + 1) is not None or not _folds(bias, bias_dim, batch):
        results = _one_by_one(call, size, dims, arguments)
    else:
        operands = [
            folded(x, dim, size) if isinstance(x, Tensor) else x
            for x, dim in zip(arguments, dims, strict=True)
        ]
        if bias is not None and bias_dim is None:
            operands[bias_at] = bias
        results = tuple(None if x is None else unfolded(x, size) for x in call(*operands))
    return results, tuple(None if x is None else 0 for x in results)


def _folds(bias: Tensor | None, dim: int | None, batch: int) -> bool:
    """Whether a bias of one sample, of `batch` elements, is one of all samples, where it lies."""
    if bias is None:
        return True
    if dim is None:
        return bias.shape[0] == 1
    size, own, *_ = bias.movedim(dim, 0).shape
    stride, own_stride, *_ = bias.movedim(dim, 0).stride()
    return own == batch and (own == 1 or size == 1 or stride == own * own_stride)


def _one_by_one(
    call: Callable[..., Sequence[Tensor | None]],
    size: int,
    in_dims: Sequence[int | None],
    arguments: Sequence[Any],
) -> tuple[Tensor | None, ...]:
    pairs = list(zip(arguments, in_dims, strict=True))
    samples = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in pairs)) for i in range(size)
    ]
    return tuple(
        None if parts[0] is None else torch.stack(parts) for parts in zip(*samples, strict=True)
    )


@torch.library.register_vmap("online_attention::forward")
def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    return mapped(forward, info.batch_size, in_dims, arguments, bias_at=8)


@torch.library.register_vmap("online_attention::backward")
def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
    return mapped(backward, info.batch_size, in_dims, arguments, bias_at=15)
