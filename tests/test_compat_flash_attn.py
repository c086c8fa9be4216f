# SPDX-License-Identifier: BSD-3-Clause
"""flash-attn's functions: the same signatures, layout and conventions, ours inside."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import online_attention.compat.flash_attn as flash_attn
import oracle
from cases import normal
from online_attention import attention
from oracle import CAUSAL, FULL, Mask
from rows import Target
from tolerance import assert_bitwise_equal, assert_close, assert_lse_close

ONE_TYPE_EACH = {"dtypes": (torch.float32, torch.bfloat16)}

DENSE = (
    "dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
    "alibi_slopes=None, deterministic=False, return_attn_probs=False"
)
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
SIGNATURES = {
    "flash_attn_func": f"(q, k, v, {DENSE})",
    "flash_attn_kvpacked_func": f"(q, kv, {DENSE})",
    "flash_attn_qkvpacked_func": f"(qkv, {DENSE})",
    "flash_attn_varlen_func": f"(q, k, v, {LENGTHS}, {DENSE}, block_table=None)",
    "flash_attn_varlen_kvpacked_func": f"(q, kv, {LENGTHS}, {DENSE})",
    "flash_attn_varlen_qkvpacked_func": f"(qkv, cu_seqlens, max_seqlen, {DENSE})",
    "flash_attn_with_kvcache": (
        "(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, "
        "cache_seqlens=None, cache_batch_idx=None, cache_leftpad=None, block_table=None, "
        "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, "
        "rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False)"
    ),
}


def test_all_functions_are_there():
    assert sorted(flash_attn.__all__) == sorted(SIGNATURES)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_are_those_of_version_2_8(name: str):
    signature = inspect.signature(getattr(flash_attn, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def inputs_of(
    target: Target, S_q: int, S_k: int, H: int = 2, H_k: int | None = None, B: int = 2
) -> list[Tensor]:
    """q, k and v, (B, S, H, D)."""
    D, H_k = target.head_dim, H if H_k is None else H_k
    shapes = (B, S_q, H, D), (B, S_k, H_k, D), (B, S_k, H_k, D)
    return normal(*shapes, dtype=target.dtype, device=target.device)


def transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.transpose(1, 2) for x in tensors)


def check(target: Target, inputs: list[Tensor], mask: Mask, **keywords) -> None:
    scale = keywords.get("softmax_scale")
    ours, lse, probabilities = flash_attn.flash_attn_func(
        *inputs, return_attn_probs=True, **keywords
    )
    exact = oracle.exact(*transposed(*inputs), mask, scale)
    plain = oracle.plain(*transposed(*inputs), mask, scale)
    assert_close(ours.transpose(1, 2), exact.out, plain.out)
    assert_lse_close(lse, exact.lse, oracle.plain_lse(*transposed(*inputs), mask, scale))
    assert (ours.shape, ours.dtype) == (inputs[0].shape, target.dtype)
    assert ours.is_contiguous()
    assert lse.dtype == target.lse_dtype
    assert probabilities is None


@pytest.mark.parametrize("H_k", [6, 2, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_results(target: Target, H_k: int, causal: bool):
    inputs = inputs_of(target, 33, 65, H=6, H_k=H_k)
    check(target, inputs, CAUSAL if causal else FULL, causal=causal, softmax_scale=0.2)


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize(("S_q", "S_k"), [(1, 7), (7, 1), (5, 70), (70, 5), (0, 3), (4, 0)])
def test_causal_is_aligned_at_the_bottom_right(target: Target, S_q: int, S_k: int):
    check(target, inputs_of(target, S_q, S_k), CAUSAL, causal=True)


def test_it_is_sdpa_in_another_layout():
    q, k, v = (torch.randn(2, 40, 4, 24, dtype=torch.float64) for _ in range(3))
    due = F.scaled_dot_product_attention(*transposed(q, k, v), is_causal=True).transpose(1, 2)
    torch.testing.assert_close(flash_attn.flash_attn_func(q, k, v, causal=True), due)


def test_by_position():
    q, k, v = torch.randn(3, 2, 9, 2, 16).unbind()
    due = flash_attn.flash_attn_func(q, k, v, softmax_scale=0.3, causal=True)
    mine = flash_attn.flash_attn_func(q, k, v, 0.0, 0.3, True, (-1, 0), 0.0, None, True, False)
    assert_bitwise_equal(mine, due)


WINDOWS = {
    "tuple": ((-1, 0), CAUSAL),
    "list": ([-1, 0], CAUSAL),
    "tensor": (torch.tensor([-1, 0]), CAUSAL),
    "none": ((-1, -1), FULL),
    "negative": ((-7, -2), FULL),
    "all-of-it": ((6, 4), FULL),
    "left-of-it": ((6, 0), CAUSAL),
    "right-of-it": ((-1, 4), FULL),
}


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize(("window", "mask"), WINDOWS.values(), ids=WINDOWS)
def test_windows_that_hide_nothing_or_the_future(target: Target, window, mask: Mask):
    inputs = inputs_of(target, 5, 7)
    check(target, inputs, mask, window_size=window)
    check(target, inputs, CAUSAL, causal=True, window_size=window)


@pytest.mark.parametrize("window", [(0, 0), (5, -1), (-1, 1), [5, 4], (6, 3), torch.tensor([3, 0])])
def test_real_windows_are_refused(window):
    q, k = torch.randn(1, 5, 2, 8), torch.randn(1, 7, 2, 8)
    text = r"window_size=\(-?\d, -?\d\) is not built yet .*: pass window_size=\(-1, -1\)"
    with pytest.raises(NotImplementedError, match=text):
        flash_attn.flash_attn_func(q, k, k, window_size=window)


def test_a_window_under_the_causal_mask_is_refused():
    x = torch.randn(1, 7, 2, 8)
    with pytest.raises(NotImplementedError, match=r"window_size=\(5, 0\) is not built yet"):
        flash_attn.flash_attn_func(x, x, x, causal=True, window_size=(5, 3))


def test_rows_without_keys_give_zero_and_minus_infinity():
    """flash-attn has +inf there, with which partial results could not be merged."""
    q, k = torch.randn(1, 5, 2, 8, requires_grad=True), torch.randn(1, 2, 2, 8)
    out, lse, _ = flash_attn.flash_attn_func(q, k, k, causal=True, return_attn_probs=True)
    assert (out[:, :3] == 0).all()
    assert (lse[:, :, :3] == -math.inf).all()
    assert lse[:, :, 3:].isfinite().all()
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert (dq[:, :3] == 0).all()


# --- packed tensors


def gradients_of(function, leaves: list[Tensor], **keywords) -> list[Tensor]:
    """Out, lse and the gradients of a drawn combination of both."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    out, lse, _ = function(*leaves, return_attn_probs=True, **keywords)
    dout, dlse = normal(out.shape, lse.shape, dtype=torch.float64, device=out.device.type, seed=5)
    loss = (out * dout.to(out.dtype)).sum() + (lse * dlse.to(lse.dtype)).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.targets(**ONE_TYPE_EACH)
