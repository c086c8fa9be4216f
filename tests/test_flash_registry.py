# SPDX-License-Identifier: BSD-3-Clause
"""torch's flash operators, ours: the registry, results and gradients, layouts, refusals.

The functions are registered for CUDA; the tests of what they compute run on CPU tensors too, where
torch has no kernels of these operators, so that nothing but ours can have run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    list_flash_attention_impls,
    restore_flash_attention_impl,
    sdpa_kernel,
)

import online_attention
from cases import Inputs, normal
from gradients import Cotangents, Gradients, assert_right
from online_attention import _C, attention, flash_registry
from oracle import CAUSAL, FULL, Mask
from philox import factors_of
from tolerance import assert_bitwise_equal

aten = torch.ops.aten
HAS_INPLACE = hasattr(aten, "_flash_attention_forward_no_dropout_inplace")
needs_inplace = pytest.mark.skipif(not HAS_INPLACE, reason="this torch has no such operator")
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.built_with_cuda()),
        reason="needs a CUDA device and CUDA kernels",
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


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


def heads_first(
    device: str, S_q: int = 33, S_kv: int = 33, H: int = 4, H_kv: int = 4, D: int = 16
) -> list[Tensor]:
    """query, key, value and a gradient of the output, (B, H, S, D)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = (2, H, S_q, D), (2, H_kv, S_kv, D), (2, H_kv, S_kv, D), (2, H, S_q, D)
    return normal(*shapes, dtype=dtype, device=device)


def swapped(*tensors: Tensor) -> list[Tensor]:
    """(B, S, H, D) from (B, H, S, D) and back, each in memory of its own order."""
    return [x.transpose(1, 2).contiguous() for x in tensors]


# --- the registry


@pytest.fixture
def _restored() -> Iterator[None]:
    yield
    restore_flash_attention_impl(_raise_warn=False)


def kernels_for_cuda() -> dict[str, bool]:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        name: has(f"aten::{name}", "CUDA")
        for name in flash_registry._IMPLEMENTATIONS
        if hasattr(aten, name)
    }


@pytest.mark.usefixtures("_restored")
def test_register_offers_and_activates_nothing():
    active, kernels = current_flash_attention_impl(), kernels_for_cuda()
    online_attention.register()
    online_attention.register()
    assert list_flash_attention_impls().count("online_attention") == 1
    assert current_flash_attention_impl() == active
    assert kernels_for_cuda() == kernels


@pytest.mark.usefixtures("_restored")
def test_activate_and_restore():
    kernels = kernels_for_cuda()
    online_attention.register()
    for _ in range(2):
        activate_flash_attention_impl("online_attention")
        assert current_flash_attention_impl() == "online_attention"
        assert all(kernels_for_cuda().values())
        restore_flash_attention_impl()
        assert current_flash_attention_impl() is None
        assert kernels_for_cuda() == kernels


@pytest.mark.usefixtures("_restored")
def test_register_while_active_changes_nothing():
    online_attention.register()
    activate_flash_attention_impl("online_attention")
    online_attention.register()
    assert current_flash_attention_impl() == "online_attention"
    restore_flash_attention_impl()
    assert current_flash_attention_impl() is None


def test_register_without_a_registry(monkeypatch: pytest.MonkeyPatch):
    offered = list_flash_attention_impls()
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    with pytest.raises(RuntimeError, match=r"register\(\) needs .* upgrade torch, or use online_"):
        online_attention.register()
    assert list_flash_attention_impls() == offered


def test_restoring_is_not_left_to_the_garbage_collector():
    activation = flash_registry._Activation(flash_registry.implement("CPU"))
    x = heads_first("cpu")[0]
    assert aten._scaled_dot_product_flash_attention(x, x, x)[0].shape == x.shape
    activation.remove()
    with pytest.raises(NotImplementedError, match="_scaled_dot_product_flash_attention"):
        aten._scaled_dot_product_flash_attention(x, x, x)
    assert activation.library is not None  # still alive, and yet gone


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


# --- refusals

X = torch.ones(2, 3, 5, 8)
LENGTHS = torch.tensor([0, 5], dtype=torch.int32)
STATE = torch.zeros(2, dtype=torch.uint64)
DENSE = (None, None, 5, 5, 0.0, False)


