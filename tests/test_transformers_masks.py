# SPDX-License-Identifier: BSD-3-Clause
"""The masks of transformers' models, the ranges that stand for them, and what is refused."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_models import (
    HAS_RANGES,
    integration,
    model_of,
    padded,
    pair_of,
    recorded_calls,
    tokens_of,
    transformers,
)
from rows import Target

pytestmark = pytest.mark.usefixtures("one_thread")
fp32 = pytest.mark.targets(dtypes=(torch.float32,))
ranges = pytest.mark.skipif(not HAS_RANGES, reason="this transformers tells masks no lengths")
BOTTOM_RIGHT, TOP_LEFT = 1, 0


def assert_equal_logits(ours: Tensor, eager: Tensor) -> None:
    torch.testing.assert_close(ours, eager, atol=1e-4, rtol=1e-4)


def layer(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def qkv(device: str, S_q: int = 5, S_kv: int = 9, H_kv: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.randn(2, 4, S_q, 8, device=device)
    k, v = torch.randn(2, 2, H_kv, S_kv, 8, device=device)
    return q, k, v


def by_hand(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """(B, S, H, D), as the models of transformers take it."""
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    weights = (q @ k.mT * q.shape[-1] ** -0.5 + mask).softmax(-1)
    return (weights @ v).transpose(1, 2)


def ones(q: Tensor, k: Tensor) -> Tensor:
    return torch.ones(2, 1, q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)


def attend(*args: Any, **kwargs: Any) -> Tensor:
    out, weights = integration.attention_forward(*args, **kwargs)
    assert weights is None
    return out


# --- no mask


@fp32
@pytest.mark.parametrize(("S_q", "S_kv"), [(5, 5), (5, 9), (1, 9)])
def test_no_mask_is_causal_from_the_top_left_but_for_one_query(target: Target, S_q: int, S_kv: int):
    q, k, v = qkv(target.device, S_q, S_kv)
    full = ones(q, k)
    causal = full if S_q == 1 else full.tril()
    for module in (layer(is_causal=True), layer()):
        assert_equal_logits(attend(module, q, k, v, None), by_hand(q, k, v, causal))
        out = attend(module, q, k, v, None, is_causal=False)
        assert_equal_logits(out, by_hand(q, k, v, full))
    encoder = layer(is_causal=False)
    assert_equal_logits(attend(encoder, q, k, v, None), by_hand(q, k, v, full))
    assert_equal_logits(attend(encoder, q, k, v, None, is_causal=True), by_hand(q, k, v, causal))


@fp32
def test_a_window_that_hides_nothing_needs_no_mask(target: Target):
    q, k, v = qkv(target.device, 5, 9)
    expected = by_hand(q, k, v, ones(q, k).tril())
    assert_equal_logits(attend(layer(), q, k, v, None, sliding_window=5), expected)
    q = q[:, :, :1]
    out = attend(layer(), q, k, v, None, sliding_window=9)
    assert_equal_logits(out, by_hand(q, k, v, ones(q, k)))


# --- masks of a user


@fp32
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_a_mask_is_taken_as_it_is(target: Target, kind: str, heads: int):
    q, k, v = qkv(target.device)
    mask = torch.randn(2, heads, 5, 9, device=target.device)
    mask = mask > -0.5 if kind == "boolean" else mask
    assert_equal_logits(attend(layer(), q, k, v, mask), by_hand(q, k, v, mask))
    # A window is in the mask that comes with it.
    out = attend(layer(), q, k, v, mask, sliding_window=2)
    assert_equal_logits(out, by_hand(q, k, v, mask))


@fp32
def test_a_mask_is_read_in_place(target: Target):
    q, k, v = qkv(target.device)
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool, device=target.device).expand(2, 1, 5, 9)
    with recorded_calls() as calls:
        attend(layer(), q, k, v, mask)
    assert calls[0]["mask"] is mask


@fp32
@torch.no_grad()
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_a_model_takes_a_mask_of_four_dimensions(target: Target, kind: str):
    ours, eager = pair_of("llama", target.device)
    ids = tokens_of(target.device)
    sees = torch.rand(2, 1, 13, 13, device=target.device) > 0.3
    sees |= torch.eye(13, dtype=torch.bool, device=target.device)
    added = torch.zeros(sees.shape, device=target.device).masked_fill(~sees, -1e9)
    mask = sees if kind == "boolean" else added
    expected = eager(ids, attention_mask=added).logits
    assert_equal_logits(ours(ids, attention_mask=mask).logits, expected)


# --- masks of the models


@fp32
@torch.no_grad()
def test_packed_sequences_by_their_positions(target: Target):
    ours, eager = pair_of("llama", target.device)
    ids = tokens_of(target.device, B=1)
    places = torch.cat([torch.arange(5), torch.arange(8)])[None].to(target.device)
    settings = {"position_ids": places, "use_cache": False}
    logits = ours(ids, **settings).logits
    assert_equal_logits(logits, eager(ids, **settings).logits)
    assert_equal_logits(logits[:, 5:], ours(ids[:, 5:], use_cache=False).logits)


@fp32
@ranges
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_prefill_is_a_causal_range_over_real_keys(target: Target, side: str):
    ours, _ = pair_of("llama", target.device)
    batch = padded(target.device, side)
    with recorded_calls() as calls:
        ours(**batch)
    for call in calls:
        assert (call["causal"], call["alignment"]) == (True, TOP_LEFT)
        assert torch.equal(call["mask"][:, 0, 0], batch["attention_mask"].bool())


@fp32
@ranges
@torch.no_grad()
@pytest.mark.parametrize("attention_mask", [None, "ones"])
def test_a_prefill_into_a_cache_is_a_causal_range(target: Target, attention_mask: str | None):
    ours, _ = pair_of("llama", target.device)
    ids = tokens_of(target.device)
    past = transformers.DynamicCache(config=ours.config)
    ours(ids[:, :5], past_key_values=past)
    seen = None if attention_mask is None else torch.ones_like(ids)
    with recorded_calls() as calls:
        ours(ids[:, 5:], past_key_values=past, attention_mask=seen)
    for call in calls:
        assert (call["causal"], call["alignment"], call["mask"]) == (True, BOTTOM_RIGHT, None)


def mask_of(device: str, q_offset: int = 0, **settings: Any) -> Tensor:
    """What transformers asks for a batch padded on the left."""
    real = torch.ones(2, 9, dtype=torch.bool, device=device)
    real[1, :3] = False
    mask = integration.make_mask(
        **{
            "batch_size": 2,
            "q_length": 9 - q_offset,
            "kv_length": 9,
            "q_offset": q_offset,
            "kv_offset": 0,
            "attention_mask": real,
            "device": device,
        }
        | settings
    )
    assert mask is not None
    return mask


def ignoring_third_key(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
    return (kv <= q) & (kv != 2)


@fp32
@ranges
@pytest.mark.parametrize("q_offset", [0, 3])
@pytest.mark.parametrize("kv_length", [9, 12])
def test_a_range_is_its_mask(target: Target, q_offset: int, kv_length: int):
    mask = mask_of(target.device, q_offset, kv_length=kv_length)
    q, k, v = qkv(target.device, 9 - q_offset, kv_length)
    q.requires_grad_(), k.requires_grad_(), v.requires_grad_()
    results = []
    for given in (mask, mask.clone()):  # a clone is a mask like any other
        with recorded_calls() as calls:
            out = attend(layer(), q, k, v, given)
        results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        is_range = given is mask and (q_offset == 0 or kv_length == 9)
        assert calls[0]["causal"] is is_range
        assert (calls[0]["mask"] is given) is not is_range
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
    empty = ~mask.any(-1)
    assert empty.any() == (q_offset == 0)
    assert (results[0][0].transpose(1, 2)[empty.expand(2, 4, -1)] == 0).all()


@fp32
@ranges
def test_what_is_not_the_models_own_causal_mask_is_run_as_a_mask(target: Target):
    q, k, v = qkv(target.device, 9, 9)
    changed = mask_of(target.device)
    changed[:, :, :, 4] = False
    with torch.inference_mode():
        untracked = mask_of(target.device)
        untracked[:, :, :, 4] = False
    other = mask_of(target.device, mask_function=ignoring_third_key)
    short = mask_of(target.device, q_length=9, kv_length=9)[:, :, :, :7]
    for mask, keys in ((changed, 9), (untracked, 9), (other, 9), (short, 7)):
        with recorded_calls() as calls:
            out = attend(layer(), q, k[:, :, :keys], v[:, :, :keys], mask)
        assert calls[0]["mask"] is mask
        expected = by_hand(q, k[:, :, :keys], v[:, :, :keys], mask)
        real = mask.any(-1)[:, 0]
        assert_equal_logits(out[real], expected[real])


@fp32
@ranges
@torch.no_grad()
def test_a_mask_of_other_sizes_than_the_layer_is_no_range(target: Target):
    q, k, v = qkv(target.device, 4, 9)
    mask = mask_of(target.device, 3)  # of 6 queries
    with pytest.raises(ValueError, match="attn_mask"):
        attend(layer(), q, k, v, mask)


@fp32
@torch.no_grad()
def test_in_inference_mode_too(target: Target):
    ours, eager = pair_of("llama", target.device)
    batch = padded(target.device, "left")
    real = batch["attention_mask"].bool()
    with torch.inference_mode():
        logits = ours(**batch).logits
    assert_equal_logits(logits[real], eager(**batch).logits[real])


# --- registration


def test_register_offers_the_attention_and_its_masks_once():
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for _ in range(2):
        integration.register()
        assert ALL_ATTENTION_FUNCTIONS["online_attention"] is integration.attention_forward
        assert ALL_MASK_ATTENTION_FUNCTIONS["online_attention"] is integration.make_mask
    names = list(ALL_ATTENTION_FUNCTIONS)
    assert names.count("online_attention") == 1
    assert transformers.AttentionInterface()["sdpa"] is not integration.attention_forward


def test_the_package_alone_does_not_import_transformers():
    code = "import sys, online_attention; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_transformers_is_named(monkeypatch: pytest.MonkeyPatch):
    name = "online_attention.integrations.transformers"
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, name)
    sentence = r"needs the package transformers, 4\.56 or newer.*pip install 'transformers>=4\.56'"
    with pytest.raises(ImportError, match=sentence):
        importlib.import_module(name)


# --- refusals


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("softcap", 30.0, "softcap asks for a cap of the scores, which is not built yet"),
        (
            "s_aux",
            torch.zeros(4),
            's_aux asks for attention sinks, .* use attn_implementation="eager"',
        ),
        ("sinks", torch.zeros(4), "sinks asks for attention sinks"),
        ("learnable_sink", torch.zeros(4), "learnable_sink asks for attention sinks"),
        ("position_bias", torch.zeros(1, 4, 5, 9), "position_bias asks for a bias of positions"),
        ("head_mask", torch.ones(4), "head_mask asks for a factor for each head"),
        ("cu_seq_lens_q", torch.tensor([0, 5]), "cu_seq_lens_q asks for packed sequences"),
        ("cu_seq_lens_k", torch.tensor([0, 9]), "cu_seq_lens_k asks .* pass position_ids alone"),
        ("cache", object(), 'cache asks for a paged cache, .* use attn_implementation="sdpa"'),
        ("block_table", torch.zeros(1), "block_table asks for a paged cache"),
        ("page_table", torch.zeros(1), "page_table asks for a paged cache"),
        ("indices", torch.zeros(1), "indices asks for keys by their indices"),
        ("block_indices", torch.zeros(1), "block_indices asks for blocks of keys"),
        ("qv_latents", torch.zeros(1), "qv_latents asks for compressed values"),
        ("output_attentions", True, "output_attentions=True asks for the attention weights"),
        ("sliding_window", 4, "sliding_window = 4 hides some of 5 keys, but attention_mask is"),
    ],
)
def test_what_is_not_built_is_refused_by_name(name: str, value: object, sentence: str):
    q, k, v = qkv("cpu")
    attend(layer(), q, k, v, None, **{name: None})
    with pytest.raises(NotImplementedError, match=sentence):
        attend(layer(), q, k, v, None, **{name: value})


@pytest.mark.parametrize(("S_q", "causal", "keys"), [(1, True, 9), (5, False, 9), (9, True, 9)])
def test_a_narrow_window_without_a_mask_is_refused(S_q: int, causal: bool, keys: int):
    q, k, v = qkv("cpu", S_q)
    attend(layer(), q, k, v, None, is_causal=causal, sliding_window=keys)
    with pytest.raises(NotImplementedError, match=f"sliding_window = {keys - 1} hides some of"):
        attend(layer(), q, k, v, None, is_causal=causal, sliding_window=keys - 1)


@pytest.mark.parametrize(
    ("mask", "kind", "sentence"),
    [
        (torch.ones(2, 9), ValueError, r"attention_mask must have 4 dimensions .* is \(2, 9\)"),
        ("causal", TypeError, "attention_mask must be a torch.Tensor or None, but is of type str"),
    ],
)
def test_masks_that_are_none(mask: object, kind: type[Exception], sentence: str):
    q, k, v = qkv("cpu")
    with pytest.raises(kind, match=sentence):
        attend(layer(), q, k, v, mask)


@pytest.mark.parametrize(
    "settings", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}]
)
def test_a_scale_that_does_not_arrive_is_refused(settings: dict[str, bool]):
    q, k, v = qkv("cpu")
    attend(layer(**settings), q, k, v, None, scaling=0.3)
    with pytest.raises(NotImplementedError, match="scaling is None although scale_attn_weights or"):
        attend(layer(**settings), q, k, v, None)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_a_model_that_would_misread_the_masks_is_refused(compiled: bool):
    config = transformers.BloomConfig(vocab_size=97, hidden_size=16, n_layer=1, n_head=2)
    model = model_of(config, integration.NAME, "cpu")
    forward = torch.compile(model, backend="eager") if compiled else model
    sentence = "models of BloomConfig compute their attention themselves and call no other"
    with pytest.raises(NotImplementedError, match=sentence):
        forward(tokens_of("cpu"))


@torch.no_grad()
def test_a_model_with_a_cap_is_refused():
    ours, _ = pair_of("gemma2", "cpu", attn_logit_softcapping=50.0)
    with pytest.raises(NotImplementedError, match="softcap asks for a cap of the scores"):
        ours(tokens_of("cpu"))
