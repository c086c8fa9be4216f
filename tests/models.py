# SPDX-License-Identifier: BSD-3-Clause
"""The models of the tests: a transformer block, as small as one can be."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from online_attention import attention
from online_attention.nn import MultiheadAttention


class Block(nn.Module):
    """Norm, causal attention, norm, MLP; `(B, S, E)` to the same."""

    embed_dim = 16

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        E = self.embed_dim
        self.norm = nn.LayerNorm(E, dtype=dtype)
        self.attention = MultiheadAttention(E, 2, dropout, batch_first=True, dtype=dtype)
        self.mlp = nn.Sequential(
            nn.LayerNorm(E, dtype=dtype),
            nn.Linear(E, 2 * E, dtype=dtype),
            nn.GELU(),
            nn.Linear(2 * E, E, dtype=dtype),
        )

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Keys where `hidden`, `(B, S)`, is true are padding."""
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, hidden, is_causal=True)[0]
        return x + self.mlp(x)


class Projected(nn.Module):
    """`attention` between two projections, written out: grouped heads, `(B, S, E)` to the same."""

    embed_dim = 16

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(self.embed_dim, 16)
        self.kv = nn.Linear(self.embed_dim, 2 * 4)
        self.out = nn.Linear(16, self.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 4)).transpose(1, 2)
        k, v = self.kv(x).unflatten(-1, (2, 1, 4)).transpose(1, 3).unbind(2)
        out, lse = attention(q, k, v, causal=True, return_lse=True)
        gated = out * lse.sigmoid()[..., None]
        return self.out(gated.transpose(1, 2).flatten(2))
