# SPDX-License-Identifier: BSD-3-Clause
"""The fp64 reference of the forward pass, and how large an error may be.

The measure is the relative Frobenius error |x - ref| / |ref|. The limit is not a chosen number but
twice the error that plain PyTorch arithmetic in the same dtype makes on the same rows. For 16-bit
inputs that has scores and softmax in fp32 and rounds the weights to 16 bits for p v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from _bias import bias_of_rows, make_bias
from _cases import Case
from _contenders import TORCH_DTYPES, Tensors

# Work of the reference per case; beyond it a sample of the query rows is checked (the first and
# the last always). A Hopper GPU checks the whole grid in this budget, two CPU cores S = 512.
REFERENCE_FLOPS = {"cuda": 3e12, "cpu": 1.5e9}
REFERENCE_BYTES = {"cuda": 2**30, "cpu": 2**26}
MIN_ROWS = 16


# Inputs are normal, so what is this small on average is 0 but for rounding.
ZERO = 1e-6


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected| in fp64; infinite if `found` has a NaN or an infinity.

    Where `expected` is 0 but for rounding, as dq is with one key, the mean error is taken as it is.
    """
    difference = torch.linalg.vector_norm(found.double() - expected.double()).item()
    norm = torch.linalg.vector_norm(expected.double()).item()
    if not math.isfinite(difference):
        return math.inf
    ones = math.sqrt(max(expected.numel(), 1))
    return difference / (norm if norm > ZERO * ones else ones)


def rounding_floor(dtype: str) -> float:
    """Below a few units of the accumulator's last place two right results may differ freely."""
    accumulator = torch.float64 if dtype == "fp64" else torch.float32
    return 16 * torch.finfo(accumulator).eps


@dataclass
class ForwardReference:
    """fp64 results for the query rows `rows`, and what plain arithmetic makes of them."""

    rows: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    limits: dict[str, float]
    of: int
    unit: str = "query rows"

    @property
    def checked(self) -> int:
        return self.rows.numel()

    def errors(self, found: dict[str, torch.Tensor]) -> dict[str, float]:
        errors = {}
        if "out" in found:
            chosen = found["out"].index_select(2, self.rows)
            errors["out"] = relative_error(chosen, self.out)
        if "lse" in found:
            errors["lse"] = self._lse_error(found["lse"].index_select(2, self.rows).double())
        return errors

    def _lse_error(self, found: torch.Tensor) -> float:
        """Of the finite log-sum-exps; infinite if the empty rows are not the same."""
        empty = self.lse == -math.inf
        if not torch.equal(found == -math.inf, empty):
            return math.inf
        return relative_error(found.masked_fill(empty, 0.0), self.lse.masked_fill(empty, 0.0))


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    hidden: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one batch entry by the definition; scores and softmax in fp32 at least.

    q (H_kv, group, n, D), k (H_kv, S_kv, D), v (H_kv, S_kv, D_v), hidden (n, S_kv), bias
    (H_kv, group, n, S_kv) or broadcast to it.
    """
    heads_kv, group, n, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.reshape(heads_kv, group * n, d).to(wide) @ k.transpose(1, 2).to(wide)
    scores = scores.view(heads_kv, group, n, -1).mul_(1 / math.sqrt(d))
    if bias is not None:
        scores = scores.add_(bias)
    if hidden is not None:
        scores = scores.masked_fill_(hidden, -math.inf)
    lse = torch.logsumexp(scores, dim=-1)
    # A row that sees no key has lse = -inf; its weights are 0, not exp(-inf + inf) = NaN.
    weights = scores.sub_(lse.masked_fill(lse == -math.inf, 0.0).unsqueeze(-1)).exp_()
    weights = weights.to(v.dtype).view(heads_kv, group * n, -1)
    out = (weights @ v).view(heads_kv, group, n, -1)
    return out, lse


def attend_rows(
    case: Case, tensors: Tensors, rows: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention by the definition, in `dtype`, for the query rows `rows` of every head."""
    q, k, v = tensors
    group = case.heads // case.heads_kv
    keys = torch.arange(case.s_kv, device=q.device)
    bias = make_bias(case, q.dtype, q.device)
    bytes_per_row = case.heads * case.s_kv * 8
    chunk = max(1, REFERENCE_BYTES[q.device.type] // bytes_per_row)
    outs, lses = [], []
    for b in range(case.batch):
        k_b, v_b = k[b].to(dtype), v[b].to(dtype)
        parts = []
        for some in rows.split(chunk):
            q_b = q[b].index_select(1, some).to(dtype)
            q_b = q_b.reshape(case.heads_kv, group, some.numel(), case.d)
            # Bottom-right aligned: query i sees key j if j <= i + S_kv - S_q.
            last_seen = some + case.s_kv - case.s_q
            hidden = keys > last_seen.unsqueeze(1) if case.causal else None
            parts.append(_attend(q_b, k_b, v_b, hidden, bias_of_rows(case, bias, b, some)))
        outs.append(torch.cat([out for out, _ in parts], dim=2).flatten(0, 1))
        lses.append(torch.cat([lse for _, lse in parts], dim=2).flatten(0, 1))
    return torch.stack(outs), torch.stack(lses)


def rows_to_check(case: Case, device: torch.device, generator: torch.Generator) -> torch.Tensor:
    """All query rows if the reference fits its budget, else a random sample with both ends."""
    per_row = 2.0 * case.batch * case.heads * case.s_kv * (case.d + case.d_v)
    affordable = max(MIN_ROWS, int(REFERENCE_FLOPS[device.type] / per_row))
    if affordable >= case.s_q:
        return torch.arange(case.s_q, device=device)
    drawn = torch.randperm(case.s_q, generator=generator)[:affordable]
    ends = torch.tensor([0, case.s_q - 1])
    return torch.cat([drawn, ends]).unique().to(device)


def make_reference(case: Case, dtype: str, tensors: Tensors) -> ForwardReference:
    device = tensors[0].device
    rows = rows_to_check(case, device, torch.Generator().manual_seed(case.s_q))
    out, lse = attend_rows(case, tensors, rows, torch.float64)
    plain, _ = attend_rows(case, tensors, rows, TORCH_DTYPES[dtype])
    lse_limit = 1e-13 if dtype == "fp64" else 1e-5
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        lse_limit = 2e-3  # TF32 was asked for: ten bits of mantissa in the products
    limits = {"out": 2 * relative_error(plain, out) + rounding_floor(dtype), "lse": lse_limit}
    return ForwardReference(rows, out, lse, limits, of=case.s_q)
