# SPDX-License-Identifier: BSD-3-Clause
"""Gradients of `sum(out * dout) + sum(lse * dlse)`: ours, the exact ones, and plain PyTorch's."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import online_attention
from attend import KEEP_ALL, Dropout, largest_of, poison_allocator
from cases import Case, Inputs, normal
from online_attention import autograd
from oracle import FULL, Attention, Mask, default_scale, pairs
from rows import Target
from tolerance import assert_close


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor


class Cotangents(NamedTuple):
    dout: Tensor | None
    dlse: Tensor | None


def cotangents_of(inputs: Inputs, seed: int = 1, which: str = "both") -> Cotangents:
    """Drawn ones for out, lse or both."""
    q, _, v = inputs
    rows = tuple(q.shape[:3])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    device = q.device.type
    (dout,) = normal((*rows, v.shape[3]), dtype=q.dtype, device=device, seed=seed)
    (dlse,) = normal(rows, dtype=wide, device=device, seed=seed + 1)
    return Cotangents(dout if which != "lse" else None, dlse if which != "out" else None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = FULL,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Attention:
    """Differentiable, by the public function if it takes the mask, else by what is under it."""
    if mask.alignment == "bottom_right" and (mask.is_full or mask.is_causal):
        settings = {"causal": mask.is_causal, "scale": scale, "deterministic": deterministic}
        return Attention(*online_attention.attention(q, k, v, return_lse=True, **settings))
    return Attention(*autograd.attention(q, k, v, scale, *mask.op_arguments, deterministic))


def differentiate(
    inputs: Inputs,
    cotangents: Cotangents,
    mask: Mask = FULL,
    scale: float | None = None,
    deterministic: bool | None = None,
) -> Gradients:
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = attend(*leaves, mask, scale, deterministic)
    pairs = [(y, dy) for y, dy in zip(results, cotangents, strict=True) if dy is not None]
    for x in inputs:
        poison_allocator(x, x.shape[-1])
    outputs, grad_outputs = zip(*pairs, strict=True)
    return Gradients(*torch.autograd.grad(outputs, leaves, grad_outputs))


def by_operators(
    inputs: Inputs,
    cotangents: Cotangents,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    dropout: Dropout = KEEP_ALL,
) -> Gradients:
    """What the operator `backward` makes of the results of `forward`, deterministically."""
    attention = torch.ops.online_attention
    settings = (scale, *mask.op_arguments, True)
    out, lse = attention.forward(*inputs, *settings, bias, *dropout)
    dout = torch.zeros_like(out) if cotangents.dout is None else cotangents.dout
    for x in inputs:
        poison_allocator(x, x.shape[-1])
    needs = (True, True, True)
    arguments = (dout, cotangents.dlse, *inputs, out, lse, *settings, *needs, bias, *dropout)
    return Gradients(*attention.backward(*arguments))


def plain(
    inputs: Inputs,
    cotangents: Cotangents,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> Gradients:
    """PyTorch's autograd over PyTorch's arithmetic in the dtype of the inputs."""
    q, k, v = (x.detach().requires_grad_() for x in inputs)
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    visible, added = pairs(q, k, mask, bias)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ keys.mT * default_scale(q, scale)).to(wide) + added.to(wide)
    is_empty = ~visible.any(-1, keepdim=True)
    scores = scores.masked_fill(~visible & ~is_empty, -math.inf)
    p = torch.softmax(scores, -1).masked_fill(~visible, 0)
    p = (p if factors is None else p * factors.to(wide)).to(q.dtype)
    out, lse = p @ values, torch.logsumexp(scores, -1).masked_fill(is_empty[..., 0], 0)
    loss = q.new_zeros((), dtype=wide)
    dout, dlse = cotangents
    if dout is not None:
        loss = loss + (out * dout).sum(dtype=wide)
    if dlse is not None:
        loss = loss + (lse * dlse.masked_fill(is_empty[..., 0], 0)).sum()
    found = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
    return Gradients(*(torch.zeros_like(x) if g is None else g
                       for x, g in zip((q, k, v), found, strict=True)))  # fmt: skip


def exact(
    inputs: Inputs,
    cotangents: Cotangents,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> tuple[Gradients, tuple[float, float, float]]:
    """(E25)-(E31), and the size of the terms that were added up for each of them.

    In extended precision for fp64 inputs, else in fp64; one head at a time, hidden pairs left out.
    """
    q = inputs.q
    Wide = np.longdouble if q.dtype == torch.float64 else np.float64
    factor = Wide(default_scale(q, scale))
    rows = tuple(q.shape[:3])
    given = (
        *inputs,
        q.new_zeros((*rows, inputs.v.shape[3])) if cotangents.dout is None else cotangents.dout,
        q.new_zeros(rows) if cotangents.dlse is None else cotangents.dlse,
    )
    wq, wk, wv, wdout, wdlse = (x.detach().double().cpu().numpy().astype(Wide) for x in given)
    results = [np.zeros(x.shape, Wide) for x in (wq, wk, wv)]
    terms = [np.zeros(x.shape, Wide) for x in (wq, wk, wv)]
    shown, added = (x.cpu().numpy() for x in pairs(q, inputs.k, mask, bias))
    kept = np.ones(shown.shape) if factors is None else factors.double().cpu().numpy()
    group = rows[1] // wk.shape[1] if wk.shape[1] else 1
    for b, h in np.ndindex(*rows[:2]):
        kv = b, h // group
        hidden, z = ~shown[b, h], kept[b, h]
        if hidden.all():
            continue
        scores = np.where(hidden, -np.inf, factor * (wq[b, h] @ wk[kv].T) + added[b, h])
        largest = scores.max(-1, keepdims=True)
        p = np.exp(scores - np.where(largest == -np.inf, 0, largest))
        p = p / np.maximum(p.sum(-1, keepdims=True), np.finfo(Wide).tiny)
        dp = z * (wdout[b, h] @ wv[kv].T)
        delta = (p * dp).sum(-1, keepdims=True) - wdlse[b, h][:, None]
        ds = factor * p * (dp - delta)
        sizes = abs(factor) * p * (abs(dp) + (p * abs(dp)).sum(-1, keepdims=True) + abs(delta))
        results[0][b, h] = ds @ wk[kv]
        results[1][kv] += ds.T @ wq[b, h]
        results[2][kv] += (z * p).T @ wdout[b, h]
        terms[0][b, h] = sizes @ abs(wk[kv])
        terms[1][kv] += sizes.T @ abs(wq[b, h])
        terms[2][kv] += (z * p).T @ abs(wdout[b, h])
    found = (torch.from_numpy(x.astype(np.float64)).to(q.device) for x in results)
    dq, dk, dv = (float(x.max(initial=0)) for x in terms)
    return Gradients(*found), (dq, dk, dv)


def weight_error(inputs: Inputs, scale: float | None, bias: Tensor | None = None) -> float:
    """How many roundings a weight 2^(s2 - L log2 e) may be off by: the largest score and lse.

    PyTorch makes the same, but may be exact by luck where the terms are few. The types whose scores
    are computed in float32 have its lse, and its rounding: a small part of theirs.
    """
    q, k, _ = (x.double() for x in inputs)
    if q.numel() == 0 or k.numel() == 0:
        return 1.0
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    largest = abs(default_scale(q, scale)) * float((grouped @ k.mT).abs().max())
    largest += largest_of(bias)
    roundings = 2 * (1 + largest + math.log(k.shape[2]))
    if inputs.q.element_size() >= 4:
        return roundings
    eps_ratio = torch.finfo(torch.float32).eps / torch.finfo(inputs.q.dtype).eps
    return max(1.0, roundings * eps_ratio)


def assert_right(
    ours: Gradients,
    inputs: Inputs,
    cotangents: Cotangents,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """Each of dq, dk and dv against the exact one, by PyTorch's error in the same dtype."""
    due, magnitudes = exact(inputs, cotangents, mask, scale, bias, factors)
    theirs = plain(inputs, cotangents, mask, scale, bias, factors)
    rounding = weight_error(inputs, scale, bias)
    for name, mine, x, other, magnitude in zip(
        Gradients._fields, ours, due, theirs, magnitudes, strict=True
    ):
        assert_close(mine, x, other, magnitude=magnitude * rounding, what=name)


def check_case(target: Target, case: Case, which: str = "both", seed: int = 0) -> None:
    inputs = case.inputs(target.dtype, target.device, target.head_dim, seed)
    cotangents = cotangents_of(inputs, seed + 1, which)
    ours = differentiate(inputs, cotangents, case.mask, case.scale)
    assert_right(ours, inputs, cotangents, case.mask, case.scale)
