# SPDX-License-Identifier: BSD-3-Clause
"""The exact answers, and the plain ones.

`exact` is what a result is judged by: fp64 for the types below fp64, extended precision for fp64.
`plain` is what PyTorch's own arithmetic makes of the same inputs in the same dtype. `by_definition`
is written apart from the library: one query at a time, a loop over what it sees and nothing else.

All of them take a bias, boolean or added to the scores, that broadcasts to (B, H, S_q, S_kv), and
`factors`, what dropout multiplies each probability of that shape by: 0 or 1 / (1 - p).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from online_attention import reference

UNBOUNDED = -1


@dataclass(frozen=True)
class Mask:
    """Keys of a query: `left` before and `right` after its diagonal, -1 for all."""

    alignment: str = "bottom_right"
    left: int = UNBOUNDED
    right: int = UNBOUNDED

    @property
    def is_causal(self) -> bool:
        return self.left == UNBOUNDED and self.right == 0

    @property
    def is_full(self) -> bool:
        return self.left == UNBOUNDED and self.right == UNBOUNDED

    @property
    def op_arguments(self) -> tuple[int, int, int]:
        """alignment, window_left and window_right of torch.ops.online_attention.forward."""
        return ("top_left", "bottom_right").index(self.alignment), self.left, self.right

    def keys(self, q_idx: int, s_q: int, s_kv: int) -> range:
        diagonal = q_idx + (s_kv - s_q if self.alignment == "bottom_right" else 0)
        begin = 0 if self.left == UNBOUNDED else max(diagonal - self.left, 0)
        end = s_kv if self.right == UNBOUNDED else min(diagonal + self.right + 1, s_kv)
        return range(begin, max(begin, end))

    def visible(self, s_q: int, s_kv: int) -> Tensor:
        """(S_q, S_kv), true where query and key see each other."""
        visible = torch.zeros(s_q, s_kv, dtype=torch.bool)
        for q_idx in range(s_q):
            keys = self.keys(q_idx, s_q, s_kv)
            visible[q_idx, keys.start : keys.stop] = True
        return visible


FULL = Mask()
CAUSAL = Mask(right=0)
CAUSAL_TOP_LEFT = Mask("top_left", right=0)


class Attention(NamedTuple):
    out: Tensor
    lse: Tensor


def default_scale(q: Tensor, scale: float | None) -> float:
    return 1 / math.sqrt(q.shape[-1]) if scale is None else scale


def shown_by(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
    """(B, H, S_q, S_kv), false where the bias hides a pair."""
    shape = (*q.shape[:3], k.shape[2])
    if bias is None:
        return torch.ones(shape, dtype=torch.bool, device=q.device)
    return (bias if bias.dtype == torch.bool else bias != -math.inf).expand(shape)


def pairs(q: Tensor, k: Tensor, mask: Mask, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which pairs see each other, and what is added to their scores, in fp64."""
    shown = shown_by(bias, q, k) & mask.visible(q.shape[2], k.shape[2]).to(q.device)
    if bias is None or bias.dtype == torch.bool:
        return shown, torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=q.device).expand(
            shown.shape
        )
    return shown, bias.detach().double().expand(shown.shape)


def by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> Attention:
    """(factors * softmax(scale q k^T + bias + mask)) v, returned in fp64 on q's device.

    Computed in extended precision for fp64 inputs, else in fp64.
    """
    Wide = np.longdouble if q.dtype == torch.float64 else np.float64
    B, H, s_q, _ = q.shape
    H_kv, d_v = k.shape[1], v.shape[3]
    wide_q, wide_k, wide_v = (x.detach().double().cpu().numpy().astype(Wide)
                              for x in (q, k, v))  # fmt: skip
    factor = Wide(default_scale(q, scale))
    shown, added = (x.cpu().numpy() for x in pairs(q, k, mask, bias))
    kept = None if factors is None else factors.double().cpu().numpy()
    out = np.zeros((B, H, s_q, d_v), Wide)
    lse = np.full((B, H, s_q), -np.inf, Wide)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for b, h, i in np.ndindex(B, H, s_q):
            seen = np.flatnonzero(shown[b, h, i])
            h_kv = h // (H // H_kv)
            scores = factor * (wide_k[b, h_kv, seen] @ wide_q[b, h, i]) + added[b, h, i, seen]
            largest = scores.max(initial=-np.inf)
            if largest == -np.inf:
                continue
            p = np.exp(scores - largest)
            weights = p if kept is None else p * kept[b, h, i, seen]
            out[b, h, i] = (weights @ wide_v[b, h_kv, seen]) / p.sum()
            lse[b, h, i] = largest + np.log(p.sum())
    return Attention(
        torch.from_numpy(out.astype(np.float64)).to(q.device),
        torch.from_numpy(lse.astype(np.float64)).to(q.device),
    )


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Attention:
    with torch.no_grad():
        return Attention(
            *reference.naive_attention(
                q,
                k,
                v,
                causal=mask.is_causal,
                alignment=mask.alignment,
                scale=scale,
                return_lse=True,
            )
        )


def exact(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> Attention:
    # The reference takes queries one by one where it must step around a NaN: slower than this loop.
    is_poisoned = not all(bool(x.isfinite().all()) for x in (q, k, v))
    is_windowed = not (mask.is_full or mask.is_causal)
    is_changed = bias is not None or factors is not None
    if q.dtype == torch.float64 or is_windowed or is_poisoned or is_changed:
        return by_definition(q, k, v, mask, scale, bias, factors)
    return _reference(q.double(), k.double(), v.double(), mask, default_scale(q, scale))


def plain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
    factors: Tensor | None = None,
) -> Attention:
    if (mask.is_full or mask.is_causal) and bias is None and factors is None:
        return _reference(q, k, v, mask, default_scale(q, scale))
    group = q.shape[1] // k.shape[1]
    shown, added = pairs(q, k, mask, bias)
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    accumulation = torch.float64 if q.dtype == torch.float64 else torch.float32
    scores = (q @ k.mT * default_scale(q, scale)).to(accumulation)
    scores = (scores + added.to(accumulation)).masked_fill(~shown, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    p = torch.where(lse[..., None] == -math.inf, 0, torch.exp(scores - lse[..., None]))
    if factors is not None:
        p = p * factors.to(p.dtype)
    return Attention(p.to(q.dtype) @ v, lse)


def plain_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask = FULL,
    scale: float | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The lse of PyTorch in the type the lse has: half inputs are widened before the products."""
    if q.dtype in (torch.float16, torch.bfloat16):
        scale = default_scale(q, scale)
        q, k, v = q.float(), k.float(), v.float()
    return plain(q, k, v, mask, scale, bias).lse