def test_packed_queries_keys_and_values(target: Target):
    parts = inputs_of(target, 37, 37)
    keywords = {"causal": True, "deterministic": True}
    due = gradients_of(flash_attn.flash_attn_func, parts, **keywords)
    mine = gradients_of(
        flash_attn.flash_attn_qkvpacked_func, [torch.stack(parts, dim=2)], **keywords
    )
    for a, b in zip((*mine[:2], *mine[2].unbind(2)), due, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize("H_k", [4, 2])
def test_packed_keys_and_values(target: Target, H_k: int):
    q, k, v = inputs_of(target, 19, 37, H=4, H_k=H_k)
    keywords = {"causal": True, "deterministic": True}
    due = gradients_of(flash_attn.flash_attn_func, [q, k, v], **keywords)
    packed = [q, torch.stack((k, v), dim=2)]
    mine = gradients_of(flash_attn.flash_attn_kvpacked_func, packed, **keywords)
    for a, b in zip((*mine[:3], *mine[3].unbind(2)), due, strict=True):
        assert_bitwise_equal(a, b)


@pytest.mark.targets(**ONE_TYPE_EACH)
def test_gradients_are_those_of_attention(target: Target):
    inputs = inputs_of(target, 19, 37, H=4, H_k=2)

    def ours(q, k, v, return_attn_probs):
        assert return_attn_probs
        result = attention(*transposed(q, k, v), causal=True, return_lse=True, deterministic=True)
        return result[0].transpose(1, 2), result[1], None

    due = gradients_of(ours, inputs)
    mine = gradients_of(flash_attn.flash_attn_func, inputs, causal=True, deterministic=True)
    for a, b in zip(mine, due, strict=True):
        assert_bitwise_equal(a, b)


def test_packed_tensors_are_read_in_place():
    """Views of a packed tensor reach the operator; a copy would be contiguous."""
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function is torch.ops.online_attention.forward.default:
                seen.extend(args[:3])
            return function(*args, **(kwargs or {}))

    qkv = torch.randn(2, 9, 3, 4, 16)
    with Watch():
        flash_attn.flash_attn_qkvpacked_func(qkv)
    base = qkv.untyped_storage().data_ptr()
    assert [x.untyped_storage().data_ptr() for x in seen] == [base] * 3
    assert [x.storage_offset() for x in seen] == [0, 64, 128]


def test_deterministic_asks_for_ours(monkeypatch):
    asked = []

    def spy(*tensors, deterministic, **keywords):
        asked.append(deterministic)
        return attention(*tensors, deterministic=deterministic, **keywords)

    monkeypatch.setattr(flash_attn, "attention", spy)
    x = torch.randn(1, 3, 2, 8)
    flash_attn.flash_attn_func(x, x, x, deterministic=True)
    flash_attn.flash_attn_func(x, x, x)
    assert asked == [True, None]  # None: torch's deterministic mode decides


@pytest.mark.targets(**ONE_TYPE_EACH)
def test_dropout_is_that_of_attention(target: Target):
    inputs = inputs_of(target, 19, 37)
    torch.manual_seed(2)
    out, lse, _ = flash_attn.flash_attn_func(*inputs, dropout_p=0.3, return_attn_probs=True)
    torch.manual_seed(2)
    due, due_lse = attention(*transposed(*inputs), dropout_p=0.3, return_lse=True)
    assert_bitwise_equal(out, due.transpose(1, 2))
    assert_bitwise_equal(lse, due_lse, "lse")
    assert not torch.equal(out, flash_attn.flash_attn_func(*inputs))


def test_compiles_without_a_graph_break():
    def block(qkv: Tensor) -> Tensor:
        return flash_attn.flash_attn_qkvpacked_func(qkv, causal=True).flatten(2)

    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 33):
        qkv = torch.randn(2, length, 3, 4, 16, requires_grad=True)
        mine, due = compiled(qkv), block(qkv)
        assert_bitwise_equal(mine, due)
        for a, b in zip(*(torch.autograd.grad(x.sum(), qkv) for x in (mine, due)), strict=True):
            assert_bitwise_equal(a, b)


