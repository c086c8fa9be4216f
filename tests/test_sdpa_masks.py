# SPDX-License-Identifier: BSD-3-Clause
"""Masks of the drop-in mean what they mean to torch's function, and are read where they lie."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
from cases import normal
from online_attention import attention, operators, scaled_dot_product_attention
from rows import Target
from test_sdpa import GROUPED, torchs
from tolerance import assert_bitwise_equal, assert_close

S_Q, S_KV = 9, 17
KINDS = ["boolean", "element", "float32"]


def mask_of(shape: tuple[int, ...], kind: str, target: Target, seed: int = 7) -> Tensor:
    """Drawn; every query sees key 0."""
    (drawn,) = normal(shape, dtype=torch.float32, device=target.device, seed=seed)
    hidden = drawn > 0.6
    if shape and shape[-1] > 1:
        hidden[..., 0] = False
    elif kind == "boolean":
        hidden[...] = False
    if kind == "boolean":
        return ~hidden
    dtype = target.dtype if kind == "element" else torch.float32
    return drawn.masked_fill(hidden, -math.inf).to(dtype)


def by_definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, lead: tuple[int, ...]) -> Tensor:
    """In extended precision; heads of equal number."""
    rank_4 = (x.expand(*lead, *x.shape[-2:]).reshape(-1, 1, *x.shape[-2:]) for x in (q, k, v))
    bias = mask.expand(*lead, q.shape[-2], k.shape[-2]).reshape(-1, 1, q.shape[-2], k.shape[-2])
    return oracle.by_definition(*rank_4, bias=bias).out.view(*lead, q.shape[-2], v.shape[-1])


def check(inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor, enable_gqa: bool = False) -> None:
    ours = scaled_dot_product_attention(*inputs, mask, enable_gqa=enable_gqa)
    plain = mask if mask.dtype == torch.bool else mask.to(inputs[0].dtype)  # as torch requires
    theirs = torchs(*inputs, attn_mask=plain, enable_gqa=enable_gqa)
    q, k, v = inputs
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    exact = by_definition(q, k, v, mask, theirs.shape[:-2])
    assert ours.dtype == q.dtype
    # A float32 mask is not rounded here, but in torch's function.
    assert_close(ours, exact, theirs, magnitude=float(v.double().abs().max()))


def inputs_of(
    target: Target, lead: tuple[tuple[int, ...], ...], S_q: int = S_Q, S_kv: int = S_KV
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = (S_q, S_kv, S_kv)
    shapes = [(*dims, n, target.head_dim) for dims, n in zip(lead, lengths, strict=True)]
    q, k, v = normal(*shapes, dtype=target.dtype, device=target.device)
    return q, k, v


SHAPES = [
    ((), (S_Q, S_KV)),
    ((), (S_KV,)),
    ((), ()),
    ((3,), (3, S_Q, S_KV)),
    ((3,), (S_Q, 1)),
    ((2, 3), (2, 3, S_Q, S_KV)),
    ((2, 3), (2, 1, 1, S_KV)),
    ((2, 3), (3, S_Q, S_KV)),
    ((2, 3), (1, 3, S_Q, 1)),
    ((2, 3), (S_Q, S_KV)),
    ((2, 2, 3), (2, 2, 3, S_Q, S_KV)),
    ((2, 2, 3), (2, 1, 3, S_Q, S_KV)),  # folds in no way
    ((2, 2, 3), (2, 3, S_Q, S_KV)),  # folds as heads
    ((2, 2, 3), (2, 1, 1, 1, S_KV)),
    ((2, 1, 2, 3), (2, 1, 1, 3, 1, S_KV)),
]


@pytest.mark.parametrize(("lead", "shape"), SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_every_rank_and_shape(
    target: Target, lead: tuple[int, ...], shape: tuple[int, ...], kind: str
):
    check(inputs_of(target, (lead,) * 3), mask_of(shape, kind, target))


@pytest.mark.parametrize("lead", GROUPED, ids=str)
@pytest.mark.parametrize("broadcast", [0, 1, 2, 3])
def test_grouped_heads(target: Target, lead: tuple[tuple[int, ...], ...], broadcast: int):
    """The mask's heads are those of the query."""
    shape = [*lead[0], S_Q, S_KV]
    if broadcast < 3:
        shape[broadcast] = 1
    check(inputs_of(target, lead), mask_of(tuple(shape), "boolean", target), enable_gqa=True)


