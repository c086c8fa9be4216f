# SPDX-License-Identifier: BSD-3-Clause
"""The gradient of a bias, and what torch and `explain` know of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cases import Case, normal
from gradients import cotangents_of
from online_attention import attention, blocks, explain, scaled_dot_product_attention
from online_attention.ops import RNG_END
from oracle import CAUSAL, default_scale
from philox import factors_of
from rows import Target
from test_sdpa import torchs
from tolerance import assert_bitwise_equal, assert_close

pytestmark = pytest.mark.usefixtures("one_thread")
FP64 = {"dtypes": (torch.float64,)}
FP32 = {"dtypes": (torch.float32,)}


def formula(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    causal: bool = False,
    factors: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out and lse by plain torch operations; every query sees a key."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT * default_scale(q, None) + bias
    if causal:
        visible = CAUSAL.visible(q.shape[2], k.shape[2]).to(q.device)
        scores = scores.masked_fill(~visible, -math.inf)
    p = torch.softmax(scores, -1)
    return (p if factors is None else p * factors.to(p.dtype)) @ v, scores.logsumexp(-1)


def bias_of(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    """Drawn, a quarter of it hidden, key 0 visible."""
    (bias,) = normal(shape, dtype=torch.float32, device=device, seed=5)
    if bias.dim() and bias.shape[-1] > 1:
        hidden = bias > 0.7
        hidden[..., 0] = False
        bias = bias.masked_fill(hidden, -math.inf)
    return bias.to(dtype)


def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    out, lse = attention(q, k, v, bias=bias, return_lse=True)
    return out.square().sum() + lse.sin().sum()


# --- its own gradient

B, H, S_Q, S_KV = 2, 4, 11, 19
SHAPES = [
    (B, H, S_Q, S_KV),
    (1, H, S_Q, S_KV),
    (B, 1, 1, S_KV),
    (H, 1, S_KV),
    (1, 1, S_Q, S_KV),
    (S_KV,),
    (B, H, S_Q, 1),
    (),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["element", "float32"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradient_of_every_shape(
    target: Target, shape: tuple[int, ...], wide: bool, dropout_p: float
):
    if wide and target.dtype == torch.float32:
        pytest.skip("float32 is the dtype of the inputs")
    inputs = Case("any", S_Q, S_KV, B=B, H=H, H_kv=2).inputs(
        target.dtype, target.device, target.head_dim
    )
    bias = bias_of(shape, torch.float32 if wide else target.dtype, target.device)
    cotangents = cotangents_of(inputs)

    def gradient(attend, dtype: torch.dtype, bias: Tensor) -> Tensor:
        leaf = bias.detach().requires_grad_()
        results = attend(*(x.to(dtype) for x in inputs), leaf)
        dout, dlse = cotangents
        return torch.autograd.grad(results, leaf, (dout.to(results[0]), dlse.to(results[1])))[0]

    torch.manual_seed(3)
    rng = torch.randint(RNG_END, (2,), device=target.device)
    factors = factors_of(rng, dropout_p, B, H, S_Q, S_KV) if dropout_p else None

    def ours(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(3)
        return attention(*tensors[:3], bias=tensors[3], causal=True, return_lse=True,
                         dropout_p=dropout_p)  # fmt: skip

    def theirs(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return formula(*tensors, causal=True, factors=factors)

    found = gradient(ours, target.dtype, bias)
    assert found.dtype == bias.dtype
    due = gradient(theirs, torch.float64, bias.double())
    plain = gradient(theirs, target.dtype, bias.to(target.dtype)).to(bias.dtype)
    terms = gradient(theirs, torch.float64, bias.double().expand(B, H, S_Q, S_KV)).abs()
    # A term has the error of a weight, some roundings of the precision computed in.
    roundings = 16 if bias.element_size() >= 4 else 1
    magnitude = roundings * float(terms.sum_to_size(shape).max())
    assert_close(found, due, plain, magnitude=magnitude, what="dbias")


@pytest.mark.parametrize("shape", [(2, 3, 9, 17), (3, 1, 17), (9, 1), (2, 1, 1, 17)], ids=str)
def test_gradients_of_the_drop_in_are_torchs(target: Target, shape: tuple[int, ...]):
    q, k, v = Case("any", 9, 17, B=2, H=3).inputs(target.dtype, target.device, target.head_dim)
    mask = bias_of(shape, target.dtype, target.device)
    (dout,) = normal(tuple(q.shape), dtype=target.dtype, device=target.device, seed=2)

    def gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v, mask)]
        return torch.autograd.grad(
            function(*leaves[:3], attn_mask=leaves[3]), leaves, dout.to(dtype)
        )

    ours = gradients(scaled_dot_product_attention, target.dtype)
    due, plain = gradients(torchs, torch.float64), gradients(torchs, target.dtype)
    if target.dtype == torch.float64:  # torch's own are not exact
        torch.testing.assert_close(ours, due)
        return
    for name, x, y, z in zip(("dq", "dk", "dv", "dmask"), ours, due, plain, strict=True):
        assert_close(x, y, z, magnitude=4 * float(y.abs().max()), what=name)


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize("lead", [(), (3,), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("enable_gqa", [False, True])
def test_gradients_of_masks_of_other_ranks(target: Target, lead: tuple[int, ...], enable_gqa: bool):
    """Also of a mask that folds in no way, and is used part by part."""
    if enable_gqa and not lead:
        pytest.skip("grouped heads need a dimension of heads")
    shape = (*lead, 5, 7)
    mask_shape = [1 if at == 1 and len(lead) == 3 else n for at, n in enumerate(shape)]
    D = target.head_dim
    q, k, mask = normal((*lead, 5, D), (*lead, 7, D), tuple(mask_shape),
                        dtype=torch.float64, device=target.device)  # fmt: skip
    leaves = [x.requires_grad_() for x in (q, k, mask)]

    def gradients(function) -> tuple[Tensor, ...]:
        out = function(q, k, k, attn_mask=mask, enable_gqa=enable_gqa)
        return torch.autograd.grad(out.square().sum(), leaves)

    torch.testing.assert_close(gradients(scaled_dot_product_attention), gradients(torchs))


@pytest.mark.targets(**FP64)
def test_gradient_of_an_expanded_bias_has_its_own_shape(target: Target):
    inputs = Case("any", 5, 7, B=2, H=4).inputs(target.dtype, target.device, target.head_dim)
    slopes, bias = (
        x.requires_grad_()
        for x in normal((4, 1, 1), (7, 4), dtype=target.dtype, device=target.device)
    )

    def gradients(attend) -> tuple[Tensor, ...]:
        lines = (slopes * torch.arange(7, device=target.device))[None].expand(2, 4, 5, 7)
        out = attend(*inputs, bias=lines + bias.T[:, None])
        return torch.autograd.grad(out.square().sum(), (slopes, bias))

    due = gradients(lambda *x, bias: formula(*x, bias)[0])
    torch.testing.assert_close(gradients(attention), due)
    line = bias.T[0].expand(2, 4, 5, 7)
    (found,) = torch.autograd.grad(attention(*inputs, bias=line).square().sum(), bias)
    (due,) = torch.autograd.grad(formula(*inputs, line)[0].square().sum(), bias)
    torch.testing.assert_close(found, due)


@pytest.mark.targets(dtypes=(torch.bfloat16,))
def test_sums_are_of_float32(target: Target):
    """bfloat16 would stop to grow after a few hundred of these terms."""
    q = torch.zeros(2, 2, 2000, target.head_dim, device=target.device, dtype=target.dtype)
    v = torch.zeros(2, 2, 2, target.head_dim, device=target.device, dtype=target.dtype)
    v[:, :, 1] = 1
    bias = torch.zeros(2, device=target.device, dtype=target.dtype).requires_grad_()
    attention(q, v, v, bias=bias)[..., 0].sum().backward()
    # P = 1/2, delta = 1/2: each of the 8000 rows has dS = (-1/4, 1/4).
    assert bias.grad.tolist() == [-2000, 2000]


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize("shape", [(3, 4, 23, 29), (4, 1, 29), (1, 23, 1)], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_blocks_change_nothing(
    target: Target, shape, dropout_p: float, monkeypatch: pytest.MonkeyPatch
):
    inputs = Case("any", 23, 29, B=3, H=4, H_kv=2).inputs(
        target.dtype, target.device, target.head_dim
    )
    bias = bias_of(shape, target.dtype, target.device).requires_grad_()

    def gradient() -> Tensor:
        torch.manual_seed(1)
        out = attention(*inputs, bias=bias, causal=True, dropout_p=dropout_p)
        return torch.autograd.grad(out.square().sum(), bias)[0]

    due = gradient()
    assert_bitwise_equal(gradient(), due)
    for block_bytes in (1, 4000):
        monkeypatch.setitem(blocks.BLOCK_BYTES, target.device, block_bytes)
        torch.testing.assert_close(gradient(), due)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_hidden_pairs_have_no_gradient(target: Target, poison: float):
    q, k, v = Case("any", 9, 17, H=2).inputs(target.dtype, target.device, target.head_dim)
    bias = bias_of((2, 9, 17), target.dtype, target.device)
    bias[..., 5], bias[1, 3] = -math.inf, -math.inf
    bias.requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(attention(q, k, v, bias=bias).sum(dtype=torch.float32), bias)[0]

    due = gradient()
    assert not due[bias == -math.inf].any()
    assert due[bias != -math.inf].any()
    k[:, :, 5], v[:, :, 5] = poison, poison
    assert_bitwise_equal(gradient(), due)


@pytest.mark.parametrize("sizes", [(0, 5), (4, 0), (9, 4)], ids=str)
def test_empty_rows_and_sizes(target: Target, sizes: tuple[int, int]):
    inputs = Case("empty", *sizes).inputs(target.dtype, target.device, target.head_dim)
    bias = torch.zeros(2, *sizes, device=target.device, dtype=target.dtype, requires_grad=True)
    attention(*inputs, bias=bias, causal=True).square().sum(dtype=torch.float32).backward()
    assert bias.grad.shape == bias.shape
    assert not bias.grad[:, ~CAUSAL.visible(*sizes).to(target.device)].any()


def test_only_what_is_needed_is_computed():
    q = torch.randn(1, 2, 3, 4)
    bias, mask = torch.randn(3, 3), torch.ones(3, 3, dtype=torch.bool)
    assert not attention(q, q, q, bias=bias).requires_grad
    out = attention(q, q, q, bias=bias.requires_grad_())
    assert [x is None for x in torch.autograd.grad(out.sum(), (bias, q.requires_grad_()),
                                                   allow_unused=True)] == [False, True]  # fmt: skip
    assert attention(q, q, q, bias=mask).requires_grad
    with torch.no_grad():
        assert not attention(q, q, q, bias=bias).requires_grad


@pytest.mark.cuda
@pytest.mark.targets(device="cuda", dtypes=(torch.float16, torch.float32))
def test_memory_is_linear_in_the_lengths(target: Target):
    """All scores of this problem would take 4 GiB."""
    inputs = Case("long", 16384, 16384, H=4).inputs(target.dtype, target.device, target.head_dim)
    bias = torch.zeros(16384, device=target.device, requires_grad=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    attention(*inputs, bias=bias, dropout_p=0.1).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 1 << 31


# --- what torch and explain know of it


@pytest.mark.targets(dtypes=(torch.float32, torch.bfloat16))
@pytest.mark.parametrize(
    ("shape", "with_rng"), [((2, 4, 5, 7), False), ((1, 4, 1, 7), True)], ids=str
)
def test_opcheck(target: Target, shape: tuple[int, ...], with_rng: bool):
    inputs = Case("any", 5, 7, B=2, H=4, H_kv=2).inputs(
        target.dtype, target.device, target.head_dim
    )
    dout, dlse = cotangents_of(inputs)
    bias = bias_of(shape, target.dtype, target.device)
    rng = torch.tensor([-3, 5], device=target.device) if with_rng else None
    arguments = (dout, dlse, *inputs, bias, rng, 0.3, 1, -1, 0, 0.2 if with_rng else 0.0)
    torch.library.opcheck(torch.ops.online_attention.bias_gradient.default, arguments)


@pytest.mark.slow
@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["boolean", "float"])
def test_compiled_gradients_are_eager_gradients(target: Target, backend: str, kind: str):
    torch.compiler.reset()
    inputs = Case("any", 5, 7, H=4, H_kv=2).inputs(target.dtype, target.device, target.head_dim)
    bias = bias_of((4, 1, 7), target.dtype, target.device)
    leaves = [x.requires_grad_() for x in inputs]
    if kind == "boolean":
        bias = bias != -math.inf
    else:
        leaves.append(bias.requires_grad_())
    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    ours = torch.autograd.grad(compiled(*inputs, bias), leaves)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(*inputs, bias), leaves))


@pytest.mark.targets(**FP32)
def test_autocast_gives_the_gradient_in_the_dtype_of_the_bias(target: Target):
    inputs = Case("any", 5, 7).inputs(target.dtype, target.device, target.head_dim)
    for dtype in (torch.float32, torch.float16):
        bias = torch.zeros(5, 7, device=target.device, dtype=dtype, requires_grad=True)
        with torch.autocast(target.device, dtype=torch.bfloat16):
            attention(*inputs, bias=bias).float().square().sum().backward()
        assert bias.grad.dtype == dtype
        assert bias.grad.any()


def test_explain_says_what_the_gradient_takes():
    q = torch.ones(1, 2, 3, 4)
    bias = torch.zeros(3, 3)
    assert explain(q, q, q, bias=bias, dropout_p=0.1) == explain(q, q, q)
    assert "that of the bias, a second derivative, and forward mode, run composed" in explain(
        q, q, q, bias=bias.requires_grad_()
    )
    assert explain(q, q, q, bias=bias[:2]).startswith(
        "Nothing runs this call: bias must be broadcastable to"
    )


def test_checks_of_a_bias_take_no_memory():
    huge = torch.ones(1, 1, 5, 8).expand(2**15, 2**15, 5, 8)
    bias = torch.zeros(1).expand(2**15, 2**15, 5, 5)  # 100 GB, were it there
    assert explain(huge, huge, huge, bias=bias).startswith("cpu.tiled runs this problem.")
    assert "broadcastable" in explain(huge, huge, huge, bias=bias[1:])