# --- refusals

X = torch.ones(2, 5, 4, 8)
REFUSED = {
    "softcap": ((X, X, X), {"softcap": 30.0}, NotImplementedError, "softcap=30.0 is not built yet"),
    "softcap-nan": ((X, X, X), {"softcap": math.nan}, NotImplementedError, "softcap=nan is not"),
    "softcap-type": ((X, X, X), {"softcap": None}, TypeError, "softcap must be a number, but is N"),
    "slopes": (
        (X, X, X),
        {"alibi_slopes": torch.ones(4)},
        NotImplementedError,
        "alibi_slopes is not built yet",
    ),
    "causal-type": ((X, X, X), {"causal": 1}, TypeError, "causal must be True or False"),
    "deterministic-type": (
        (X, X, X),
        {"deterministic": None},
        TypeError,
        "deterministic must be True or False",
    ),
    "probs-type": (
        (X, X, X),
        {"return_attn_probs": 1},
        TypeError,
        "return_attn_probs must be True or False",
    ),
    "scale-type": (
        (X, X, X),
        {"softmax_scale": "1"},
        TypeError,
        "softmax_scale must be a number or None, but is '1'",
    ),
    "scale-nan": (
        (X, X, X),
        {"softmax_scale": math.nan},
        ValueError,
        "softmax_scale must be finite, but is nan",
    ),
    "dropout-type": ((X, X, X), {"dropout_p": "0"}, TypeError, "dropout_p must be a number"),
    "window-length": (
        (X, X, X),
        {"window_size": (1, 2, 3)},
        TypeError,
        r"window_size must be two integers \(left, right\), .* but is \(1, 2, 3\)",
    ),
    "window-type": ((X, X, X), {"window_size": None}, TypeError, "window_size must be two"),
    "window-none": ((X, X, X), {"window_size": (None, 0)}, TypeError, "pass .-1, -1. for no"),
    "window-float": ((X, X, X), {"window_size": (1.0, 0)}, TypeError, "window_size must be two"),
    "no-tensor": ((X, None, X), {}, TypeError, r"k must be a torch\.Tensor, but is None"),
    "dtype": ((X, X.half(), X), {}, TypeError, "k must have the dtype of q, float32"),
    "rank": (
        (X, X[0], X),
        {},
        ValueError,
        r"k must have 4 dimensions \(B, S_k, H_k, D\), but its shape is \(5, 4, 8\)",
    ),
    "batch": ((X, X[:1], X), {}, ValueError, r"k must have B = 2 as q, but k\.shape\[0\] is 1"),
    "length": (
        (X, X, X[:, :4]),
        {},
        ValueError,
        r"v must have S_k = 5 as k, but v\.shape\[1\] is 4",
    ),
    "heads": (
        (X, X, X[:, :, :2]),
        {},
        ValueError,
        r"v must have H_k = 4 as k, but v\.shape\[2\] is 2",
    ),
    "head-dim": (
        (X, X[..., :7], X),
        {},
        ValueError,
        r"k must have D = 8 as q, but k\.shape\[3\] is 7",
    ),
    "groups": (
        (X, X[:, :, :3], X[:, :, :3]),
        {},
        ValueError,
        "H must be a multiple of H_k, but q has H = 4 heads and k has H_k = 3",
    ),
}


