# SPDX-License-Identifier: BSD-3-Clause
"""Models of transformers compute, generate and train with this attention as with the eager one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_models import (
    DECODERS,
    FAMILIES,
    PAD,
    Pair,
    config_of,
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
TOLERANCE = 1e-4
NEW_TOKENS = 9  # past the window of 6 keys


def assert_equal_logits(ours: Tensor, eager: Tensor, real: Tensor | None = None) -> None:
    assert not ours.isnan().any()
    if real is not None:
        ours, eager = ours[real], eager[real]
    torch.testing.assert_close(ours, eager, atol=TOLERANCE, rtol=TOLERANCE)


# --- forward


@fp32
@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_batch_gives_the_eager_logits(target: Target, family: str):
    ours, eager = pair_of(family, target.device)
    ids = tokens_of(target.device)
    assert_equal_logits(ours(ids).logits, eager(ids).logits)
    # Another text gives other logits: attention is not lost in the model.
    other = ids.clone()
    other[:, 0] = 3 + (other[:, 0] - 2) % 90
    last = 5 if family == "mistral-window" else -1  # that sees the first token
    changed = (ours(other).logits - ours(ids).logits)[:, last].abs().max()
    assert changed > 100 * TOLERANCE


@fp32
@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_padded_batch_gives_the_eager_logits(target: Target, family: str, side: str):
    ours, eager = pair_of(family, target.device)
    batch = padded(target.device, side)
    real = batch["attention_mask"].bool()
    logits = ours(**batch).logits
    assert_equal_logits(logits, eager(**batch).logits, real)
    alone = ours(batch["input_ids"][1:2, real[1]]).logits  # a sequence does not see its padding
    assert_equal_logits(logits[1:2, real[1]], alone)


@torch.no_grad()
@pytest.mark.targets(dtypes=(torch.float16, torch.bfloat16))
@pytest.mark.parametrize("side", ["none", "left"])
def test_half_precision_is_as_good_as_eager(target: Target, side: str):
    config = config_of("llama", head_dim=target.head_dim)
    batch = {"input_ids": tokens_of(target.device)}
    if side == "left":
        batch = padded(target.device, side)
    logits = {}
    for name, dtype in ((integration.NAME, target.dtype), ("eager", target.dtype)):
        logits[name] = model_of(config, name, target.device, dtype)(**batch).logits.double()
    # Eager's softmax is float32 at most, and NaN in float64 where a row sees nothing.
    exact = model_of(config, "sdpa", target.device, torch.float64)(**batch).logits
    real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    error = {name: (result - exact)[real].abs().max() for name, result in logits.items()}
    assert error[integration.NAME] <= 2 * error["eager"]
    assert error["eager"] > 0


# --- generation


def generated(model: Any, cache: str, batch: dict[str, Tensor]) -> Tensor:
    """All tokens, chosen greedily."""
    tokens: Tensor = model.generate(
        batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        pad_token_id=PAD,
        cache_implementation=None if cache == "dynamic" else cache,
        disable_compile=True,
    )
    return tokens


@fp32
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("lengths", [(9,), (9, 4)], ids=["one", "padded"])
@pytest.mark.parametrize("family", DECODERS)
def test_generates_the_eager_tokens(
    target: Target, family: str, lengths: tuple[int, ...], cache: str
):
    ours, eager = pair_of(family, target.device)
    batch = padded(target.device, "left", S=9, lengths=lengths)
    tokens = generated(ours, cache, batch)
    assert tokens.shape == (len(lengths), 9 + NEW_TOKENS)
    assert tokens.tolist() == generated(eager, cache, batch).tolist()


@fp32
def test_a_prompt_of_one_token_sees_no_empty_place_of_a_static_cache(target: Target):
    ours, eager = pair_of("llama", target.device)
    batch = padded(target.device, "left", S=1, lengths=(1, 1))
    assert generated(ours, "static", batch).tolist() == generated(eager, "static", batch).tolist()


@fp32
@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ["llama", "mistral-window", "gemma3", "gpt2"])
def test_a_text_in_pieces_gives_the_logits_of_the_whole(target: Target, family: str, cache: str):
    ours, eager = pair_of(family, target.device)
    ids = tokens_of(target.device)
    if cache == "dynamic":
        past = transformers.DynamicCache(config=ours.config)
    else:
        past = transformers.StaticCache(config=ours.config, max_cache_len=20)
    pieces = [
        ours(piece, past_key_values=past, use_cache=True).logits
        for piece in ids.split([5, 4, 1, 3], 1)
    ]
    assert_equal_logits(torch.cat(pieces, 1), eager(ids).logits)


# --- training


def gradients_of(model: Any, batch: dict[str, Tensor], labels: Tensor) -> dict[str, Tensor]:
    model.train()
    loss = model(**batch, labels=labels, use_cache=False).loss
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def without_dropout(family: str) -> dict[str, float]:
    if family.startswith("gpt2"):
        return {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    return {}


@fp32
@pytest.mark.parametrize("side", ["left", "right", "none"])
@pytest.mark.parametrize("family", DECODERS)
def test_gradients_are_the_eager_ones(target: Target, family: str, side: str):
    ours, eager = pair_of(family, target.device, **without_dropout(family))
    batch = {"input_ids": tokens_of(target.device)}
    labels = batch["input_ids"]
    if side != "none":
        batch = padded(target.device, side)
        real = batch["attention_mask"].bool()
        # Nor is the first token learned: what would predict it is padding.
        labels = batch["input_ids"].masked_fill(~(real & real.roll(1, 1)), -100)
    expected = gradients_of(eager, batch, labels)
    for name, gradient in gradients_of(ours, batch, labels).items():
        bound = 1e-5 * expected[name].abs().max().item() + 1e-7
        torch.testing.assert_close(
            gradient,
            expected[name],
            atol=bound,
            rtol=1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@fp32
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("side", ["left", "none"])
def test_gradient_checkpointing_changes_no_gradient(target: Target, side: str, reentrant: bool):
    model = pair_of("llama", target.device).ours
    batch = {"input_ids": tokens_of(target.device)}
    if side == "left":
        batch = padded(target.device, side)
    labels = batch["input_ids"]
    expected = gradients_of(model, batch, labels)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with recorded_calls() as calls:
        if reentrant:  # which torch.autograd.grad is not for
            model.train()
            model(**batch, labels=labels, use_cache=False).loss.backward()
            gradients = {name: weight.grad for name, weight in model.named_parameters()}
        else:
            gradients = gradients_of(model, batch, labels)
    assert len(calls) == 2 * 2  # forward, and once more in backward
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            expected[name],
            atol=1e-6,
            rtol=1e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )


@fp32
def test_dropout_is_that_of_the_model_in_training_alone(target: Target):
    model = pair_of("llama", target.device, attention_dropout=0.4).ours
    ids = tokens_of(target.device)
    with recorded_calls() as calls, torch.no_grad():
        evaluated = model(ids).logits
        model.train()
        torch.manual_seed(1)
        first = model(ids).logits
        second = model(ids).logits
        torch.manual_seed(1)
        again = model(ids).logits
    assert [call["dropout"] for call in calls] == [0.0] * 2 + [0.4] * 6
    assert torch.equal(first, again)
    assert not torch.allclose(first, second, atol=100 * TOLERANCE)
    assert not torch.allclose(first, evaluated, atol=100 * TOLERANCE)


# --- what reaches attention


@fp32
@torch.no_grad()
def test_heads_are_not_repeated_and_nothing_is_masked_without_padding(target: Target):
    ours = pair_of("llama", target.device, attention_bias=True).ours
    past = transformers.DynamicCache(config=ours.config)
    with recorded_calls() as calls:
        ours(tokens_of(target.device, S=11), past_key_values=past)
        ours(tokens_of(target.device, S=1), past_key_values=past)
    prefill, _, step, _ = calls
    assert prefill["query"] == (2, 4, 11, 16)
    assert prefill["key"] == prefill["value"] == (2, 2, 11, 16)
    assert step["query"] == (2, 4, 1, 16)
    assert step["key"] == step["value"] == (2, 2, 12, 16)
    assert [call["mask"] for call in calls] == [None] * 4
    assert [call["causal"] for call in calls] == [True, True, False, False]


@fp32
@torch.no_grad()
def test_the_model_scales_its_scores(target: Target):
    ours, eager = pair_of("gemma2", target.device, query_pre_attn_scalar=7)
    ids = tokens_of(target.device)
    with recorded_calls() as calls:
        assert_equal_logits(ours(ids).logits, eager(ids).logits)
    assert [call["scale"] for call in calls] == [7**-0.5] * 2


@fp32
def test_results_are_contiguous_rows_of_heads(target: Target):
    q, k, v = torch.randn(3, 2, 5, 2, 8, device=target.device).transpose(2, 3)
    out, weights = integration.attention_forward(torch.nn.Module(), q, k, v, None)
    assert weights is None
    assert out.shape == (2, 5, 2, 8)
    assert out.is_contiguous()


@fp32
@torch.no_grad()
@pytest.mark.parametrize("side", ["none", "left"])
def test_compiles_to_one_graph(target: Target, side: str):
    ours = pair_of("llama", target.device).ours
    batch: dict[str, Tensor] = {"input_ids": tokens_of(target.device)}
    if side == "left":
        batch = padded(target.device, side)
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    logits = compiled(**batch, use_cache=False).logits
    real = batch.get("attention_mask")
    expected = ours(**batch, use_cache=False).logits
    assert_equal_logits(logits, expected, None if real is None else real.bool())


def test_pairs_differ_in_attention_alone():
    ours, eager = Pair(*pair_of("llama", "cpu"))
    assert ours.config._attn_implementation == "online_attention"
    assert eager.config._attn_implementation == "eager"
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b)
