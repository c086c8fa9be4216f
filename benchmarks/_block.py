# SPDX-License-Identifier: BSD-3-Clause
"""A transformer's block around the attention: what a faster one is worth to a model.

Pre-norm, as GPT-2 and most since, without biases:

    x = x + attention(norm(x) qkvᵀ) projectionᵀ
    x = x + gelu(norm(x) widenᵀ) narrowᵀ

Everyone gets the same block, all of it torch's but the attention. q, k and v are views of what one
product has written, (B, S, H, D) in memory. Checked are its output or, with gradients, those of
the input and of every weight, against the same block in fp64; twice the error of the block in the
inputs' dtype with the attention by the definition is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from _cases import Case
from _contenders import TORCH_DTYPES, Call, Contender, Inputs, Tensors
from _reference import relative_error, rounding_floor

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def gradient_names(case: Case) -> tuple[str, ...]:
    return ("dx", *(f"d{name}" for name in case.block_weights))


def make_tensors(case: Case, dtype: str, device: torch.device, seed: int) -> Tensors:
    """x (B, S, E), normal, and the weights: of products such that features keep their size."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(shape: tuple[int, ...], spread: float) -> torch.Tensor:
        drawn = torch.randn(shape, generator=generator, device=device)
        return (drawn * spread).to(TORCH_DTYPES[dtype])

    tensors = [draw((case.batch, case.s_q, case.width), 1.0)]
    for shape in case.block_weights.values():
        is_norm = len(shape) == 1
        drawn = draw(shape, 0.1 if is_norm else 1 / math.sqrt(shape[1]))
        tensors.append(1 + drawn if is_norm else drawn)
    return tuple(tensors)


def project(case: Case, x: torch.Tensor, norm: torch.Tensor, qkv: torch.Tensor) -> Tensors:
    """q, k and v of the block, (B, H, S, D) by strides."""
    widths = (case.width, case.heads_kv * case.d, case.heads_kv * case.d_v)
    parts = F.linear(F.layer_norm(x, norm.shape, norm), qkv).split(widths, dim=-1)
    heads = (case.heads, case.heads_kv, case.heads_kv)
    return tuple(
        p.unflatten(-1, (h, -1)).transpose(1, 2) for p, h in zip(parts, heads, strict=True)
    )


def run_block(case: Case, attend: Attend, tensors: Tensors) -> torch.Tensor:
    x, norm_attention, qkv, projection, norm_network, widen, narrow = tensors
    attended = attend(*project(case, x, norm_attention, qkv))
    x = x + F.linear(attended.transpose(1, 2).flatten(2), projection)
    normed = F.layer_norm(x, norm_network.shape, norm_network)
    return x + F.linear(F.gelu(F.linear(normed, widen)), narrow)


def within_block(contender: Contender) -> Contender:
    """The same attention, timed and checked as a part of the block."""

    def bind(case: Case, tensors: Tensors) -> Call:
        def attend(*qkv: torch.Tensor) -> torch.Tensor:
            return contender.out(contender.bind(case, qkv)())

        return partial(run_block, case, attend, tensors)

    return replace(contender, bind=bind, out=lambda result: result)


def attend_by_definition(
    case: Case, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> torch.Tensor:
    """Scores and softmax in fp32 at least, a head at a time: all of them may not fit."""
    wide = torch.promote_types(q.dtype, torch.float32)
    hidden = torch.ones(case.s_q, case.s_kv, dtype=torch.bool, device=q.device)
    hidden = hidden.triu(1 + case.s_kv - case.s_q) & case.causal
    group = case.heads // case.heads_kv
    outs = []
    for h in range(case.heads):
        scores = q[:, h].to(wide) @ k[:, h // group].to(wide).mT / math.sqrt(case.d)
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1).to(v.dtype)
        outs.append(weights @ v[:, h // group])
    return torch.stack(outs, dim=1)


@dataclass
class BlockReference:
    """fp64 results, all of them."""

    expected: dict[str, torch.Tensor]
    limits: dict[str, float]
    checked: int
    of: int
    unit: str = "blocks"

    def errors(self, found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {name: relative_error(found[name], self.expected[name]) for name in found}


def results_by_definition(
    case: Case, inputs: Inputs, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """The output, or the gradients, of the block with the attention by its definition."""
    tensors = tuple(tensor.detach().to(dtype) for tensor in inputs.tensors)
    attend = partial(attend_by_definition, case)
    if inputs.dout is None:
        return {"out": run_block(case, attend, tensors)}
    for tensor in tensors:
        tensor.requires_grad_()
    with torch.enable_grad():
        out = run_block(case, attend, tensors)
    gradients = torch.autograd.grad(out, tensors, inputs.dout.to(dtype))
    return dict(zip(gradient_names(case), gradients, strict=True))


def make_reference(case: Case, dtype: str, inputs: Inputs) -> BlockReference:
    expected = results_by_definition(case, inputs, torch.float64)
    plain = results_by_definition(case, inputs, TORCH_DTYPES[dtype])
    limits = {
        name: 2 * relative_error(plain[name], expected[name]) + rounding_floor(dtype)
        for name in expected
    }
    return BlockReference(expected, limits, checked=1, of=1)
