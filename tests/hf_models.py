# SPDX-License-Identifier: BSD-3-Clause
"""Tiny random models of transformers, each with this attention and with transformers' eager one."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip(
    "transformers", minversion="4.56", reason="needs transformers, of the extra [test]"
)

from online_attention.integrations import transformers as integration  # noqa: E402

integration.register()

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
# Older versions tell no lengths when they ask for a mask, so there it is run as a mask.
HAS_RANGES = "q_length" in inspect.signature(integration.sdpa_mask).parameters
VOCABULARY, PAD = 97, 0
TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
SMALL = TOKENS | {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
}
BY_LAYER = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6}
GPT2 = TOKENS | {"n_embd": 48, "n_layer": 2, "n_head": 3, "n_positions": 128}
NO_CAP = {"attn_logit_softcapping": None}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": None}),
    "mistral-window": ("MistralConfig", SMALL | {"sliding_window": 6}),
    "qwen2-window": ("Qwen2Config", SMALL | BY_LAYER | {"use_sliding_window": True}),
    "gemma": ("GemmaConfig", SMALL),
    "gemma2": ("Gemma2Config", SMALL | BY_LAYER | NO_CAP | {"query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", SMALL | BY_LAYER | {"query_pre_attn_scalar": 16}),
    "gpt2": ("GPT2Config", GPT2),
    "gpt2-scaled": ("GPT2Config", GPT2 | {"scale_attn_by_inverse_layer_idx": True}),
    "bert": ("BertConfig", {k: v for k, v in SMALL.items() if "key_value" not in k}),
}
DECODERS = [family for family in FAMILIES if family != "bert"]


class Pair(NamedTuple):
    ours: Any
    eager: Any


def config_of(family: str, **changes: Any) -> Any:
    name, settings = FAMILIES[family]
    return getattr(transformers, name)(**settings | changes)


def model_of(
    config: Any, implementation: str, device: str, dtype: torch.dtype = torch.float32
) -> Any:
    """The same weights for every implementation; wide ones, so that attention is not uniform."""
    if VERSION < (5, 0) and config.model_type == "bert":
        pytest.skip("before transformers 5 BERT takes no other implementation")
    if not HAS_RANGES and getattr(config, "scale_attn_by_inverse_layer_idx", False):
        pytest.skip("older versions of transformers do not tell others GPT-2's scales")
    torch.manual_seed(5)
    build = transformers.AutoModelForCausalLM.from_config
    if isinstance(config, transformers.BertConfig):
        build = transformers.AutoModelForMaskedLM.from_config
    model = build(config, attn_implementation=implementation)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.normal_(std=0.2)
    return model.to(device, dtype).eval()


def pair_of(family: str, device: str, **changes: Any) -> Pair:
    models = (
        model_of(config_of(family, **changes), name, device) for name in (integration.NAME, "eager")
    )
    return Pair(*models)


def tokens_of(device: str, B: int = 2, S: int = 13) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (B, S), generator=generator).to(device)


def padded(device: str, side: str, S: int = 13, lengths: tuple[int, ...] = (13, 8, 1)) -> Any:
    """input_ids, attention_mask and position_ids of sequences of several lengths."""
    ids = tokens_of(device, len(lengths), S)
    places = torch.arange(S, device=device)
    count = torch.tensor(lengths, device=device)[:, None]
    real = places >= S - count if side == "left" else places < count
    return {
        "input_ids": ids.masked_fill(~real, PAD),
        "attention_mask": real.long(),
        "position_ids": (real.long().cumsum(-1) - 1).clamp(min=0),
    }


class Calls(list[dict[str, Any]]):
    """What reached attention: one entry a call, with shapes and the mask."""


@contextmanager
def recorded_calls() -> Iterator[Calls]:
    """Records the calls of both routes from the integration into the package, and runs them."""
    calls = Calls()
    sdpa, forward = integration.scaled_dot_product_attention, integration.ops.forward

    def recorded_sdpa(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        causal: bool,
        scale: float | None,
        enable_gqa: bool,
    ) -> Tensor:
        shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
        settings = {"mask": mask, "dropout": dropout, "causal": causal, "scale": scale}
        calls.append(shapes | settings | {"alignment": 0})
        return sdpa(query, key, value, mask, dropout, causal, scale, enable_gqa=enable_gqa)

    def recorded_forward(
        query: Tensor, key: Tensor, value: Tensor, causal: bool, *rest: Any, **settings: Any
    ) -> tuple[Tensor, Tensor]:
        shapes = {"query": query.shape, "key": key.shape, "value": value.shape}
        extra = {"mask": settings["bias"], "dropout": settings["dropout_p"], "causal": causal}
        calls.append(shapes | extra | {"scale": rest[0], "alignment": rest[1]})
        return forward(query, key, value, causal, *rest, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(integration, "scaled_dot_product_attention", recorded_sdpa)
        patch.setattr(integration.ops, "forward", recorded_forward)
        yield calls
