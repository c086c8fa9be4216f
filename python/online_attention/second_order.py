# SPDX-License-Identifier: BSD-3-Clause
"""Tangents and second derivatives of attention, composed of torch's matrix products.

Equations (E34)-(E39) of docs/algorithm.md over blocks of query rows: the memory beside inputs and
results is bounded, whatever the lengths are. Computed in float32, float64 for float64.

A block holds all keys of its rows, so it computes their softmax anew instead of taking `out` and
`lse`, which the forward pass has rounded to its own dtype. Nothing here is differentiable itself:
`autograd` wraps these functions.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .operators import TOP_LEFT, UNBOUNDED, lse_dtype

# Scores of a block: few enough for the caches of a CPU, enough to fill a GPU. A handful of tensors
# of this size live at once.
BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}


class Settings(NamedTuple):
    """What a call is besides its tensors, as the operators take it."""

    scale: float | None
    alignment: int
    left: int
    right: int


class Block:
    """Rows of some batch elements, with the keys they see: heads of a group folded into the rows.

    Tensors of queries are (B, H_kv, group * rows, D) here, so that no key is repeated for a group.
    """

    def __init__(self, q: Tensor, k: Tensor, settings: Settings, batch: slice, rows: slice) -> None:
        """The part `batch`, `rows` of the problem."""
        self.H, self.H_kv, self.S_q, self.S_kv = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
        self.batch, self.rows = batch, rows
        self.dtype = lse_dtype(q.dtype)
        d_min, d_max = self._band(settings)
        # (E20)
        self.keys = slice(max(0, rows.start + d_min), min(self.S_kv, rows.stop + d_max))
        self.is_empty = self.keys.start >= self.keys.stop
        self.visible: Tensor | None = None  # (group * rows, keys), unless all of it is
        first, last = self.keys.start - (rows.stop - 1), self.keys.stop - 1 - rows.start
        if not self.is_empty and (first < d_min or last > d_max):
            q_idx = torch.arange(rows.start, rows.stop, device=q.device)
            kv_idx = torch.arange(self.keys.start, self.keys.stop, device=q.device)
            diagonal = kv_idx - q_idx.repeat(self.H // self.H_kv)[:, None]
            self.visible = (diagonal >= d_min) & (diagonal <= d_max)

    def _band(self, settings: Settings) -> tuple[int, int]:
        """(E21)"""
        offset = 0 if settings.alignment == TOP_LEFT else self.S_kv - self.S_q
        beyond = self.S_q + self.S_kv
        return (
            -beyond if settings.left == UNBOUNDED else offset - settings.left,
            beyond if settings.right == UNBOUNDED else offset + settings.right,
        )

    def of_queries(self, x: Tensor) -> Tensor:
        """The rows of (B, H, S_q, D), or of (B, H, S_q) as a column."""
        part = x[self.batch, :, self.rows].to(self.dtype)
        columns = x.shape[3] if x.dim() == 4 else 1
        folded_rows = self.H // self.H_kv * part.shape[2]
        return part.reshape(part.shape[0], self.H_kv, folded_rows, columns)

    def of_keys(self, x: Tensor) -> Tensor:
        """The keys or values these rows see."""
        return x[self.batch, :, self.keys].to(self.dtype)

    def write(self, result: Tensor, x: Tensor) -> None:
        """Give the rows their results."""
        part = result[self.batch, :, self.rows]
        part.copy_(x.reshape(part.shape))

    def add_to_keys(self, result: Tensor, x: Tensor) -> None:
        """Add what these rows contribute to their keys."""
        result[self.batch, :, self.keys] += x

    def probabilities(self, q: Tensor, k: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """(E25), and where it is 0 because nothing is there: hidden pairs and empty rows."""
        scores = (q @ k.mT).mul_(scale)
        if self.visible is not None:
            scores.masked_fill_(~self.visible, -math.inf)
        absent = scores.amax(-1, keepdim=True) == -math.inf
        if self.visible is not None:
            absent = absent | ~self.visible
        return torch.softmax(scores, -1).masked_fill_(absent, 0), absent

    def product(self, weights: Tensor, x: Tensor) -> Tensor:
        """`weights @ x`, where a pair that is hidden is no term at all. (E24)

        Weights that are NaN wherever a visible part of x is not finite are taken for granted.
        """
        return weights @ (x if self.visible is None else x.masked_fill(~x.isfinite(), 0))

    def product_of_any(self, weights: Tensor, x: Tensor, *, over_rows: bool = False) -> Tensor:
        """The same for any weights: a visible NaN or Inf makes its result NaN."""
        result = self.product(weights, x)
        if self.visible is not None:
            visible = self.visible.mT if over_rows else self.visible
            result.masked_fill_(visible.to(x.dtype) @ (~x.isfinite()).to(x.dtype) > 0, math.nan)
        return result


def blocks(q: Tensor, k: Tensor, settings: Settings) -> Iterator[Block]:
    """The whole problem in parts whose scores fit in BLOCK_BYTES, one row of all heads at least."""
    B, H, S_q, _ = q.shape
    bytes_of_row = max(1, H * k.shape[2]) * lse_dtype(q.dtype).itemsize
    block_bytes = BLOCK_BYTES[q.device.type]
    batch = min(max(block_bytes // bytes_of_row, 1), max(B, 1))
    rows = max(block_bytes // (bytes_of_row * batch), 1)
    for b in range(0, B, batch):
        for begin in range(0, S_q if H else 0, rows):
            parts = slice(b, min(b + batch, B)), slice(begin, min(begin + rows, S_q))
            block = Block(q, k, settings, *parts)
            if not block.is_empty:
                yield block


class Tangent(NamedTuple):
    """A direction in which q, k and v move; None stays where it is."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None


