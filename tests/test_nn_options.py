# SPDX-License-Identifier: BSD-3-Clause
"""`nn.MultiheadAttention` over all options at once, drawn by hypothesis, against torch's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from test_nn import Theirs, assert_same, pair


@dataclass(frozen=True)
class Problem:
    N: int
    L: int
    S: int
    batch_first: bool
    is_batched: bool
    same: str  # which of query, key and value are one tensor
    options: dict[str, object]
    attn_mask: str
    padding: str
    is_causal: bool
    seed: int

    def inputs(self, module: Theirs) -> list[Tensor]:
        torch.manual_seed(self.seed)
        sizes = ((self.L, module.embed_dim), (self.S, module.kdim), (self.S, module.vdim))
        batch_dim = 0 if self.batch_first else 1
        drawn = [torch.randn(self.N, *size, dtype=torch.float64) for size in sizes]
        query, key, value = (
            x.transpose(0, batch_dim).contiguous() if self.is_batched else x[0].clone()
            for x in drawn
        )
        if self.same == "all":
            return [query] * 3
        return [query, key, key] if self.same == "keys" else [query, key, value]

    def masks(self, heads: int) -> dict[str, Tensor | None]:
        """Every query sees at least key 0."""
        N = self.N if self.is_batched else 1
        shape = (N * heads, self.L, self.S) if "heads" in self.attn_mask else (self.L, self.S)
        padding = (N, self.S) if self.is_batched else (self.S,)
        if self.is_causal:
            mask = torch.ones(self.L, self.S, dtype=torch.bool).triu(1)
        else:
            mask = self.drawn(self.attn_mask, shape)
        return {"attn_mask": mask, "key_padding_mask": self.drawn(self.padding, padding)}

    @staticmethod
    def drawn(kind: str, shape: tuple[int, ...]) -> Tensor | None:
        if kind == "none":
            return None
        hidden = torch.rand(shape) < 0.4
        hidden[..., 0] = False
        if "bool" in kind:
            return hidden
        return torch.randn(shape, dtype=torch.float64).masked_fill(hidden, -math.inf)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    flag = st.booleans()
    same = draw(st.sampled_from(["all", "keys", "none"]))
    L = draw(st.integers(1, 6))
    options: dict[str, object] = {name: draw(flag) for name in ("bias", "add_bias_kv")}
    options["add_zero_attn"] = draw(flag)
    if same == "none":
        options |= {name: draw(st.sampled_from([None, 5, 12])) for name in ("kdim", "vdim")}
    return Problem(
        N=draw(st.integers(1, 3)),
        L=L,
        S=L if same == "all" else draw(st.integers(1, 7)),
        batch_first=draw(flag),
        is_batched=draw(flag),
        same=same,
        options=options,
        attn_mask=draw(st.sampled_from(["none", "bool", "float", "bool heads", "float heads"])),
        padding=draw(st.sampled_from(["none", "bool", "float"])),
        is_causal=draw(flag),
        seed=draw(st.integers(0, 99)),
    )


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@given(problem=problems(), heads=st.sampled_from([1, 3, 4]))
def test_results_and_gradients_are_torchs(problem: Problem, heads: int):
    ours, theirs = pair(12, heads, batch_first=problem.batch_first, **problem.options)
    inputs = problem.inputs(theirs)
    out = assert_same(ours, theirs, inputs, **problem.masks(heads), is_causal=problem.is_causal)
    assert out.shape == inputs[0].shape
