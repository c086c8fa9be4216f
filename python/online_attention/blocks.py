# SPDX-License-Identifier: BSD-3-Clause
"""Blocks of query rows with all the keys they see: what derivatives in torch operations run over.

The memory beside inputs and results is bounded, whatever the lengths are. Computed in float32,
float64 for float64. A block holds all keys of its rows, so it computes their softmax anew instead
of taking `out` and `lse`, which the forward pass has rounded to its own dtype. Equations (E..) are
those of docs/algorithm.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from . import philox
from .operators import TOP_LEFT, UNBOUNDED, lse_dtype

# Scores of a block: few enough for the caches of a CPU, enough to fill a GPU. A handful of tensors
# of this size live at once.
BLOCK_BYTES = {"cpu": 1 << 22, "cuda": 1 << 26}


class Inputs(NamedTuple):
    """The tensors of a call: q, k and v, a bias of rank 4, the two numbers of dropout."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None = None
    rng: Tensor | None = None


class Settings(NamedTuple):
    """What a call is besides its tensors, as the operators take it."""

    scale: float | None
    alignment: int
    left: int
    right: int
    dropout_p: float = 0.0


class Block:
    """Rows of some batch elements, with the keys they see: heads of a group folded into the rows.

    Tensors of queries are (B, H_kv, group * rows, D) here, so that no key is repeated for a group.
    Tensors of pairs are (B, H_kv, group * rows, keys).
    """

    def __init__(self, inputs: Inputs, settings: Settings, batch: slice, rows: slice) -> None:
        """The part `batch`, `rows` of the problem."""
        q, k = inputs.q, inputs.k
        self.H, self.H_kv, self.S_q, self.S_kv = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
        self.inputs, self.settings = inputs, settings
        self.batch, self.rows = batch, rows
        self.dtype = lse_dtype(q.dtype)
        d_min, d_max = self._band(settings)
        # (E20)
        self.keys = slice(max(0, rows.start + d_min), min(self.S_kv, rows.stop + d_max))
        self.is_empty = self.keys.start >= self.keys.stop
        # Of the last two, or of all dimensions of pairs; None: every pair is visible, or kept.
        self.visible: Tensor | None = None
        self.kept: Tensor | None = None
        if self.is_empty:
            return
        first, last = self.keys.start - (rows.stop - 1), self.keys.stop - 1 - rows.start
        if first < d_min or last > d_max:
            q_idx = torch.arange(rows.start, rows.stop, device=q.device)
            kv_idx = torch.arange(self.keys.start, self.keys.stop, device=q.device)
            diagonal = kv_idx - q_idx[:, None]
            self.visible = (diagonal >= d_min) & (diagonal <= d_max)
        self._hide_by_bias()
        if self.visible is not None:
            self.visible = self._by_group(self.visible)
        if inputs.rng is not None:
            heads = range(batch.start * self.H, batch.stop * self.H)
            parts = [range(part.start, part.stop) for part in (rows, self.keys)]
            kept = philox.kept(inputs.rng, settings.dropout_p, heads, *parts)
            self.kept = kept.reshape(
                -1, self.H_kv, self.H // self.H_kv * len(parts[0]), len(parts[1])
            )

    def _hide_by_bias(self) -> None:
        bias = self.of_pairs(self.inputs.bias)
        if bias is not None:
            visible = bias if bias.dtype == torch.bool else bias != -math.inf
            self.visible = visible if self.visible is None else visible & self.visible

    def _by_group(self, x: Tensor) -> Tensor:
        """(rows, keys), or broadcastable to (B, H, rows, keys), as a tensor of pairs."""
        group, n_rows = self.H // self.H_kv, self.rows.stop - self.rows.start
        n_keys = self.keys.stop - self.keys.start
        if x.dim() == 2:
            return x.repeat(group, 1)
        heads = (1, 1) if x.shape[1] == 1 else (self.H_kv, group)
        x = x.reshape(x.shape[0], *heads, *x.shape[2:])
        return x.expand(-1, -1, group, n_rows, n_keys).flatten(2, 3)

    def index_of(self, x: Tensor) -> tuple[slice, ...]:
        """Where (B, H, S_q, S_kv), or what broadcasts to it by sizes of 1, has these pairs."""
        whole = slice(None)
        parts = (self.batch, whole, self.rows, self.keys)
        return tuple(whole if n == 1 else part for n, part in zip(x.shape, parts, strict=True))

    def of_pairs(self, x: Tensor | None) -> Tensor | None:
        """These pairs of it, broadcastable to what `by_head` gives."""
        return None if x is None else x[self.index_of(x)]

    def by_head(self, x: Tensor) -> Tensor:
        """A tensor of pairs as (B, H, rows, keys), in place."""
        return x.view(x.shape[0], self.H, -1, x.shape[3])

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
        bias = self.of_pairs(self.inputs.bias)
        if bias is not None and bias.dtype != torch.bool:
            self.by_head(scores).add_(bias)
        if self.visible is not None:
            scores.masked_fill_(~self.visible, -math.inf)
        absent = scores.amax(-1, keepdim=True) == -math.inf
        if self.visible is not None:
            absent = absent | ~self.visible
        return torch.softmax(scores, -1).masked_fill_(absent, 0), absent

    def dropped_out(self, x: Tensor) -> Tensor:
        """Z of (E43) times a tensor of pairs, which may be changed; what is dropped is replaced."""
        if self.kept is None:
            return x
        keep_scale = philox.keep_scale(self.settings.dropout_p, self.dtype)
        return x.masked_fill(~self.kept, 0).mul_(keep_scale)

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


