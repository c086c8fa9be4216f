# SPDX-License-Identifier: BSD-3-Clause
"""How the Hopper backward kernels sum dQ (csrc/cuda/hopper/backward_dq.cuh and, for wide heads,
wide_backward_queries.cuh): key tiles in order, each waiting for the one before, or in any order.

The other half-precision rows run the same tests, which hold for any kernel.
"""

from __future__ import annotations

import pytest
import torch

from cases import Case
from gradients import Gradients, assert_right, cotangents_of, differentiate
from oracle import CAUSAL, CAUSAL_TOP_LEFT, Mask
from rows import Target
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.targets(dtypes=(torch.float16, torch.bfloat16), device="cuda")

CASES = [
    *[
        Case(f"d{D}-{name}-{S_q}-{S_kv}", S_q, S_kv, D=D, H=2 * group, H_kv=2, mask=mask)
        for D in (64, 72, 128, 192, 248)
        for name, S_q, S_kv, group, mask in [
            ("full", 321, 400, 1, Mask()),
            ("full", 200, 1400, 2, Mask()),
            ("causal", 500, 500, 2, CAUSAL),
            ("causal", 1300, 1300, 1, CAUSAL),
            ("top-left", 700, 300, 1, CAUSAL_TOP_LEFT),  # key tiles without queries follow
            ("top-left", 130, 900, 1, CAUSAL_TOP_LEFT),
            ("window", 900, 900, 3, Mask(left=200, right=30)),
            ("one-sided", 400, 600, 1, Mask(left=100)),
        ]
    ],
    Case("empty-rows", 900, 260, D=128, H=3, mask=CAUSAL),  # query tiles that see no key
    Case("values-narrower", 300, 700, D=128, D_v=64, H=2, mask=CAUSAL),
    Case("wide-empty-rows", 900, 260, D=192, H=3, mask=CAUSAL),
    Case("wide-values-narrower", 300, 700, D=192, D_v=128, H=4, H_kv=2, mask=CAUSAL),
    Case("wide-values-narrower-full", 500, 700, D=192, D_v=128, H=4, H_kv=2),
]
LONG = [
    Case("full", 1100, 2300, D=128, H=4, H_kv=2),
    Case("causal", 2300, 2300, D=64, H=4, H_kv=2, mask=CAUSAL),
    Case("causal-wide", 2300, 2300, D=128, H=5, mask=CAUSAL),
    Case("window", 3000, 3000, D=128, H=2, mask=Mask(left=500, right=0)),
    Case("wide-full", 1100, 2300, D=256, H=4, H_kv=2),
    Case("wide-causal", 2300, 2300, D=192, H=6, H_kv=2, mask=CAUSAL),
    Case("wide-window", 2300, 2300, D=192, D_v=128, H=2, mask=Mask(left=500, right=0)),
]


def assert_same(a: Gradients, b: Gradients) -> None:
    for name, x, y in zip(Gradients._fields, a, b, strict=True):
        assert_bitwise_equal(x, y, name)


@pytest.mark.cases(CASES)
@pytest.mark.parametrize("deterministic", [False, True])
def test_result(target: Target, case: Case, deterministic: bool):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    ours = differentiate(inputs, cotangents, case.mask, None, deterministic)
    assert_right(ours, inputs, cotangents, case.mask)


@pytest.mark.cases(LONG)
def test_a_hundred_runs_beside_another_stream(target: Target, case: Case):
    """The other stream's blocks take places away, and have counters of their own."""
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    first = differentiate(inputs, cotangents, case.mask, None, True)
    other = torch.cuda.Stream()
    torch.cuda.synchronize()
    for run in range(100):
        if run % 2:
            with torch.cuda.stream(other):
                beside = differentiate(inputs, cotangents, case.mask, None, True)
        assert_same(differentiate(inputs, cotangents, case.mask, None, True), first)
        if run % 2:
            other.synchronize()
            assert_same(beside, first)


@pytest.mark.cases(LONG)
def test_in_any_order_dq_is_off_by_its_last_bit(target: Target, case: Case):
    """Sums in float32 differ by much less than a 16-bit number can tell: one rounding, at most."""
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    first = differentiate(inputs, cotangents, case.mask, None, False)
    bound = torch.finfo(target.dtype).eps * first.dq.float().abs().max()
    for _ in range(20):
        again = differentiate(inputs, cotangents, case.mask, None, False)
        assert (again.dq.float() - first.dq.float()).abs().max() <= bound
        assert_bitwise_equal(again.dk, first.dk, "dk")
        assert_bitwise_equal(again.dv, first.dv, "dv")


@pytest.mark.cases(LONG)
def test_deterministic_gradients_are_those_of_one_batch(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    cotangents = cotangents_of(inputs)
    due = differentiate(inputs, cotangents, case.mask, None, True)
    many = [torch.cat([x * 0.5, x, x * 2]) for x in (*inputs, *cotangents)]
    many = [x.contiguous() for x in many]
    whole = differentiate(
        type(inputs)(*many[:3]), type(cotangents)(*many[3:]), case.mask, None, True
    )
    assert_same(Gradients(*(x[1:2] for x in whole)), due)
