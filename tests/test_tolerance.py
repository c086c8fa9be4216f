# SPDX-License-Identifier: BSD-3-Clause
"""The judge itself: `tolerance` passes what it must, and fails what it must, saying where."""

from __future__ import annotations

import math

import pytest
import torch

import oracle
from cases import Case, normal
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask
from tolerance import assert_bitwise_equal, assert_close, assert_lse_close

SHAPE = (2, 3, 5, 7)
EPS_BF16 = 2.0**-7


def results() -> tuple[torch.Tensor, torch.Tensor]:
    """An exact result, and one that is off by a hundredth of the element's own size."""
    (exact,) = normal(SHAPE, dtype=torch.float64)
    return exact, (exact * 1.01).float()


def test_plain_error_is_allowed_twice():
    exact, plain = results()
    assert_close(plain, exact, plain)
    assert_close((exact * (1 + 0.0199)).float(), exact, plain)


@pytest.mark.parametrize("factor", [1.021, 0.979, 2.0])
def test_more_than_twice_the_plain_error_fails(factor: float):
    exact, plain = results()
    with pytest.raises(AssertionError, match=r"error .* is over the bound"):
        assert_close((exact * factor).float(), exact, plain)


def test_rounding_of_an_exact_result_passes_where_plain_is_exact_by_luck():
    (exact,) = normal(SHAPE, dtype=torch.float64)
    plain = exact.bfloat16()
    exact = plain.double()
    assert_close(plain, exact, plain)
    assert_close((exact * (1 + EPS_BF16 / 2)).bfloat16(), exact, plain)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close((exact * (1 + 4 * EPS_BF16)).bfloat16(), exact, plain)


def test_failure_names_the_worst_element_both_values_and_the_side():
    exact, plain = results()
    ours = plain.clone()
    ours[1, 2, 3, 4] = exact[1, 2, 3, 4] + 5
    with pytest.raises(AssertionError) as failure:
        assert_close(ours, exact, plain)
    text = str(failure.value)
    assert "(1, 2, 3, 4)" in text
    assert repr(ours[1, 2, 3, 4].item()) in text
    assert repr(exact[1, 2, 3, 4].item()) in text
    assert repr(plain[1, 2, 3, 4].double().item()) in text
    assert "above exact" in text
    with pytest.raises(AssertionError, match="below exact"):
        assert_close(torch.where(ours == ours.max(), -ours, ours), exact, plain)


def test_small_query_cannot_hide_behind_a_large_one():
    exact, plain = results()
    exact[:, :, 3] *= 1e-3
    plain = (exact * 1.001).float()
    ours = plain.clone()
    ours[0, 0, 3, 0] += 1e-4  # tiny beside the whole, a tenth of its own query
    with pytest.raises(AssertionError, match=r"relative to its query .*\(0, 0, 3, "):
        assert_close(ours, exact, plain)


def test_single_element_is_no_magnitude_of_its_query():
    exact = torch.tensor([[[[1.0], [1e-4]]]], dtype=torch.float64)
    plain = exact.float()
    assert_close(plain + torch.tensor([[[[0.0], [1e-7]]]]), exact, plain)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(plain + torch.tensor([[[[0.0], [1e-6]]]]), exact, plain)


