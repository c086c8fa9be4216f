# SPDX-License-Identifier: BSD-3-Clause
"""Ways to lay out a (B, H, S, D) tensor in memory, NaN wherever none of it lies."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

NAN = float("nan")


def permuted(order: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """The tensor with its dimensions laid out in memory in `order`, slowest first."""
    inverse = [order.index(dim) for dim in range(4)]
    return lambda x: x.permute(order).contiguous().permute(inverse)


def between_nan(x: Tensor) -> Tensor:
    """Inside a larger NaN-filled tensor: gaps after every row, key and head, an odd offset."""
    B, H, S, D = x.shape
    room = torch.full((B + 1, H + 2, S + 3, D + 5), NAN, dtype=x.dtype, device=x.device)
    view = room[1:, 1:-1, 2:-1, 3:-2]
    view.copy_(x)
    return view


def rows_apart(x: Tensor) -> Tensor:
    """Gaps of eight elements between the rows, which stay as aligned as their own size is."""
    room = torch.full((*x.shape[:3], x.shape[3] + 8), NAN, dtype=x.dtype, device=x.device)
    view = room[..., : x.shape[3]]
    view.copy_(x)
    return view


def every_second_element(x: Tensor) -> Tensor:
    room = torch.full((*x.shape[:3], 2 * x.shape[3]), NAN, dtype=x.dtype, device=x.device)
    view = room[..., ::2]
    view.copy_(x)
    return view


def every_third_row(x: Tensor) -> Tensor:
    B, H, S, D = x.shape
    room = torch.full((B, H, 3 * S, D), NAN, dtype=x.dtype, device=x.device)
    view = room[:, :, ::3]
    view.copy_(x)
    return view


def off_by_one_element(x: Tensor) -> Tensor:
    """Contiguous, but aligned to a single element."""
    room = torch.full((x.numel() + 1,), NAN, dtype=x.dtype, device=x.device)
    view = room[1:].view(x.shape)
    view.copy_(x)
    return view


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "bshd": permuted((0, 2, 1, 3)),
    "sbhd": permuted((2, 0, 1, 3)),
    "hbsd": permuted((1, 0, 2, 3)),
    "rows-apart": rows_apart,
    "last-dim-strided": permuted((0, 1, 3, 2)),
    "between-nan": between_nan,
    "every-second-element": every_second_element,
    "every-third-row": every_third_row,
    "off-by-one-element": off_by_one_element,
}
# Those that keep rows on 16-byte boundaries, where the head dim is a multiple of 8.
ALIGNED = ("contiguous", "bshd", "sbhd", "hbsd", "rows-apart")
