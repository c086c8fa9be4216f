# SPDX-License-Identifier: BSD-3-Clause
"""Random calls, one after the other, for as long as asked: right, steady, and back in time?

    python tests/soak.py --seconds 60                    # on CUDA if there is one
    python tests/soak.py --seed 7 --first 1234 --calls 1 # one call again

Each call has a shape, a dtype, a mask, strides and a scale of its own, forward and two times in
three backward. Judged are out, lse and gradients by the bounds of the tests (`tolerance`) against
fp64, and the bits: every forward gives the same ones when repeated, and so do dk and dv; dq where
it is promised. On CUDA most calls are such that the fastest row for the device takes them, some
run on a stream of their own, and some beside other work. Gaps between rows, heads and sequences
hold NaN, and so does freed memory.

A call that is not back after `--patience` seconds ends the process with its description: status 3.
A wrong one is described and counted: status 1 in the end. A call depends on the seed and its
number alone, so the command that a description ends with repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the tests' own modules

import gradients
import online_attention
import oracle
from attend import largest_sum, poison_allocator, rounding_magnitude
from cases import Case, Inputs, normal
from gradients import Cotangents, Gradients
from layouts import ALIGNED, LAYOUTS
from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Attention, Mask
from tolerance import assert_bitwise_equal, assert_close, assert_lse_close, eps_of

RIGHT, WRONG, USAGE, LATE = 0, 1, 2, 3
WRONG_MAX = 5  # after so many the run ends: more of them say nothing new
EDGES = (1, 2, 31, 63, 64, 65, 80, 127, 128, 129, 191, 192, 193, 255, 257, 384)
BIASES = ("key-padding", "boolean", "floating")
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# Below it a sum has so few terms that PyTorch may be exact by luck: see `assert_close`.
TERMS_MIN = 32


@dataclass(frozen=True)
class Sizes:
    """What is drawn: lengths up to `length`, one call in eight up to `long`."""

    length: int
    long: int
    pairs: int  # of B * H * S_q * S_kv, of which the judges have several matrices in fp64
    half_share: float  # of fp16 and bf16
    easy_share: float  # aligned and without bias: what the fastest rows take


SIZES = {
    "cpu": Sizes(160, 700, 1 << 17, half_share=0.6, easy_share=0.5),
    "cuda": Sizes(3000, 20000, 1 << 25, half_share=0.95, easy_share=0.85),
}


@dataclass(frozen=True)
class Problem:
    """One call; `layouts` of q, k, v and dout are names in `layouts.LAYOUTS`."""

    case: Case
    dtype: str
    layouts: tuple[str, str, str, str]
    bias: str | None
    deterministic: bool | None
    is_differentiated: bool
    own_stream: bool
    beside_work: bool
    seed: int = field(repr=False)


def drawn(seed: int, index: int, device: str) -> Problem:
    """The call of that number."""
    rng = random.Random(f"{seed}/{index}")
    sizes = SIZES[device]
    is_easy = rng.random() < sizes.easy_share
    dtype = rng.choice(["float16", "bfloat16"])
    if rng.random() > sizes.half_share:
        dtype = "float32"
    D = 8 * rng.randint(1, 32) if is_easy else rng.randint(1, 300)
    D_v = D if rng.random() < 0.7 else 8 * rng.randint(1, 32)
    bias = None if is_easy or rng.random() < 0.3 else rng.choice(BIASES)
    masks = [FULL, CAUSAL]
    if bias is None:
        window = Mask(
            rng.choice(["top_left", "bottom_right"]),
            rng.randint(-1, sizes.length // 2),
            rng.randint(-1, 200),
        )
        masks = [FULL, CAUSAL, CAUSAL, CAUSAL_TOP_LEFT, window]
    case = _shape(rng, sizes, D, D_v, rng.choice(masks))
    names = tuple(rng.choice(ALIGNED if is_easy else tuple(LAYOUTS)) for _ in range(4))
    return Problem(
        case,
        dtype,
        names,  # type: ignore[arg-type]
        bias,
        deterministic=rng.choice([None, None, True]),
        is_differentiated=rng.random() < 2 / 3,
        own_stream=rng.random() < 0.3,
        beside_work=rng.random() < 0.5,
        seed=rng.randrange(1 << 30),
    )


def _shape(rng: random.Random, sizes: Sizes, D: int, D_v: int, mask: Mask) -> Case:
    def length(longest: int) -> int:
        return rng.choice(EDGES) if rng.random() < 0.3 else rng.randint(1, longest)

    is_long = rng.random() < 1 / 8
    S_q, S_kv = length(sizes.length), length(sizes.long if is_long else sizes.length)
    if rng.random() < 0.3:
        S_q = S_kv
    elif rng.random() < 0.15:
        S_q = rng.randint(1, 16)
    B, H_kv, group = rng.randint(1, 3), rng.randint(1, 4), rng.choice([1, 1, 2, 3, 4, 7, 8, 16])
    S_q = min(S_q, max(1, sizes.pairs // S_kv))
    while B * H_kv * group * S_q * S_kv > sizes.pairs:
        if B > 1:
            B -= 1
        elif H_kv > 1:
            H_kv -= 1
        else:
            group -= 1
    scale = None if rng.random() < 0.85 else rng.choice([0.0, -0.3, 0.05])
    return Case("drawn", S_q, S_kv, D, D_v, B, H_kv * group, H_kv, mask, scale)


class Watchdog:
    """Calls `on_late` with what `over` was given, if its block takes longer than `patience` s."""

    def __init__(self, patience: float, on_late: Callable[[str], None]) -> None:
        self.patience, self.on_late = patience, on_late

    @contextmanager
    def over(self, what: str) -> Iterator[None]:
        timer = threading.Timer(self.patience, self.on_late, (what,))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def end_process(what: str) -> None:
    """A kernel that never ends cannot be stopped from within: nothing is waited for."""
    print(f"LATE: {what}", flush=True)
    os._exit(LATE)


# --- one call


def make_bias(problem: Problem, device: str) -> Tensor | None:
    case = problem.case
    generator = torch.Generator().manual_seed(problem.seed + 7)
    if problem.bias is None:
        return None
    if problem.bias == "key-padding":
        ends = torch.randint(0, case.S_kv + 1, (case.B, 1, 1, 1), generator=generator)
        return (torch.arange(case.S_kv) < ends).to(device)
    if problem.bias == "boolean":
        visible = torch.rand((1, 1, case.S_q, case.S_kv), generator=generator) < 0.5
        return visible.to(device)
    shape = (1, case.H, case.S_q, case.S_kv)
    return normal(shape, dtype=DTYPES[problem.dtype], device=device, seed=problem.seed + 7)[0]


def call(problem: Problem, inputs: Inputs, bias: Tensor | None) -> Attention:
    case = problem.case
    poison_allocator(inputs.q, inputs.v.shape[-1])
    settings = {"scale": case.scale, "deterministic": problem.deterministic}
    if bias is None:
        return gradients.attend(*inputs, case.mask, **settings)
    is_causal = case.mask.is_causal
    found = online_attention.attention(
        *inputs, causal=is_causal, bias=bias, return_lse=True, **settings
    )
    return Attention(*found)


def differentiate(
    problem: Problem, inputs: Inputs, cotangents: Cotangents, bias: Tensor | None
) -> tuple[Attention, list[Gradients]]:
    """The results, and the gradients twice."""
    leaves = Inputs(*(x.detach().requires_grad_() for x in inputs))
    results = call(problem, leaves, bias)
    found = []
    for _ in range(2):
        for x in inputs:
            poison_allocator(x, x.shape[-1])
        found.append(
            Gradients(*torch.autograd.grad(results, leaves, cotangents, retain_graph=True))
        )
    return Attention(*(x.detach() for x in results)), found


def check(problem: Problem, device: str) -> None:
    """Raises AssertionError with what is wrong."""
    case = problem.case
    inputs = case.inputs(DTYPES[problem.dtype], device, 0, problem.seed)
    inputs = Inputs(*(LAYOUTS[n](x) for n, x in zip(problem.layouts, inputs, strict=False)))
    bias = make_bias(problem, device)
    ours = call(problem, inputs, bias)
    for _ in range(2):
        again = call(problem, inputs, bias)
        assert_bitwise_equal(again.out, ours.out, "out of the same call")
        assert_bitwise_equal(again.lse, ours.lse, "lse of the same call")
    assert_forward(problem, ours, inputs, bias)
    if not problem.is_differentiated:
        return
    cotangents = gradients.cotangents_of(inputs, problem.seed + 1)
    cotangents = cotangents._replace(dout=LAYOUTS[problem.layouts[3]](cotangents.dout))
    again, (mine, repeated) = differentiate(problem, inputs, cotangents, bias)
    assert_bitwise_equal(again.out, ours.out, "out of the call with gradients")
    for name in Gradients._fields:
        if name != "dq" or problem.deterministic or device == "cpu":
            first, second = getattr(mine, name), getattr(repeated, name)
            assert_bitwise_equal(second, first, f"{name} of the same call")
    assert_gradients(problem, mine, inputs, cotangents, bias)


def has_many_terms(case: Case) -> bool:
    return min(case.S_q, case.S_kv) >= TERMS_MIN


def assert_forward(problem: Problem, ours: Attention, inputs: Inputs, bias: Tensor | None) -> None:
    case = problem.case
    wide = (x.double() for x in inputs)
    scale = oracle.default_scale(inputs.q, case.scale)
    exact = oracle.plain(*wide, case.mask, scale, bias)
    plain = oracle.plain(*inputs, case.mask, scale, bias)
    by_luck = not has_many_terms(case) or bias is not None or case.scale is not None
    magnitude = rounding_magnitude(inputs, case.scale, bias) if by_luck else None
    assert_close(ours.out, exact.out, plain.out, magnitude=magnitude)
    ulps = 4 * max(1.0, largest_sum(inputs, case.scale))
    plain_lse = oracle.plain_lse(*inputs, case.mask, scale, bias)
    assert_lse_close(ours.lse, exact.lse, plain_lse, ulps=ulps)


def assert_gradients(
    problem: Problem, ours: Gradients, inputs: Inputs, cotangents: Cotangents, bias: Tensor | None
) -> None:
    """The largest error as the tests have it, and that of each gradient as a whole."""
    case = problem.case
    wide = Inputs(*(x.double() for x in inputs))
    wide_cotangents = Cotangents(*(x.double() for x in cotangents))
    scale = oracle.default_scale(inputs.q, case.scale)
    exact = gradients.plain(wide, wide_cotangents, case.mask, scale, bias)
    plain = gradients.plain(inputs, cotangents, case.mask, scale, bias)
    magnitudes = term_sizes(wide, wide_cotangents, case.mask, scale, bias)
    rounding = gradients.weight_error(inputs, case.scale, bias)
    for name, mine, due, other, size in zip(
        Gradients._fields, ours, exact, plain, magnitudes, strict=True
    ):
        assert_close(mine, due, other, magnitude=size * rounding, what=name)
        if has_many_terms(case) and float(due.norm()) > 0:
            errors = [float((x.double() - due).norm() / due.norm()) for x in (mine, other)]
            bound = 2 * errors[1] + eps_of(mine.dtype)
            assert errors[0] <= bound, f"{name}: error {errors[0]:.3g} of all is over {bound:.3g}"


def term_sizes(
    inputs: Inputs, cotangents: Cotangents, mask: Mask, scale: float, bias: Tensor | None
) -> tuple[float, float, float]:
    """`gradients.exact`'s second result: what was added up for dq, dk and dv, at its largest."""
    q, k, v = inputs
    group = q.shape[1] // k.shape[1]
    visible, added = oracle.pairs(q, k, mask, bias)
    scores = (scale * (q @ k.repeat_interleave(group, 1).mT) + added).masked_fill_(
        ~visible, -torch.inf
    )
    p = torch.softmax(scores, -1).nan_to_num_(0.0)
    del scores
    dp = (cotangents.dout @ v.repeat_interleave(group, 1).mT).abs_()
    delta = (p * dp).sum(-1, keepdim=True)
    sizes = abs(scale) * p * (dp + 2 * delta + cotangents.dlse[..., None].abs())
    dq = sizes @ k.repeat_interleave(group, 1).abs()
    by_head = sizes.mT @ q.abs(), p.mT @ cotangents.dout.abs()
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in by_head)
    return float(dq.max()), float(dk.max()), float(dv.max())


