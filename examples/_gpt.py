# SPDX-License-Identifier: BSD-3-Clause
"""The model of train_gpt.py: a pre-norm transformer over bytes, whose attention is an argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import online_attention

BYTES = 256  # the vocabulary

# --- attention: (B, H, S, D) queries, (B, H_kv, S, D) keys and values -> (B, H, S, D)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return online_attention.attention(q, k, v, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


# `enabled` is torch's call in a block that routes it to this package: see `routed`.
ATTENTIONS: dict[str, Attend] = {"online_attention": ours, "sdpa": sdpa, "enabled": sdpa}


def routed(name: str) -> AbstractContextManager[object]:
    """The block in which a training with the attention of that name runs."""
    return online_attention.enabled(strict=True) if name == "enabled" else nullcontext()


# --- the model


@dataclass(frozen=True)
class Sizes:
    context: int
    layers: int
    heads: int
    kv_heads: int
    width: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Rotation(nn.Module):
    """Rotary positions: a pair of features turns by an angle that grows with the position."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        half = sizes.head_dim // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(sizes.context, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().float().unsqueeze(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of (B, S, H, D), whose first feature lies at position 0."""
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; each key/value head serves a group of query heads."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.sizes, self.attend = sizes, attend
        kv_width = sizes.kv_heads * sizes.head_dim
        self.qkv = nn.Linear(sizes.width, sizes.width + 2 * kv_width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.split = [sizes.heads, sizes.kv_heads, sizes.kv_heads]

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        # (B, S, H, D) in memory, (B, H, S, D) by strides: nothing is copied for the attention.
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.sizes.head_dim)).split(self.split, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention, then a two-layer network, each added to what it reads."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.norm_attention, self.norm_network = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.attention = Attention(sizes, attend)
        self.widen = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.out = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotate)
        return x + self.out(F.gelu(self.widen(self.norm_network(x))))


class GPT(nn.Module):
    """Logits of the next byte for every byte of (B, S); input and output share their embedding."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, sizes.width)
        self.rotation = Rotation(sizes)
        self.blocks = nn.ModuleList(Block(sizes, attend) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What is added up over the layers starts smaller, so that the sum does not grow.
                depth = 2 * sizes.layers if name.endswith("out.weight") else 1
                nn.init.normal_(weight, std=0.02 / math.sqrt(depth))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x, self.rotation)
        return F.linear(self.norm(x), self.embedding.weight)
