# SPDX-License-Identifier: BSD-3-Clause
"""Named problems. Lengths are primes and tile edges +- 1, since a multiple of the tile hides bugs.

SMALL runs everywhere on every commit and under compute-sanitizer; FULL covers each option of the
contract with each other one; STRESS is long, wide or many.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from oracle import CAUSAL, CAUSAL_TOP_LEFT, FULL, Mask


class Inputs(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Case:
    name: str
    S_q: int
    S_kv: int
    D: int | None = None  # None: one that the row under test is the first to take
    D_v: int | None = None  # None: as D
    B: int = 1
    H: int = 2
    H_kv: int | None = None  # None: as H
    mask: Mask = FULL
    scale: float | None = None
    spread: float = 1.0  # standard deviation of q and k

    def inputs(self, dtype: torch.dtype, device: str, head_dim: int, seed: int = 0) -> Inputs:
        D = head_dim if self.D is None else self.D
        D_v = D if self.D_v is None else self.D_v
        H_kv = self.H if self.H_kv is None else self.H_kv
        q, k, v = normal(
            (self.B, self.H, self.S_q, D),
            (self.B, H_kv, self.S_kv, D),
            (self.B, H_kv, self.S_kv, D_v),
            dtype=dtype,
            device=device,
            seed=seed,
        )
        return Inputs(q * self.spread, k * self.spread, v)


def normal(
    *shapes: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", seed: int = 0
) -> list[Tensor]:
    """The same numbers on every device, for every dtype but for rounding."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(device=device, dtype=dtype) for s in shapes]


SMALL = [
    Case("one-by-one", 1, 1),
    Case("odd", 5, 7),
    Case("tile-plus-one", 65, 67),
    Case("causal", 33, 33, mask=CAUSAL),
    Case("causal-more-keys", 7, 70, mask=CAUSAL),
    Case("causal-more-queries", 70, 7, mask=CAUSAL),
    Case("causal-top-left", 9, 66, mask=CAUSAL_TOP_LEFT),
    Case("window", 40, 70, mask=Mask(left=5, right=2)),
    Case("grouped", 17, 19, H=6, H_kv=2, mask=CAUSAL),
    Case("one-kv-head", 3, 37, H=4, H_kv=1),
    Case("batch", 11, 13, B=3),
    Case("no-keys", 4, 0),
    Case("decode", 1, 131, H=2, mask=CAUSAL),
    Case("negative-scale", 9, 21, scale=-0.3),
]

LENGTHS = [1, 2, 31, 63, 64, 65, 113, 127, 128, 129, 257]

FULL_CASES = [
    *[Case(f"square-{n}", n, n) for n in LENGTHS],
    *[Case(f"square-causal-{n}", n, n, mask=CAUSAL) for n in LENGTHS],
    Case("more-keys", 113, 257),
    Case("more-queries", 257, 113),
    Case("more-keys-causal", 113, 257, mask=CAUSAL),
    Case("more-queries-causal", 257, 113, mask=CAUSAL),
    Case("more-keys-top-left", 113, 257, mask=CAUSAL_TOP_LEFT),
    Case("more-queries-top-left", 257, 113, mask=CAUSAL_TOP_LEFT),
    Case("edge-causal", 129, 127, mask=CAUSAL),
    Case("edge-top-left", 127, 129, mask=CAUSAL_TOP_LEFT),
    Case("two-queries-causal", 2, 129, mask=CAUSAL),
    Case("many-queries-one-key", 129, 1, mask=CAUSAL),
    Case("left-window", 131, 131, mask=Mask(left=17, right=0)),
    Case("right-window", 131, 140, mask=Mask(left=-1, right=9)),
    Case("window-of-one", 97, 130, mask=Mask(left=0, right=0)),
    Case("window-top-left", 140, 97, mask=Mask("top_left", left=33, right=3)),
    Case("window-beyond", 65, 67, mask=Mask(left=4000, right=4000)),
    Case("groups-of-2", 67, 71, H=4, H_kv=2),
    Case("groups-of-3-causal", 67, 71, H=6, H_kv=2, mask=CAUSAL),
    Case("groups-of-7", 33, 129, H=7, H_kv=1, mask=CAUSAL),
    Case("groups-of-8-decode", 1, 259, B=2, H=16, H_kv=2, mask=CAUSAL),
    Case("batch-of-5", 31, 37, B=5, H=3, mask=CAUSAL),
    Case("zero-scale", 33, 65, scale=0.0, mask=CAUSAL),
    Case("negative-scale-causal", 65, 129, scale=-0.7, mask=CAUSAL),
    Case("tiny-scale", 33, 65, scale=1e-20),
    Case("large-scale", 33, 65, scale=5.0),
    Case("scores-of-1e4", 65, 129, spread=30.0, scale=2.0, mask=CAUSAL),
]

# The smallest that a device with many idle processors splits.
SMALL_SPLIT = [
    Case("split-1", 1, 1031, H=1, mask=CAUSAL),
    Case("split-3-grouped", 3, 1031, H=2, H_kv=1),
]

# Few queries and many keys: the keys of one query are split among many workers.
SPLIT = [
    Case("decode-1", 1, 4099, H=2, mask=CAUSAL),
    Case("decode-1-grouped", 1, 8191, H=8, H_kv=1),
    Case("decode-4", 4, 5003, H=2, mask=CAUSAL),
    Case("decode-16", 16, 2053, H=4, H_kv=2, mask=CAUSAL),
    Case("decode-5-window", 5, 3001, H=2, mask=Mask(left=700, right=0)),
    Case("decode-window-at-the-end", 2, 3001, H=1, mask=Mask(left=3, right=0)),
    Case("decode-top-left", 3, 3001, H=1, mask=CAUSAL_TOP_LEFT),
]

STRESS = [
    Case("long-keys", 2, 20011, H=1, mask=CAUSAL),
    Case("long-square", 1021, 1031, H=1, mask=CAUSAL),
    Case("long-full", 509, 2053, H=1),
    # More query tiles than processors, so that a block computes several.
    Case("many-tiles", 67, 140, B=4, H=36, D=64),
    Case("many-tiles-causal", 200, 200, B=2, H=36, H_kv=12, D=64, mask=CAUSAL),
    Case("many-tiles-window", 140, 190, B=2, H=34, D=128, mask=Mask(left=70, right=5)),
    Case("many-empty-tiles", 500, 130, H=34, D=128, mask=CAUSAL),
]

HEAD_DIMS = [1, 3, 8, 17, 40, 64, 80, 96, 128, 160, 192, 256, 257, 320, 576]
UNEQUAL_HEAD_DIMS = [(192, 128), (64, 256), (1, 5), (40, 3), (256, 257), (320, 64)]
