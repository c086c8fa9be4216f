# SPDX-License-Identifier: BSD-3-Clause
"""torch's flash operators, computed by ours: results, gradients, dropout, layouts.

The functions are registered for CUDA; here they run on CPU tensors too, where torch has no kernels
of these operators, so that nothing but ours can have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.attention import (
    activate_flash_attention_impl,
    restore_flash_attention_impl,
)

import online_attention
from cases import Inputs
from flash_cases import DEVICES, aten, heads_first, needs_inplace, swapped
from gradients import Cotangents, Gradients, assert_right
from online_attention import attention, flash_registry
from oracle import CAUSAL, FULL, Mask
from philox import factors_of
from tolerance import assert_bitwise_equal


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A device whose flash operators are ours."""
    if request.param == "cuda":
        online_attention.register()
        activate_flash_attention_impl("online_attention")
        yield "cuda"
        restore_flash_attention_impl()
    else:
        library = flash_registry.implement("CPU")
        yield "cpu"
        library._destroy()


on_cuda = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)
on_each_device = pytest.mark.parametrize("device", DEVICES, indirect=True)


# --- results and gradients

SDPA_CASES = {
    "full": ({}, FULL),
    "causal": ({"is_causal": True}, CAUSAL),
    "scale": ({"scale": 0.3}, FULL),
    "more-keys": ({"sizes": {"S_q": 7, "S_kv": 70}}, FULL),
    "more-keys-causal": ({"sizes": {"S_q": 7, "S_kv": 70}, "is_causal": True}, CAUSAL),
    "grouped": ({"sizes": {"H_kv": 2}, "is_causal": True}, CAUSAL),
}


@on_each_device
@pytest.mark.parametrize(("settings", "mask"), SDPA_CASES.values(), ids=SDPA_CASES)
def test_sdpa_operator(device: str, settings: dict, mask: Mask):
    settings = dict(settings)
    *inputs, dout = heads_first(device, **settings.pop("sizes", {}))
    is_causal = settings.pop("is_causal", False)
    leaves = [x.requires_grad_() for x in inputs]
    out, lse, cum_q, cum_k, max_q, max_k, rng, unused, debug = (
        aten._scaled_dot_product_flash_attention(*leaves, 0.0, is_causal, **settings)
    )
    due = attention(*leaves, causal=is_causal, return_lse=True, **settings)
    assert_bitwise_equal(out, due[0])
    assert_bitwise_equal(lse, due[1])
    assert (cum_q, cum_k, max_q, max_k) == (None, None, inputs[0].shape[2], inputs[1].shape[2])
    assert (rng.dtype, rng.shape, rng.device) == (torch.uint64, (2,), out.device)
    assert (unused.dtype, unused.shape) == (torch.uint64, ())
    assert (debug.dtype, debug.shape) == (out.dtype, (0,))
    assert not lse.requires_grad
    gradients = Gradients(*torch.autograd.grad(out, leaves, dout))
    plain_inputs = Inputs(*(x.detach() for x in inputs))
    assert_right(gradients, plain_inputs, Cotangents(dout, None), mask, settings.get("scale"))


WINDOWS = {
    "full": ({}, FULL),
    "none": ({"window_size_left": None, "window_size_right": None}, FULL),
    "unbounded": ({"window_size_left": -1, "window_size_right": -1}, FULL),
    "causal-window": ({"window_size_left": -1, "window_size_right": 0}, CAUSAL),
    "causal": ({"is_causal": True}, CAUSAL),
    "causal-wins": ({"is_causal": True, "window_size_right": 5}, CAUSAL),
    "sliding": ({"is_causal": True, "window_size_left": 4}, Mask(left=4, right=0)),
    "both": ({"window_size_left": 3, "window_size_right": 6}, Mask(left=3, right=6)),
}


