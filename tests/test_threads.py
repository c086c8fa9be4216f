# SPDX-License-Identifier: BSD-3-Clause
"""The CPU kernels beside other users of threads: torch's setting holds, and bits stay the same."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import online_attention
from cases import normal
from tolerance import assert_bitwise_equal

# One that is split by its keys, and one that is cut by its queries.
SHAPES = {"decode": (2, 1, 1500), "prefill": (2, 150, 150)}
D = 32


def inputs_of(name: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    H, S_q, S_kv = SHAPES[name]
    q, k, v = normal(
        (1, H, S_q, D), (1, H, S_kv, D), (1, H, S_kv, D), dtype=torch.bfloat16, seed=seed
    )
    return q, k, v


def with_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = online_attention.attention(q, k, v, causal=True, return_lse=True)
    gradients = torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), lse.detach()))
    return out.detach(), lse.detach(), *gradients


def assert_same(ours: tuple[Tensor, ...], due: tuple[Tensor, ...], where: str) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), ours, due, strict=True):
        assert_bitwise_equal(a, b, f"{name} {where}")


def threads_of_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


class Attention(Dataset[tuple[Tensor, ...]]):
    """Item i: the number of threads, then attention and its gradients of inputs with the seed i."""

    names = (*SHAPES, *SHAPES)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[Tensor, ...]:
        return torch.tensor(torch.get_num_threads()), *with_gradients(*inputs_of(self.names[i], i))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader(start: str) -> None:
    """In a process of its own: torch refuses gradients in a fork of one that ran many."""
    command = [sys.executable, __file__, start]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def check_workers_of_a_loader(start: str) -> None:
    """After the parent has used its threads, which a fork does not bring along."""
    items = Attention()
    due = [items[i][1:] for i in range(len(items))]
    workers = 2 if start == "fork" else 1  # each that is spawned imports torch, for seconds
    loader = DataLoader(
        items, batch_size=None, num_workers=workers, multiprocessing_context=start, timeout=120
    )
    for i, (threads, *ours) in enumerate(loader):
        assert threads == 1
        assert_same(tuple(ours), due[i], f"of item {i}")


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("threads", [1, 3])
def test_several_callers_at_once(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    due = [with_gradients(*inputs_of(name, i)) for i in range(4)]
    together = threading.Barrier(4)

    def call(i: int) -> list[tuple[Tensor, ...]]:
        together.wait(timeout=60)
        return [with_gradients(*inputs_of(name, i)) for _ in range(5)]

    with ThreadPoolExecutor(4) as callers:
        for i, results in enumerate(callers.map(call, range(4))):
            for ours in results:
                assert_same(ours, due[i], f"of caller {i}")


def call_in_thread(body: Callable[[], None]) -> None:
    failures: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


def assert_starts_no_thread(inputs: tuple[Tensor, ...]) -> None:
    before = threads_of_process()
    with torch.no_grad():
        online_attention.attention(*inputs)
    assert threads_of_process() == before


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("name", SHAPES)
def test_one_thread_starts_no_other(name: str) -> None:
    """Counted in a thread of its own, as a pool would be new there."""
    inputs = inputs_of(name)

    def body() -> None:
        torch.set_num_threads(1)
        assert_starts_no_thread(inputs)

    call_in_thread(body)


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("name", SHAPES)
def test_no_thread_beyond_those_of_torch(name: str) -> None:
    """A pool that torch's own operators have filled gains no thread by ours."""
    inputs = inputs_of(name)
    many = torch.ones(1 << 20)

    def body() -> None:
        torch.set_num_threads(3)
        many.add(1)
        assert_starts_no_thread(inputs)

    call_in_thread(body)


@pytest.mark.usefixtures("threads_restored")
def test_in_compiled_code() -> None:
    q, k, v = inputs_of("decode")

    def eager(x: Tensor) -> Tensor:
        return online_attention.attention(x * 2, k, v, causal=True) + 1

    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert_bitwise_equal(compiled(q), eager(q), f"with {threads} threads")


if __name__ == "__main__":
    check_workers_of_a_loader(sys.argv[1])
