# SPDX-License-Identifier: BSD-3-Clause
"""The path of the idea in plain PyTorch: safe softmax, online softmax, naive and tiled attention.

Written to be read and checked against, not to be fast. Runs on every device and floating dtype;
autograd goes through it; only `traffic` needs compiled code. Equations (E..) are those of
docs/algorithm.md, symbols those of docs/glossary.md. Softmax states are in natural units (a score x
has the weight exp(x - m)), as in the papers; the kernels use base-2 units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Alignment = Literal["top_left", "bottom_right"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPE_NAMES = "float16, bfloat16, float32 or float64"
_SHAPES = {"q": "(B, H, S_q, D)", "k": "(B, H_kv, S_kv, D)", "v": "(B, H_kv, S_kv, D_v)"}


class SoftmaxState(NamedTuple):
    """What online softmax knows of a row after some of its scores, in natural units.

    `m` is the largest score so far (-inf before the first), `l` the sum of exp(score - m). Both
    have the scores' shape without the last dimension, in fp32 (fp64 for fp64 scores). States form a
    commutative monoid under `merge` with the identity `empty`. For autograd `m` is a constant:
    what does not depend on it (`lse`, softmax, attention) has the right gradient, `l` alone not.
    """

    m: Tensor
    l: Tensor

    @staticmethod
    def empty(rows: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> "SoftmaxState":
        """The state of rows that have seen no score."""
        m = torch.full(rows, -math.inf, dtype=dtype, device=device)
        return SoftmaxState(m, torch.zeros_like(m))

    def absorb(self, scores: Tensor) -> tuple["SoftmaxState", Tensor, Tensor]:
        """Takes in a block of scores (..., N): the step of online softmax (E6)-(E8).

        Returns the new state; `alpha` (...), which brings sums and outputs gathered so far to the
        new maximum; and the weights `p` (..., N) = exp(scores - m).
        """
        m = torch.maximum(self.m, _row_max(scores))
        alpha = torch.exp(self.m - _base(m))
        p = torch.exp(scores - _base(m)[..., None])
        return SoftmaxState(m, alpha * self.l + p.sum(-1)), alpha, p

    def merge(self, other: "SoftmaxState") -> "SoftmaxState":
        """The state of two disjoint sets of scores taken together (E11)."""
        m = torch.maximum(self.m, other.m)
        mine, theirs = (torch.exp(part.m - _base(m)) for part in (self, other))
        return SoftmaxState(m, self.l * mine + other.l * theirs)

    def lse(self) -> Tensor:
        """Natural log of the sum of exp(score), -inf for an empty row (E10)."""
        is_empty = self.l == 0
        log_sum = torch.log(torch.where(is_empty, 1.0, self.l))
        return torch.where(is_empty, -math.inf, _base(self.m) + log_sum)

    def normalise(self, weighted: Tensor) -> Tensor:
        """`weighted` (..., N), gathered under this m, divided by l; 0 for an empty row (E9)."""
        return weighted / torch.where(self.l == 0, 1.0, self.l)[..., None]


def safe_softmax(x: Tensor) -> Tensor:
    """Softmax over the last dimension in three passes: maximum, sum, result (E2).

    `x` is (..., N), floating point; -inf hides an element. The result has its shape and dtype; half
    types are computed in fp32. A row of -inf alone gives zeros. Raises TypeError or ValueError if
    `x` is not a floating point tensor, or has no dimension.
    """
    _check_scores(x)
    scores = x.to(_accumulation_dtype(x.dtype))
    m = _base(_row_max(scores))[..., None]  # pass 1
    total = torch.exp(scores - m).sum(-1, keepdim=True)  # pass 2
    return (torch.exp(scores - m) / torch.where(total == 0, 1.0, total)).to(x.dtype)  # pass 3


def online_softmax_states(x: Tensor, block_size: int) -> list[SoftmaxState]:
    """The running (m, l) of online softmax over the last dimension, one state after each block.

    Milakov & Gimelshein 2018 (arXiv 1805.02867), by blocks instead of single scores: (E3), (E4).

    Args:
        x: scores of shape (..., N), floating point; errors as for `safe_softmax`.
        block_size: scores taken at once, at least 1 (else ValueError); the last block may be short.

    Returns:
        ceil(N / block_size) states in natural units, each of the shape of `x` without its last
        dimension. The last one is the row's.
    """
    _check_scores(x)
    _check_size("block_size", block_size)
    scores = x.to(_accumulation_dtype(x.dtype))
    state = SoftmaxState.empty(scores.shape[:-1], dtype=scores.dtype, device=scores.device)
    states = []
    for begin in range(0, scores.shape[-1], block_size):
        state, _, _ = state.absorb(scores[..., begin : begin + block_size])
        states.append(state)
    return states


def online_softmax(x: Tensor, block_size: int) -> Tensor:
    """Softmax over the last dimension in two passes: state (E3), then result.

    The same function as `safe_softmax`, for every block size. Arguments and errors are those of
    `online_softmax_states`; the result has the shape and dtype of `x`.
    """
    states = online_softmax_states(x, block_size)
    if not states:
        return x.clone()
    scores = x.to(_accumulation_dtype(x.dtype))
    return states[-1].normalise(torch.exp(scores - _base(states[-1].m)[..., None])).to(x.dtype)


def naive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    alignment: Alignment = "bottom_right",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * q k^T + mask) v with the score matrix stored (E1): plain PyTorch arithmetic.

    Products are computed in the inputs' dtype, the softmax in fp32 for half types. With fp64 inputs
    this is the oracle of the tests, with others the rounding error that PyTorch itself makes.
    Memory grows with B * H * S_q * S_kv.

    Args:
        q: (B, H, S_q, D), fp16, bf16, fp32 or fp64.
        k: (B, H_kv, S_kv, D), same dtype and device; H is a multiple of H_kv (GQA).
        v: (B, H_kv, S_kv, D_v), same dtype and device.
        causal: query i sees key j if j <= i + offset, offset = S_kv - S_q for "bottom_right" and 0
            for "top_left" alignment.
        alignment: where the causal diagonal lies if S_q != S_kv.
        scale: factor of the scores, any finite number; None means 1 / sqrt(D).
        return_lse: also return the log-sum-exp of every row.

    Returns:
        out (B, H, S_q, D_v) in the inputs' dtype; with `return_lse` also lse (B, H, S_q), the
        natural log of the sum of exp(score), in fp32 (fp64 for fp64). A row that sees no key has
        out 0 and lse -inf. A key or value hidden from a row is without effect on it, even if it
        is NaN. Both results are differentiable.

    Raises:
        TypeError, ValueError: naming the argument, the expected shape or dtype, and the actual one.
    """
    call = _AttentionCall.checked(q, k, v, causal, alignment, scale)

    def rows(q_begin: int, q_end: int) -> tuple[Tensor, Tensor]:
        keys = call.keys_seen(q_end - 1)
        scores = (q[:, :, q_begin:q_end] @ call.k[:, :, :keys].mT) * call.scale
        scores = call.hide(scores.to(call.dtype), q_begin, 0)
        state, _, p = call.empty_state(q_end - q_begin).absorb(scores)
        return state.normalise(p).to(q.dtype) @ call.v[:, :, :keys], state.lse()

    out, lse = call.over_queries(rows, tile_q=max(call.s_q, 1))
    return (out, lse) if return_lse else out


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    tile_q: int,
    tile_kv: int,
    causal: bool = False,
    alignment: Alignment = "bottom_right",
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The flash algorithm in plain loops: one pass over the keys, no score matrix (E5)-(E10).

    Rabe & Staats 2021 (arXiv 2112.05682); Dao et al., FlashAttention 2022 (arXiv 2205.14135),
    in the loop order of FlashAttention-2, 2023 (arXiv 2307.08691). Tiles without a visible pair are
    skipped. Scores, states and outputs are held in fp32 (fp64 for fp64) and rounded once at the
    end. Equal to `naive_attention` but for rounding, for all tile sizes.

    Args, besides those of `naive_attention`, whose results and errors are the same:
        tile_q: queries of a tile, at least 1; need not divide S_q.
        tile_kv: keys of a tile, at least 1; need not divide S_kv.
    """
    _check_size("tile_q", tile_q)
    _check_size("tile_kv", tile_kv)
    call = _AttentionCall.checked(q, k, v, causal, alignment, scale)

    def rows(q_begin: int, q_end: int) -> tuple[Tensor, Tensor]:
        q_tile = q[:, :, q_begin:q_end].to(call.dtype)
        state = call.empty_state(q_end - q_begin)
        out = q_tile.new_zeros(*q_tile.shape[:3], v.shape[3])
        keys = call.keys_seen(q_end - 1)
        for kv_begin in range(0, keys, tile_kv):
            kv_tile = slice(kv_begin, min(kv_begin + tile_kv, keys))
            scores = (q_tile @ call.k[:, :, kv_tile].to(call.dtype).mT) * call.scale
            scores = call.hide(scores, q_begin, kv_begin)
            state, alpha, p = state.absorb(scores)  # (E6)-(E8)
            out = out * alpha[..., None] + p @ call.v[:, :, kv_tile].to(call.dtype)  # (E8)
        return state.normalise(out).to(q.dtype), state.lse()  # (E9), (E10)

    out, lse = call.over_queries(rows, tile_q)
    return (out, lse) if return_lse else out


@dataclass(frozen=True)
class _AttentionCall:
    """A checked call: keys and values repeated for every query head, and the causal mask."""

    k: Tensor
    v: Tensor
    s_q: int
    offset: int | None  # query i sees keys up to i + offset; None: all keys
    scale: float
    all_finite: bool
    dtype: torch.dtype  # of softmax states

    @staticmethod
    def checked(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, alignment: str, scale: float | None
    ) -> "_AttentionCall":
        _check_tensors(q, k, v)
        _check_shapes(tuple(q.shape), tuple(k.shape), tuple(v.shape))
        _check_mask(causal, alignment)
        group = q.shape[1] // k.shape[1] if k.shape[1] else 1
        k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
        s_q, s_kv = q.shape[2], k.shape[2]
        offset = (s_kv - s_q if alignment == "bottom_right" else 0) if causal else None
        scale = _checked_scale(scale, q.shape[3])
        finite = all(bool(x.isfinite().all()) for x in (q, k, v))
        dtype = _accumulation_dtype(q.dtype)
        return _AttentionCall(k, v, s_q, offset, scale, finite, dtype)

    def keys_seen(self, q_idx: int) -> int:
        """How many keys query q_idx sees; they are the first ones."""
        s_kv = self.k.shape[2]
        return s_kv if self.offset is None else min(max(q_idx + 1 + self.offset, 0), s_kv)

    def over_queries(
        self, rows: Callable[[int, int], tuple[Tensor, Tensor]], tile_q: int
    ) -> tuple[Tensor, Tensor]:
        """Joins (out, lse) of `rows(q_begin, q_end)` for tiles of queries.

        A query by itself sees all keys of its range. So single queries are taken where a hidden
        NaN or Inf could otherwise meet a weight of 0: 0 * NaN is NaN.
        """
        if self.offset is not None and not self.all_finite:
            tile_q = 1
        tiles = [(i, min(i + tile_q, self.s_q)) for i in range(0, max(self.s_q, 1), tile_q)]
        outs, lses = zip(*(rows(*tile) for tile in tiles), strict=True)
        return torch.cat(outs, dim=2), torch.cat(lses, dim=2)

    def hide(self, scores: Tensor, q_begin: int, kv_begin: int) -> Tensor:
        """-inf for the pairs of a tile (..., M, N) that the mask hides."""
        q_end, kv_end = q_begin + scores.shape[-2], kv_begin + scores.shape[-1]
        if self.offset is None or kv_end <= self.keys_seen(q_begin):
            return scores
        q_idx = torch.arange(q_begin, q_end, device=scores.device)[:, None]
        kv_idx = torch.arange(kv_begin, kv_end, device=scores.device)
        return scores.masked_fill(kv_idx > q_idx + self.offset, -math.inf)

    def empty_state(self, rows: int) -> SoftmaxState:
        shape = (*self.k.shape[:2], rows)
        return SoftmaxState.empty(shape, dtype=self.dtype, device=self.k.device)


@dataclass(frozen=True)
class Traffic:
    """Estimated costs of a forward pass (E14)-(E18): operations, and bytes of device memory.

    *_traffic_bytes pass through memory during the pass, *_peak_bytes are alive at its worst moment.
    """

    flops: float
    input_bytes: float
    output_bytes: float
    score_matrix_bytes: float
    naive_traffic_bytes: float
    tiled_traffic_bytes: float
    naive_peak_bytes: float
    tiled_peak_bytes: float


def traffic(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    v_shape: tuple[int, ...],
    *,
    dtype: torch.dtype = torch.float32,
    causal: bool = False,
    alignment: Alignment = "bottom_right",
    tile_q: int = 128,
) -> Traffic:
    """The library's estimate of what attention on tensors of these shapes costs; nothing is run.

    Args, besides `causal` and `alignment` of `naive_attention`, with the same errors:
        q_shape, k_shape, v_shape: (B, H, S_q, D), (B, H_kv, S_kv, D), (B, H_kv, S_kv, D_v).
        dtype: of the tensors.
        tile_q: queries of a tile, each of which reads the keys and values it sees once.
    """
    from . import _C  # here, so that the rest of this file runs without the compiled part

    _check_shapes(tuple(q_shape), tuple(k_shape), tuple(v_shape))
    _check_mask(causal, alignment)
    _check_size("tile_q", tile_q)
    if dtype not in _DTYPES:
        raise TypeError(f"dtype must be {_DTYPE_NAMES}, but is {dtype}.")
    (b, h, s_q, d), (_, h_kv, s_kv, _), (*_, d_v) = q_shape, k_shape, v_shape
    sizes = (b, h, h_kv, s_q, s_kv, d, d_v)
    window = (get_args(Alignment).index(alignment), -1, 0 if causal else -1)
    return Traffic(**_C.estimate(*sizes, str(dtype).removeprefix("torch."), *window, tile_q))


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _row_max(x: Tensor) -> Tensor:
    """Maximum over the last dimension as a constant for autograd, -inf if there is no element."""
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], -math.inf)
    return x.detach().amax(-1)


def _base(m: Tensor) -> Tensor:
    """m, or 0 where nothing was seen: the guard against (-inf) - (-inf)."""
    return m.masked_fill(m == -math.inf, 0.0)


def _check_size(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but is {value!r} ({type(value).__name__}).")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, but is {value}.")


def _check_float_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        kind = type(x).__name__
        raise TypeError(f"{name} must be a torch.Tensor, but is a {kind}: use torch.as_tensor().")
    if x.dtype not in _DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, but is {x.dtype}: convert it with .to().")


def _check_scores(x: Tensor) -> None:
    _check_float_tensor("x", x)
    if x.dim() == 0:
        raise ValueError("x must have shape (..., N), but its shape is (): use .reshape(1).")


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_float_tensor(name, x)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must be {q.dtype} as q, but is {x.dtype}: use .to(q.dtype).")
        if x.device != q.device:
            wanted, actual = q.device, x.device
            raise ValueError(f"{name} must be on {wanted} as q, but is on {actual}: use .to().")


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    for name, shape in (("q", q), ("k", k), ("v", v)):
        if len(shape) != 4:
            raise ValueError(f"{name} must have shape {_SHAPES[name]}, but its shape is {shape}.")
        if not all(0 <= size < 2**31 for size in shape):
            raise ValueError(f"{name} must have sizes below 2^31, but its shape is {shape}.")
    if q[3] == 0:
        raise ValueError(f"q must have shape {_SHAPES['q']} with D > 0, but its shape is {q}.")
    for name, shape, fit in (("k", k, (q[0], *k[1:3], q[3])), ("v", v, (*k[:3], v[3]))):
        if shape != fit:
            wanted = f"{_SHAPES[name]}, here {fit}"
            raise ValueError(f"{name} must have shape {wanted}, but its shape is {shape}.")
    if q[1] != k[1] and (k[1] == 0 or q[1] % k[1] != 0):
        heads = f"q has H = {q[1]} heads and k has H_kv = {k[1]}"
        raise ValueError(f"H must be a multiple of H_kv, but {heads}: repeat or drop k's and v's.")


def _check_mask(causal: bool, alignment: str) -> None:
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be True or False, but is {causal!r}.")
    if alignment not in get_args(Alignment):
        raise ValueError(f"alignment must be 'top_left' or 'bottom_right', but is {alignment!r}.")


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a number or None, but is {scale!r}.")
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite, but is {scale}: pass None for 1 / sqrt(D).")
    return float(scale)
