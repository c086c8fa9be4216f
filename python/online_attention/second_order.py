# SPDX-License-Identifier: BSD-3-Clause
"""Tangents and second derivatives of attention, composed of torch's matrix products.

Equations (E34)-(E39), (E50) and (E51) of docs/algorithm.md over `blocks` of query rows.
Nothing here is differentiable itself: `autograd` wraps these functions.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Block, Inputs, Settings, SumOverPairs, blocks, scale_of, score_gradient
from .operators import lse_dtype


class Tangent(NamedTuple):
    """A direction in which q, k, v and bias move; None stays where it is."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    bias: Tensor | None = None


def tangent_of_scores(
    block: Block, q: Tensor, k: Tensor, tangent: Tangent, scale: float, absent: Tensor
) -> Tensor:
    """(E34) with the bias's own (E51), 0 where nothing is there."""
    scores = q.new_zeros(*q.shape[:3], k.shape[2])
    if tangent.q is not None:
        scores += block.of_queries(tangent.q) @ k.mT
    if tangent.k is not None:
        scores += q @ block.of_keys(tangent.k).mT
    scores.mul_(scale)
    if tangent.bias is not None:
        block.by_head(scores).add_(tangent.bias[block.index_of(tangent.bias)])
    return scores.masked_fill_(absent, 0)


@torch.no_grad()
def tangents(inputs: Inputs, tangent: Tangent, settings: Settings) -> tuple[Tensor, Tensor]:
    """How out and lse move if q, k, v and bias do: (E34)-(E36)."""
    q, k, v = inputs[:3]
    scale = scale_of(q, settings)
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = q.new_zeros(q.shape[:3], dtype=lse_dtype(q.dtype))
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(inputs, settings):
            q_rows, keys = block.of_queries(q), block.of_keys(k)
            p, absent = block.probabilities(q_rows, keys, scale)
            t = tangent_of_scores(block, q_rows, keys, tangent, scale, absent)
            lse_rows = (p * t).sum(-1, keepdim=True)
            dp = block.dropped_out((p * (t - lse_rows)).masked_fill_(absent, 0))
            out_rows = block.product_of_any(dp, block.of_keys(v))
            if tangent.v is not None:
                weights = block.dropped_out(p)
                out_rows += block.product_of_any(weights, block.of_keys(tangent.v))
            block.write(out, out_rows)
            block.write(lse, lse_rows)
    return out, lse


@torch.no_grad()
def second_order(
    dout: Tensor,
    dlse: Tensor | None,
    inputs: Inputs,
    tangent: Tangent,
    settings: Settings,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """The gradients of <tangent, (dq, dk, dv, dbias)> to q, k, v, bias, dout, dlse: (E37)-(E39).

    `out` and `lse`, from which the first gradients were computed, count as functions of the inputs.
    """
    q, k, v = inputs[:3]
    scale = scale_of(q, settings)
    wide = lse_dtype(q.dtype)
    gq, gdout = q.new_zeros(q.shape), q.new_zeros(dout.shape)
    gk, gv = k.new_zeros(k.shape, dtype=wide), v.new_zeros(v.shape, dtype=wide)
    gdlse = q.new_zeros(q.shape[:3], dtype=wide)
    gbias = SumOverPairs(inputs.bias, inputs) if inputs.bias is not None and needs_bias else None
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(inputs, settings):
            q_rows, keys, values = block.of_queries(q), block.of_keys(k), block.of_keys(v)
            dout_rows = block.of_queries(dout)
            p, absent = block.probabilities(q_rows, keys, scale)

            t = tangent_of_scores(block, q_rows, keys, tangent, scale, absent)  # (E34)
            lse_rows = (p * t).sum(-1, keepdim=True)  # (E35)
            dp = block.dropped_out((p * (t - lse_rows)).masked_fill_(absent, 0))
            out_rows = block.product_of_any(dp, values)  # (E36)
            block.write(gdlse, lse_rows)  # (E37)

            g, delta, ds = score_gradient(block, p, absent, dout_rows, values, dlse)  # (E27)-(E29)
            w = t * (g - delta) - lse_rows * g  # (E38)
            if tangent.v is not None:
                tangent_values = block.of_keys(tangent.v)
                w += block.dropped_out((dout_rows @ tangent_values.mT).masked_fill_(absent, 0))
                out_rows += block.product_of_any(block.dropped_out(p), tangent_values)
            w.masked_fill_(absent, 0)
            gs = (p * (w - (p * w).sum(-1, keepdim=True))).masked_fill_(absent, 0)
            block.write(gdout, out_rows)  # (E37)
            if gbias is not None:
                gbias.add(block, gs)  # (E51)

            gq_rows = block.product(gs, keys)  # (E39)
            gk_keys = block.product(gs.mT, q_rows)
            if tangent.k is not None:
                gq_rows += block.product(ds, block.of_keys(tangent.k))
            if tangent.q is not None:
                gk_keys += block.product(ds.mT, block.of_queries(tangent.q))
            block.write(gq, gq_rows.mul_(scale))
            block.add_to_keys(gk, gk_keys.mul_(scale))
            block.add_to_keys(gv, block.product_of_any(dp.mT, dout_rows, over_rows=True))
    of_bias = None if gbias is None else gbias.result()
    return gq, gk.to(k.dtype), gv.to(v.dtype), of_bias, gdout, gdlse