def blocks(inputs: Inputs, settings: Settings) -> Iterator[Block]:
    """The whole problem in parts whose scores fit in BLOCK_BYTES, one row of all heads at least."""
    q = inputs.q
    B, H, S_q, _ = q.shape
    bytes_of_row = max(1, H * inputs.k.shape[2]) * lse_dtype(q.dtype).itemsize
    block_bytes = BLOCK_BYTES[q.device.type]
    batch = min(max(block_bytes // bytes_of_row, 1), max(B, 1))
    rows = max(block_bytes // (bytes_of_row * batch), 1)
    for b in range(0, B, batch):
        for begin in range(0, S_q if H else 0, rows):
            parts = slice(b, min(b + batch, B)), slice(begin, min(begin + rows, S_q))
            block = Block(inputs, settings, *parts)
            if not block.is_empty:
                yield block


class SumOverPairs:
    """Sums of tensors of pairs, given block by block, over the dimensions of size 1 of a bias."""

    def __init__(self, bias: Tensor, inputs: Inputs) -> None:
        """Begin at zero."""
        B, _, S_q, _ = inputs.q.shape
        # Blocks have other batch elements or rows: only these sums go over blocks.
        over_blocks = bias.shape[0] == 1 < B or bias.shape[2] == 1 < S_q
        self.dtype = bias.dtype
        wide = lse_dtype(inputs.q.dtype) if over_blocks else bias.dtype
        self.total = bias.new_zeros(bias.shape, dtype=wide)

    def add(self, block: Block, x: Tensor) -> None:
        """Add what a block has."""
        x = block.by_head(x)
        part = self.total[block.index_of(self.total)]
        part += x.sum_to_size(part.shape)

    def result(self) -> Tensor:
        """In the dtype of the bias."""
        return self.total.to(self.dtype)


def scale_of(q: Tensor, settings: Settings) -> float:
    """The scale, 1 / sqrt(D) by default."""
    return 1 / math.sqrt(q.shape[3]) if settings.scale is None else settings.scale


class ScoreGradient(NamedTuple):
    """The first derivatives of a block: tensors of pairs, but for delta, a column."""

    dp: Tensor
    delta: Tensor
    ds: Tensor


def score_gradient(
    block: Block, p: Tensor, absent: Tensor, dout_rows: Tensor, values: Tensor, dlse: Tensor | None
) -> ScoreGradient:
    """dP, delta and dS: (E28), (E46)."""
    dp = block.dropped_out((dout_rows @ values.mT).masked_fill_(absent, 0))
    delta = (p * dp).sum(-1, keepdim=True)  # (E28): the sum over d, exchanged with that over keys
    if dlse is not None:
        delta -= block.of_queries(dlse)
    return ScoreGradient(dp, delta, (p * (dp - delta)).masked_fill_(absent, 0))
