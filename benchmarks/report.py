# SPDX-License-Identifier: BSD-3-Clause
"""Writes the performance tables of README.md from result files, between two markers.

    python benchmarks/report.py h100_forward_bf16.json ...   # names in benchmarks/results/
    python benchmarks/report.py                              # again, from the same files
    python benchmarks/report.py --check                      # is README.md up to date?

The begin marker keeps the names of the files, so that other results on a disk change nothing:
`<!-- benchmark:begin h100_forward_bf16.json -->` ... `<!-- benchmark:end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from _cases import pass_text
from _metrics import geometric_mean, group_of, grouped

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
MARKED = re.compile(
    r"<!-- benchmark:begin(?P<names>[^>]*?)\s*-->\n.*?(?=<!-- benchmark:end -->)",
    re.DOTALL,
)
UP_TO_DATE, OUT_OF_DATE, USAGE = 0, 1, 2

Row = dict[str, Any]
Report = dict[str, Any]


def fastest_peer(row: Row, baselines: list[str]) -> tuple[str, float] | None:
    """The baseline with the shortest median time in the same run, and that time in ms."""
    found = [
        (row["results"][name]["median_ms"], name)
        for name in baselines
        if name in row["results"] and not name.startswith("ours")
    ]
    return (min(found)[1], min(found)[0]) if found else None


def peer_ratio(row: Row, baselines: list[str]) -> float | None:
    """The fastest peer's time over ours: above 1 where ours is the fastest."""
    peer = fastest_peer(row, baselines)
    ours = row["results"].get("ours")
    return peer[1] / ours["median_ms"] if peer and ours else None


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _is_decode(report: Report) -> bool:
    """Whether every case has few queries: what counts is how fast keys and values are read."""
    return all(row["case"]["family"] == "decode" for row in report["rows"])


def _cell(row: Row | None, report: Report) -> str:
    """Ours, and in brackets its ratio to the fastest peer, bold from 1 on."""
    if row is None:
        return "–"
    if row["status"] != "ok" or "ours" not in row["results"]:
        return row["status"] if row["status"] != "ok" else "–"
    ours = row["results"]["ours"]
    if report["settings"]["host_time"]:
        own = f"{ours['median_ms'] * 1e3:.1f}"
    elif _is_decode(report):
        own = _figure(ours["gbytes_per_s"])
    else:
        own = _figure(ours["tflops"])
    relative = peer_ratio(row, report["baselines"])
    if relative is None:
        return own
    # Rounded first: a cell that reads 1.00 must not be bold or not by its hidden digits.
    text = f"{relative:.2f}×"
    return f"{own} (**{text}**)" if round(relative, 2) >= 1 else f"{own} ({text})"


def _mean_text(rows: list[Row], report: Report) -> str:
    ratios = [r for r in (peer_ratio(row, report["baselines"]) for row in rows) if r is not None]
    return f"{geometric_mean(ratios):.2f}×" if ratios else "–"


def _table(header: list[str], lines: list[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(cells)} |"
        for cells in (header, ["---"] * 2 + ["---:"] * (len(header) - 2), *lines)
    ]


def _tables(report: Report) -> list[str]:
    """One table per family, or, where no family is a grid over the lengths, one for all."""
    if _is_decode(report):
        return _decode_table(report["rows"], report)
    families: dict[str, list[Row]] = {}
    for row in report["rows"]:
        families.setdefault(row["case"]["family"], []).append(row)
    if not any(_is_grid(rows) for rows in families.values()):
        return _case_table(report["rows"], report)
    lines: list[str] = []
    others: list[Row] = []
    for rows in families.values():
        if _is_grid(rows):
            lines += [*_grid_table(rows, report), ""]
        else:
            others += rows
    return [*lines, *_case_table(others, report)] if others else lines[:-1]


def _is_grid(rows: list[Row]) -> bool:
    """Whether the length is what varies within each (D, mask)."""
    several = len({row["case"]["s_kv"] for row in rows}) > 1
    return several and all(
        len(members) == len({row["case"]["s_kv"] for row in members})
        for members in grouped(rows).values()
    )


def _grid_table(rows: list[Row], report: Report) -> list[str]:
    """A line per (D, mask) with a column per length."""
    lengths = sorted({row["case"]["s_kv"] for row in rows})
    header = ["D", "mask", *(f"S {length}" for length in lengths), "geometric mean"]
    lines = []
    for group, members in grouped(rows).items():
        at = {row["case"]["s_kv"]: row for row in members}
        cells = [_cell(at.get(length), report) for length in lengths]
        lines.append([*group[1:], *cells, _mean_text(members, report)])
    return _table(header, lines)