# --- many calls


class Soak:
    def __init__(self, seed: int, device: str, patience: float) -> None:
        self.seed, self.device = seed, device
        self.watchdog = Watchdog(patience, end_process)
        self.wrong: list[str] = []
        self.counted: Counter[str] = Counter()
        if device == "cuda":
            self.streams = [torch.cuda.Stream() for _ in range(2)]
            self.factor = torch.randn(2048, 2048, device=device, dtype=torch.bfloat16)

    def describe(self, index: int, problem: Problem) -> str:
        command = f"--seed {self.seed} --first {index} --calls 1 --device {self.device}"
        return f"{problem!r}; again: python tests/soak.py {command}"

    def run_one(self, index: int) -> None:
        problem = drawn(self.seed, index, self.device)
        what = self.describe(index, problem)
        on_gpu = self.device == "cuda"
        stream = torch.cuda.stream(self.streams[0]) if on_gpu and problem.own_stream else None
        with self.watchdog.over(what):
            if on_gpu and problem.beside_work:
                with torch.cuda.stream(self.streams[1]):
                    for _ in range(20):
                        self.factor @ self.factor
            try:
                with stream or nullcontext():
                    check(problem, self.device)
                if on_gpu:
                    torch.cuda.synchronize()
            except Exception as error:  # whatever it is, it is a finding; the next may be another
                self.wrong.append(what)
                print(f"WRONG: {type(error).__name__}: {error}\n  in {what}", flush=True)
        self.counted["calls"] += 1
        self.counted[problem.dtype] += 1
        self.counted["with gradients"] += problem.is_differentiated
        self.counted["with bias"] += problem.bias is not None

    def run(self, first: int, calls: int | None, seconds: float) -> int:
        end = time.monotonic() + seconds
        index = first
        while len(self.wrong) < WRONG_MAX and (calls is None or index < first + calls):
            if calls is None and time.monotonic() > end:
                break
            self.run_one(index)
            index += 1
        counts = ", ".join(f"{count} {name}" for name, count in self.counted.items())
        verdict = f"{len(self.wrong)} WRONG" if self.wrong else "all right"
        print(f"soak on {self.device}, seed {self.seed}: {counts}: {verdict}", flush=True)
        return WRONG if self.wrong else RIGHT


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="tests/soak.py", description="Random calls of attention, judged one by one."
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="how long (default: 60)")
    parser.add_argument("--calls", type=int, help="how many, instead of how long")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=SIZES, help="default: cuda if there is one")
    parser.add_argument(
        "--patience", type=float, default=10.0, metavar="SECONDS",
        help="for one call with its judges (default: 10)",
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    has_gpu = torch.cuda.is_available()
    device = arguments.device or ("cuda" if has_gpu else "cpu")
    if device == "cuda" and not has_gpu:
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return USAGE
    soak = Soak(arguments.seed, device, arguments.patience)
    return soak.run(arguments.first, arguments.calls, arguments.seconds)


if __name__ == "__main__":
    sys.exit(main())
