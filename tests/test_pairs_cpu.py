# SPDX-License-Identifier: BSD-3-Clause
"""Bias and dropout in the CPU kernels of each instruction set: results, hidden pairs, threads.

Its checks run by each instruction set: see instruction_sets.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attend import KEEP_ALL, Dropout, assert_right, attend, rounding_magnitude
from cases import Inputs, normal
from gradients import assert_right as assert_gradients_right
from gradients import by_operators, cotangents_of
from instruction_sets import for_each_set, run
from oracle import CAUSAL, FULL
from philox import factors_of
from tolerance import assert_bitwise_equal

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NAMES = ("out", "lse", "dq", "dk", "dv")
RNG = torch.tensor([0x123456789ABCDEF, -5])
S_Q, S_KV = 29, 203


def inputs_of(dtype: torch.dtype, S_q: int = S_Q, B: int = 1) -> Inputs:
    """D_v of 32: single and double precision take such values where they lie."""
    return Inputs(*normal((B, 4, S_q, 24), (B, 2, S_KV, 24), (B, 2, S_KV, 32), dtype=dtype))


def biases(dtype: torch.dtype, S_q: int = S_Q) -> list[Tensor]:
    """Boolean, of both float types, along the keys and across them."""
    drawn, across = normal((1, 4, S_q, S_KV), (1, 1, S_KV, S_q), dtype=dtype, seed=9)
    drawn = drawn.masked_fill(drawn > 1, -math.inf)
    return [drawn < 0.5, drawn, across.mT, drawn[:, :, :1].float()]


def results(
    inputs: Inputs, bias: Tensor | None = None, dropout: Dropout = KEEP_ALL
) -> tuple[Tensor, ...]:
    ours = attend(*inputs, CAUSAL, bias=bias, dropout=dropout)
    return *ours, *by_operators(inputs, cotangents_of(inputs), CAUSAL, None, bias, dropout)


def check_accuracy() -> None:
    factors = factors_of(RNG, 0.3, 1, 4, S_Q, S_KV)
    for dtype in DTYPES:
        inputs = inputs_of(dtype)
        cotangents = cotangents_of(inputs)
        for mask, bias in zip((FULL, CAUSAL, CAUSAL, FULL), biases(dtype), strict=True):
            dropout = Dropout(RNG, 0.3)
            ours = attend(*inputs, mask, bias=bias, dropout=dropout)
            magnitude = float(factors.max()) * rounding_magnitude(inputs, None, bias)
            assert_right(ours, inputs, mask, None, magnitude, bias, factors)
            gradients = by_operators(inputs, cotangents, mask, None, bias, dropout)
            assert_gradients_right(gradients, inputs, cotangents, mask, None, bias, factors)


def check_hidden() -> None:
    """NaN in keys, values and queries that the bias hides changes no bit of any result."""
    for dtype in DTYPES:
        q, k, v = inputs_of(dtype)
        for bias in biases(dtype)[:2]:
            hidden = torch.zeros(1, 4, S_Q, S_KV, dtype=torch.bool)
            hidden[..., ::5] = hidden[:, :, 11] = True
            bias = bias.masked_fill(hidden, False if bias.dtype == torch.bool else -math.inf)
            clean = results(Inputs(q, k, v), bias)
            bad = Inputs(q.clone(), k.clone(), v.clone())
            bad.q[:, :, 11] = math.nan
            bad.k[:, :, ::5], bad.v[:, :, ::5] = math.nan, math.inf
            for name, a, b in zip(NAMES, results(bad, bias), clean, strict=True):
                assert_bitwise_equal(a, b, name)


def check_boolean_is_a_mask() -> None:
    """The boolean form of a causal mask gives its results, bit by bit."""
    visible = CAUSAL.visible(S_Q, S_KV)[None, None]
    for dtype in DTYPES:
        inputs = inputs_of(dtype)
        for dropout in (KEEP_ALL, Dropout(RNG, 0.1)):
            masked = attend(*inputs, CAUSAL, dropout=dropout)
            ours = attend(*inputs, bias=visible, dropout=dropout)
            for name, a, b in zip(NAMES, ours, masked, strict=False):
                assert_bitwise_equal(a, b, name)


CHECKS = (check_accuracy, check_hidden, check_boolean_is_a_mask)
test_widest_instruction_set, test_instruction_set = for_each_set(__file__, CHECKS)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("dtype", DTYPES)
def test_number_of_threads_and_batch_change_no_bit(dtype: torch.dtype) -> None:
    inputs, bias = inputs_of(dtype, 130, B=2), biases(dtype, 130)[1]
    torch.set_num_threads(1)
    due = results(inputs, bias, Dropout(RNG, 0.2))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        for name, a, b in zip(NAMES, results(inputs, bias, Dropout(RNG, 0.2)), due, strict=True):
            assert_bitwise_equal(a, b, f"{name} with {threads} threads")
    alone = by_operators(Inputs(*(x[:1] for x in inputs)), cotangents_of(inputs)._replace(
        dout=cotangents_of(inputs).dout[:1], dlse=cotangents_of(inputs).dlse[:1]),
        CAUSAL, None, bias, Dropout(RNG, 0.2))  # fmt: skip
    for name, a, b in zip(NAMES[2:], alone, due[2:], strict=True):
        assert_bitwise_equal(a, b[:1], f"{name} of one batch element")


if __name__ == "__main__":
    run(CHECKS)
