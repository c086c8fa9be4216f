# SPDX-License-Identifier: BSD-3-Clause
"""The same bits from run to run, for any number of threads, and whatever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attend import attend
from cases import Case
from oracle import CAUSAL, Mask
from rows import Target
from tolerance import assert_bitwise_equal

CASES = [
    Case("square", 129, 129, B=3, H=4, H_kv=2, mask=CAUSAL),
    Case("more-queries", 130, 65, B=2, mask=CAUSAL),
    Case("decode", 1, 4099, B=3, H=4, H_kv=2, mask=CAUSAL),
    Case("few-queries", 5, 2053, B=3, H=2, mask=CAUSAL),
    Case("window", 67, 300, B=3, mask=Mask(left=70, right=4)),
]


def assert_same(a, b) -> None:
    assert_bitwise_equal(a.out, b.out)
    assert_bitwise_equal(a.lse, b.lse, "lse")


@pytest.mark.cases(CASES)
@pytest.mark.parametrize("deterministic", [None, False, True])
def test_runs_are_bitwise_equal(target: Target, case: Case, deterministic: bool | None):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    first = attend(*inputs, case.mask, deterministic=deterministic)
    for _ in range(4):
        assert_same(attend(*inputs, case.mask, deterministic=deterministic), first)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.targets(device="cpu")
@pytest.mark.cases(CASES)
def test_number_of_threads_changes_no_bit(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        results.append(attend(*inputs, case.mask))
    for result in results[1:]:
        assert_same(result, results[0])


def check_batch_invariance(target: Target, case: Case, deterministic: bool | None) -> None:
    q, k, v = case.inputs(target.dtype, target.device, target.head_dim)
    group = q.shape[1] // k.shape[1]
    whole = attend(q, k, v, case.mask, deterministic=deterministic)
    for b in range(case.B):
        alone = attend(q[b : b + 1], k[b : b + 1], v[b : b + 1], case.mask,
                       deterministic=deterministic)  # fmt: skip
        assert_bitwise_equal(alone.out[0], whole.out[b])
        assert_bitwise_equal(alone.lse[0], whole.lse[b], "lse")
    one_head = slice(0, 1)
    for h_kv in range(k.shape[1]):
        heads = slice(h_kv * group, (h_kv + 1) * group)
        kv_head = slice(h_kv, h_kv + 1)
        alone = attend(q[one_head, heads], k[one_head, kv_head], v[one_head, kv_head], case.mask,
                       deterministic=deterministic)  # fmt: skip
        assert_bitwise_equal(alone.out, whole.out[one_head, heads])


@pytest.mark.cases(CASES)
def test_result_does_not_depend_on_the_batch(target: Target, case: Case):
    check_batch_invariance(target, case, deterministic=True)


@pytest.mark.targets(device="cpu")
@pytest.mark.cases(CASES)
def test_cpu_result_never_depends_on_the_batch(target: Target, case: Case):
    check_batch_invariance(target, case, deterministic=None)


@pytest.mark.usefixtures("deterministic_mode")
@pytest.mark.cases(CASES)
def test_deterministic_mode_of_torch_is_followed(target: Target, case: Case):
    check_batch_invariance(target, case, deterministic=None)
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    assert_same(attend(*inputs, case.mask), attend(*inputs, case.mask, deterministic=True))


@given(copies=st.integers(1, 40), S_q=st.integers(1, 9), S_kv=st.integers(1, 700))
def test_copies_in_a_batch_are_equal(target: Target, copies: int, S_q: int, S_kv: int):
    case = Case("copies", S_q, S_kv, H=1, mask=CAUSAL)
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    alone = attend(*inputs, CAUSAL, deterministic=True)
    many = attend(*(x.expand(copies, -1, -1, -1) for x in inputs), CAUSAL, deterministic=True)
    assert_bitwise_equal(many.out, alone.out.expand_as(many.out))
    assert_bitwise_equal(many.lse, alone.lse.expand_as(many.lse), "lse")
