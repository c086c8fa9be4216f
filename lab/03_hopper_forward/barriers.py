# SPDX-License-Identifier: BSD-3-Clause
"""Who waits for whom in the Hopper forward kernel: its loader, inspectors and consumers as
generators that are advanced in random order. A state in which nobody can go on is a hang.

    python lab/03_hopper_forward/barriers.py [runs]

What is modelled is what csrc/cuda/hopper/producer.cuh and consumer.cuh do with the barriers of
forward.cuh, products and copies taking no time. Change it with them, and before them.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

Process = Generator[str, None, None]  # yields what it waits for


class Barrier:
    """An mbarrier: `count` arrivals end a phase."""

    def __init__(self, count: int) -> None:
        self.count = self.pending = count
        self.phase = 0

    def arrive(self) -> None:
        self.pending -= 1
        if self.pending == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def wait(self, parity: int, what: str) -> Process:
        while (self.phase & 1) == (parity & 1):
            yield what


@dataclass
class Kernel:
    """One block. `tiles`: key tiles of its query tiles; `skipped(tile, consumer)`: how many of them
    the consumer leaves out; `ends_chain()`: whether something rare does."""

    consumers: int
    stages: int
    q_stages: int
    tiles: list[int]
    counted: bool
    skipped: Callable[[int, int], int]
    inspected: Callable[[int], bool]
    ends_chain: Callable[[], bool]
    turns: bool
    published: dict[int, int] = field(default_factory=dict)  # by place: the query tile, -1: the end

    def __post_init__(self) -> None:
        def ring(size: int, count: int) -> list[Barrier]:
            return [Barrier(count) for _ in range(size)]

        self.q_full = ring(self.q_stages, 1)
        self.q_empty = ring(self.q_stages, self.consumers + 1)
        self.k_full, self.v_full = ring(self.stages, 1), ring(self.stages, 1)
        self.k_empty, self.v_empty = (ring(self.stages, self.consumers) for _ in range(2))
        self.v_landed = ring(self.stages, 1)
        self.turn = 0  # whose it is

    def full(self, ring: list[Barrier], i: int, what: str) -> Process:
        return ring[i % len(ring)].wait(i // len(ring), f"{what} {i}")

    def empty(self, ring: list[Barrier], i: int, what: str) -> Process:
        return ring[i % len(ring)].wait(i // len(ring) + 1, f"place of {what} {i}")

    def place(self, tile: int) -> int:
        return tile % (self.q_stages + 2)

    def loader(self) -> Process:
        k = v = 0
        chained = self.q_stages > 1

        def load_k() -> Process:
            nonlocal k
            yield from self.empty(self.k_empty, k, "keys")
            self.k_full[k % self.stages].arrive()
            k += 1

        def load_v(block: int) -> Process:
            nonlocal v
            yield from self.empty(self.v_empty, v, "values")
            ring = self.v_landed if self.inspected(block) else self.v_full
            ring[v % self.stages].arrive()
            v += 1

        def open_tile(tile: int) -> Process:
            exists = tile < len(self.tiles)
            if exists and not chained:
                yield from load_k()
            yield from self.empty(self.q_empty, tile, "queries")
            self.published[self.place(tile)] = tile if exists else -1
            self.q_full[tile % self.q_stages].arrive()

        yield from open_tile(0)
        for tile, blocks in enumerate(self.tiles):
            if chained:
                yield from load_k()
            last, second = blocks - 1, max(blocks - 2, -1)
            for block in range(second, -2, -1):
                if block >= 0:
                    yield from load_k()
                if block < last:
                    yield from load_v(block + 1)
                if chained and block == (min(second, 1) if self.counted else second):
                    yield from open_tile(tile + 1)
            if not chained:
                yield from open_tile(tile + 1)

    def inspectors(self) -> Process:
        v = 0
        phases = [0] * self.stages
        for tile, blocks in enumerate(self.tiles):
            yield from self.full(self.q_full, tile, "queries")
            self.q_empty[tile % self.q_stages].arrive()
            for block in range(blocks - 1, -1, -1):
                stage = v % self.stages
                if self.inspected(block):
                    yield from self.v_landed[stage].wait(phases[stage], f"landed {v}")
                    phases[stage] += 1
                    self.v_full[stage].arrive()
                v += 1

    def consumer(self, group: int) -> Process:
        i = 0  # key tiles whose scores are done

        def pass_turn() -> Iterator[str]:
            while self.turns and self.turn != group:
                yield "turn"
            self.turn = (group + 1) % self.consumers

        def scores(tile: int, left: int) -> Iterator[str]:
            yield from self.full(self.k_full, i, "keys")
            yield from pass_turn()
            yield "product"
            self.k_empty[i % self.stages].arrive()
            if left == 1:
                self.q_empty[tile % self.q_stages].arrive()

        def out(last: int) -> None:
            self.v_empty[last % self.stages].arrive()

        running = False  # whether the last O += P V of the query tile before is still to be started
        for tile, blocks in enumerate(self.tiles):
            yield from self.full(self.q_full, tile, "queries")
            assert self.published[self.place(tile)] == tile
            last, left = i - 1, blocks
            while blocks - left < min(self.skipped(tile, group), blocks - 1):
                yield from self.full(self.k_full, i, "keys left out")
                self.k_empty[i % self.stages].arrive()
                yield from self.full(self.v_full, i, "values left out")
                out(i)
                yield from pass_turn()
                i, left = i + 1, left - 1
            yield from scores(tile, left)
            if running:
                out(last)
                yield "store"
                assert self.published[self.place(tile - 1)] == tile - 1  # still needed
            i, left = i + 1, left - 1
            while left > 0:
                yield from self.full(self.v_full, i - 1, "values")
                yield from scores(tile, left)
                out(i - 1)
                i, left = i + 1, left - 1
            yield from self.full(self.v_full, i - 1, "values")
            running = self.q_stages > 1 and tile + 1 < len(self.tiles) and not self.ends_chain()
            if not running:
                out(i - 1)
        yield from self.full(self.q_full, len(self.tiles), "the end")


def hang(kernel: Kernel, order: random.Random) -> dict[str, str] | None:
    """What everybody waits for if nobody can go on."""
    running = {"loader": kernel.loader(), "inspectors": kernel.inspectors()}
    running |= {f"consumer {g}": kernel.consumer(g) for g in range(kernel.consumers)}
    waits: dict[str, str] = {}
    idle = 0
    while running:
        name = order.choice(list(running))
        what = next(running[name], None)
        idle = idle + 1 if what is not None and waits.get(name) == what else 0
        if what is None:
            del running[name]
        else:
            waits[name] = what
        if idle > 2000:
            return {name: waits[name] for name in running}
    return None


def main(runs: int) -> int:
    # Consumers, stages, query stages, key tiles that a consumer may leave out: config.h.
    configs = [(2, 4, 2, 1), (3, 4, 2, 1), (2, 2, 2, 1), (3, 3, 2, 2), (3, 3, 1, 2), (2, 2, 1, 1)]
    for seed in range(runs):
        order = random.Random(seed)
        consumers, stages, q_stages, most = order.choice(configs)
        masked = order.random() < 0.7
        kernel = Kernel(
            consumers,
            stages,
            q_stages,
            tiles=[order.randint(1, 9) for _ in range(order.randint(1, 9))],
            counted=masked,
            skipped=lambda tile, group, most=most * masked: max(0, most - group),
            inspected=lambda block, masked=masked: masked and block % 3 == 2,
            ends_chain=lambda order=order: order.random() < 0.2,
            turns=order.random() < 0.5,
        )
        waits = hang(kernel, order)
        if waits is not None:
            print(f"seed {seed}: {consumers} consumers, {stages} stages, {kernel.tiles}: {waits}")
            return 1
    print(f"{runs} runs, no hang")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 1000))