@on_each_device
@pytest.mark.parametrize(("settings", "mask"), WINDOWS.values(), ids=WINDOWS)
def test_flash_operator(device: str, settings: dict, mask: Mask):
    windows = dict(settings)
    is_causal = windows.pop("is_causal", False)
    *inputs, dout = heads_first(device, S_q=20, S_kv=33, H_kv=2)
    scale = 0.4
    q, k, v, grad = swapped(*inputs, dout)
    common = (None, None, 20, 33, 0.0, is_causal)
    out, lse, rng, unused, debug = aten._flash_attention_forward(
        q, k, v, *common, False, scale=scale, **windows
    )
    due = torch.ops.online_attention.forward(*inputs, scale, *mask.op_arguments, False)
    assert_bitwise_equal(*swapped(out), due[0])
    assert_bitwise_equal(lse, due[1])  # (B, H, S_q), unlike out
    assert (rng.dtype, unused.dtype, debug.shape) == (torch.uint64, torch.uint64, (0,))
    found = aten._flash_attention_backward(
        grad, q, k, v, out, lse, None, None, *common[2:], rng, unused, scale=scale, **windows
    )
    assert all(x.shape == y.shape for x, y in zip(found, (q, k, v), strict=True))
    gradients = Gradients(*swapped(*found))
    assert_right(gradients, Inputs(*inputs), Cotangents(dout, None), mask, scale)


@needs_inplace
@on_each_device
def test_flash_operator_in_place(device: str):
    q, k, v, _ = swapped(*heads_first(device))
    common = (q, k, v, None, None, 33, 33, 0.0, True, False)
    due, due_lse, *_ = aten._flash_attention_forward(*common)
    out = torch.full_like(q, math.nan).transpose(0, 1).contiguous().transpose(0, 1)
    lse = aten._flash_attention_forward_no_dropout_inplace(out, *common)
    assert_bitwise_equal(out, due)
    assert_bitwise_equal(lse, due_lse)


@on_each_device
def test_gradients_of_a_part_of_the_keys(device: str):
    """What context parallelism asks for: out and lse of all keys, gradients of some."""
    q, k, v, dout = heads_first(device)
    out, lse = attention(q, k, v, return_lse=True)
    some = slice(5, 20)
    common = (None, None, 33, 33, 0.0, False, torch.zeros(2, dtype=torch.uint64, device=q.device))
    arguments = (dout, q, k[:, :, some], v[:, :, some], out, lse[..., None].squeeze(-1))
    none = torch.zeros((), dtype=torch.uint64, device=q.device)
    _, dk, dv = aten._scaled_dot_product_flash_attention_backward(*arguments, *common, none)
    whole = aten._scaled_dot_product_flash_attention_backward(
        dout, q, k, v, out, lse, *common, none
    )
    for part, due in zip((dk, dv), whole[1:], strict=True):
        torch.testing.assert_close(part, due[:, :, some])


def decode(device: str, batch: slice, **keywords: int) -> Tensor:
    """One query and many keys, which devices with idle processors split by how many there are."""
    tensors = heads_first(device, S_q=1, S_kv=4099, H=2, H_kv=2)[:3]
    q, k, v = swapped(*(x[batch] for x in tensors))
    settings = (None, None, 1, 4099, 0.0, False, False)
    return aten._flash_attention_forward(q, k, v, *settings, **keywords)[0]


@on_cuda
@pytest.mark.usefixtures("deterministic_mode")
def test_no_result_depends_on_its_batch_in_deterministic_mode(device: str):
    assert_bitwise_equal(decode(device, slice(1)), decode(device, slice(2))[:1])


@needs_inplace
@on_cuda
def test_no_result_depends_on_its_batch_with_one_split(device: str):
    one, whole = (decode(device, slice(n), num_splits=1) for n in (1, 2))
    assert_bitwise_equal(one, whole[:1])


# --- dropout


