# SPDX-License-Identifier: BSD-3-Clause
"""The PNG: speed of ours and the peers, one panel per head size and mask. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _cases import pass_text
from _metrics import Group, grouped

# Okabe and Ito's colours, which stay apart for colour-blind readers; ours is black and thick.
COLOURS = {
    "ours": "#000000",
    "ours + lse": "#999999",
    "ours, as sdpa": "#BBBBBB",
    "ours, any order": "#777777",
    "sdpa": "#56B4E9",
    "flash": "#E69F00",
    "efficient": "#CC79A7",
    "cudnn": "#009E73",
    "math": "#D55E00",
    "fa3": "#0072B2",
}

Rows = list[dict[str, Any]]


def write_plot(report: dict[str, Any], path: Path) -> bool:
    """Writes the plot; False if there is no timed row to show."""
    rows = [row for row in report["rows"] if row["results"]]
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = grouped(rows)
    columns = 2 if len(groups) > 1 else 1
    lines = -(-len(groups) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(6.2 * columns, 3.4 * lines + 0.8), squeeze=False
    )
    names = ["ours", *report["baselines"]]
    scale, unit = _unit(report, rows)
    for axis, (group, members) in zip(axes.flat, groups.items(), strict=False):
        draw = _draw_lines if _is_curve(members) else _draw_bars
        draw(axis, members, names, scale)
        axis.set_title(_panel_title(group, groups))
        axis.set_ylabel(unit)
        axis.set_ylim(bottom=0)
        axis.grid(axis="y", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in list(axes.flat)[len(groups) :]:
        axis.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    environment = report["environment"]
    figure.suptitle(
        f"{environment['device']}, {report['dtype']} {pass_text(report['pass'])}, "
        f"torch {environment['torch']}, {environment['date'][:10]}"
    )
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.8 / (3.4 * lines + 0.8) / 2, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True


def _unit(report: dict[str, Any], rows: Rows) -> tuple[float, str]:
    """Factor and name of the unit; 0 stands for times instead of speeds."""
    if report["settings"]["host_time"]:
        return 0.0, "host time, µs"
    best = max(result["tflops"] for row in rows for result in row["results"].values())
    return (1.0, "TFLOP/s") if best >= 10 else (1e3, "GFLOP/s")


def _value(result: dict[str, Any] | None, scale: float) -> float:
    if result is None:
        return float("nan")
    return result["tflops"] * scale if scale else result["median_ms"] * 1e3


def _is_curve(rows: Rows) -> bool:
    """Whether a panel is a curve over S: at least two lengths, each of them once."""
    lengths = [row["case"]["s_kv"] for row in rows]
    return len(lengths) >= 2 and len(set(lengths)) == len(lengths)


def _panel_title(group: Group, groups: dict[Group, Rows]) -> str:
    family, head_dim, mask = group
    several = len({other for other, _, _ in groups}) > 1
    return f"{family}, " * several + f"D {head_dim}, {mask}"


def _draw_lines(axis: Any, rows: Rows, names: list[str], scale: float) -> None:
    rows = sorted(rows, key=lambda row: row["case"]["s_kv"])
    lengths = [row["case"]["s_kv"] for row in rows]
    for name in names:
        results = [row["results"].get(name) for row in rows]
        colour, ours = COLOURS.get(name), name == "ours"
        values = [_value(result, scale) for result in results]
        axis.plot(
            lengths, values, marker="o", markersize=4, color=colour, label=name,
            linewidth=2.5 if ours else 1.5, zorder=3 if ours else 2,
        )  # fmt: skip
        if scale:
            # Speed is work over time: the fastest percentile of time is the top of the band.
            low = [v * r["median_ms"] / r["p80_ms"] if r else v for v, r in _pairs(values, results)]
            top = [v * r["median_ms"] / r["p20_ms"] if r else v for v, r in _pairs(values, results)]
            axis.fill_between(lengths, low, top, color=colour, alpha=0.2, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(length) for length in lengths])
    axis.minorticks_off()
    axis.set_xlabel("S")


def _pairs(values: list[float], results: list[Any]) -> list[tuple[float, Any]]:
    return list(zip(values, results, strict=True))


def _draw_bars(axis: Any, rows: Rows, names: list[str], scale: float) -> None:
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        positions = [i + (index - (len(names) - 1) / 2) * width for i in range(len(rows))]
        values = [_value(row["results"].get(name), scale) for row in rows]
        axis.bar(positions, values, width, color=COLOURS.get(name), label=name)
    small = {"rotation": 30, "ha": "right", "fontsize": 7} if len(rows) > 3 else {"fontsize": 8}
    axis.set_xticks(range(len(rows)), [row["shape"] for row in rows], **small)