@st.composite
def problems(draw) -> tuple[list[tuple[int, ...]], tuple[int, ...], int, int]:
    """Dimensions before the last two of q, k and v, and a mask's shape."""
    S_q, S_kv = draw(st.integers(1, 5)), draw(st.integers(1, 9))
    whole = draw(st.lists(st.integers(1, 3), max_size=3))
    lead = []
    for _ in range(3):
        kept = [n if draw(st.booleans()) else 1 for n in whole]
        lead.append(tuple(kept[draw(st.integers(0, len(kept))) :]))
    lead[0] = tuple(whole)
    mask = [n if draw(st.booleans()) else 1 for n in (*whole, S_q, S_kv)]
    return lead, tuple(mask[draw(st.integers(0, len(mask))) :]), S_q, S_kv


def laid_out(mask: Tensor, layout: str) -> Tensor:
    """The same mask with other strides."""
    if layout == "transposed" and mask.dim() > 1:
        return mask.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "stepped" and mask.dim():
        wide = mask.new_zeros(*mask.shape[:-1], 2 * mask.shape[-1] + 1)
        wide[..., 1::2] = mask
        return wide[..., 1::2]
    return mask


@settings(max_examples=25)
@given(problem=problems(), kind=st.sampled_from(KINDS), seed=st.integers(0, 9),
       layout=st.sampled_from(["contiguous", "transposed", "stepped"]))  # fmt: skip
def test_anything_that_broadcasts(target: Target, problem, kind: str, seed: int, layout: str):
    lead, shape, S_q, S_kv = problem
    mask = laid_out(mask_of(shape, kind, target, seed), layout)
    check(inputs_of(target, lead, S_q, S_kv), mask)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_are_zero(target: Target, kind: str):
    inputs = inputs_of(target, ((2, 3),) * 3)
    mask = mask_of((2, 1, S_Q, S_KV), kind, target)
    mask[0, :, 4] = False if kind == "boolean" else -math.inf
    ours = scaled_dot_product_attention(*inputs, mask)
    assert not ours[0, :, 4].any()
    assert ours[1, :, 4].any()
    assert ours.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_keys_do_not_exist(target: Target, kind: str):
    q, k, v = inputs_of(target, ((2, 3),) * 3)
    mask = mask_of((2, 1, 1, S_KV), kind, target)
    mask[..., 5] = False if kind == "boolean" else -math.inf
    due = scaled_dot_product_attention(q, k, v, mask)
    k[:, :, 5], v[:, :, 5] = math.nan, math.inf
    assert_bitwise_equal(scaled_dot_product_attention(q, k, v, mask), due)


# --- in place


