# SPDX-License-Identifier: BSD-3-Clause
"""What the terminal shows: a progress bar while it runs, then the tables. Needs rich."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from _cases import Case
from _metrics import group_of, ratio

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    HAS_RICH = True
except ImportError:
    HAS_RICH = False

# A log file has no width; rich's guess of 80 columns would break the table's lines there.
WIDTH_WITHOUT_TERMINAL = 160


def three_digits(value: float) -> str:
    """Three significant digits without an exponent: 1230, 123, 12.3, 1.23, 0.123, 0.0123."""
    digits = 0
    while digits < 6 and abs(value) * 10**digits < 99.95:
        digits += 1
    return f"{value:.{min(digits, 2) if abs(value) >= 1 else min(digits, 4)}f}"


def size_text(count: float) -> str:
    """Bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{three_digits(count) if count % 1 else f'{count:.0f}'} {unit}"


class SilentPresenter:
    """Shows nothing: `--quiet`, which works without rich."""

    def start(self, total: int) -> AbstractContextManager[Any]:
        return nullcontext()

    def step(self, case: Case, dtype: str, what: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def show(self, report: dict[str, Any]) -> None:
        pass


class RichPresenter(SilentPresenter):
    def __init__(self) -> None:
        self.console = Console(highlight=False)
        if not self.console.is_terminal:
            self.console = Console(highlight=False, width=WIDTH_WITHOUT_TERMINAL)
        self.progress = Progress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self.console,
            transient=True,
        )

    def start(self, total: int) -> AbstractContextManager[Any]:
        self.task = self.progress.add_task("starting", total=total)
        return self.progress

    def step(self, case: Case, dtype: str, what: str) -> None:
        self.progress.update(self.task, description=f"{dtype} {case.label}: {what}")

    def advance(self) -> None:
        self.progress.advance(self.task)

    def note(self, text: str) -> None:
        self.console.print(escape(text))

    def show(self, report: dict[str, Any]) -> None:
        if not report["check_only"]:
            self.console.print(speed_table(report))
        self.console.print(check_table(report))
        for line in remarks(report):
            self.console.print(escape(line))


