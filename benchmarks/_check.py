# SPDX-License-Identifier: BSD-3-Clause
"""Is it right? Errors against an fp64 reference, before anything is timed.

The measure is the relative Frobenius error |out - ref| / |ref|. The limit is not a chosen number
but twice the error that plain PyTorch arithmetic in the same dtype makes on the same rows. For
16-bit inputs that has scores and softmax in fp32 and rounds the weights to 16 bits for p v.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from _cases import Case
from _contenders import OURS_WITH_LSE, TORCH_DTYPES, Contender, Refusal, Tensors, first_call

# Work of the reference per case; beyond it a sample of the query rows is checked (the first and
# the last always). A Hopper GPU checks the whole grid in this budget, two CPU cores S = 512.
REFERENCE_FLOPS = {"cuda": 3e12, "cpu": 1.5e9}
REFERENCE_BYTES = {"cuda": 2**30, "cpu": 2**26}
MIN_ROWS = 16


@dataclass
class Reference:
    """fp64 results for the query rows `rows`, and what plain arithmetic makes of them."""

    rows: torch.Tensor
    out: torch.Tensor
    lse: torch.Tensor
    limit: float
    lse_limit: float


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """|out - expected| / |expected| in fp64; infinite if out has a NaN or an infinity."""
    difference = torch.linalg.vector_norm(out.double() - expected.double()).item()
    norm = torch.linalg.vector_norm(expected.double()).item()
    if not math.isfinite(difference):
        return math.inf
    return difference / norm if norm else difference


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, hidden: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of one batch entry by the definition; scores and softmax in fp32 at least.

    q (H_kv, group, n, D), k (H_kv, S_kv, D), v (H_kv, S_kv, D_v), hidden (n, S_kv).
    """
    heads_kv, group, n, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = q.reshape(heads_kv, group * n, d).to(wide) @ k.transpose(1, 2).to(wide)
    scores = scores.view(heads_kv, group, n, -1).mul_(1 / math.sqrt(d))
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
            parts.append(_attend(q_b, k_b, v_b, hidden))
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


def make_reference(case: Case, dtype: str, tensors: Tensors) -> Reference:
    device = tensors[0].device
    rows = rows_to_check(case, device, torch.Generator().manual_seed(case.s_q))
    out, lse = attend_rows(case, tensors, rows, torch.float64)
    plain, _ = attend_rows(case, tensors, rows, TORCH_DTYPES[dtype])
    # Below a few units of the accumulator's last place two right results may differ freely.
    accumulator = torch.float64 if dtype == "fp64" else torch.float32
    floor = 16 * torch.finfo(accumulator).eps
    lse_limit = 1e-13 if dtype == "fp64" else 1e-5
    if dtype == "fp32" and torch.get_float32_matmul_precision() != "highest":
        lse_limit = 2e-3  # TF32 was asked for: ten bits of mantissa in the products
    return Reference(rows, out, lse, 2 * relative_error(plain, out) + floor, lse_limit)


def _lse_error(lse: torch.Tensor, reference: Reference) -> float:
    """Relative error of the finite log-sum-exps; infinite if the empty rows are not the same."""
    found = lse.index_select(2, reference.rows).double()
    empty = reference.lse == -math.inf
    if not torch.equal(found == -math.inf, empty):
        return math.inf
    return relative_error(found.masked_fill(empty, 0.0), reference.lse.masked_fill(empty, 0.0))


def _poison(case: Case, like: torch.Tensor) -> None:
    """Leaves NaN in the block that the allocator will probably hand out for the next output.

    An output element that is never written then shows as NaN and not as a right old result.
    """
    shape = (case.batch, case.s_q, case.heads, case.d_v)
    torch.full(shape, math.nan, dtype=like.dtype, device=like.device)


def check(
    case: Case, dtype: str, tensors: Tensors, takers: list[Contender]
) -> tuple[dict[str, Any], dict[str, Refusal]]:
    """Calls every contender once.

    Returns the check, ready for JSON, and for each contender that does not take the case the
    reason. `check["wrong"]` is a list of sentences, empty if ours is right.
    """
    reference = make_reference(case, dtype, tensors)
    errors: dict[str, float] = {}
    refused: dict[str, Refusal] = {}
    ours: torch.Tensor | None = None
    against: tuple[str, float] | None = None
    for contender in takers:
        _poison(case, tensors[0])
        result, refusal = first_call(contender, case, tensors)
        if refusal is not None:
            refused[contender.name] = refusal
            continue
        out = contender.out(result)
        errors[contender.name] = relative_error(out.index_select(2, reference.rows), reference.out)
        if contender.name == "ours":
            ours = out
        elif contender.is_sdpa and ours is not None and against is None:
            # The whole output this time, in case only a sample of the rows met the reference.
            against = (contender.name, relative_error(ours, out))
        del result, out
    lse_error, lse_refusal = None, None
    if ours is not None:
        result, lse_refusal = first_call(OURS_WITH_LSE, case, tensors)
        if lse_refusal is None:
            lse_error = _lse_error(result[1], reference)
    found = {
        "rows_checked": reference.rows.numel(),
        "rows": case.s_q,
        "limit": reference.limit,
        "errors": errors,
        "lse_error": lse_error,
        "lse_limit": reference.lse_limit,
        "difference_to": against,
    }
    found["wrong"] = _what_is_wrong(found)
    if lse_refusal is not None:
        found["wrong"].append(f"return_lse=True failed: {lse_refusal.reason}")
    return found, refused


def _what_is_wrong(found: dict[str, Any]) -> list[str]:
    errors, limit = found["errors"], found["limit"]
    wrong = []
    for name in ("ours", OURS_WITH_LSE.name):
        if name in errors and not errors[name] <= limit:
            wrong.append(f"out of {name} is off by {errors[name]:.1e}, allowed is {limit:.1e}")
    lse_error, lse_limit = found["lse_error"], found["lse_limit"]
    if lse_error is not None and not lse_error <= lse_limit:
        wrong.append(f"lse is off by {lse_error:.1e}, allowed is {lse_limit:.1e}")
    if found["difference_to"] is not None:
        name, difference = found["difference_to"]
        # Two right results can each be a limit away from the truth, on opposite sides.
        if errors[name] <= limit and not difference <= 2 * limit:
            wrong.append(f"out differs from {name} by {difference:.1e}, allowed is {2 * limit:.1e}")
    return wrong