def _decode_table(rows: list[Row], report: Report) -> list[str]:
    """A line per heads, queries and D, a column per length, and the mean of all."""
    lengths = sorted({row["case"]["s_kv"] for row in rows})
    header = ["B×H/H_kv×S_q", "D", *(f"S_kv {length}" for length in lengths), "geometric mean"]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        case = row["case"]
        name = f"{case['batch']}×{case['heads']}/{case['heads_kv']}×{case['s_q']}"
        groups.setdefault((name, str(case["d"])), []).append(row)
    lines = []
    for group, members in groups.items():
        at = {row["case"]["s_kv"]: row for row in members}
        cells = [_cell(at.get(length), report) for length in lengths]
        lines.append([*group, *cells, _mean_text(members, report)])
    lines.append(["all", "", *([""] * len(lengths)), _mean_text(rows, report)])
    return _table(header, lines)


def _case_table(rows: list[Row], report: Report) -> list[str]:
    """A line per case."""
    header = ["case", "D, mask", "ours", "fastest peer"]
    lines = []
    for row in rows:
        peer = fastest_peer(row, report["baselines"])
        name = f"{row['case']['family']} {row['shape'].replace(' x ', '×')}"
        group = ", ".join(group_of(row)[1:])
        lines.append([name, group, _cell(row, report), peer[0] if peer else "–"])
    return _table(header, lines)


def _what(report: Report) -> str:
    """The dtype, and the pass unless it is the forward alone."""
    which_pass = report.get("pass", "forward")
    dtype = str(report["dtype"])
    return dtype if which_pass == "forward" else f"{dtype} {pass_text(which_pass)}"


def _heading(report: Report) -> str:
    environment = report["environment"]
    commit = (environment["commit"] or "unknown")[:10]
    words = [
        f"**{environment['device']}, {_what(report)}, suite `{report['suite']}`**",
        f"torch {environment['torch']}",
    ]
    if environment["driver"]:
        words.append(f"driver {environment['driver']}")
    if environment["device_type"] == "cpu":
        words.append(f"{environment['threads']} threads")
    state = f"{commit} with changes" if environment["dirty"] else commit
    words += [f"commit {state}", environment["date"][:10]]
    return ", ".join(words) + "."


def _counted(report: Report) -> str:
    """What a speed with gradients counts."""
    products = {"backward": "five", "forward_backward": "seven"}.get(report.get("pass", "forward"))
    if report["settings"]["host_time"]:
        return ""
    if any(row["case"].get("block") for row in report["rows"]):
        return ", which counts the matrix products of the attention and of every weight"
    if products is None:
        return ""
    return f", which counts {products} matrix products where the forward has two"


def markdown(reports: list[Report]) -> str:
    """The text between the markers; the same files always give the same text."""
    if not reports:
        return "No results have been recorded yet.\n"
    parts = []
    for report in reports:
        unit = "Microseconds of host time" if report["settings"]["host_time"] else "TFLOP/s"
        if _is_decode(report):
            unit = "GB/s, each of q, k, v and out counted once,"
        peers = ", ".join(name for name in report["baselines"] if not name.startswith("ours"))
        parts.append(
            f"{_heading(report)}\n"
            f"{unit} of ours{_counted(report)}; in brackets the speed relative to the fastest of "
            f"{peers or 'none'} in the same run.\n"
        )
        parts.append("\n".join(_tables(report)) + "\n")
        parts.append(f"Reproduce: `{report['environment']['command']}`\n")
    return "\n".join(parts)


def load(path: Path) -> Report:
    report: Report = json.loads(path.read_text())
    # Schema 2 has other checks than 1; what is read here is the same in both.
    if report.get("schema") not in (1, 2) or report.get("check_only"):
        raise ValueError(f"{path.name} holds no timings that this script knows")
    return report


def rewritten(readme: str, names: list[str] | None, results: Path) -> str:
    """README's text with a new table; `names` None keeps the files that the marker names."""
    found = MARKED.search(readme)
    if found is None:
        raise ValueError(
            "the README has no <!-- benchmark:begin --> and <!-- benchmark:end --> on lines of "
            "their own; add them where the table belongs"
        )
    names = found["names"].split() if names is None else names
    reports = [load(results / name) for name in names]
    marker = " ".join(["<!-- benchmark:begin", *names, "-->"])
    new = f"{marker}\n{markdown(reports)}"
    return readme[: found.start()] + new + readme[found.end() :]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/report.py", description="README's tables.")
    parser.add_argument("names", nargs="*", help="result files (default: those already there)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("--readme", type=Path, default=REPOSITORY / "README.md")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    arguments = parser.parse_args(argv)
    # A path is as good as a name: results are looked up by name in one folder.
    names = [Path(name).name for name in arguments.names] or None
    try:
        old = arguments.readme.read_text()
        new = rewritten(old, names, arguments.results)
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return USAGE
    if arguments.check:
        if new != old:
            print("README.md is out of date; run: python benchmarks/report.py", file=sys.stderr)
            return OUT_OF_DATE
        return UP_TO_DATE
    arguments.readme.write_text(new)
    return UP_TO_DATE


if __name__ == "__main__":
    sys.exit(main())
