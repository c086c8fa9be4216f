# SPDX-License-Identifier: BSD-3-Clause
"""What the Hopper forward kernel (csrc/cuda/hopper) does beside what every kernel does: heads
packed into a query tile, keys split where the grid is small, two tile shapes, a counter of tiles.

The other half-precision rows run the same tests, which hold for any kernel.
"""

from __future__ import annotations

import pytest
import torch

from attend import assert_right, attend, check_case, rounding_magnitude
from cases import Case, normal
from oracle import CAUSAL, CAUSAL_TOP_LEFT, Mask
from rows import Target
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.targets(dtypes=(torch.float16, torch.bfloat16), device="cuda")

HEAD_DIMS = [
    Case(f"d{D}-{D_v}-{name}", 257, 321, D=D, D_v=D_v, mask=mask)
    for D, D_v in [
        *[(64, 64), (72, 40), (96, 96), (128, 128), (192, 128)],
        *[(136, 24), (192, 192), (200, 256), (256, 256), (24, 248)],
    ]
    for name, mask in [("full", Mask()), ("causal", CAUSAL), ("window", Mask(left=90, right=7))]
]
PACKED = [
    Case("packed-16", 5, 300, D=128, H=32, H_kv=2),
    Case("packed-causal", 20, 300, D=128, H=8, H_kv=2, mask=CAUSAL),
    Case("packed-64", 1, 1000, D=64, H=64, H_kv=1),
    Case("packed-window", 33, 200, D=192, D_v=128, H=8, H_kv=1, mask=Mask(left=20, right=3)),
    Case("packed-empty-rows", 40, 9, D=256, H=4, H_kv=2, B=2, mask=CAUSAL),
    Case("not-packed-7", 20, 300, D=128, H=7, H_kv=1, mask=CAUSAL),
]
SPLIT = [
    Case("split-full", 128, 4100, D=128, H=1),
    Case("split-causal", 512, 2048, D=128, H=2, mask=CAUSAL),
    Case("split-top-left", 200, 3000, D=64, H=1, mask=CAUSAL_TOP_LEFT),  # parts without keys
    Case("split-window", 500, 2500, D=256, H=1, mask=Mask(left=700, right=0)),
    Case("split-packed", 16, 5000, D=128, H=8, H_kv=1, mask=CAUSAL),
    Case("split-empty-rows", 2000, 1600, D=192, D_v=128, H=1, mask=CAUSAL),
]
SHAPES = [  # of tiles: short and long, masked and not
    Case("short-causal", 512, 512, D=64, H=4, mask=CAUSAL),
    Case("long-causal", 2100, 2100, D=64, H=2, mask=CAUSAL),
    Case("long-full", 700, 2100, D=128, H=3),
    Case("longer-causal", 300, 8200, D=128, H=1, mask=CAUSAL),
    Case("first-keys-alone", 512, 512, D=192, D_v=128, H=3, mask=CAUSAL),
    Case("first-keys-alone-cut", 500, 460, D=184, D_v=120, H=40, B=2, mask=CAUSAL),
    Case("short-wide-causal", 960, 960, D=256, H=2, mask=CAUSAL),
    Case("long-wide-causal", 1040, 1040, D=256, H=2, mask=CAUSAL),
]
CHAINED = [  # more query tiles than blocks on a device of 132: a block goes from one to the next
    Case("chained-full", 300, 300, D=64, H=32, B=3),
    Case("chained-causal", 650, 650, D=64, H=24, B=3, mask=CAUSAL),
    Case("chained-window", 500, 700, D=96, H=24, B=2, mask=Mask(left=100, right=50)),
    Case("chained-one-key-tile", 260, 60, D=128, H=30, H_kv=10, B=3, mask=CAUSAL_TOP_LEFT),
    Case("chained-empty-rows", 700, 500, D=128, H=16, B=2, mask=CAUSAL),
    Case("chained-packed", 64, 400, D=128, H=64, H_kv=32, B=6, mask=CAUSAL),
    Case("chained-tall", 2100, 2100, D=64, H=14, mask=CAUSAL),
    Case("chained-tall-full", 600, 2100, D=128, H=40),
    Case("chained-192", 330, 330, D=192, H=24, B=3, mask=CAUSAL),
    Case("chained-wide", 260, 260, D=256, H=32, B=2, mask=CAUSAL),
]
SAFETY = [
    Case("chained", 515, 515, D=128, H=32, B=2, mask=CAUSAL),
    Case("causal", 513, 513, D=128, H=6, mask=CAUSAL),
    Case("full", 400, 700, D=64, H=5),
    Case("wide", 260, 260, D=256, H=3, mask=CAUSAL),
]


@pytest.mark.cases(HEAD_DIMS + PACKED + SPLIT + SHAPES + CHAINED)
def test_result(target: Target, case: Case):
    check_case(target, case)


