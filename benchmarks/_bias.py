# SPDX-License-Identifier: BSD-3-Clause
"""The masks given as tensors: what they are, and what they do to scores by the definition."""

from __future__ import annotations

import math

import torch

from _cases import Case


def make_bias(case: Case, dtype: torch.dtype, device: torch.device) -> torch.Tensor | None:
    """The mask tensor of a case, the same in every call; None if it has none.

    key_padding: boolean (B, 1, 1, S_kv); the sequences of a batch are between half as long and as
        long as there is room for. boolean: (1, 1, S_q, S_kv), each pair visible or not by a coin,
        but for a key of its own that every query sees. additive: (1, H, S_q, S_kv) in `dtype`.
    """
    generator = torch.Generator(device).manual_seed(case.s_q + case.s_kv)
    if case.bias == "none":
        return None
    if case.bias == "key_padding":
        lengths = torch.linspace(case.s_kv / 2, case.s_kv, case.batch, device=device).ceil()
        return torch.arange(case.s_kv, device=device) < lengths[:, None, None, None]
    if case.bias == "boolean":
        shape = (1, 1, case.s_q, case.s_kv)
        visible = torch.rand(shape, generator=generator, device=device) < 0.5
        queries = torch.arange(case.s_q, device=device)
        visible[..., queries, queries % case.s_kv] = True
        return visible
    shape = (1, case.heads, case.s_q, case.s_kv)
    return torch.randn(shape, generator=generator, device=device, dtype=dtype)


def bias_of_rows(
    case: Case, bias: torch.Tensor | None, b: int, rows: torch.Tensor
) -> torch.Tensor | None:
    """What is added to the scores of some query rows of one batch entry, -inf where hidden.

    (H_kv, group, n, S_kv), broadcast where the mask is.
    """
    if bias is None:
        return None
    entry = bias[b if bias.shape[0] > 1 else 0]
    if entry.shape[1] > 1:
        entry = entry.index_select(1, rows)
    if entry.dtype == torch.bool:
        entry = torch.zeros(entry.shape, device=entry.device).masked_fill_(~entry, -math.inf)
    if entry.shape[0] > 1:
        return entry.unflatten(0, (case.heads_kv, -1))
    return entry[None]
