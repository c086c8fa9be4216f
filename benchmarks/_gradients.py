# SPDX-License-Identifier: BSD-3-Clause
"""The fp64 reference of the gradients, (E25) to (E31), and what plain arithmetic makes of them.

A key's gradient gathers every query that sees it, so a sample of the query rows would not do:
where the work is too much, some key/value heads are checked, each with all of its query heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from _bias import bias_of_rows, make_bias
from _cases import Case
from _contenders import TORCH_DTYPES, Tensors
from _metrics import flops
from _reference import REFERENCE_BYTES, REFERENCE_FLOPS, relative_error, rounding_floor

GRADIENTS = ("dq", "dk", "dv")
MIN_HEADS = 2
Heads = list[tuple[int, list[int]]]


@dataclass
class GradientReference:
    """fp64 gradients of some key/value heads: pairs (batch entry, its heads that are checked).

    expected: each (number of heads, ...); dq has the query heads of a group as its second size.
    """

    heads: Heads
    group: int
    expected: dict[str, torch.Tensor]
    limits: dict[str, float]
    checked: int
    of: int
    unit: str = "key/value heads"

    def errors(self, found: dict[str, torch.Tensor]) -> dict[str, float]:
        return {
            name: relative_error(self._chosen(name, found[name]), expected)
            for name, expected in self.expected.items()
        }

    def _chosen(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        if name == "dq":
            gradient = gradient.unflatten(1, (-1, self.group))
        return torch.cat([gradient[b, heads] for b, heads in self.heads])


def heads_to_check(case: Case, device: torch.device, generator: torch.Generator) -> Heads:
    """All key/value heads if the reference fits its budget, else some, the first and last too."""
    total = case.batch * case.heads_kv
    per_head = flops(case, "forward_backward") / total * (2 if case.causal else 1)
    affordable = max(MIN_HEADS, int(REFERENCE_FLOPS[device.type] / per_head))
    chosen = list(range(total))
    if affordable < total:
        between = torch.randperm(total - 2, generator=generator)[: affordable - 2] + 1
        chosen = sorted([0, *between.tolist(), total - 1])
    by_entry: dict[int, list[int]] = {}
    for index in chosen:
        by_entry.setdefault(index // case.heads_kv, []).append(index % case.heads_kv)
    return list(by_entry.items())


def gradients(
    case: Case, tensors: Tensors, dout: torch.Tensor, heads: Heads, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """dq, dk, dv by the definition, with `dtype` for what is stored between the products.

    Scores, softmax and sums are in fp32 at least, as are the products, of factors in `dtype`: what
    PyTorch does where it does it well. delta is of `out` in `dtype`, all that is kept of it.
    """
    q, k, v = tensors
    group = case.heads // case.heads_kv
    mask = make_bias(case, q.dtype, q.device)
    parts = []
    for b, some in heads:
        by_group = [t[b].unflatten(0, (case.heads_kv, group))[some] for t in (q, dout)]
        k_b, v_b = k[b, some], v[b, some]
        parts.append(
            _gradients_of_entry(case, by_group[0], k_b, v_b, by_group[1], dtype, mask, (b, some))
        )
    return {name: torch.cat([part[i] for part in parts]) for i, name in enumerate(GRADIENTS)}


def _gradients_of_entry(
    case: Case,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dout: torch.Tensor,
    dtype: torch.dtype,
    mask: torch.Tensor | None,
    place: tuple[int, list[int]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, dout (heads, group, S_q, D or D_v); k, v (heads, S_kv, D or D_v).

    place: the batch entry and which of its key/value heads these are.
    """
    wide = torch.promote_types(dtype, torch.float32)
    heads, group = q.shape[:2]
    scale = 1 / math.sqrt(case.d)
    k, v = k.to(wide), v.to(wide)
    dq = torch.empty(q.shape, dtype=dtype, device=q.device)
    dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    keys = torch.arange(case.s_kv, device=q.device)
    chunk = max(1, REFERENCE_BYTES[q.device.type] // (heads * group * case.s_kv * 8))
    for rows in torch.arange(case.s_q, device=q.device).split(chunk):
        q_c, dout_c = (t[:, :, rows].flatten(1, 2).to(wide) for t in (q, dout))
        scores = (q_c @ k.mT).mul_(scale)
        bias = bias_of_rows(case, mask, place[0], rows)
        if bias is not None:
            bias = bias[place[1]] if bias.shape[0] > 1 else bias
            scores = scores.unflatten(1, (group, -1)).add_(bias).flatten(1, 2)
        if case.causal:
            # Bottom-right aligned: query i sees key j if j <= i + S_kv - S_q.
            hidden = keys > (rows + case.s_kv - case.s_q).unsqueeze(1)
            scores = scores.masked_fill_(hidden.repeat(group, 1), -math.inf)
        lse = torch.logsumexp(scores, dim=-1, keepdim=True)
        # A row that sees no key has lse = -inf; its probabilities are 0, not NaN.
        p = scores.sub_(lse.masked_fill_(lse == -math.inf, 0.0)).exp_()  # (E25)
        p_stored = p.to(dtype).to(wide)
        out = (p_stored @ v).to(dtype).to(wide)
        dv += p_stored.mT @ dout_c  # (E26)
        delta = (dout_c * out).sum(-1, keepdim=True)  # (E28)
        ds = (dout_c @ v.mT).sub_(delta).mul_(p).to(dtype).to(wide)  # (E27), (E29)
        dq[:, :, rows] = (ds @ k).mul_(scale).to(dtype).unflatten(1, (group, -1))  # (E30)
        dk += ds.mT @ q_c  # (E31)
    return dq, dk.mul_(scale).to(dtype), dv.to(dtype)


def make_reference(
    case: Case, dtype: str, tensors: Tensors, dout: torch.Tensor
) -> GradientReference:
    device = dout.device
    heads = heads_to_check(case, device, torch.Generator().manual_seed(case.s_q))
    inputs: Tensors = tuple(t.detach() for t in tensors)  # type: ignore[assignment]
    expected = gradients(case, inputs, dout, heads, torch.float64)
    plain = gradients(case, inputs, dout, heads, TORCH_DTYPES[dtype])
    limits = {
        name: 2 * relative_error(plain[name], expected[name]) + rounding_floor(dtype)
        for name in GRADIENTS
    }
    return GradientReference(
        heads,
        case.heads // case.heads_kv,
        expected,
        limits,
        checked=sum(len(some) for _, some in heads),
        of=case.batch * case.heads_kv,
    )