@pytest.fixture
def biases(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every bias that reaches the operator."""
    seen: list[Tensor] = []
    operator = operators.forward

    def forward(*arguments):
        seen.append(arguments[8])
        return operator(*arguments)

    monkeypatch.setattr(operators, "forward", forward)
    return seen


LAYOUTS = {
    "broadcast": lambda m: m,
    "transposed": lambda m: m.transpose(-1, -2).contiguous().transpose(-1, -2),
    "stepped": lambda m: torch.stack([m, ~m], -1)[..., 0],
    "expanded": lambda m: m[..., :1, :].expand_as(m),
    "heads-last": lambda m: m.movedim(-3, -1).contiguous().movedim(-1, -3),
}


@pytest.mark.targets(dtypes=(torch.float32,))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("lead", "shape", "calls"),
    [
        ((2, 3), (2, 3, S_Q, S_KV), 1),
        ((2, 3), (3, S_Q, S_KV), 1),
        ((2, 2, 3), (2, 2, 3, S_Q, S_KV), 1),
        ((2, 2, 3), (2, 1, 3, S_Q, S_KV), 2),
        ((2, 2, 3), (1, 1, 3, S_Q, S_KV), 1),
    ],
    ids=str,
)
def test_masks_are_read_where_they_lie(
    target: Target, biases: list[Tensor], layout: str, lead: tuple[int, ...], shape, calls: int
):
    mask = LAYOUTS[layout](mask_of(shape, "boolean", target))
    check(inputs_of(target, (lead,) * 3), mask)
    if layout != "heads-last":  # there batch and heads are no one dimension
        assert len(biases) == calls
    for bias in biases:
        assert bias.dim() == 4
        assert bias.untyped_storage().data_ptr() == mask.untyped_storage().data_ptr()


@pytest.mark.targets(dtypes=(torch.float32,))
def test_attention_takes_every_rank_in_place(target: Target, biases: list[Tensor]):
    q, k, v = inputs_of(target, ((2, 3),) * 3)
    whole = mask_of((2, 3, S_Q, S_KV), "float32", target)
    for bias in (whole, whole[1], whole[1, 2], whole[1, 2, 3], whole[0, 0, 0, 0]):
        due = attention(q, k, v, bias=bias.expand_as(whole).contiguous())
        assert_bitwise_equal(attention(q, k, v, bias=bias), due)
        assert biases[-1].data_ptr() == bias.data_ptr()


def test_bias_and_causal_hide_together(target: Target):
    q, k, v = inputs_of(target, ((2, 3),) * 3)
    bias = mask_of((2, 1, S_Q, S_KV), "boolean", target)
    both = bias & oracle.CAUSAL.visible(S_Q, S_KV).to(target.device)
    assert_bitwise_equal(
        attention(q, k, v, bias=bias, causal=True), attention(q, k, v, bias=both), "causal"
    )


# --- autocast

AUTOCAST = [torch.float32, torch.float16, torch.bfloat16, torch.bool]


@pytest.mark.targets(dtypes=(torch.float32,))
@pytest.mark.parametrize("dtype", AUTOCAST, ids=str)
def test_autocast(target: Target, biases: list[Tensor], dtype: torch.dtype):
    """A mask is cast as an input is, but float32 stays: a kernel reads it as it is."""
    q, k, v = inputs_of(target, ((2, 3),) * 3)
    mask = mask_of((S_Q, S_KV), "boolean" if dtype == torch.bool else "float32", target).to(dtype)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        ours = scaled_dot_product_attention(q, k, v, mask)
    assert ours.dtype == torch.bfloat16
    kept = dtype in (torch.bool, torch.float32)
    assert biases[-1].dtype == (dtype if kept else torch.bfloat16)
    rounded = (x.bfloat16() for x in (q, k, v))
    due = scaled_dot_product_attention(*rounded, mask if kept else mask.bfloat16())
    assert_bitwise_equal(ours, due)


# --- refusals

X = torch.ones(2, 3, 5, 8)
REFUSED = {
    "causal": (X, torch.ones(5, 5), {"is_causal": True}, ValueError, "None where is_causal is"),
    "shape": (X, torch.ones(4, 5), {}, ValueError,
              r"attn_mask must be broadcastable to \(B, H, S_q, S_kv\) = \(2, 3, 5, 5\), but"),
    "rank-3": (X[0], torch.ones(2, 3, 5, 5), {}, ValueError,
               r"attn_mask must be broadcastable to \(..., H, S_q, S_kv\) = \(3, 5, 5\), but its"),
    "batch": (X, torch.ones(4, 1, 5, 5), {}, ValueError, "make each size 1 or equal, counted"),
    "dtype": (X, torch.ones(5, 5).double(), {}, TypeError,
              "attn_mask must be boolean, float32, but is float64: convert it with .bool"),
    "half-dtype": (X.half(), torch.ones(5, 5).bfloat16(), {}, TypeError,
                   "attn_mask must be boolean, of the dtype of query, float16, or float32, but is"),
    "integers": (X, torch.ones(5, 5).int(), {}, TypeError, "attn_mask must be .* but is int32"),
    "list": (X, [True], {}, TypeError, r"attn_mask must be a torch.Tensor, but is \[True\]"),
    "list-rank-3": (X[0], [True], {}, TypeError, "attn_mask must be a torch.Tensor"),
    "sparse": (X, torch.ones(5, 5).to_sparse(), {}, TypeError, "attn_mask must be a dense tensor"),
    "device": (X, torch.ones(5, 5, device="meta"), {}, ValueError,
               "attn_mask must be on the device of query, cpu, but is on meta"),
    "dropout": (X, None, {"dropout_p": 1.0}, ValueError, "dropout_p must be at least 0 and below"),
}  # fmt: skip


@pytest.mark.parametrize(("x", "mask", "keywords", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(x: Tensor, mask, keywords, error: type[Exception], text: str):
    with pytest.raises(error, match=text):
        scaled_dot_product_attention(x, x, x, mask, **keywords)


def test_mask_of_torch_is_taken_with_its_name():
    x, mask = torch.randn(2, 3, 5, 8), torch.ones(5, 5, dtype=torch.bool).tril()
    ours = scaled_dot_product_attention(x, x, x, attn_mask=mask)
    assert_close(ours, torchs(*(x.double(),) * 3, attn_mask=mask),
                 F.scaled_dot_product_attention(x, x, x, attn_mask=mask))  # fmt: skip
