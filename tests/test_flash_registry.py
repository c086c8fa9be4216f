# SPDX-License-Identifier: BSD-3-Clause
"""torch's registry of flash implementations: ours offered, activated and restored; refusals."""

from __future__ import annotations

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
from cases import Inputs
from flash_cases import aten, heads_first, needs_cuda
from gradients import Cotangents, Gradients, assert_right
from online_attention import attention, flash_registry
from oracle import CAUSAL
from tolerance import assert_bitwise_equal

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
