# SPDX-License-Identifier: BSD-3-Clause
"""The drop-in means what torch.nn.functional.scaled_dot_product_attention means."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import oracle
from attend import attend
from cases import normal
from online_attention import scaled_dot_product_attention
from oracle import CAUSAL_TOP_LEFT, FULL
from rows import Target
from tolerance import assert_bitwise_equal, assert_close

Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def torchs(q: Tensor, k: Tensor, v: Tensor, **keywords) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, **keywords)


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    torchs_out: Tensor,
    is_causal=False,
    scale=None,
    enable_gqa=False,
) -> Tensor:
    """In extended precision, of the shape that torch gives it."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    lead = torchs_out.shape[:-2]
    rank_4 = (x.expand(*lead, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    mask = CAUSAL_TOP_LEFT if is_causal else FULL
    return oracle.by_definition(*rank_4, mask, scale).out.view(torchs_out.shape)


def check(target: Target, lead: Shapes, S_q: int, S_kv: int, **keywords) -> None:
    """The drop-in and torch's function on tensors of `lead` + (S, D)."""
    D = target.head_dim
    shapes = [(*dims, length, D) for dims, length in zip(lead, (S_q, S_kv, S_kv), strict=True)]
    q, k, v = normal(*shapes, dtype=target.dtype, device=target.device)
    ours = scaled_dot_product_attention(q, k, v, **keywords)
    exact = torchs(q.double(), k.double(), v.double(), **keywords)
    if target.dtype == torch.float64:
        exact = by_definition(q, k, v, exact, **keywords)
    assert ours.dtype == target.dtype
    assert_close(ours, exact, torchs(q, k, v, **keywords))


RANKS = [(), (3,), (2, 3), (2, 1, 3), (1, 2, 1, 3)]


@pytest.mark.parametrize("lead", RANKS, ids=lambda lead: f"rank{len(lead) + 2}")
@pytest.mark.parametrize("is_causal", [False, True])
def test_every_rank(target: Target, lead: tuple[int, ...], is_causal: bool):
    check(target, (lead, lead, lead), 33, 65, is_causal=is_causal)


BROADCASTS = [
    ((2, 3), (1, 3), (2, 3)),
    ((2, 3), (2, 1), (2, 1)),
    ((1, 3), (2, 3), (2, 1)),
    ((2, 1), (1, 3), (2, 3)),
    ((2, 3), (3,), ()),
    ((), (2, 3), (1, 3)),
    ((4, 2, 3), (2, 3), (1, 1, 1)),
]


@pytest.mark.parametrize("lead", BROADCASTS, ids=str)
def test_dimensions_before_the_last_two_broadcast(target: Target, lead: Shapes):
    check(target, lead, 9, 17, is_causal=True)


@pytest.mark.parametrize(("S_q", "S_kv"), [(1, 7), (7, 1), (5, 70), (70, 5), (65, 64), (64, 65)])
def test_causal_is_aligned_at_the_top_left(target: Target, S_q: int, S_kv: int):
    check(target, ((2, 3),) * 3, S_q, S_kv, is_causal=True)


def test_causal_is_the_top_left_mask_of_the_operator(target: Target):
    D = target.head_dim
    q, k, v = normal((2, 3, 9, D), (2, 3, 66, D), (2, 3, 66, D),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    ours = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_bitwise_equal(ours, attend(q, k, v, CAUSAL_TOP_LEFT).out)


GROUPED = [
    ((2, 6), (2, 3), (2, 3)),
    ((2, 6), (2, 1), (2, 1)),
    ((2, 6), (2, 2), (2, 3)),
    ((2, 6), (2, 6), (2, 2)),
    ((6,), (2,), (2,)),
    ((3, 2, 4), (3, 2, 2), (3, 2, 2)),
    ((3, 2, 4), (1, 2, 2), (3, 1, 2)),
]


@pytest.mark.parametrize("lead", GROUPED, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(target: Target, lead: Shapes, is_causal: bool):
    check(target, lead, 17, 33, enable_gqa=True, is_causal=is_causal)


@pytest.mark.parametrize("scale", [None, 0.3, 0.0, -0.5, 2])
def test_scale(target: Target, scale: float | None):
    check(target, ((2, 3),) * 3, 17, 33, scale=scale)


def test_keyword_order_is_torchs():
    x = torch.randn(1, 2, 5, 8)
    by_position = scaled_dot_product_attention(x, x, x, None, 0.0, True, scale=0.5)
    assert_close(by_position, torchs(x.double(), x.double(), x.double(), is_causal=True, scale=0.5),
                 F.scaled_dot_product_attention(x, x, x, None, 0.0, True, scale=0.5))  # fmt: skip
    by_name = scaled_dot_product_attention(
        query=x, key=x, value=x, attn_mask=None, dropout_p=0, is_causal=True, scale=0.5
    )
    assert_bitwise_equal(by_position, by_name)


@pytest.mark.parametrize("sizes", list(itertools.product([0, 2], [0, 3], [0, 5])), ids=str)
def test_empty_tensors(target: Target, sizes: tuple[int, int, int]):
    B, S_q, S_kv = sizes
    D = target.head_dim
    q, k, v = normal((B, 2, S_q, D), (B, 2, S_kv, D), (B, 2, S_kv, D),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    ours = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert ours.shape == (B, 2, S_q, D)
    if S_kv == 0:
        assert_bitwise_equal(ours, torch.zeros_like(ours))


def test_transposed_projection_is_read_in_place_and_kept_in_order(target: Target):
    x = torch.randn(2, 5, 3 * target.head_dim).to(target.dtype).to(target.device)
    q = x.view(2, 5, 3, target.head_dim).transpose(1, 2)
    out = scaled_dot_product_attention(q, q, q)
    assert out.transpose(1, 2).is_contiguous()


X = torch.ones(2, 3, 5, 8)
REFUSED = {
    "dropout-type": ((X, X, X), {"dropout_p": "0"}, TypeError, "dropout_p must be a number"),
    "causal-type": ((X, X, X), {"is_causal": 1}, TypeError, "is_causal must be True or False"),
    "gqa-type": ((X, X, X), {"enable_gqa": None}, TypeError, "enable_gqa must be True or False"),
    "scale-type": ((X, X, X), {"scale": "1"}, TypeError, "scale must be a number or None"),
    "scale-nan": ((X, X, X), {"scale": math.nan}, ValueError, "scale must be finite"),
    "no-tensor": ((X, None, X), {}, TypeError, r"key must be a torch\.Tensor"),
    "dtype": ((X, X.half(), X), {}, TypeError, "key must have the dtype of query, float32"),
    "integers": ((X.int(), X.int(), X.int()), {}, TypeError, "query must be float16, bfloat16"),
    "rank-1": ((X[0, 0, 0], X, X), {}, ValueError, "query must have at least 2 dimensions"),
    "head-dim": ((X, X[..., :7], X), {}, ValueError, "key must have D = 8 as query, but key"),
    "length": ((X, X, X[:, :, :4]), {}, ValueError, "value must have S_kv = 5 as key, but value"),
    "batch": ((X, X[:, :2], X[:, :2]), {}, ValueError, "broadcastable .*pass enable_gqa=True"),
    "groups": (
        (X, X[:, :2], X[:, :2]),
        {"enable_gqa": True},
        ValueError,
        "H must be a multiple of H_kv, but query has H = 3 heads and key has H_kv = 2",
    ),
    "unequal-groups": (
        (X, X, X[:, :2]),
        {"enable_gqa": True},
        ValueError,
        "heads of query, 3, must be a multiple of those of value, 2",
    ),
}


@pytest.mark.parametrize(("inputs", "keywords", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(inputs, keywords, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        scaled_dot_product_attention(*inputs, **keywords)
    assert scaled_dot_product_attention(X, X, X).shape == X.shape