def tangent_of_scores(
    block: Block, q: Tensor, k: Tensor, tangent: Tangent, scale: float, absent: Tensor
) -> Tensor:
    """(E34), 0 where nothing is there."""
    scores = q.new_zeros(*q.shape[:3], k.shape[2])
    if tangent.q is not None:
        scores += block.of_queries(tangent.q) @ k.mT
    if tangent.k is not None:
        scores += q @ block.of_keys(tangent.k).mT
    return scores.mul_(scale).masked_fill_(absent, 0)


def scale_of(q: Tensor, settings: Settings) -> float:
    """The scale, 1 / sqrt(D) by default."""
    return 1 / math.sqrt(q.shape[3]) if settings.scale is None else settings.scale


@torch.no_grad()
def tangents(
    q: Tensor, k: Tensor, v: Tensor, tangent: Tangent, settings: Settings
) -> tuple[Tensor, Tensor]:
    """How out and lse move if q, k and v do: (E34)-(E36)."""
    scale = scale_of(q, settings)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(q.shape[:3], dtype=lse_dtype(q.dtype))
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(q, k, settings):
            q_rows, keys = block.of_queries(q), block.of_keys(k)
            p, absent = block.probabilities(q_rows, keys, scale)
            t = tangent_of_scores(block, q_rows, keys, tangent, scale, absent)
            lse_rows = (p * t).sum(-1, keepdim=True)
            dp = (p * (t - lse_rows)).masked_fill_(absent, 0)
            out_rows = block.product_of_any(dp, block.of_keys(v))
            if tangent.v is not None:
                out_rows += block.product_of_any(p, block.of_keys(tangent.v))
            block.write(out, out_rows)
            block.write(lse, lse_rows)
    return out, lse


@torch.no_grad()
def second_order(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tangent: Tangent,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of <tangent, (dq, dk, dv)> to q, k, v, dout and dlse: (E37)-(E39).

    `out` and `lse`, from which the first gradients were computed, count as functions of q, k, v.
    """
    scale = scale_of(q, settings)
    wide = lse_dtype(q.dtype)
    gq, gdout = q.new_zeros(q.shape), q.new_zeros(dout.shape)
    gk, gv = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    gdlse = q.new_zeros(q.shape[:3], dtype=wide)
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(q, k, settings):
            q_rows, keys, values = block.of_queries(q), block.of_keys(k), block.of_keys(v)
            dout_rows = block.of_queries(dout)
            p, absent = block.probabilities(q_rows, keys, scale)

            t = tangent_of_scores(block, q_rows, keys, tangent, scale, absent)  # (E34)
            lse_rows = (p * t).sum(-1, keepdim=True)  # (E35)
            dp = (p * (t - lse_rows)).masked_fill_(absent, 0)
            out_rows = block.product_of_any(dp, values)  # (E36)
            block.write(gdlse, lse_rows)  # (E37)

            g = (dout_rows @ values.mT).masked_fill_(absent, 0)  # (E27)
            delta = (p * g).sum(-1, keepdim=True)  # (E28): the sum over d, exchanged with that
            if dlse is not None:  # over keys
                delta -= block.of_queries(dlse)
            ds = (p * (g - delta)).masked_fill_(absent, 0)  # (E29)
            w = t * (g - delta) - lse_rows * g  # (E38)
            if tangent.v is not None:
                tangent_values = block.of_keys(tangent.v)
                w += (dout_rows @ tangent_values.mT).masked_fill_(absent, 0)
                out_rows += block.product_of_any(p, tangent_values)
            w.masked_fill_(absent, 0)
            gs = (p * (w - (p * w).sum(-1, keepdim=True))).masked_fill_(absent, 0)
            block.write(gdout, out_rows)  # (E37)

            gq_rows = block.product(gs, keys)  # (E39)
            gk_keys = block.product(gs.mT, q_rows)
            if tangent.k is not None:
                gq_rows += block.product(ds, block.of_keys(tangent.k))
            if tangent.q is not None:
                gk_keys += block.product(ds.mT, block.of_queries(tangent.q))
            block.write(gq, gq_rows.mul_(scale))
            block.add_to_keys(gk, gk_keys.mul_(scale))
            block.add_to_keys(gv, block.product_of_any(dp.mT, dout_rows, over_rows=True))
    return gq, gk.to(k.dtype), gv.to(v.dtype), gdout, gdlse