def test_magnitude_raises_the_floor_for_values_that_cancel():
    exact, plain = torch.full(SHAPE, 1e-6).double(), torch.full(SHAPE, 1e-6)
    ours = plain + 2e-8
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(ours, exact, plain)
    assert_close(ours, exact, plain, magnitude=1.0)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(plain + 1e-6, exact, plain, magnitude=1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_ours_alone_not_finite_fails(value: float):
    exact, plain = results()
    ours = plain.clone()
    ours[0, 1, 2, 3] = value
    with pytest.raises(AssertionError, match=r"in ours alone at 1 of 210 .* \(0, 1, 2, 3\)"):
        assert_close(ours, exact, plain)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_exact_alone_not_finite_fails(value: float):
    exact, plain = results()
    exact[0, 1, 2, 3] = value
    with pytest.raises(AssertionError, match=r"in exact alone at 1 of 210 .* \(0, 1, 2, 3\)"):
        assert_close(plain.clone(), exact, plain)


def test_infinity_of_the_other_sign_fails():
    exact, plain = results()
    exact[0, 0, 0, 0], ours = math.inf, plain.clone()
    ours[0, 0, 0, 0] = -math.inf
    with pytest.raises(AssertionError, match="inf in exact alone"):
        assert_close(ours, exact, plain)


def test_what_is_not_finite_in_both_is_not_compared_and_the_rest_is():
    exact, plain = results()
    ours = plain.clone()
    for row, value in enumerate([math.nan, math.inf, -math.inf]):
        exact[row % 2, row, 0], ours[row % 2, row, 0] = value, value
    assert_close(ours, exact, plain)
    ours[1, 1, 1, 1] += 1
    with pytest.raises(AssertionError, match=r"\(1, 1, 1, 1\)"):
        assert_close(ours, exact, plain)


def test_nan_of_plain_pytorch_allows_nothing():
    """fp16 scores overflow in plain PyTorch: that must not loosen the bound of the rest."""
    exact, plain = results()
    plain[0, 0] = math.nan
    assert_close((exact * 1.01).float(), exact, plain)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close((exact * 1.05).float(), exact, plain)


def test_shapes_and_dtypes_are_compared_first():
    exact, plain = results()
    with pytest.raises(AssertionError, match=r"shape \(2, 3, 5\), not \(2, 3, 5, 7\)"):
        assert_close(plain[..., 0], exact, plain)
    with pytest.raises(AssertionError, match="plain has shape"):
        assert_close(plain, exact, plain[..., :1])
    with pytest.raises(
        AssertionError, match=r"torch.bfloat16, but plain PyTorch has torch.float32"
    ):
        assert_close(plain.bfloat16(), exact, plain)
    with pytest.raises(AssertionError, match=r"shape \(2, 3\), not"):
        assert_lse_close(plain[..., 0, 0], exact, plain)
    with pytest.raises(AssertionError, match=r"torch.float64, but plain"):
        assert_lse_close(plain.double(), exact, plain)


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 3, 0, 4), (1, 1, 1, 0)])
def test_empty_results_pass(shape: tuple[int, ...]):
    empty = torch.empty(shape, dtype=torch.float64)
    assert_close(empty.half(), empty, empty.half())
    assert_lse_close(empty[..., :0].float(), empty[..., :0], empty[..., :0].float())


def test_rows_that_are_zero_everywhere_must_stay_zero():
    exact = torch.zeros(SHAPE, dtype=torch.float64)
    zeros = torch.zeros(SHAPE)
    assert_close(zeros, exact, zeros)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_close(zeros + 1e-20, exact, zeros)


@pytest.mark.parametrize("size", [0.0, 1.0, 300.0])
def test_lse_is_compared_in_ulps(size: float):
    exact = torch.full((2, 3, 5), size, dtype=torch.float64)
    plain = exact.float()
    ulp = 2.0**-23 * max(size, 1.0)
    assert_lse_close((exact + 3 * ulp).float(), exact, plain)
    assert_lse_close((exact + 7 * ulp).float(), exact, (exact + 3 * ulp).float())
    with pytest.raises(AssertionError, match=r"error in ulp .* is over the bound"):
        assert_lse_close((exact + 6 * ulp).float(), exact, plain)
    with pytest.raises(AssertionError, match="over the bound"):
        assert_lse_close((exact - 3 * ulp).float(), exact, plain, ulps=1.0)


def test_lse_of_an_empty_row_must_be_minus_infinity():
    exact = torch.tensor([[1.0, -math.inf]], dtype=torch.float64)
    assert_lse_close(exact.float(), exact, exact.float())
    for wrong in (-1e30, math.inf, math.nan):
        ours = torch.tensor([[1.0, wrong]])
        with pytest.raises(AssertionError, match="alone"):
            assert_lse_close(ours, exact, exact.float())