@on_each_device
@pytest.mark.parametrize("operator", ["sdpa", "flash"])
def test_dropout_draws_a_state_that_it_returns(device: str, operator: str):
    q, k, v, _ = heads_first(device)

    def run() -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        if operator == "sdpa":
            out, lse, *_, rng, _, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.3, True)
            return out, lse, rng
        out, lse, rng, *_ = aten._flash_attention_forward(
            *swapped(q, k, v), None, None, 33, 33, 0.3, True, False
        )
        return *swapped(out), lse, rng

    out, lse, rng = run()
    assert (rng.dtype, rng.shape) == (torch.uint64, (2,))
    state = rng.view(torch.int64)
    due = torch.ops.online_attention.forward(
        q, k, v, None, *CAUSAL.op_arguments, False, None, state, 0.3
    )
    assert_bitwise_equal(out, due[0])
    assert_bitwise_equal(lse, due[1])  # of what was not dropped yet
    assert_bitwise_equal(lse, attention(q, k, v, causal=True, return_lse=True)[1])
    again = run()
    assert_bitwise_equal(again[0], out)
    assert torch.equal(again[2], rng)
    assert not torch.equal(aten._scaled_dot_product_flash_attention(q, k, v, 0.3)[6], rng)


@on_each_device
@pytest.mark.parametrize("operator", ["sdpa", "flash"])
def test_gradients_under_dropout(device: str, operator: str):
    *inputs, dout = heads_first(device)
    q, k, v = (x.requires_grad_() for x in inputs)
    if operator == "sdpa":
        out, *_, rng, _, _ = aten._scaled_dot_product_flash_attention(q, k, v, 0.3, True)
    else:
        out, _, rng, *_ = aten._flash_attention_forward(
            *(x.transpose(1, 2) for x in (q, k, v)), None, None, 33, 33, 0.3, True, False
        )
        out = out.transpose(1, 2)
    gradients = Gradients(*torch.autograd.grad(out, (q, k, v), dout))
    factors = factors_of(rng.view(torch.int64), 0.3, 2, 4, 33, 33)
    plain_inputs = Inputs(*(x.detach() for x in inputs))
    assert_right(gradients, plain_inputs, Cotangents(dout, None), CAUSAL, factors=factors)


# --- layouts

LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "gaps": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "columns": lambda x: x.mT.contiguous().mT,
    "broadcast": lambda x: x[:1].expand(x.shape),
    "one-batch": lambda x: x[:1].transpose(1, 2).contiguous().transpose(1, 2),
}


@on_each_device
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_have_the_strides_that_torchs_compiler_expects(device: str, layout: str):
    inputs = [LAYOUTS[layout](x) for x in heads_first(device)]
    for operator in ("sdpa", "flash"):
        metas = [x.to("meta").as_strided(x.shape, x.stride()) for x in inputs]
        real, meta = (forward_and_backward(operator, xs) for xs in (inputs, metas))
        for mine, due in zip(real, meta, strict=True):
            assert (mine.shape, mine.dtype) == (due.shape, due.dtype)
            pairs = zip(mine.shape, mine.stride(), due.stride(), strict=True)
            assert all(a == b for size, a, b in pairs if size != 1)


def forward_and_backward(operator: str, tensors: list[Tensor]) -> list[Tensor]:
    q, k, v, dout = tensors
    if operator == "sdpa":
        out, lse, *_, rng, unused, _ = aten._scaled_dot_product_flash_attention(q, k, v)
        back = aten._scaled_dot_product_flash_attention_backward
    else:
        out, lse, rng, unused, _ = aten._flash_attention_forward(
            q, k, v, None, None, 33, 33, 0.0, False, False
        )
        back = aten._flash_attention_backward
    gradients = back(
        dout, q, k, v, out, lse, None, None, 33, 33, 0.0, False,
        *(x if x.device == q.device else torch.zeros_like(x, device=q.device)
          for x in (rng, unused)),
    )  # fmt: skip
    return [out, lse, *gradients]


@on_each_device
def test_compiled(device: str):
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return aten._scaled_dot_product_flash_attention(q * 1, k, v, 0.0, True)[0] * 2

    *inputs, dout = heads_first(device)
    leaves = [LAYOUTS["transposed"](x).requires_grad_() for x in inputs]
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, dout)])
    for mine, due in zip(*results, strict=True):
        assert_bitwise_equal(mine, due)
