# SPDX-License-Identifier: BSD-3-Clause
"""Work estimates and ScoreScale (csrc/core/estimate.h, problem.h) against counting it out."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st

UNBOUNDED = 2**31 - 1
DTYPES = {"f16": 2, "bf16": 2, "f32": 4, "f64": 8}
SMALLEST_NORMAL_F32 = 2.0**-126


@dataclass(frozen=True)
class Dims:
    B: int
    H: int
    H_kv: int
    S_q: int
    S_kv: int
    D: int
    D_v: int

    def shape(self, whitebox: ModuleType):
        return whitebox.Shape(**asdict(self))


@st.composite
def dims(draw, smallest: int = 0):
    group, H_kv = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    B, S_q, S_kv = (draw(st.integers(smallest, n)) for n in (3, 12, 12))
    D, D_v = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    return Dims(B, group * H_kv, H_kv, S_q, S_kv, D, D_v)


SIDE = st.one_of(st.just(UNBOUNDED), st.integers(0, 14))
TOP_LEFT = st.booleans()
DTYPE = st.sampled_from(sorted(DTYPES))


def mask_of(whitebox: ModuleType, d: Dims, top_left: bool, left: int, right: int):
    alignment = whitebox.Alignment.top_left if top_left else whitebox.Alignment.bottom_right
    return whitebox.Mask.window(d.S_q, d.S_kv, alignment, left, right)


def seen_pairs(mask, d: Dims) -> int:
    return sum(mask.visible(q, kv) for q in range(d.S_q) for kv in range(d.S_kv))


@given(d=dims(), top_left=TOP_LEFT, left=SIDE, right=SIDE)
def test_operations_are_two_products_a_visible_pair(
    whitebox: ModuleType, d: Dims, top_left: bool, left: int, right: int
):
    mask = mask_of(whitebox, d, top_left, left, right)
    pairs = seen_pairs(mask, d)
    assert whitebox.visible_pairs(d.S_q, mask) == pairs
    operations = sum(2 * (d.D + d.D_v) * pairs for _ in range(d.B * d.H))
    assert whitebox.forward_flops(d.shape(whitebox), mask) == operations


@given(d=dims(), dtype=DTYPE)
def test_bytes_are_those_of_the_tensors(whitebox: ModuleType, d: Dims, dtype: str):
    shape, kind, size = d.shape(whitebox), getattr(whitebox.DType, dtype), DTYPES[dtype]
    q, k, v = d.B * d.H * d.S_q * d.D, d.B * d.H_kv * d.S_kv * d.D, d.B * d.H_kv * d.S_kv * d.D_v
    out, rows = d.B * d.H * d.S_q * d.D_v, d.B * d.H * d.S_q
    inputs, outputs = size * (q + k + v), size * out + (8 if dtype == "f64" else 4) * rows
    scores = size * rows * d.S_kv
    assert whitebox.element_bytes(kind) == size
    assert whitebox.input_bytes(shape, kind) == inputs
    assert whitebox.output_bytes(shape, kind) == outputs
    assert whitebox.score_matrix_bytes(shape, kind) == scores
    assert whitebox.naive_traffic_bytes(shape, kind) == inputs + outputs + 4 * scores
    assert whitebox.naive_peak_bytes(shape, kind) == inputs + outputs + 2 * scores
    assert whitebox.tiled_peak_bytes(shape, kind) == inputs + outputs


@given(d=dims(), dtype=DTYPE, top_left=TOP_LEFT, left=SIDE, right=SIDE, tile_q=st.integers(1, 16))
def test_tiled_traffic_is_what_the_tiles_read_and_write(
    whitebox: ModuleType, d: Dims, dtype: str, top_left: bool, left: int, right: int, tile_q: int
):
    mask = mask_of(whitebox, d, top_left, left, right)
    moved = whitebox.output_bytes(d.shape(whitebox), getattr(whitebox.DType, dtype))
    for begin in range(0, d.S_q, tile_q):
        rows = range(begin, min(begin + tile_q, d.S_q))
        seen = [kv for kv in range(d.S_kv) if any(mask.visible(q, kv) for q in rows)]
        keys = seen[-1] + 1 - seen[0] if seen else 0
        moved += d.B * d.H * DTYPES[dtype] * (len(rows) * d.D + keys * (d.D + d.D_v))
    kind = getattr(whitebox.DType, dtype)
    assert whitebox.tiled_traffic_bytes(d.shape(whitebox), kind, mask, tile_q) == moved


@given(d=dims(), dtype=DTYPE, top_left=TOP_LEFT, left=SIDE, right=SIDE, tile_q=st.integers(1, 8))
def test_taller_tiles_never_move_more(
    whitebox: ModuleType, d: Dims, dtype: str, top_left: bool, left: int, right: int, tile_q: int
):
    shape, kind = d.shape(whitebox), getattr(whitebox.DType, dtype)
    mask = mask_of(whitebox, d, top_left, left, right)
    low = whitebox.tiled_traffic_bytes(shape, kind, mask, tile_q)
    assert whitebox.tiled_traffic_bytes(shape, kind, mask, 2 * tile_q) <= low


@given(d=dims(smallest=1), dtype=DTYPE, tiles=st.integers(1, 4), taller=st.integers(0, 4))
def test_tiled_beats_naive_once_a_tile_is_a_quarter_of_the_head_dims(
    whitebox: ModuleType, d: Dims, dtype: str, tiles: int, taller: int
):
    """Reading D + D_v of a key for every tile against moving a score four times for every row."""
    tile_q = math.ceil((d.D + d.D_v) / 4) + taller
    d = replace(d, H_kv=d.H, S_q=tiles * tile_q)
    shape, kind = d.shape(whitebox), getattr(whitebox.DType, dtype)
    tiled = whitebox.tiled_traffic_bytes(shape, kind, whitebox.Mask.full(d.S_kv), tile_q)
    assert tiled <= whitebox.naive_traffic_bytes(shape, kind)


@given(d=dims(smallest=1), dtype=DTYPE)
def test_tiled_peak_is_linear_and_naive_is_not(whitebox: ModuleType, d: Dims, dtype: str):
    kind = getattr(whitebox.DType, dtype)
    doubled = Dims(d.B, d.H, d.H_kv, 2 * d.S_q, 2 * d.S_kv, d.D, d.D_v)
    shape, twice = d.shape(whitebox), doubled.shape(whitebox)
    assert whitebox.tiled_peak_bytes(shape, kind) < whitebox.naive_peak_bytes(shape, kind)
    assert whitebox.tiled_peak_bytes(twice, kind) == 2 * whitebox.tiled_peak_bytes(shape, kind)
    assert whitebox.naive_peak_bytes(twice, kind) > 2 * whitebox.naive_peak_bytes(shape, kind)


def test_counts_beyond_int32_do_not_wrap(whitebox: ModuleType):
    length = 2**20
    shape = whitebox.Shape(B=64, H=128, H_kv=8, S_q=length, S_kv=length, D=256, D_v=256)
    full = whitebox.Mask.full(length)
    assert whitebox.forward_flops(shape, full) == 4 * 64 * 128 * 256 * 2.0**40
    assert whitebox.score_matrix_bytes(shape, whitebox.DType.f16) == 2 * 64 * 128 * 2.0**40


def test_shape_says_when_there_is_nothing_to_compute(whitebox: ModuleType):
    some = Dims(B=2, H=4, H_kv=2, S_q=3, S_kv=5, D=8, D_v=8)
    assert not some.shape(whitebox).empty()
    assert some.shape(whitebox).group() == 2
    for name in ("B", "H", "S_q"):
        assert Dims(**{**asdict(some), name: 0}).shape(whitebox).empty()
    assert not Dims(**{**asdict(some), "S_kv": 0}).shape(whitebox).empty()
    assert Dims(**{**asdict(some), "H": 0, "H_kv": 0}).shape(whitebox).group() == 1


def test_dtype_names_are_those_of_torch(whitebox: ModuleType):
    names = [whitebox.name_of(getattr(whitebox.DType, dtype)) for dtype in DTYPES]
    assert names == ["float16", "bfloat16", "float32", "float64"]


# --- ScoreScale


@given(
    scale=st.floats(1e-30, 1e30) | st.floats(-1e30, -1e-30),
    dtype=DTYPE,
)
def test_scale_is_its_sign_times_its_size_in_base_two(
    whitebox: ModuleType, scale: float, dtype: str
):
    parts = whitebox.ScoreScale.of(scale, getattr(whitebox.DType, dtype))
    assert parts.sign == math.copysign(1, scale)
    assert parts.log2 == pytest.approx(abs(scale) * math.log2(math.e), rel=1e-15)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("zero", [0.0, -0.0, 5e-324, -5e-324])
def test_zero_scale_has_no_sign_and_a_finite_size(whitebox: ModuleType, zero: float, dtype: str):
    parts = whitebox.ScoreScale.of(zero, getattr(whitebox.DType, dtype))
    assert (parts.sign, parts.log2) == (0, 1)  # 0 * hidden = 0 * -inf would be NaN


@pytest.mark.parametrize("scale", [1e-39, -1e-45, 1e-300])
def test_scale_that_vanishes_in_single_precision_is_zero_there_alone(
    whitebox: ModuleType, scale: float
):
    for dtype in ("f16", "bf16", "f32"):
        assert whitebox.ScoreScale.of(scale, getattr(whitebox.DType, dtype)).sign == 0
    kept = whitebox.ScoreScale.of(scale, whitebox.DType.f64)
    assert kept.sign == math.copysign(1, scale)
    assert kept.log2 == pytest.approx(abs(scale) * math.log2(math.e), rel=1e-15)


@given(scale=st.floats(-1e-30, 1e-30), dtype=st.sampled_from(["f16", "bf16", "f32"]))
def test_size_of_a_scale_is_normal_in_single_precision(
    whitebox: ModuleType, scale: float, dtype: str
):
    parts = whitebox.ScoreScale.of(scale, getattr(whitebox.DType, dtype))
    assert parts.log2 >= SMALLEST_NORMAL_F32
