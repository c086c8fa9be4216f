# SPDX-License-Identifier: BSD-3-Clause
"""From softmax to attention in one pass, step by step, each step run beside the one before.

    python examples/walkthrough.py [--tile-q 16 --tile-kv 24 ...] [--out out]

Equations (E..) are those of docs/algorithm.md. Needs rich and matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import online_attention
from online_attention import reference

try:
    import matplotlib
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    raise SystemExit(
        f"{error.name} is not installed; install it with: pip install '.[bench]'"
    ) from None

matplotlib.use("Agg")  # before pyplot: a backend that needs no display
import matplotlib.pyplot as plt

Differences = dict[str, float]
console = Console(width=100, highlight=False)

LENGTHS = [512 * 2**i for i in range(6)]  # 512 ... 16384


def main(argv: Sequence[str] | None = None) -> Differences:
    """Tells the story; returns the largest difference of every step to the step it must equal."""
    options = parse(argv)
    console.rule("[bold]Exact attention by online softmax")
    differences: Differences = {}
    differences |= softmax_of_a_vector(options)
    differences |= one_output_element(options)
    differences |= tiled_attention(options)
    costs(options)
    differences |= the_package(options)
    largest = torch.tensor(list(differences.values()), dtype=torch.float64).max()  # or NaN
    console.rule(f"[bold]largest difference of all steps: {largest:.1e}")
    return differences


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for name, default, meaning in (
        ("block-size", 3, "scores that online softmax takes at once"),
        ("tile-q", 16, "queries of a tile"),
        ("tile-kv", 24, "keys of a tile"),
        ("queries", 37, "S_q, number of queries"),
        ("keys", 71, "S_kv, number of keys"),
        ("heads", 4, "H, number of query heads"),
        ("kv-heads", 2, "H_kv, number of key/value heads, a divisor of H"),
        ("head-dim", 64, "D, size of a query and a key"),
        ("value-dim", 48, "D_v, size of a value and an output"),
        ("cost-tile-q", 128, "queries of a tile in the cost estimates"),
    ):
        parser.add_argument(f"--{name}", type=positive, default=default, help=meaning)
    parser.add_argument(
        "--causal",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="hide later keys, bottom-right aligned",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the random inputs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of the plot")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


# --- (a) softmax


def softmax_of_a_vector(options: argparse.Namespace) -> Differences:
    section("a", "Softmax of a vector, safe and online")
    x = torch.tensor([1.0, 3.0, -2.0, 0.5, 6.0, 2.0, 5.5, -1.0], dtype=torch.float64)
    unsafe = torch.exp(x + 1000) / torch.exp(x + 1000).sum()
    safe, online = reference.safe_softmax(x), reference.online_softmax(x, options.block_size)
    shifted = reference.safe_softmax(x + 1000)

    table = new_table("", *(f"x{j}" for j in range(len(x))))
    table.add_row("scores x", *numbers(x, ".1f"))
    table.add_row("exp(x + 1000) / sum", *numbers(unsafe))
    table.add_row("safe, of x + 1000 (E2)", *numbers(shifted))
    table.add_row("safe, of x (E2)", *numbers(safe))
    table.add_row("online, of x (E3)", *numbers(online))
    console.print(table)

    console.print(
        "Safe softmax reads the row three times: maximum, sum, result. Online softmax finds "
        "maximum and sum\nin one reading, block by block. When the maximum grows, the sum so far "
        "is corrected by alpha (E4):"
    )
    states = reference.online_softmax_states(x, options.block_size)
    table = new_table("block", "scores", "m", "alpha", "l = alpha l + sum exp(x - m)")
    m_old = -math.inf
    for i, (state, block) in enumerate(zip(states, x.split(options.block_size), strict=True)):
        alpha = math.exp(m_old - state.m.item())
        scores = "  ".join(numbers(block, ".1f"))
        table.add_row(str(i), scores, f"{state.m:.1f}", f"{alpha:.4f}", f"{state.l:.6f}")
        m_old = state.m.item()
    console.print(table)

    m, l = x.max(), torch.exp(x - x.max()).sum()
    console.print(f"All at once: m = {m:.1f}, l = {l:.6f}")
    return report(
        {
            "online softmax - safe softmax": largest_difference(online, safe),
            "safe softmax of x + 1000 - of x": largest_difference(shifted, safe),
            "last online sum - sum at once": abs(float(states[-1].l - l)),
        }
    )


# --- (b) one output element


def one_output_element(options: argparse.Namespace) -> Differences:
    section("b", "One element of the output, with less and less stored")
    q, k, v = inputs(options, torch.float64, queries=1, keys=7)
    scale = 1 / math.sqrt(options.head_dim)
    s = (scale * k[0, 0] @ q[0, 0, 0]).tolist()  # a row of scores
    values = v[0, 0, :, 0].tolist()  # the values' first element

    naive, p = element_naive(s, values)
    routes = (  # name, readings of the scores, rows stored, result
        ("naive (E1)", 3, "s, p", naive),
        ("probabilities not stored (E2)", 3, "s", element_without_probabilities(s, values)),
        ("online sums (E3)", 2, "s", element_with_online_sums(s, values)),
        ("flash: output corrected too (E8)", 1, "none", element_in_one_pass(s, values)),
    )
    table = new_table("", *(f"key {j}" for j in range(len(s))))
    table.add_row("score s", *numbers(s))
    table.add_row("probability p", *numbers(p))
    table.add_row("value v", *numbers(values))
    console.print(table)
    console.print("out[0] = sum of p v, by four routes:")
    table = new_table("route", "readings of s", "rows stored", "out[0]", "difference")
    for route, readings, stored, out in routes:
        table.add_row(route, str(readings), stored, f"{out:.16f}", f"{abs(out - naive):.1e}")
    console.print(table)
    return {f"{route} - naive": abs(out - naive) for route, _, _, out in routes[1:]}


def element_naive(s: list[float], v: list[float]) -> tuple[float, list[float]]:
    m = max(s)
    l = sum(math.exp(x - m) for x in s)
    p = [math.exp(x - m) / l for x in s]
    return sum(p_j * v_j for p_j, v_j in zip(p, v, strict=True)), p


def element_without_probabilities(s: list[float], v: list[float]) -> float:
    m = max(s)
    l = sum(math.exp(x - m) for x in s)
    o = 0.0
    for s_j, v_j in zip(s, v, strict=True):
        o += math.exp(s_j - m) * v_j  # a probability lives for one step
    return o / l


def element_with_online_sums(s: list[float], v: list[float]) -> float:
    m, l = -math.inf, 0.0
    for s_j in s:
        m_old, m = m, max(m, s_j)
        l = math.exp(m_old - m) * l + math.exp(s_j - m)
    return sum(math.exp(s_j - m) * v_j for s_j, v_j in zip(s, v, strict=True)) / l


def element_in_one_pass(s: list[float], v: list[float]) -> float:
    m, l, o = -math.inf, 0.0, 0.0
    for s_j, v_j in zip(s, v, strict=True):
        m_old, m = m, max(m, s_j)
        alpha, p = math.exp(m_old - m), math.exp(s_j - m)
        l = alpha * l + p
        o = alpha * o + p * v_j  # the output is corrected like the sum
    return o / l


# --- (c) tiles


def tiled_attention(options: argparse.Namespace) -> Differences:
    section("c", "Attention by tiles of any size, S_q and S_kv unequal (E5)-(E10)")
    tiles = dict.fromkeys(  # each once, in this order
        [(options.tile_q, options.tile_kv), (1, 1), (5, 3), (1, options.keys), (options.queries, 7)]
    )
    lengths = dict.fromkeys(
        [(options.queries, options.keys), (options.keys, options.queries), (1, options.keys)]
    )
    table = new_table("S_q", "S_kv", "tile_q", "tile_kv", "fp32: out", "lse", "fp64: out", "lse")
    differences: Differences = {}
    for queries, keys in lengths:
        for tile_q, tile_kv in tiles:
            cells = []
            for dtype in (torch.float32, torch.float64):
                q, k, v = inputs(options, dtype, queries, keys)
                keywords = {"causal": options.causal, "return_lse": True}
                naive = reference.naive_attention(q, k, v, **keywords)
                tiled = reference.tiled_attention(
                    q, k, v, tile_q=tile_q, tile_kv=tile_kv, **keywords
                )
                for what, a, b in zip(("out", "lse"), tiled, naive, strict=True):
                    name = f"tiled {dtype} {queries}x{keys} by {tile_q}x{tile_kv} {what} - naive"
                    differences[name] = largest_difference(a, b)
                    cells.append(f"{differences[name]:.1e}")
            table.add_row(*map(str, (queries, keys, tile_q, tile_kv)), *cells)
    console.print(
        f"H = {options.heads}, H_kv = {options.kv_heads}, D = {options.head_dim}, "
        f"D_v = {options.value_dim}, {mask_name(options)}.\nLargest differences to the naive route:"
    )
    console.print(table)
    return differences


# --- (d) costs


def costs(options: argparse.Namespace) -> None:
    section("d", "Bytes moved and held (E14)-(E18): estimates, S_q = S_kv = T")
    rows = []
    for length in LENGTHS:
        q, k, v = shapes(options, length, length)
        rows.append(reference.traffic(q, k, v, causal=options.causal, tile_q=options.cost_tile_q))
    table = new_table(
        "T", "GFLOP", "traffic naive", "tiled", "ratio", "peak memory naive", "tiled", "ratio"
    )
    for length, row in zip(LENGTHS, rows, strict=True):
        table.add_row(
            str(length),
            f"{row.flops / 1e9:.2f}",
            size(row.naive_traffic_bytes),
            size(row.tiled_traffic_bytes),
            f"{row.naive_traffic_bytes / row.tiled_traffic_bytes:.1f}",
            size(row.naive_peak_bytes),
            size(row.tiled_peak_bytes),
            f"{row.naive_peak_bytes / row.tiled_peak_bytes:.1f}",
        )
    console.print(f"{cost_problem(options)}:")
    console.print(table)
    path = plot_costs(rows, options)
    console.print(f"Plot: {path}")


def plot_costs(rows: list[reference.Traffic], options: argparse.Namespace) -> Path:
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    panels = (
        ("Bytes through memory", "naive_traffic_bytes", "tiled_traffic_bytes"),
        ("Peak memory", "naive_peak_bytes", "tiled_peak_bytes"),
    )
    for axis, (title, *fields) in zip(axes, panels, strict=True):
        for field, marker in zip(fields, "os", strict=True):
            gigabytes = [getattr(row, field) / 1e9 for row in rows]
            axis.plot(LENGTHS, gigabytes, marker=marker, label=field.split("_")[0])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(LENGTHS, [str(length) for length in LENGTHS])
        axis.set(title=title, xlabel="T = S_q = S_kv", ylabel="GB")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"Estimates: {cost_problem(options)}")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "traffic_and_memory.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def cost_problem(options: argparse.Namespace) -> str:
    return (
        f"fp32, H = {options.heads}, H_kv = {options.kv_heads}, D = {options.head_dim}, "
        f"D_v = {options.value_dim}, {mask_name(options)}, tiles of {options.cost_tile_q} queries"
    )


# --- (e) the package


def the_package(options: argparse.Namespace) -> Differences:
    section("e", "The same inputs through the compiled kernels")
    differences: Differences = {}
    table = new_table("dtype", "out - naive", "lse - naive", "what runs")
    for dtype in (torch.float32, torch.float64):
        q, k, v = inputs(options, dtype, options.queries, options.keys)
        keywords = {"causal": options.causal, "return_lse": True}
        ours = online_attention.attention(q, k, v, **keywords)
        naive = reference.naive_attention(q, k, v, **keywords)
        for what, a, b in zip(("out", "lse"), ours, naive, strict=True):
            differences[f"attention {dtype} {what} - naive"] = largest_difference(a, b)
        table.add_row(
            str(dtype).removeprefix("torch."),
            *(f"{x:.1e}" for x in list(differences.values())[-2:]),
            online_attention.explain(q, k, v, causal=options.causal),
        )
    console.print(f"online_attention.attention(q, k, v, causal={options.causal}, return_lse=True):")
    console.print(table)
    return differences


# --- shared


Shapes = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def shapes(options: argparse.Namespace, queries: int, keys: int) -> Shapes:
    return (
        (1, options.heads, queries, options.head_dim),
        (1, options.kv_heads, keys, options.head_dim),
        (1, options.kv_heads, keys, options.value_dim),
    )


def inputs(
    options: argparse.Namespace, dtype: torch.dtype, queries: int, keys: int
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(options.seed)
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).to(options.device, dtype)
        for shape in shapes(options, queries, keys)
    )


def largest_difference(a: Tensor, b: Tensor) -> float:
    """0 where both are the same infinity; NaN counts as a difference, and is returned."""
    return float(torch.where(a == b, 0.0, (a - b).abs()).max())


def report(differences: Differences) -> Differences:
    for name, difference in differences.items():
        console.print(f"  {name}: {difference:.1e}")
    return differences


def mask_name(options: argparse.Namespace) -> str:
    return "causal" if options.causal else "no mask"


def section(letter: str, title: str) -> None:
    console.print(f"\n[bold cyan]({letter}) {title}[/]")


def new_table(*columns: str) -> Table:
    table = Table(*columns)
    for column in table.columns:
        column.overflow = "fold"
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def numbers(values: Tensor | list[float], form: str = ".4f") -> list[str]:
    return [format(float(value), form) for value in values]


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


if __name__ == "__main__":
    main()