def test_bitwise_equality_sees_the_sign_of_zero_and_one_bit():
    a = torch.tensor([0.0, 1.0, math.nan])
    assert_bitwise_equal(a, a.clone())
    for index, value in ((0, -0.0), (1, 1 + 2.0**-23), (2, 1.0)):
        b = a.clone()
        b[index] = value
        with pytest.raises(AssertionError, match=rf"1 of 3 elements .*\({index},\)"):
            assert_bitwise_equal(a, b)
    with pytest.raises(AssertionError, match=r"float32 and torch\.float64"):
        assert_bitwise_equal(a, a.double())
    with pytest.raises(AssertionError, match="shapes"):
        assert_bitwise_equal(a, a[:2])


# --- the oracle: the library's reference against a loop written apart from it

ORACLE_CASES = [
    Case("full", 5, 7, D=3, D_v=4, H=4, H_kv=2),
    Case("causal", 9, 6, D=3, mask=CAUSAL),
    Case("causal-more-keys", 4, 11, D=3, B=2, mask=CAUSAL),
    Case("top-left", 4, 11, D=3, mask=CAUSAL_TOP_LEFT),
    Case("top-left-more-queries", 11, 4, D=3, mask=CAUSAL_TOP_LEFT),
    Case("no-keys", 3, 0, D=3, mask=CAUSAL),
    Case("negative", 6, 6, D=3, scale=-0.5, mask=CAUSAL),
    Case("large", 6, 6, D=3, scale=700.0),
]


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.name)
def test_reference_equals_the_definition(case: Case):
    inputs = case.inputs(torch.float64, "cpu", 3)
    ours = oracle._reference(*inputs, case.mask, oracle.default_scale(inputs.q, case.scale))
    due = oracle.by_definition(*inputs, case.mask, case.scale)
    torch.testing.assert_close(ours.out, due.out, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours.lse, due.lse, rtol=1e-13, atol=1e-13)


def test_reference_reads_no_hidden_key_or_value():
    q, k, v = Case("poison", 5, 5, D=3).inputs(torch.float64, "cpu", 3)
    due = oracle.by_definition(q, k, v, CAUSAL)
    k[:, :, 3:], v[:, :, 3:] = math.nan, math.inf
    for compute in (oracle.by_definition, lambda *args: oracle._reference(*args, None)):
        ours = compute(q, k, v, CAUSAL)
        torch.testing.assert_close(ours.out[:, :, :3], due.out[:, :, :3], rtol=1e-13, atol=0)
        assert ours.out[:, :, 3:].isnan().all()


@pytest.mark.parametrize(
    ("mask", "seen"),
    [
        (FULL, [[0, 1, 2], [0, 1, 2]]),
        (CAUSAL, [[0, 1], [0, 1, 2]]),
        (CAUSAL_TOP_LEFT, [[0], [0, 1]]),
        (Mask(left=0, right=0), [[1], [2]]),
        (Mask("top_left", left=0, right=1), [[0, 1], [1, 2]]),
        (Mask(left=1, right=-1), [[0, 1, 2], [1, 2]]),
    ],
)
def test_masks_of_the_oracle_written_out(mask: Mask, seen: list[list[int]]):
    assert [list(mask.keys(q_idx, 2, 3)) for q_idx in range(2)] == seen
    assert [row.nonzero().flatten().tolist() for row in mask.visible(2, 3)] == seen


def test_plain_windowed_attention_is_near_the_exact_one():
    inputs = Case("window", 20, 30, D=5).inputs(torch.float32, "cpu", 5)
    mask = Mask(left=4, right=1)
    plain, exact = oracle.plain(*inputs, mask), oracle.exact(*inputs, mask)
    torch.testing.assert_close(plain.out.double(), exact.out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(plain.lse.double(), exact.lse, rtol=1e-5, atol=1e-6)
