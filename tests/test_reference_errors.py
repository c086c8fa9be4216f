# SPDX-License-Identifier: BSD-3-Clause
"""What online_attention.reference refuses, and the sentences it does so with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from online_attention import reference

INF = math.inf
ROUTES = [
    (reference.naive_attention, {}),
    (reference.tiled_attention, {"tile_q": 3, "tile_kv": 2}),
]
Q = torch.zeros(2, 4, 3, 8)
KV = torch.zeros(2, 2, 5, 8)


@pytest.mark.parametrize(
    ("q", "k", "v", "error", "text"),
    [
        ([1.0], KV, KV, TypeError, r"q must be a torch.Tensor, but is a list"),
        (Q, KV.int(), KV, TypeError, r"k must be float16, .* but is torch.int32: convert"),
        (Q, KV, KV.double(), TypeError, r"v must be torch.float32 as q, but is torch.float64"),
        (Q, KV.to("meta"), KV, ValueError, r"k must be on cpu as q, but is on meta: use"),
        (Q[0], KV, KV, ValueError, r"q must have shape \(B, H, S_q, D\), .* \(4, 3, 8\)"),
        (Q, KV[..., :7], KV, ValueError, r"k must have shape .*, here \(2, 2, 5, 8\)"),
        (Q, KV[:1], KV, ValueError, r"k must have shape \(B, H_kv, S_kv, D\), .* \(1, 2, 5, 8\)"),
        (Q, KV, KV[:, :, :4], ValueError, r"v must have shape \(B, H_kv, S_kv, D_v\), here"),
        (Q, KV, KV[:, :1], ValueError, r"v must have .* but its shape is \(2, 1, 5, 8\)"),
        (Q[:, :3], KV, KV, ValueError, r"H must be a multiple of H_kv, but q has H = 3 .* = 2"),
        (Q, KV[:, :0], KV[:, :0], ValueError, r"H must be a multiple of H_kv, .* H_kv = 0"),
        (Q[..., :0], KV[..., :0], KV, ValueError, r"q must have shape .* with D > 0"),
    ],
)
def test_bad_tensors_are_refused_by_name(q: Any, k: Any, v: Any, error: Any, text: str):
    for route, tiles in ROUTES:
        with pytest.raises(error, match=text):
            route(q, k, v, **tiles)


@pytest.mark.parametrize(
    ("keyword", "error", "text"),
    [
        ({"causal": 1}, TypeError, r"causal must be True or False, but is 1"),
        ({"alignment": "left"}, ValueError, r"alignment must be 'top_left' or .* is 'left'"),
        ({"scale": "1"}, TypeError, r"scale must be a number or None, but is '1'"),
        ({"scale": True}, TypeError, r"scale must be a number or None, but is True"),
        ({"scale": INF}, ValueError, r"scale must be finite, but is inf: pass None"),
        ({"scale": math.nan}, ValueError, r"scale must be finite, but is nan"),
    ],
)
def test_bad_keywords_are_refused_by_name(keyword: dict[str, Any], error: Any, text: str):
    for route, tiles in ROUTES:
        with pytest.raises(error, match=text):
            route(Q, KV, KV, **tiles, **keyword)


@pytest.mark.parametrize("name", ["tile_q", "tile_kv"])
def test_bad_tiles_are_refused_by_name(name: str):
    tiles = {"tile_q": 1, "tile_kv": 1}
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but is 0"):
        reference.tiled_attention(Q, KV, KV, **{**tiles, name: 0})
    with pytest.raises(TypeError, match=rf"{name} must be an int, but is 1.5 \(float\)"):
        reference.tiled_attention(Q, KV, KV, **{**tiles, name: 1.5})


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        ("x", TypeError, r"x must be a torch.Tensor, but is a str"),
        (torch.zeros(3, dtype=torch.int64), TypeError, r"x must be float16, .* is torch.int64"),
        (torch.tensor(1.0), ValueError, r"x must have shape \(..., N\), but its shape is \(\)"),
    ],
)
def test_bad_scores_are_refused(x: Any, error: Any, text: str):
    for softmax in (reference.safe_softmax, lambda x: reference.online_softmax(x, 2)):
        with pytest.raises(error, match=text):
            softmax(x)


@pytest.mark.parametrize(("size", "error"), [(0, ValueError), (True, TypeError), (2.0, TypeError)])
def test_bad_block_sizes_are_refused(size: Any, error: Any):
    with pytest.raises(error, match="block_size must be"):
        reference.online_softmax(torch.zeros(3), size)


def test_bad_traffic_is_refused():
    shape = (1, 2, 3, 4)
    with pytest.raises(TypeError, match=r"dtype must be float16, .* but is torch.int8"):
        reference.traffic(shape, shape, shape, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"k must have shape \(B, H_kv, S_kv, D\), .* \(3, 4\)"):
        reference.traffic(shape, (3, 4), shape)
    with pytest.raises(ValueError, match=r"v must have sizes below 2\^31"):
        reference.traffic(shape, shape, (1, 2, 3, 2**31))
    with pytest.raises(ValueError, match="tile_q must be at least 1, but is -4"):
        reference.traffic(shape, shape, shape, tile_q=-4)
