# SPDX-License-Identifier: BSD-3-Clause
"""Counts and statistics: the only place that says what a FLOP, a byte or a ratio is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from _cases import ELEMENT_BYTES, Case, mask_text


def flops(case: Case, which_pass: str = "forward") -> float:
    """Floating-point operations of the matrix products, as the field counts them.

    Forward has two products, q kT of D and p v of D_v: 2 B H S_q S_kv (D + D_v), which is
    4 B H S_q S_kv D for equal head sizes. Backward has five, the scores again, dq and dk of D, dp
    and dv of D_v: 2 B H S_q S_kv (3 D + 2 D_v), 2.5 times as much for equal head sizes. Half of it
    when causal; pairs that a mask tensor hides are counted. Exponentials are not counted, nor what
    a kernel computes more than once.

    Around it a block has a product of every weight matrix with every token, 2 T (the weights'
    elements), and backward two of them.
    """
    pairs = float(case.batch * case.heads * case.s_q * case.s_kv)
    widths = {"forward": case.d + case.d_v, "backward": 3 * case.d + 2 * case.d_v}
    widths["forward_backward"] = widths["forward"] + widths["backward"]
    attention = 2.0 * pairs * widths[which_pass] / (2 if case.causal else 1)
    return attention + (_block_flops(case, which_pass) if case.block else 0)


def _block_flops(case: Case, which_pass: str) -> float:
    matrices = [shape for shape in case.block_weights.values() if len(shape) == 2]
    products = {"forward": 1, "backward": 2, "forward_backward": 3}[which_pass]
    return 2.0 * products * case.batch * case.s_q * sum(math.prod(shape) for shape in matrices)


# Forward reads q, k, v and writes out; backward reads all four and dout, and writes dq, dk, dv.
BYTES_RELATIVE_TO_FORWARD = {"forward": 1, "backward": 2, "forward_backward": 3}


def moved_bytes(case: Case, dtype: str, which_pass: str = "forward") -> int:
    """The fewest bytes a pass can move: each of its tensors once, the log-sum-exp not counted.

    Of a block: its input, its weights and its output, and backward the gradients of all three.
    """
    if case.block:
        elements = 2 * case.batch * case.s_q * case.width
        elements += sum(math.prod(shape) for shape in case.block_weights.values())
    else:
        rows = case.heads * case.s_q + case.heads_kv * case.s_kv
        elements = case.batch * rows * (case.d + case.d_v)
    return elements * ELEMENT_BYTES[dtype] * BYTES_RELATIVE_TO_FORWARD[which_pass]


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


Group = tuple[str, str, str]


def group_of(row: dict[str, Any]) -> Group:
    """The group (family, head size, mask) that a result row is averaged in."""
    case = row["case"]
    head_dim = f"{case['d']}" if case["d"] == case["d_v"] else f"{case['d']}, {case['d_v']}"
    return case["family"], head_dim, mask_text(case["causal"], case.get("bias", "none"))


def grouped(rows: list[dict[str, Any]]) -> dict[Group, list[dict[str, Any]]]:
    """The rows of each group, groups and rows in the order of `rows`."""
    groups: dict[Group, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    return groups


def ratio(row: dict[str, Any], baseline: str) -> float | None:
    """Baseline's median time over ours, so above 1 where ours is faster; None if one is missing."""
    ours = row["results"].get("ours", {}).get("median_ms")
    theirs = row["results"].get(baseline, {}).get("median_ms")
    return theirs / ours if ours and theirs else None


def geometric_means(rows: list[dict[str, Any]], baselines: Sequence[str]) -> list[dict[str, Any]]:
    """Per group, then over all rows: the geometric mean of the ratios to each baseline."""
    means = []
    for group, members in [*grouped(rows).items(), (("all", "all", "all"), rows)]:
        found = {
            name: [r for r in (ratio(row, name) for row in members) if r is not None]
            for name in baselines
        }
        means.append(
            {
                **dict(zip(("family", "D", "mask"), group, strict=True)),
                "ratios": {name: geometric_mean(rs) for name, rs in found.items() if rs},
                "rows": {name: len(rs) for name, rs in found.items() if rs},
            }
        )
    return means