@pytest.mark.parametrize(("inputs", "keywords", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(inputs, keywords, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        flash_attn.flash_attn_func(*inputs, **keywords)
    assert flash_attn.flash_attn_func(X, X, X).shape == X.shape


@pytest.mark.parametrize("softcap", [0, -1.0])
def test_softcap_of_zero_or_less_is_none(softcap: float):
    x = torch.randn(1, 3, 2, 8)
    due = flash_attn.flash_attn_func(x, x, x)
    assert_bitwise_equal(flash_attn.flash_attn_func(x, x, x, softcap=softcap), due)


PACKED = {
    "kv-rank": ("kvpacked", (X, X), ValueError, r"kv must have the shape \(B, S_k, 2, H_k, D\), b"),
    "kv-count": ("kvpacked", (X, X[None]), ValueError, r"its shape is \(1, 2, 5, 4, 8\): stack"),
    "kv-type": ("kvpacked", (X, [X, X]), TypeError, r"kv must be a torch\.Tensor, but is of type"),
    "qkv-rank": ("qkvpacked", (X,), ValueError, r"qkv must have the shape \(B, S, 3, H, D\), but"),
    "qkv-type": ("qkvpacked", (None,), TypeError, r"qkv must be a torch\.Tensor, but is of type"),
}


@pytest.mark.parametrize(("name", "inputs", "error", "text"), PACKED.values(), ids=PACKED)
def test_refusals_of_packed_tensors(name: str, inputs, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        getattr(flash_attn, f"flash_attn_{name}_func")(*inputs)


UNBUILT = [name for name in SIGNATURES if "varlen" in name or "kvcache" in name]


@pytest.mark.parametrize("name", UNBUILT)
def test_unbuilt_functions_say_so_when_called(name: str):
    function = getattr(flash_attn, name)
    required = sum(
        p.default is inspect.Parameter.empty
        for p in inspect.signature(function).parameters.values()
    )
    text = f"^{re.escape(name)} is not built yet in this version of online_attention: "
    with pytest.raises(NotImplementedError, match=text):
        function(*[X] * required)
