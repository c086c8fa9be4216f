# SPDX-License-Identifier: BSD-3-Clause
"""What the terminal shows: a progress bar while it runs, then the tables. Needs rich."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from _cases import Case
from _metrics import group_of, grouped, ratio

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
        if has_peaks(report):
            self.console.print(memory_table(report))
        for line in remarks(report):
            self.console.print(escape(line))


def _new_table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1))


def _title(report: dict[str, Any]) -> str:
    environment = report["environment"]
    return escape(f"{environment['device']}, {report['dtype']}, {report['suite']}")


def _label(row: dict[str, Any]) -> list[str]:
    _, head_dim, mask = group_of(row)
    return [f"{head_dim}, {mask}", row["shape"]]


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
    means = {(mean["family"], mean["D"], mean["mask"]): mean for mean in report["geometric_means"]}
    for group, rows in grouped(report["rows"]).items():
        for row in rows:
            label = _label(row)
            if row["status"] != "ok":
                table.add_row(*label, f"[bold red]{row['status'].upper()}[/]")
                continue
            ratios = [_ratio_cell(row, name, unit, factor) for name in names]
            table.add_row(*label, *_ours_cells(row, unit, factor), *ratios)
        if len(rows) > 1:
            _add_mean(table, means[group], names, len(ours_columns), _label(rows[0])[0])
        table.add_section()
    _add_mean(table, means["all", "all", "all"], names, len(ours_columns), "all")
    return table


def _add_mean(table: Table, mean: dict[str, Any], names: list[str], skip: int, label: str) -> None:
    cells = []
    for name in names:
        value = mean["ratios"].get(name)
        text = "-" if value is None else f"{value:.2f}x"
        cells.append(f"[bold green]{text}[/]" if value and value > 1 else text)
    table.add_row(label, "geometric mean", *[""] * skip, *cells, style="italic")


def check_table(report: dict[str, Any]) -> Table:
    """Errors against fp64: a line for each tensor of each case."""
    names = report["baselines"]
    table = _new_table(f"Error against fp64 (relative Frobenius): {_title(report)}")
    table.add_column("D, mask")
    table.add_column("B x H x S")
    table.add_column("of")
    for name in ("ours", "allowed", *names, "naive scores"):
        table.add_column(name, justify="right")
    for row in report["rows"]:
        label, naive = _label(row), size_text(row["naive_bytes"])
        for tensor, limit in row["check"]["limits"].items():
            cells = [_error_cell(row, name, tensor) for name in ("ours", *names)]
            cells.insert(1, f"{limit:.2e}")
            table.add_row(*label, tensor, *cells, naive)
            label, naive = ["", ""], ""
    return table


def _error_cell(row: dict[str, Any], name: str, tensor: str) -> str:
    if name == "ours" and row["status"] not in ("wrong", "ok"):
        return f"[bold red]{row['status']}[/]"
    error = row["check"]["errors"].get(name, {}).get(tensor)
    if error is None:
        return "-"
    if error <= row["check"]["limits"][tensor]:
        return f"{error:.2e}"
    return f"[bold red]{error:.2e} WRONG[/]" if name == "ours" else f"[yellow]{error:.2e}[/]"


def has_peaks(report: dict[str, Any]) -> bool:
    results = [result for row in report["rows"] for result in row["results"].values()]
    return any(result["peak_bytes"] is not None for result in results)


def memory_table(report: dict[str, Any]) -> Table:
    """What one call takes from torch's allocator at its peak, results included."""
    names = ["ours", *report["baselines"]]
    table = _new_table(f"Peak memory of a call: {_title(report)}")
    table.add_column("D, mask")
    table.add_column("B x H x S")
    for name in names:
        table.add_column(name, justify="right")
    for row in report["rows"]:
        peaks = [row["results"].get(name, {}).get("peak_bytes") for name in names]
        cells = ["-" if peak is None else size_text(peak) for peak in peaks]
        table.add_row(*_label(row), *cells)
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
    in_block = report["rows"][0]["case"]["block"] if report["rows"] else False
    if (report["pass"] != "forward" or in_block) and unit != "us" and not report["check_only"]:
        of_attention = "two forward, five backward; half of them if causal"
        counted = "Counted are the matrix products: "
        lines.append(
            f"{counted}those of every weight, and of the attention {of_attention}."
            if in_block
            else f"{counted}{of_attention}."
        )
    lines.append(
        "Allowed error: twice that of plain PyTorch arithmetic in the same dtype. Naive scores: "
        "what a softmax(q kT) matrix in the inputs' dtype would need."
    )
    if report["environment"]["device_type"] == "cpu":
        lines.append("Peak memory is not shown: the CPU allocator keeps no count of it.")
    elif report["pass"] == "backward" and not report["check_only"]:
        lines.append("Peak memory is what the backward takes beside all that the forward has left.")
    sampled = [row["check"] for row in report["rows"]]
    sampled = [check for check in sampled if check["checked"] < check["of"]]
    if sampled:
        lines.append(
            f"In {len(sampled)} of {len(report['rows'])} cases the reference was computed for a "
            f"sample of the {sampled[0]['unit']}; the whole result was compared with SDPA's."
        )
    if report["deterministic"]:
        lines.append(
            "In torch's deterministic mode. `ours, any order` is ours with deterministic=False: a "
            "ratio below 1 is what the mode costs. Two calls of ours gave the same bits where no "
            "line below says otherwise."
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
