# SPDX-License-Identifier: BSD-3-Clause
"""How it is timed: interleaved rounds of blocks, one sample per block.

Each round times one block of calls of every contender, in an order of its own: a clock that falls
meets all of them alike, and everyone runs in the wake of each other one equally often. That
matters: at its power limit a GPU runs faster for a while after a kernel that drew little. A block
is long enough for its timer and starts with calls that are not counted. The median over the
rounds is reported with the 20th and 80th percentile. For a close race name the fast peers alone
(`--baselines cudnn fa3`): timed against itself on an H100, cuDNN then agreed within 1 %, and
within 3 % (6 % at worst) with the slower backends in the rounds, at a clock 5 to 10 % higher.

GPU: CUDA events around the block. Small inputs are rotated over several sets: calls in a row on
one set would find q, k and v in L2, which they do not after the layers of a model have streamed
their weights through it. So the sets together are at least twice the size of L2.

CPU: time.perf_counter around the block, on one set: the projections that make q, k and v leave
small ones in the caches, so warm caches are what a model sees.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from _cases import Case
from _contenders import TORCH_DTYPES, Call, Contender, Inputs
from _metrics import flops, moved_bytes, percentile
from _passes import bind, draw_inputs, entered

MAX_SETS = 64
MAX_CALLS = 2000
MIN_ROUNDS = 3
WARM_UP_SECONDS = 0.025
# Below the depth of a launch queue: a host that runs ahead of a full queue waits for the GPU.
HOST_CALLS = 100

Block = Callable[[list[Call], int], float]


@dataclass(frozen=True)
class Settings:
    """How many samples.

    rounds: samples per contender; after MIN_ROUNDS they end when case_seconds are over.
    min_time: seconds a block lasts at least.
    which_pass: what a call is.
    """

    rounds: int
    min_time: float
    case_seconds: float = math.inf
    host_time: bool = False
    which_pass: str = "forward"


def default_settings(device_type: str, host_time: bool) -> Settings:
    if host_time:
        return Settings(rounds=21, min_time=0.01, host_time=True)
    return Settings(rounds=10 if device_type == "cuda" else 7, min_time=0.02)


def l2_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def input_sets(case: Case, dtype: str, device: torch.device, which_pass: str) -> int:
    """How many sets of inputs a block rotates over (see the module's docstring)."""
    wanted = math.ceil(2 * l2_bytes(device) / moved_bytes(case, dtype, which_pass))
    return min(max(wanted, 1), MAX_SETS)


def _event_block(calls: list[Call], count: int) -> float:
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _clock_block(calls: list[Call], count: int) -> float:
    start = time.perf_counter()
    for i in range(count):
        calls[i % len(calls)]()
    return time.perf_counter() - start


def _host_block(calls: list[Call], count: int) -> float:
    """The host's time alone: the GPU's work is waited for, but after the clock has stopped."""
    seconds = _clock_block(calls, count)
    torch.cuda.synchronize()
    return seconds


def block_timer(device_type: str, host_time: bool) -> Block:
    if device_type != "cuda":
        return _clock_block
    return _host_block if host_time else _event_block


def _calls_per_block(calls: list[Call], block: Block, settings: Settings, on_gpu: bool) -> int:
    """Warms up, and finds how many calls make a block last `min_time`."""
    if settings.host_time and on_gpu:
        block(calls, HOST_CALLS)
        return HOST_CALLS
    count, seconds = 1, block(calls, 1)
    warmed = seconds
    while warmed < WARM_UP_SECONDS or seconds < settings.min_time / 4:
        count = min(max(count * 2, len(calls)), MAX_CALLS)
        seconds = block(calls, count)
        warmed += seconds
        if count == MAX_CALLS:
            break
    per_call = seconds / count
    return min(max(math.ceil(settings.min_time / per_call), 1), MAX_CALLS)


def balanced_order(count: int, round_index: int) -> list[int]:
    """The order of a round: a row of Williams' Latin square.

    Over `count` rounds (twice as many where count is odd) everyone takes every place, and follows
    everyone else, equally often.
    """
    zigzag = [(i + 1) // 2 if i % 2 else -(i // 2) for i in range(count)]
    row = [(step + round_index) % count for step in zigzag]
    mirrored = count % 2 == 1 and round_index // count % 2 == 1
    return row[::-1] if mirrored else row


def time_case(
    case: Case,
    dtype: str,
    first_set: Inputs,
    takers: list[Contender],
    settings: Settings,
    on_block: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Times every contender of one case; `on_block` is told whose turn it is."""
    device = first_set.tensors[0].device
    which_pass = settings.which_pass
    count_sets = input_sets(case, dtype, device, which_pass)
    sets = [first_set] + [
        draw_inputs(case, dtype, device, seed=1 + i, gradients=first_set.dout is not None)
        for i in range(count_sets - 1)
    ]
    bound: dict[str, list[Call]] = {}
    for taker in takers:
        with entered(taker, which_pass):
            bound[taker.name] = [bind(taker, case, inputs, which_pass) for inputs in sets]
    counts, samples = _run_rounds(takers, bound, settings, device.type, on_block)
    results = {}
    for taker in takers:
        result = _summary(case, dtype, samples[taker.name], which_pass)
        result["calls_per_sample"] = counts[taker.name]
        result["input_sets"] = count_sets
        result["peak_bytes"] = None
        if device.type == "cuda":
            result["peak_bytes"] = peak_bytes(taker, bound[taker.name][0], which_pass)
        results[taker.name] = result
    return results


def _run_rounds(
    takers: list[Contender],
    bound: dict[str, list[Call]],
    settings: Settings,
    device_type: str,
    on_block: Callable[[str], None],
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Calls per block, and the samples (ms), of each contender."""
    on_gpu = device_type == "cuda"
    block = block_timer(device_type, settings.host_time)
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {taker.name: [] for taker in takers}
    for taker in takers:
        on_block(taker.name)
        with entered(taker, settings.which_pass):
            counts[taker.name] = _calls_per_block(bound[taker.name], block, settings, on_gpu)
    started = time.perf_counter()
    for round_index in range(settings.rounds):
        spent = time.perf_counter() - started
        if round_index >= MIN_ROUNDS and spent > settings.case_seconds:
            break
        for taker in (takers[i] for i in balanced_order(len(takers), round_index)):
            on_block(taker.name)
            name, count = taker.name, counts[taker.name]
            with entered(taker, settings.which_pass):
                # Takes over clock, caches and threads from the contender before.
                for _ in range(max(count // 2, 1) if on_gpu else count > 3):
                    bound[name][-1]()
                samples[name].append(block(bound[name], count) / count * 1e3)
    return counts, samples


def _summary(case: Case, dtype: str, samples_ms: list[float], which_pass: str) -> dict[str, Any]:
    median = percentile(samples_ms, 0.5)
    return {
        "median_ms": median,
        "p20_ms": percentile(samples_ms, 0.2),
        "p80_ms": percentile(samples_ms, 0.8),
        "tflops": flops(case, which_pass) / median / 1e9,
        "gbytes_per_s": moved_bytes(case, dtype, which_pass) / median / 1e6,
        "samples_ms": samples_ms,
    }


def peak_bytes(taker: Contender, call: Call, which_pass: str) -> int:
    """What one call takes from torch's CUDA allocator at its peak: results and workspace.

    Of the backward pass alone, what the forward before it has saved is not a part.
    """
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with entered(taker, which_pass):
        call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ceilings(dtype: str, device: torch.device) -> dict[str, float]:
    """What the device does in the same minutes: a matmul (TFLOP/s) and a copy (GB/s)."""
    on_gpu = device.type == "cuda"
    block = block_timer(device.type, host_time=False)
    size, copied_bytes = (8192, 2**30) if on_gpu else (1024, 2**27)
    a = torch.randn(size, size, device=device).to(TORCH_DTYPES[dtype])
    source = torch.empty(copied_bytes, dtype=torch.uint8, device=device).random_(0, 256)
    target = torch.empty_like(source)
    settings = Settings(rounds=5, min_time=0.02)
    medians = []
    for call in (lambda: torch.mm(a, a), lambda: target.copy_(source)):
        count = _calls_per_block([call], block, settings, on_gpu)
        samples = [block([call], count) / count for _ in range(settings.rounds)]
        medians.append(percentile(samples, 0.5))
    return {
        "matmul_tflops": 2 * size**3 / medians[0] / 1e12,
        "copy_gbytes_per_s": 2 * copied_bytes / medians[1] / 1e9,
    }
