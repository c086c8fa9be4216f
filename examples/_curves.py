# SPDX-License-Identifier: BSD-3-Clause
"""What train_gpt.py shows of a training: its curve, the comparison of two, the plot."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

COLOURS = {"online_attention": "#000000", "sdpa": "#E69F00", "enabled": "#56B4E9"}
INSTALL = "install it with: pip install '.[bench]'"


@dataclass
class Curve:
    """What one training gave. validation: pairs (steps done, loss)."""

    attention: str
    tokens_per_step: int
    training: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    interrupted: bool = False
    sample: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of the median step: a pause of the machine changes nothing. 0 before the first."""
        return self.tokens_per_step / median(self.step_seconds) if self.step_seconds else 0.0


class Display:
    """A line per validation, and rich's progress bar below them where rich is installed."""

    def __init__(self, options: argparse.Namespace, trainings: int) -> None:
        self.quiet, self.bar = options.quiet, None
        if self.quiet:
            return
        if importlib.util.find_spec("rich") is None:
            say = f"rich is not installed, so there is no progress bar; {INSTALL}"
            print(say, file=sys.stderr)
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.description}"), transient=True)
        self.task = self.bar.add_task("starting", total=trainings * options.steps)

    def shown(self) -> AbstractContextManager[Any]:
        return self.bar or nullcontext()

    def advance(self, curve: Curve) -> None:
        if self.bar:
            loss, speed = curve.training[-1], curve.tokens_per_second
            text = f"{curve.attention}: loss {loss:.3f}, {speed:,.0f} tokens/s"
            self.bar.update(self.task, advance=1, description=text)

    def line(self, curve: Curve) -> None:
        step, validation = curve.validation[-1]
        self.say(
            f"{curve.attention:>16}  step {step:>5}  loss {curve.training[-1]:.4f}  "
            f"validation {validation:.4f}  {curve.tokens_per_second:,.0f} tokens/s"
        )

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text)  # above the bar: rich takes over the standard output while it is shown


def comparison(curves: list[Curve]) -> dict[str, Any] | None:
    """How far two curves differ, and how fast the first is beside the second."""
    if len(curves) < 2 or any(curve.interrupted for curve in curves):
        return None
    first, second = curves
    differences = [abs(a - b) for a, b in zip(first.training, second.training, strict=True)]
    return {
        "differences": differences,
        "largest": max(differences),
        "largest_at_step": 1 + differences.index(max(differences)),
        "validation": abs(first.validation[-1][1] - second.validation[-1][1]),
        "speed_ratio": first.tokens_per_second / second.tokens_per_second,
    }


def summary(curves: list[Curve], compared: dict[str, Any] | None) -> Iterator[str]:
    for curve in curves:
        if curve.validation:
            steps, loss = curve.validation[-1]
            yield (
                f"{curve.attention}: {sum(curve.step_seconds):.1f} s, "
                f"{curve.tokens_per_second:,.0f} tokens/s; validation loss {loss:.4f}, "
                f"{loss / math.log(2):.2f} bits a byte, after {steps} steps"
            )
    if compared:
        a, b = (curve.attention for curve in curves)
        ratio = compared["speed_ratio"]
        faster, slower, ratio = (a, b, ratio) if ratio >= 1 else (b, a, 1 / ratio)
        yield (
            f"Training losses of {a} and {b} differ by {compared['largest']:.1e} at most (step "
            f"{compared['largest_at_step']}), validation losses at the end by "
            f"{compared['validation']:.1e}."
        )
        yield f"A step with {faster} is {ratio:.2f} times as fast as one with {slower}."


def write_plot(curves: list[Curve], compared: dict[str, Any] | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    heights = [3, 1] if compared else [1]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(7, 5), sharex=True, squeeze=False, height_ratios=heights
    )
    top, bottom = axes[0, 0], axes[-1, 0]
    # The second lies on the first wherever the two agree, so it is dashed.
    for curve, dashes in zip(curves, ("-", (0, (4, 4))), strict=False):
        name, colour = curve.attention, COLOURS[curve.attention]
        steps = range(1, len(curve.training) + 1)
        top.plot(steps, curve.training, color=colour, linestyle=dashes, alpha=0.7, label=name)
        points = tuple(zip(*curve.validation, strict=True)) or ((), ())
        marker = "o" if dashes == "-" else "x"
        top.plot(*points, marker, color=colour, label=f"{name}, validation")
    top.set_ylabel("loss, nats a byte")
    top.legend(frameon=False)
    if compared:
        differences = [difference or math.nan for difference in compared["differences"]]
        bottom.semilogy(range(1, len(differences) + 1), differences, color="#0072B2")
        bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
