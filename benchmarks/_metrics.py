# SPDX-License-Identifier: BSD-3-Clause
"""Counts and statistics: the only place that says what a FLOP, a byte or a ratio is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from _cases import ELEMENT_BYTES, Case

# Forward is two matrix products (q kT, p v), backward five (the scores again, dv, dp, dq, dk).
PRODUCTS_RELATIVE_TO_FORWARD = {"forward": 1.0, "backward": 2.5, "forward_backward": 3.5}


def flops(case: Case, which_pass: str = "forward") -> float:
    """Floating-point operations of the matrix products, as the field counts them.

    2 B H S_q S_kv (D + D_v), which is 4 B H S_q S_kv D for equal head sizes; half of it when
    causal; 2.5 times as much backward. Exponentials are not counted.
    """
    products = 2.0 * case.batch * case.heads * case.s_q * case.s_kv * (case.d + case.d_v)
    if case.causal:
        products /= 2
    return products * PRODUCTS_RELATIVE_TO_FORWARD[which_pass]


def moved_bytes(case: Case, dtype: str) -> int:
    """The fewest bytes a forward can move: q, k and v read once, out written once."""
    per_query = case.batch * case.heads * case.s_q * (case.d + case.d_v)
    per_key = case.batch * case.heads_kv * case.s_kv * (case.d + case.d_v)
    return (per_query + per_key) * ELEMENT_BYTES[dtype]


def naive_bytes(case: Case, dtype: str) -> int:
    """The score matrix softmax(q kT) that a naive implementation keeps, in the inputs' dtype."""
    return case.batch * case.heads * case.s_q * case.s_kv * ELEMENT_BYTES[dtype]


def percentile(samples: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the sorted samples; fraction 0.5 is the median."""
    ordered = sorted(samples)
    position = fraction * (len(ordered) - 1)
    below = math.floor(position)
    above = math.ceil(position)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def geometric_mean(values: Iterable[float]) -> float:
    """exp(mean(log)): the mean for which "twice as fast" and "half as fast" cancel."""
    logs = [math.log(value) for value in values]
    if not logs:
        raise ValueError("the geometric mean of no values is not defined")
    return math.exp(sum(logs) / len(logs))


def group_of(row: dict[str, Any]) -> tuple[str, str]:
    """The group (head size, mask) that a result row is averaged in."""
    case = row["case"]
    head_dim = f"{case['d']}" if case["d"] == case["d_v"] else f"{case['d']}, {case['d_v']}"
    return head_dim, "causal" if case["causal"] else "full"


def ratio(row: dict[str, Any], baseline: str) -> float | None:
    """Baseline's median time over ours, so above 1 where ours is faster; None if one is missing."""
    ours = row["results"].get("ours", {}).get("median_ms")
    theirs = row["results"].get(baseline, {}).get("median_ms")
    return theirs / ours if ours and theirs else None


def geometric_means(rows: list[dict[str, Any]], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Per (D, mask), then over all rows: the geometric mean of the ratios to each baseline."""
    groups: dict[tuple[str, str] | None, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    groups[None] = rows
    means = []
    for group, members in groups.items():
        found = {
            name: [r for r in (ratio(row, name) for row in members) if r is not None]
            for name in baselines
        }
        means.append(
            {
                "D": group[0] if group else "all",
                "mask": group[1] if group else "all",
                "ratios": {name: geometric_mean(rs) for name, rs in found.items() if rs},
                "rows": {name: len(rs) for name, rs in found.items() if rs},
            }
        )
    return means