def _new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _title(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return escape(f"{environment['device']}, {report['dtype']}, {report['suite']}")


def _ratio_cell(row: dict[str, Any], name: str, unit: str, factor: float) -> str:
    """Ratio, with the baseline's own figure in brackets; bold where ours wins."""
    value = ratio(row, name)
    if value is None:
        return "[dim]-[/]"
    result = row["results"][name]
    own = result["median_ms"] * 1e3 if unit == "us" else result["tflops"] * factor
    text = f"{value:.2f}x"
    shown = f"[bold green]{text}[/]" if value > 1 else text
    return f"{shown} [dim]({three_digits(own)})[/]"


def _speed_unit(report: dict[str, Any]) -> tuple[str, float]:
    """The unit of the speeds and its factor from TFLOP/s; microseconds for host time."""
    if report["settings"]["host_time"]:
        return "us", 1.0
    best = max((r["tflops"] for row in report["rows"] for r in row["results"].values()), default=1)
    return ("TFLOP/s", 1.0) if best >= 10 else ("GFLOP/s", 1e3)


def _ours_cells(row: dict[str, Any], unit: str, factor: float) -> list[str]:
    ours = row["results"]["ours"]
    spread = (ours["p80_ms"] - ours["p20_ms"]) / 2 / ours["median_ms"]
    time = ours["median_ms"] * (1e3 if unit == "us" else 1)
    cells = [f"{three_digits(time)} [dim]±{spread:.0%}[/]"]
    if unit != "us":
        cells += [three_digits(ours["tflops"] * factor), three_digits(ours["gbytes_per_s"])]
    return cells


def speed_table(report: dict[str, Any]) -> Table:
    """Times of ours and ratios to each baseline, a group per (D, mask) with its mean."""
    names = report["baselines"]
    unit, factor = _speed_unit(report)
    table = _new_table(f"Speed: {_title(report)}")
    table.add_column("D, mask")
    table.add_column("B x H x S")
    ours_columns = ["us"] if unit == "us" else ["ms", unit, "GB/s"]
    for name in ours_columns:
        table.add_column(name, justify="right")
    for name in names:
        table.add_column(f"vs {name}", justify="right")
    means = {(mean["D"], mean["mask"]): mean for mean in report["geometric_means"]}
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["rows"]:
        grouped.setdefault(group_of(row), []).append(row)
    for group, rows in grouped.items():
        for row in rows:
            label = [f"{group[0]}, {group[1]}", row["shape"]]
            if row["status"] != "ok":
                table.add_row(*label, f"[bold red]{row['status'].upper()}[/]")
                continue
            ratios = [_ratio_cell(row, name, unit, factor) for name in names]
            table.add_row(*label, *_ours_cells(row, unit, factor), *ratios)
        if len(rows) > 1:
            _add_mean(table, means[group], names, len(ours_columns), f"{group[0]}, {group[1]}")
        table.add_section()
    _add_mean(table, means["all", "all"], names, len(ours_columns), "all")
    return table


def _add_mean(table: Table, mean: dict[str, Any], names: list[str], skip: int, label: str) -> None:
    cells = []
    for name in names:
        value = mean["ratios"].get(name)
        text = "-" if value is None else f"{value:.2f}x"
        cells.append(f"[bold green]{text}[/]" if value and value > 1 else text)
    table.add_row(label, "geometric mean", *[""] * skip, *cells, style="italic")


def check_table(report: dict[str, Any]) -> Table:
    """Errors against fp64, and the memory of one call."""
    names = report["baselines"]
    table = _new_table(f"Error against fp64 (relative Frobenius) and memory: {_title(report)}")
    table.add_column("D, mask")
    table.add_column("B x H x S")
    for name in ("ours", "allowed", *names, "lse, ours"):
        table.add_column(name, justify="right")
    if report["environment"]["device_type"] == "cuda" and not report["check_only"]:
        table.add_column("peak, ours", justify="right")
    table.add_column("naive scores", justify="right")
    for row in report["rows"]:
        check = row["check"]
        group = group_of(row)
        cells = [f"{group[0]}, {group[1]}", row["shape"]]
        if row["status"] in ("wrong", "ok"):
            text = f"{check['errors']['ours']:.2e}"
            cells.append(f"[bold red]{text} WRONG[/]" if row["status"] == "wrong" else text)
        else:
            cells.append(f"[bold red]{row['status']}[/]")
        cells.append(f"{check['limit']:.2e}")
        for name in names:
            error = check["errors"].get(name)
            too_large = error is not None and not error <= check["limit"]
            text = "-" if error is None else f"{error:.2e}"
            cells.append(f"[yellow]{text}[/]" if too_large else text)
        cells.append("-" if check["lse_error"] is None else f"{check['lse_error']:.1e}")
        if report["environment"]["device_type"] == "cuda" and not report["check_only"]:
            peak = row["results"].get("ours", {}).get("peak_bytes")
            cells.append("-" if peak is None else size_text(peak))
        table.add_row(*cells, size_text(row["naive_bytes"]))
    return table


def remarks(report: dict[str, Any]) -> list[str]:
    """What the numbers mean, what was left out and why, what went wrong."""
    lines = []
    unit, _ = _speed_unit(report)
    if not report["check_only"]:
        lines.append(
            "vs: median time of the baseline over ours, so above 1 ours is faster; in brackets "
            f"the baseline's own {unit}. ± is half the distance of the 20th to the 80th percentile."
        )
    lines.append(f"Timed and checked: {report['function']}.")
    lines.append(
        "Allowed error: twice that of plain PyTorch arithmetic in the same dtype. Naive scores: "
        "what a softmax(q kT) matrix in the inputs' dtype would need."
    )
    if report["environment"]["device_type"] == "cpu":
        lines.append("Peak memory is not shown: the CPU allocator keeps no count of it.")
    sampled = sum(row["check"]["rows_checked"] < row["check"]["rows"] for row in report["rows"])
    if sampled:
        lines.append(
            f"In {sampled} of {len(report['rows'])} cases the reference was computed for a sample "
            "of the query rows; the whole output was compared with SDPA's."
        )
    ceiling = report.get("ceilings")
    if ceiling:
        lines.append(
            f"Ceilings in the same minutes: {report['dtype']} matmul "
            f"{three_digits(ceiling['matmul_tflops'])} TFLOP/s, copy "
            f"{three_digits(ceiling['copy_gbytes_per_s'])} GB/s."
        )
    skipped: dict[str, list[str]] = {}
    for row in report["rows"]:
        for name, reason in row["skipped"].items():
            skipped.setdefault(f"{name}: {reason}", []).append(row["label"])
    for text, labels in skipped.items():
        where = labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"
        lines.append(f"Without {text} [{where}]")
    for row in report["rows"]:
        if row["status"] != "ok":
            lines.append(f"{row['status'].upper()}: {row['label']}: {row['reason']}")
    return lines
