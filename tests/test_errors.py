# SPDX-License-Identifier: BSD-3-Clause
"""Every refusal is a sentence: the argument, what it must be, what it is, what to do."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import online_attention
from attend import attend
from online_attention import attention
from tolerance import assert_bitwise_equal

Q = torch.ones(2, 4, 5, 8)
K = torch.ones(2, 2, 7, 8)
V = torch.ones(2, 2, 7, 6)

# Broadcast, so that sizes beyond every limit take no memory.
ONE = torch.ones(1, 1, 1, 1)
MANY = ONE.expand(2**16, 2**15, 1, 1)
LONG = ONE.expand(1, 1, 2**31 - 1023, 1)

TENSORS = {
    "too-many-heads": (MANY, MANY, MANY, ValueError, r"B \* H must be below 2\^31, but q has"),
    "too-many-keys": (ONE, LONG, LONG, ValueError, "k must have .* at most 2147482624, but"),
    "too-many-queries": (LONG, ONE, ONE, ValueError, "q must have .* at most 2147482624, but"),
    "q-rank-3": (Q[0], K, V, ValueError, r"q must have 4 dimensions \(B, H, S_q, D\).*\(4, 5, 8\)"),
    "k-rank-5": (Q, K[None], V, ValueError, r"k must have 4 dimensions \(B, H_kv, S_kv, D\)"),
    "v-rank-0": (Q, K, V[0, 0, 0, 0], ValueError, r"v must have 4 dimensions .*shape is \(\)"),
    "k-dtype": (Q, K.half(), V, TypeError, "k must have the dtype of q, float32, but is float16"),
    "v-dtype": (Q, K, V.double(), TypeError, "v must have the dtype of q, float32, but is float64"),
    "q-integers": (Q.int(), K.int(), V.int(), TypeError, "q must be float16, .* but is int32"),
    "v-bool": (Q, K, V.bool(), TypeError, "v must be float16, .* but is bool"),
    "q-complex": (Q.to(torch.complex64), K, V, TypeError, "q must be .* but is complex64"),
    "q-sparse": (Q.to_sparse(), K, V, TypeError, r"q must be a dense tensor.*to_dense"),
    "k-batch": (Q, K[:1], V[:1], ValueError, r"k must have B = 2 as q, but k.shape\[0\] is 1"),
    "v-batch": (Q, K, V[:1], ValueError, r"v must have B = 2 as q, but v.shape\[0\] is 1"),
    "k-head-dim": (Q, K[..., :7], V, ValueError, r"k must have D = 8 as q, but k.shape\[3\] is 7"),
    "v-heads": (Q, K, V[:, :1], ValueError, r"v must have H_kv = 2 as k, but v.shape\[1\] is 1"),
    "v-length": (Q, K, V[:, :, :6], ValueError, r"v must have S_kv = 7 as k, but v.shape\[2\]"),
    "groups": (Q[:, :3], K, V, ValueError, "H must be a multiple of H_kv.* H = 3 .* H_kv = 2"),
    "fewer-heads": (Q[:, :1], K, V, ValueError, "H must be a multiple of H_kv.* H = 1 .*"),
    "no-kv-heads": (Q, K[:, :0], V[:, :0], ValueError, "H must be a multiple of H_kv.* H_kv = 0"),
    "no-head-dim": (Q[..., :0], K[..., :0], V, ValueError, "q must have a last dimension of at"),
    "no-value-dim": (Q, K, V[..., :0], ValueError, "v must have a last dimension of at least 1"),
    "q-list": (Q.tolist(), K, V, TypeError, r"q must be a torch.Tensor.*as_tensor"),
    "k-none": (Q, None, V, TypeError, r"k must be a torch.Tensor, but is None"),
    "v-numpy": (Q, K, V.numpy(), TypeError, r"v must be a torch.Tensor, but is ndarray"),
    "meta": (Q.to("meta"), K.to("meta"), V.to("meta"), NotImplementedError, "q must be on .* meta"),
    "k-meta": (Q, K.to("meta"), V, Exception, "k must be on .*, but is on meta.*move it"),
}  # fmt: skip

KEYWORDS = {
    "scale-nan": ({"scale": math.nan}, ValueError, "scale must be finite, but is nan"),
    "scale-inf": ({"scale": -math.inf}, ValueError, "scale must be finite, but is -inf"),
    "scale-text": ({"scale": "1"}, TypeError, "scale must be a number or None, but is '1'"),
    "scale-bool": ({"scale": True}, TypeError, "scale must be a number or None, but is True"),
    "scale-tensor": ({"scale": torch.ones(1)}, TypeError, "scale must be a number or None"),
    "scale-complex": ({"scale": 1j}, TypeError, "scale must be a number or None"),
    "causal-int": ({"causal": 1}, TypeError, r"causal must be True or False, but is 1 \(int\)"),
    "causal-none": ({"causal": None}, TypeError, "causal must be True or False, but is None"),
    "lse-text": ({"return_lse": "yes"}, TypeError, "return_lse must be True or False"),
    "deterministic": ({"deterministic": 0}, TypeError, "deterministic must be True or False"),
    "softcap-text": ({"softcap": "30"}, TypeError, "softcap must be a number"),
    "dropout-none": ({"dropout_p": None}, TypeError, "dropout_p must be a number"),
    "dropout-one": ({"dropout_p": 1}, ValueError, "dropout_p must be at least 0 and below 1, but"),
    "dropout-negative": ({"dropout_p": -0.1}, ValueError, "dropout_p must be .* but is -0.1"),
    "dropout-nan": ({"dropout_p": math.nan}, ValueError, "dropout_p must be .* but is nan"),
    "dropout-bool": ({"dropout_p": True}, TypeError, "dropout_p must be a number, but is True"),
    "bias-list": ({"bias": [0.0]}, TypeError, r"bias must be a torch.Tensor, but is \[0.0\]"),
    "bias-shape": (
        {"bias": torch.ones(3, 5, 7)},
        ValueError,
        r"bias must be broadcastable to \(B, H, S_q, S_kv\) = \(2, 4, 5, 7\), but .*\(3, 5, 7\)",
    ),
    "bias-rank": ({"bias": torch.ones(1, 1, 1, 5, 7)}, ValueError, r"bias must be broadcastable"),
    "bias-heads": ({"bias": torch.ones(2, 5, 7)}, ValueError, "make each size 1 or equal"),
    "bias-half": ({"bias": Q.half()}, TypeError, "bias must be boolean, float32, but is float16"),
    "bias-int": ({"bias": torch.ones(7).int()}, TypeError, "bias must be .* but is int32: convert"),
    "bias-sparse": ({"bias": torch.ones(5, 7).to_sparse()}, TypeError, "bias must be a dense"),
    "bias-meta": ({"bias": torch.ones(7, device="meta")}, ValueError, "bias must be on the device"),
    "window": ({"window": (3, 0)}, NotImplementedError, "window is not built yet"),
    "softcap": ({"softcap": 30.0}, NotImplementedError, "softcap is not built yet"),
    "alibi": ({"alibi_slopes": torch.ones(4)}, NotImplementedError, "alibi_slopes is not built"),
    "sinks": ({"sinks": torch.ones(4)}, NotImplementedError, "sinks is not built yet"),
}


def assert_is_a_sentence(text: str) -> None:
    assert text.endswith("."), text
    assert not re.search(r"\.(cpp|h|cu|py)\b|::|Position:|Declaration:", text), text


@pytest.mark.parametrize(("q", "k", "v", "error", "text"), TENSORS.values(), ids=TENSORS)
def test_tensors_that_are_refused(q, k, v, error: type[Exception], text: str):
    with pytest.raises(error, match=text) as refusal:
        attention(q, k, v)
    assert_is_a_sentence(str(refusal.value))
    assert_is_a_sentence(online_attention.explain(q, k, v))
    assert attention(Q, K, V).shape == (2, 4, 5, 6)  # the next call works


@pytest.mark.parametrize(("keywords", "error", "text"), KEYWORDS.values(), ids=KEYWORDS)
def test_keywords_that_are_refused(keywords, error: type[Exception], text: str):
    with pytest.raises(error, match=text) as refusal:
        attention(Q, K, V, **keywords)
    assert_is_a_sentence(str(refusal.value))
    assert_is_a_sentence(online_attention.explain(Q, K, V, **keywords))
    assert attention(Q, K, V).shape == (2, 4, 5, 6)


def test_keywords_are_keywords():
    with pytest.raises(TypeError, match="positional"):
        attention(Q, K, V, True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        attention(Q, K, V, is_causal=True)


@pytest.mark.parametrize("unit", [0, 0.0, -0.0])
def test_keywords_that_ask_for_nothing_are_taken(unit: float):
    due = attention(Q, K, V)
    ours = attention(Q, K, V, window=None, softcap=unit, bias=None, alibi_slopes=None, sinks=None,
                     dropout_p=unit, deterministic=None)  # fmt: skip
    assert_bitwise_equal(ours, due)


@pytest.mark.skipif(
    any(row.device == "cuda" for row in online_attention.supported()),
    reason="this build holds CUDA kernels",
)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_tensor_on_a_build_without_cuda():
    with pytest.raises(NotImplementedError, match=r"this build .* holds no CUDA kernels"):
        attention(Q.cuda(), K.cuda(), V.cuda())


@pytest.mark.cuda
@pytest.mark.targets(device="cuda")
@pytest.mark.parametrize("which", [0, 1, 2])
def test_tensors_on_two_devices(target, which: int):
    inputs = [x.to(target.device, target.dtype) for x in (Q, K, V)]
    inputs[which] = inputs[which].cpu()
    with pytest.raises(ValueError, match="must be on the device of q") as refusal:
        attention(*inputs)
    assert_is_a_sentence(str(refusal.value))


# --- the operator itself, past the Python functions

forward = torch.ops.online_attention.forward
SETTINGS = (1.0, 1, -1, -1, False)

OPERATOR = {
    "too-many-heads": ((MANY, MANY, MANY, *SETTINGS), r"B \* H must be below 2\^31"),
    "too-many-keys": ((ONE, LONG, LONG, *SETTINGS), "must be at most 2147482624, but one of them"),
    "rank": ((Q[0], K, V, *SETTINGS), "q must have 4 dimensions"),
    "k-batch": ((Q, K[:1], V, *SETTINGS), r"k.shape\[0\] must be B = 2"),
    "v-batch": ((Q, K, V[:1], *SETTINGS), r"v.shape\[0\] must be B = 2"),
    "k-head-dim": ((Q, K[..., :3], V, *SETTINGS), r"k.shape\[3\] must be D = 8"),
    "v-heads": ((Q, K, V[:, :1], *SETTINGS), r"v.shape\[1\] must be H_kv = 2"),
    "v-length": ((Q, K, V[:, :, :1], *SETTINGS), r"v.shape\[2\] must be S_kv = 7"),
    "groups": ((Q[:, :3], K, V, *SETTINGS), "H must be a multiple of H_kv"),
    "no-kv-heads": ((Q, K[:, :0], V[:, :0], *SETTINGS), "H must be a multiple of H_kv"),
    "no-head-dim": ((Q[..., :0], K[..., :0], V, *SETTINGS), "D and D_v, .* must be at least 1"),
    "dtype": ((Q.int(), K.int(), V.int(), *SETTINGS), "q must be float16, bfloat16"),
    "k-dtype": ((Q, K.half(), V, *SETTINGS), "k must have the dtype of q"),
    "v-dtype": ((Q, K, V.half(), *SETTINGS), "v must have the dtype of q"),
    "scale": ((Q, K, V, math.nan, 1, -1, -1, False), "scale must be a finite number"),
    "alignment": ((Q, K, V, 1.0, 2, -1, -1, False), "alignment must be 0 .* or 1 .*, not 2"),
    "window-left": ((Q, K, V, 1.0, 1, -2, -1, False), "window_left and window_right must be -1"),
    "window-right": ((Q, K, V, 1.0, 1, -1, -9, False), "window_left and window_right must be -1"),
}


@pytest.mark.parametrize(("arguments", "text"), OPERATOR.values(), ids=OPERATOR)
def test_operator_refuses_what_it_cannot_run(arguments, text: str):
    with pytest.raises(ValueError, match=text):
        forward(*arguments)
    assert forward(Q, K, V, *SETTINGS)[0].shape == (2, 4, 5, 6)


SHAPES = st.lists(st.integers(0, 4), min_size=0, max_size=5)


def is_problem(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if not q.dim() == k.dim() == v.dim() == 4:
        return False
    fits = q.shape[0] == k.shape[0] and q.shape[3] == k.shape[3] and k.shape[:3] == v.shape[:3]
    H, H_kv = q.shape[1], k.shape[1]
    divides = H == 0 if H_kv == 0 else H % H_kv == 0
    return fits and divides and q.shape[3] > 0 and v.shape[3] > 0


@given(shapes=st.tuples(SHAPES, SHAPES, SHAPES), settings=st.tuples(*[st.integers(-3, 5)] * 3))
def test_operator_computes_or_refuses(shapes, settings):
    q, k, v = (torch.ones(shape) for shape in shapes)
    alignment, left, right = settings
    if is_problem(q, k, v) and alignment in (0, 1) and left >= -1 and right >= -1:
        out, _ = forward(q, k, v, 1.0, alignment, left, right, False)
        assert out.shape == (*q.shape[:3], v.shape[3])
        return
    with pytest.raises(ValueError, match=r"\.$"):
        forward(q, k, v, 1.0, alignment, left, right, False)


@given(B=st.integers(0, 2), H=st.integers(0, 6), H_kv=st.integers(0, 4), S=st.integers(0, 3),
       D=st.integers(0, 3), D_v=st.integers(0, 3))  # fmt: skip
def test_operator_and_function_refuse_the_same(B, H, H_kv, S, D, D_v):
    q, k, v = torch.ones(B, H, S, D), torch.ones(B, H_kv, S, D), torch.ones(B, H_kv, S, D_v)
    if is_problem(q, k, v):
        assert attend(q, k, v).out.shape == (B, H, S, D_v)
        return
    with pytest.raises(ValueError, match=r"at least 1|multiple of H_kv"):
        attention(q, k, v)
    with pytest.raises(ValueError, match=r"at least 1|multiple of H_kv"):
        forward(q, k, v, *SETTINGS)