@pytest.mark.parametrize(
    ("keywords", "name"),
    [
        ({"seqused_k": LENGTHS}, "seqused_k"),
        ({"alibi_slopes": X}, "alibi_slopes"),
        ({"block_table": LENGTHS}, "block_table"),
        ({"num_splits": 2}, "num_splits above 1"),
        ({"return_debug_mask": True}, "return_debug_mask"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_forward(keywords: dict, name: str):
    text = rf"does not take {name}: leave it out, or call .*restore_flash_attention_impl\(\) first"
    debug = keywords.pop("return_debug_mask", False)
    with pytest.raises(NotImplementedError, match=text):
        flash_registry.flash_forward(X, X, X, *DENSE, debug, **keywords)


REFUSED = {
    "cum_seq_q": ((X, X, X, LENGTHS, None), NotImplementedError, "does not take cum_seq_q: leave"),
    "cum_seq_k": ((X, X, X, None, LENGTHS), NotImplementedError, "does not take cum_seq_k: leave"),
    "dtype": ((X.double(),) * 3, TypeError, "query must be float16, .* but is float64: convert"),
    "head-dim": ((X, X, X[..., :7]), ValueError, "value must have D = 8 as key in torch's flash"),
}


@pytest.mark.parametrize(("inputs", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refused_forward_and_backward(inputs: tuple, error: type[Exception], text: str):
    q, k, v, *lengths = inputs
    settings = (*lengths, *DENSE[len(lengths) :])
    with pytest.raises(error, match=text):
        flash_registry.flash_forward(q, k, v, *settings, False)
    with pytest.raises(error, match=text):
        flash_registry.flash_backward(q, q, k, v, q, q[..., 0], *settings, STATE, STATE)
    with pytest.raises(error, match=text):
        flash_registry.sdpa_backward(q, q, k, v, q, q[..., 0], *settings, STATE, STATE)
    if not lengths:
        with pytest.raises(error, match=text):
            flash_registry.sdpa_forward(q, k, v)


def test_shapes_that_do_not_fit_are_named_as_torch_names_them():
    with pytest.raises(ValueError, match="key must have B = 2 as query, but key"):
        flash_registry.sdpa_forward(X, X[:1], X[:1])


def test_in_place_refuses_dropout():
    arguments = (X, X, X, X, None, None, 5, 5, 0.1, False, False)
    with pytest.raises(NotImplementedError, match=r"dropout_p must be 0 in _flash_.* but is 0\.1"):
        flash_registry.flash_forward_inplace(*arguments)


def test_variable_lengths_are_refused_through_torchs_function():
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    library = flash_registry.implement("CPU")
    x = torch.ones(5, 2, 8)
    try:
        with pytest.raises(NotImplementedError, match="does not take cum_seq_q"):
            varlen.varlen_attn(x, x, x, LENGTHS, LENGTHS, 5, 5)
    finally:
        library._destroy()


# --- torch's function on CUDA


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which of our functions torch's dispatcher has called, from an activation on."""
    seen: list[str] = []

    def counted(name, function):
        def call(*arguments, **keywords):
            seen.append(name)
            return function(*arguments, **keywords)

        return call

    for name, function in list(flash_registry._IMPLEMENTATIONS.items()):
        monkeypatch.setitem(flash_registry._IMPLEMENTATIONS, name, counted(name, function))
    return seen


def flash_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("_", [pytest.param(None, marks=needs_cuda, id="cuda")])
@pytest.mark.usefixtures("_restored")
def test_torchs_function_runs_ours_while_active(_: None, calls: list[str], compiled: bool):
    *inputs, dout = heads_first("cuda", S_q=130, S_kv=130, D=64)
    leaves = [x.requires_grad_() for x in inputs]
    function = torch.compile(flash_sdpa, fullgraph=True) if compiled else flash_sdpa
    online_attention.register()
    activate_flash_attention_impl("online_attention")
    out = function(*leaves)
    gradients = Gradients(*torch.autograd.grad(out, leaves, dout))
    names = [
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    ]
    assert calls == names
    assert_bitwise_equal(out, attention(*inputs, causal=True))
    plain_inputs = Inputs(*(x.detach() for x in inputs))
    assert_right(gradients, plain_inputs, Cotangents(dout, None), CAUSAL)
    restore_flash_attention_impl()
    theirs = function(*leaves)
    torch.autograd.grad(theirs, leaves, dout)
    assert calls == names  # and no further ones
    torch.testing.assert_close(theirs, out, atol=2e-2, rtol=2e-2)