@pytest.mark.cases(PACKED + SPLIT + CHAINED)
def test_hidden_nan_and_inf_stay_hidden(target: Target, case: Case):
    """Values that some rows of a tile see and others do not: the latter get none of them."""
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, case.mask)
    at = case.S_kv - 1 if case.mask.is_full else min(case.S_kv - 1, case.S_q // 2)
    poisoned = inputs._replace(v=inputs.v.clone())
    poisoned.v[:, :, at] = float("inf")
    ours = attend(*poisoned, case.mask)
    seen = case.mask.visible(case.S_q, case.S_kv).to(target.device)[:, at]
    assert_bitwise_equal(ours.out[:, :, ~seen], due.out[:, :, ~seen])
    assert not ours.out[:, :, seen].isfinite().any()
    assert_bitwise_equal(ours.lse, due.lse, "lse")


@pytest.mark.parametrize("level", [-2048, -16, -6, 0, 2048])
@pytest.mark.parametrize("rise", [0, 3, -3, 40, -40])
@pytest.mark.parametrize("D", [64, 256])
def test_scores_of_any_level_and_growth(target: Target, level: int, rise: int, D: int):
    """Maxima of either sign that change, from one key tile to the next, by less and by more than
    a kernel leaves them behind."""
    case = Case("levels", 130, 700, D=D, mask=Mask(left=600, right=90))
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    scale = 0.125
    inputs.q[..., -1] = 1
    inputs.k[..., -1] = (level + rise * (torch.arange(700) // 64)) / scale
    magnitude = rounding_magnitude(inputs, scale)
    assert_right(attend(*inputs, case.mask, scale), inputs, case.mask, scale, magnitude)


@pytest.mark.cases(PACKED[:2] + SPLIT[:2])
def test_batch_of_one_gives_the_bits_of_the_batch(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    batch = [torch.cat([x, x.flip(2), x.neg()]) for x in inputs]
    whole = attend(*batch, case.mask, deterministic=True)
    one = attend(*inputs, case.mask, deterministic=True)
    assert_bitwise_equal(whole.out[:1], one.out)
    assert_bitwise_equal(whole.lse[:1], one.lse, "lse")


@pytest.mark.cases(SAFETY)
def test_thousand_launches_beside_other_work_give_the_same_bits(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, case.mask)
    differs = torch.zeros((), dtype=torch.bool, device=target.device)
    other = torch.cuda.Stream()
    (a,) = normal((1024, 1024), dtype=target.dtype, device=target.device)
    torch.cuda.synchronize()
    for _ in range(1000):
        with torch.cuda.stream(other):
            a @ a
        ours = attend(*inputs, case.mask)
        differs |= (ours.out != due.out).any() | (ours.lse != due.lse).any()
    torch.cuda.synchronize()
    assert not differs


def test_launches_behind_each_other_do_not_touch(target: Target):
    """Counters and workspaces of a call are its own, whatever runs before and after it."""
    cases = HEAD_DIMS + PACKED + SPLIT + SAFETY
    inputs = [case.inputs(target.dtype, target.device, target.head_dim) for case in cases]
    due = []
    for case, tensors in zip(cases, inputs, strict=True):
        due.append(attend(*tensors, case.mask))
        torch.cuda.synchronize()
    for _ in range(3):
        ours = [attend(*x, case.mask) for case, x in zip(cases, inputs, strict=True)]
        for mine, theirs in zip(ours, due, strict=True):
            assert_bitwise_equal(mine.out, theirs.out)
            assert_bitwise_equal(mine.lse, theirs.lse, "lse")


COUNTED = Case("counted", 700, 700, D=64, H=32, mask=CAUSAL)  # more tiles than a device has blocks


def test_streams_and_graphs_count_their_tiles_apart(target: Target):
    inputs = COUNTED.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, COUNTED.mask)
    graph, streams = torch.cuda.CUDAGraph(), [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=streams[0]):
        captured = attend(*inputs, COUNTED.mask)
    ours = []
    for _ in range(20):
        with torch.cuda.stream(streams[2]):
            graph.replay()
        for stream in streams[:2]:
            with torch.cuda.stream(stream):
                ours.append(attend(*inputs, COUNTED.mask))
    torch.cuda.synchronize()
    for mine in [*ours, captured]:
        assert_bitwise_equal(mine.out, due.out)
        assert_bitwise_equal(mine.lse, due.lse, "lse")


def test_any_number_of_streams_may_come(target: Target):
    """1024 of them have a counter of tiles of their own."""
    inputs = COUNTED.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, COUNTED.mask)
    torch.cuda.synchronize()
    differs = torch.zeros((), dtype=torch.bool, device=target.device)
    for _ in range(1100):
        handle = torch.empty(1, dtype=torch.int64)
        assert int(torch.cuda.cudart().cudaStreamCreate(handle.data_ptr())) == 0
        with torch.cuda.stream(torch.cuda.ExternalStream(int(handle))):
            ours = attend(*inputs, COUNTED.mask)
            differs |= (ours.out != due.out).any() | (ours.lse != due.lse).any()
        torch.cuda.synchronize()
        assert int(torch.cuda.cudart().cudaStreamDestroy(int(handle))) == 0
    assert not differs


@pytest.mark.slow
def test_random_problems(target: Target):
    generator = torch.Generator().manual_seed(7)

    def pick(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    for seed in range(60):
        H_kv = pick(1, 2, 3)
        case = Case(
            f"random-{seed}",
            S_q=pick(1, 17, 63, 64, 65, 127, 129, 192, 193, 300, 511, 1000),
            S_kv=pick(1, 63, 64, 65, 80, 81, 127, 129, 240, 300, 513, 1111, 2500),
            D=8 * pick(*range(1, 33)),
            D_v=8 * pick(*range(1, 33)),
            B=pick(1, 2),
            H=H_kv * pick(1, 2, 3, 4, 8),
            H_kv=H_kv,
            mask=[Mask(), CAUSAL, CAUSAL_TOP_LEFT, Mask(left=50, right=9)][pick(0, 1, 2, 3)],
        )
        inputs = case.inputs(target.dtype, target.device, target.head_dim, seed)
        largest = float(inputs.v.abs().max())
        assert_right(attend(*inputs, case.mask), inputs, case.mask, magnitude=largest)
