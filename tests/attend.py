# SPDX-License-Identifier: BSD-3-Clause
"""Calling the library in a test: outputs poisoned before, results judged by `tolerance` after."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import online_attention
import oracle
from cases import Case, Inputs
from oracle import FULL, Attention, Mask
from rows import Target
from tolerance import assert_close, assert_lse_close

NAN = float("nan")


class Dropout(NamedTuple):
    """The last arguments of the operators."""

    rng: Tensor | None
    p: float


KEEP_ALL = Dropout(None, 0.0)


def poison_allocator(q: Tensor, d_v: int) -> None:
    """Frees NaN-filled blocks of the sizes of out and lse, which the allocator hands out next."""
    rows = q.shape[:3]
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    blocks = [
        torch.full((*rows, d_v), NAN, dtype=q.dtype, device=q.device),
        torch.full(rows, NAN, dtype=lse_dtype, device=q.device),
    ]
    blocks.clear()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = FULL,
    scale: float | None = None,
    deterministic: bool | None = None,
    bias: Tensor | None = None,
    dropout: Dropout = KEEP_ALL,
) -> Attention:
    """By the public function if it takes the mask, else by the operator under it."""
    poison_allocator(q, v.shape[-1])
    is_plain = bias is None and dropout == KEEP_ALL
    if is_plain and mask.alignment == "bottom_right" and (mask.is_full or mask.is_causal):
        return Attention(
            *online_attention.attention(
                q,
                k,
                v,
                causal=mask.is_causal,
                scale=scale,
                return_lse=True,
                deterministic=deterministic,
            )
        )
    factor = oracle.default_scale(q, scale)
    if deterministic is None:  # as the public function does
        deterministic = torch.are_deterministic_algorithms_enabled()
    arguments = (q, k, v, factor, *mask.op_arguments, deterministic)
    return Attention(*torch.ops.online_attention.forward(*arguments, bias, *dropout))


def assert_right(
    ours: Attention,
    inputs: Inputs,
    mask: Mask = FULL,
    scale: float | None = None,
    magnitude: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> None:
    """Out and lse against the exact ones; `magnitude` as in `assert_close`.

    With it, PyTorch may be exact by luck, and so may its lse: then that is off by roundings of the
    sums on the way to a score, which may be larger than the score.
    """
    exact = oracle.exact(*inputs, mask, scale, bias, factors)
    plain = oracle.plain(*inputs, mask, scale, bias, factors)
    assert_close(ours.out, exact.out, plain.out, magnitude=magnitude)
    ulps = 4.0 if magnitude is None else 4 * max(1.0, largest_sum(inputs, scale))
    assert_lse_close(ours.lse, exact.lse, oracle.plain_lse(*inputs, mask, scale, bias), ulps=ulps)


def largest_sum(inputs: Inputs, scale: float | None) -> float:
    """About how large the sums on the way to a score become: its terms are added at random."""
    q, k, _ = (x.double().square() for x in inputs)
    if q.numel() == 0 or k.numel() == 0:
        return 0.0
    squares = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3) @ k.mT
    return abs(oracle.default_scale(inputs.q, scale)) * float(squares.max().sqrt())


def rounding_magnitude(inputs: Inputs, scale: float | None, bias: Tensor | None = None) -> float:
    """What one rounding may move in a result of few elements, where PyTorch may be exact by luck.

    The largest value, and as often as it the largest score, for the types whose scores are rounded
    to their own precision: that rounding is an error of the weight.
    """
    q, k, v = (x.double() for x in inputs)
    largest = float(v.abs().max()) if v.numel() else 1.0
    if inputs.q.element_size() < 4 or q.numel() == 0 or k.numel() == 0:
        return largest
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)
    score = abs(oracle.default_scale(q, scale)) * float((grouped @ k.mT).abs().max())
    return largest * (1 + score + largest_of(bias))


def largest_of(bias: Tensor | None) -> float:
    """The largest number that is added to a score."""
    if bias is None or bias.dtype == torch.bool or not bool(bias.isfinite().any()):
        return 0.0
    return float(bias[bias.isfinite()].abs().max())


def check_case(target: Target, case: Case) -> None:
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    assert_right(attend(*inputs, case.mask, case.scale), inputs, case.mask, case.scale)
