# SPDX-License-Identifier: BSD-3-Clause
"""Is `online_attention.attention` right on this machine, and how fast is it beside SDPA?

    pip install '.[bench]' && python benchmarks/attention.py

checks ours and every baseline against an fp64 reference, times them in turns, prints the tables
and writes a JSON file with every sample and a plot to benchmarks/results/. The exit status is 0
if every result is right, 1 if one is wrong, 2 for arguments that cannot be.

Timed is `attention(q, k, v, causal=...)` without gradients; with `--pass backward` the gradients
of q, k and v alone, with `--pass forward_backward` both. Its causal mask is aligned to the
bottom right, that of SDPA's `is_causal` to the top left: the same for S_q == S_kv, which every
suite has. For a causal `--shapes` with other lengths SDPA gets the bottom-right mask as a tensor.

`--suite block` times the attention where a model has it: in a transformer's block of LayerNorm,
projections, attention, a GELU network and residuals, forward and backward, for each attention.

`--deterministic` puts torch into its deterministic mode. Ours follows it, and is timed beside
itself with `deterministic=False`: what the mode costs. A baseline without a deterministic kernel
refuses, and that every call of ours gives the same bits is checked.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _cases import DTYPES, PASSES, SHAPE_FIELDS, SUITES, Case, custom
from _metrics import flops, geometric_means, moved_bytes, naive_bytes
from _table import HAS_RICH, RichPresenter, SilentPresenter

if TYPE_CHECKING:
    import torch

    from _timing import Settings

SCHEMA = 2
RIGHT, WRONG, USAGE, INTERRUPTED = 0, 1, 2, 130
DEFAULT_OUT = Path(__file__).resolve().parent / "results"
BASELINE_NAMES = ("sdpa", "flash", "efficient", "cudnn", "math", "fa3")
FUNCTIONS = {
    "forward": "online_attention.attention(q, k, v, causal=...), forward, no gradients",
    "backward": "the gradients of q, k and v of online_attention.attention(q, k, v, causal=...): "
    "torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), without the forward before it",
    "forward_backward": "online_attention.attention(q, k, v, causal=...), then "
    "torch.autograd.grad(out, (q, k, v), dout)",
}
BLOCK_FUNCTIONS = {
    "forward": "a pre-norm block (LayerNorm, q k v in one projection, online_attention.attention, "
    "projection, GELU network of 4 times the width, residuals), forward, no gradients",
    "backward": "the gradients of input and weights of a pre-norm block with "
    "online_attention.attention, without the forward before it",
    "forward_backward": "a pre-norm block (LayerNorm, q k v in one projection, "
    "online_attention.attention, projection, GELU network of 4 times the width, residuals), then "
    "the gradients of its input and weights",
}


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/attention.py",
        description="Checks online_attention.attention and times it beside PyTorch's SDPA.",
    )
    add = parser.add_argument
    add("--suite", choices=SUITES, default="quick", help="which cases (default: quick)")
    add("--shapes", action="append", metavar=SHAPE_FIELDS, help="a case of your own; repeatable")
    add("--device", help="cuda, cuda:1 or cpu (default: cuda if there is one)")
    add("--dtype", nargs="+", choices=DTYPES, help="default: the suite's own")
    add("--pass", dest="which_pass", choices=PASSES, help="default: the suite's own")
    add(
        "--deterministic", action="store_true",
        help="in torch's deterministic mode, beside ours out of it",
    )  # fmt: skip
    add("--head-dim", nargs="+", type=int, metavar="D", help="only cases with these head sizes")
    mask = parser.add_mutually_exclusive_group()
    mask.add_argument("--causal", action="store_true", help="only causal cases")
    mask.add_argument("--full", action="store_true", help="only cases without a mask")
    add(
        "--baselines", nargs="*", choices=BASELINE_NAMES, metavar="NAME",
        help=f"out of {', '.join(BASELINE_NAMES)} (default: every one that the device has)",
    )  # fmt: skip
    add("--rounds", type=int, help="samples per implementation and case")
    add("--min-time", type=float, metavar="SECONDS", help="how long a sample lasts at least")
    add("--check-only", action="store_true", help="check the results, time nothing")
    add("--out", type=Path, default=DEFAULT_OUT, metavar="DIR", help="where JSON and plot go")
    add("--commit", help="the commit to record, for a copy of the tree without its history")
    add("--no-plot", action="store_true", help="write no PNG")
    add("--quiet", action="store_true", help="print no progress and no tables")
    arguments = parser.parse_args(argv)
    if arguments.which_pass is None:
        arguments.which_pass = default_pass(arguments)
    return arguments


def default_pass(arguments: argparse.Namespace) -> str:
    return "forward" if arguments.shapes else SUITES[arguments.suite].which_pass


def missing_sentence(arguments: argparse.Namespace) -> str | None:
    """What is not installed, and what to do about it; None if everything needed is there."""
    install = "install it with: pip install '.[bench]'"
    for module in ("torch", "online_attention"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed; {install}"
    if not arguments.quiet and not HAS_RICH:
        return f"rich, which prints the tables, is not installed; {install}, or pass --quiet"
    wants_plot = not (arguments.no_plot or arguments.check_only)
    if wants_plot and importlib.util.find_spec("matplotlib") is None:
        return f"matplotlib, which draws the plot, is not installed; {install}, or pass --no-plot"
    return None


def choose_device(name: str | None) -> torch.device:
    """The device asked for, or CUDA if there is one; ValueError with a sentence if it is absent."""
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device expects cuda, cuda:N or cpu, got {name!r}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise ValueError(f"--device {name}: torch sees {count} CUDA devices here")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    return device


def choose_cases(arguments: argparse.Namespace, device_type: str) -> list[Case]:
    if arguments.shapes:
        cases = custom(arguments.shapes)
    else:
        cases = SUITES[arguments.suite].cases(device_type)
    if arguments.causal or arguments.full:
        cases = [case for case in cases if case.causal == arguments.causal]
    if arguments.head_dim:
        cases = [case for case in cases if case.d in arguments.head_dim]
    if not cases:
        raise ValueError("no case is left: --head-dim, --causal or --full exclude all of the suite")
    return cases


def choose_settings(arguments: argparse.Namespace, device_type: str, host_time: bool) -> Settings:
    from _timing import default_settings

    settings = default_settings(device_type, host_time)
    settings = replace(settings, which_pass=arguments.which_pass)
    if arguments.rounds is not None:
        if arguments.rounds < 1:
            raise ValueError(f"--rounds must be at least 1, got {arguments.rounds}")
        settings = replace(settings, rounds=arguments.rounds)
    elif not arguments.shapes:
        # A number of rounds asked for is kept, however long they take.
        settings = replace(settings, case_seconds=SUITES[arguments.suite].case_seconds)
    if arguments.min_time is not None:
        if not 0 <= arguments.min_time < math.inf:
            raise ValueError(f"--min-time must be a number of seconds, got {arguments.min_time}")
        settings = replace(settings, min_time=arguments.min_time)
    return settings


def suite_name(arguments: argparse.Namespace) -> str:
    """The suite's name with its filters, so that a part never overwrites the whole.

    And with the pass, where it is not the suite's own.
    """
    words = ["custom" if arguments.shapes else arguments.suite]
    words += [arguments.which_pass] * (arguments.which_pass != default_pass(arguments))
    words += ["deterministic"] * arguments.deterministic
    words += [f"d{d}" for d in arguments.head_dim or ()]
    words += ["causal"] * arguments.causal + ["full"] * arguments.full
    words += ["check"] * arguments.check_only
    return "-".join(words)


class Run:
    """One run of the command: the choices made, and what it takes to measure a case."""

    def __init__(self, arguments: argparse.Namespace, argv: list[str]) -> None:
        from _contenders import contenders, default_baselines

        self.arguments = arguments
        self.argv = argv
        self.device = choose_device(arguments.device)
        kind = self.device.type
        suite = SUITES[arguments.suite]
        host_time = suite.measures_host_time and not arguments.shapes
        self.settings = choose_settings(arguments, kind, host_time)
        self.cases = choose_cases(arguments, kind)
        self.dtypes = tuple(dict.fromkeys(arguments.dtype or suite.dtypes(kind)))
        if arguments.baselines is None:
            names = default_baselines(kind, host_time, arguments.which_pass)
        else:
            names = tuple(dict.fromkeys(arguments.baselines))
        self.contenders = contenders(names, host_time, arguments.deterministic)
        self.presenter = SilentPresenter() if arguments.quiet else RichPresenter()

    def measure(self, case: Case, dtype: str) -> dict[str, Any]:
        """Checks one case, and times it if ours is right: a wrong result has no speed."""
        from _block import within_block
        from _check import check
        from _environment import without_paths
        from _passes import draw_inputs, gradients_wanted
        from _timing import time_case

        which_pass = self.arguments.which_pass
        inputs = draw_inputs(case, dtype, self.device, 0, gradients_wanted(which_pass))
        self.presenter.step(case, dtype, "checking")
        all_takers = [within_block(c) if case.block else c for c in self.contenders]
        found, refused = check(case, dtype, inputs, all_takers, which_pass)
        status, reason = "ok", None
        if "ours" in refused:
            status = "not built" if refused["ours"].not_built else "failed"
            reason = without_paths(refused["ours"].reason)
        elif found["wrong"]:
            status, reason = "wrong", "; ".join(found["wrong"])
        results: dict[str, Any] = {}
        if status == "ok" and not self.arguments.check_only:
            takers = [taker for taker in all_takers if taker.name not in refused]
            results = time_case(
                case, dtype, inputs, takers, self.settings,
                lambda name: self.presenter.step(case, dtype, name),
            )  # fmt: skip
        if self.device.type == "cuda":
            import torch

            # The math backend's blocks would otherwise stay cached and crowd out the next case.
            torch.cuda.empty_cache()
        return {
            "label": case.label,
            "shape": case.shape,
            "case": case.as_json(),
            "status": status,
            "reason": reason,
            "flops": flops(case, which_pass),
            "moved_bytes": moved_bytes(case, dtype, which_pass),
            "naive_bytes": naive_bytes(case, dtype),
            "explain": explanation(case, inputs.tensors),
            "check": found,
            "skipped": {
                name: without_paths(refusal.reason)
                for name, refusal in refused.items()
                if name != "ours"
            },
            "results": results,
        }

    def report(self, dtype: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The JSON of one dtype, but for the clocks."""
        from _environment import describe

        functions = BLOCK_FUNCTIONS if self.cases[0].block else FUNCTIONS
        baselines = [taker.name for taker in self.contenders if taker.name != "ours"]
        # A baseline that took no case would only be an empty column.
        shown = [name for name in baselines if any(name in row["check"]["errors"] for row in rows)]
        return {
            "schema": SCHEMA,
            "suite": suite_name(self.arguments),
            "pass": self.arguments.which_pass,
            "dtype": dtype,
            "deterministic": self.arguments.deterministic,
            "function": functions[self.arguments.which_pass],
            "check_only": self.arguments.check_only,
            "settings": without_infinities(asdict(self.settings)),
            "environment": describe(self.device, self.argv, self.arguments.commit),
            "baselines": shown,
            "geometric_means": geometric_means(rows, shown),
            "rows": rows,
        }

    def run(self) -> int:
        """Measures every dtype; returns the exit status."""
        from _passes import deterministic_mode

        status = RIGHT
        deterministic = deterministic_mode(self.arguments.deterministic)
        with deterministic, self.presenter.start(len(self.cases) * len(self.dtypes)):
            reports = []
            for dtype in self.dtypes:
                reports.append(self.measure_all(dtype))
                if reports[-1]["interrupted"]:
                    status = INTERRUPTED
                    break
        for report in reports:
            self.presenter.show(report)
            self.write(report)
            if any(row["status"] in ("wrong", "failed") for row in report["rows"]):
                status = max(status, WRONG)
        return status

    def measure_all(self, dtype: str) -> dict[str, Any]:
        """The report of one dtype; what was measured until Ctrl-C if that ends it."""
        from _environment import clocks
        from _timing import ceilings

        rows: list[dict[str, Any]] = []
        interrupted, ceiling, before = False, None, None
        try:
            if not self.arguments.check_only:
                ceiling = ceilings(dtype, self.device)
            before = clocks(self.device)
            for case in self.cases:
                rows.append(self.measure(case, dtype))
                self.presenter.advance()
        except KeyboardInterrupt:
            interrupted = True
        after = clocks(self.device)
        report = self.report(dtype, rows)
        report |= {"ceilings": ceiling, "clocks_before": before, "clocks_after": after}
        return report | {"interrupted": interrupted}

    def write(self, report: dict[str, Any]) -> None:
        """Writes the JSON and the plot, and says where."""
        from _environment import device_slug

        out: Path = self.arguments.out
        out.mkdir(parents=True, exist_ok=True)
        # A dot in the name would read as a suffix, so it is not built with with_suffix.
        stem = f"{device_slug(self.device)}_{report['suite']}_{report['dtype']}"
        path = out / f"{stem}.json"
        path.write_text(json.dumps(without_infinities(report), indent=1, allow_nan=False) + "\n")
        print(f"wrote {path}")
        if not (self.arguments.no_plot or self.arguments.check_only):
            from _plot import write_plot

            if write_plot(report, out / f"{stem}.png"):
                print(f"wrote {out / f'{stem}.png'}")


def explanation(case: Case, tensors: Any) -> str | None:
    """Which kernel takes the case, in the package's own words; None if it has none."""
    import online_attention
    from _bias import make_bias
    from _block import project
    from _environment import without_paths

    try:
        tensors = project(case, *tensors[:3]) if case.block else tensors
        bias = make_bias(case, tensors[0].dtype, tensors[0].device)
        return without_paths(str(online_attention.explain(*tensors, causal=case.causal, bias=bias)))
    except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None


def without_infinities(value: Any) -> Any:
    """The value with infinite and undefined numbers as text: JSON has none of them."""
    if isinstance(value, dict):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_infinities(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    missing = missing_sentence(arguments)
    if missing:
        print(missing, file=sys.stderr)
        return USAGE
    try:
        run = Run(arguments, argv)
    except ValueError as error:
        print(error, file=sys.stderr)
        return USAGE
    return run.run()


if __name__ == "__main__":
    sys.exit(main())
