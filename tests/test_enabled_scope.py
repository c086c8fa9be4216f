# SPDX-License-Identifier: BSD-3-Clause
"""Where `enabled` and `enable` hold: blocks in blocks, threads, other modes, the process."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as early
from torch.overrides import TorchFunctionMode

import routed
from online_attention import FallbackWarning, disable, enable, enabled, routing
from routed import BUILTIN, REFUSAL, WAYS, X, refused


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from routed.restored(monkeypatch)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our function was called with."""
    return routed.watched(monkeypatch)


# --- nesting, exceptions, threads, other modes


def test_innermost_block_decides():
    with enabled(strict=True):
        with enabled(), pytest.warns(FallbackWarning, match=REFUSAL):
            refused()
        with pytest.raises(ValueError, match=REFUSAL):
            refused()
        with enabled(), enabled(strict=True), pytest.raises(ValueError, match=REFUSAL):
            refused()
        with enabled(), enabled(strict=True), enabled():
            refused()  # has been reported
        with pytest.raises(ValueError, match=REFUSAL):
            refused()


def test_one_block_entered_twice(ours: list):
    block = enabled(strict=True)
    with block, block:
        early(X, X, X)
    with block, enabled(), block, pytest.raises(ValueError, match=REFUSAL):
        refused()
    assert len(ours) == 1 + 1


def test_block_ends_with_an_exception(ours: list):
    with pytest.raises(RuntimeError, match="inside"), enabled():
        raise RuntimeError("inside")
    early(X, X, X)
    assert ours == []


def test_block_belongs_to_its_thread(ours: list):
    inside, done = threading.Event(), threading.Event()

    def other() -> None:
        inside.wait(60)
        early(X, X, X)
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with enabled(strict=True):
        inside.set()
        assert done.wait(60)
        assert ours == []
        early(X, X, X)
    thread.join()
    assert len(ours) == 1


class Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[object] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.calls.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("inside", [True, False])
def test_modes_see_the_function_as_they_know_it(ours: list, inside: bool):
    recorder = Recorder()
    with recorder if not inside else enabled(), enabled() if not inside else recorder:
        early(X, X, X)
        assert recorder.calls.count(F.scaled_dot_product_attention) == 1
    assert len(ours) == 1


def test_classes_decide_first(ours: list):
    class Halved(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is F.scaled_dot_product_attention:
                return func(*(x.as_subclass(Tensor) / 2 for x in args))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = X.as_subclass(Halved)
    outside = F.scaled_dot_product_attention(x, x, x)
    with enabled(strict=True):
        inside = F.scaled_dot_product_attention(x, x, x)
    torch.testing.assert_close(inside, outside)
    assert len(ours) == 1


@pytest.mark.parametrize("S_q", [5, 3])
def test_causal_bias_of_torch(ours: list, S_q: int):
    arguments = X[:, :, :S_q], X, X, causal_lower_right(S_q, 5)
    due = F.scaled_dot_product_attention(*arguments)
    with enabled(strict=True):
        torch.testing.assert_close(F.scaled_dot_product_attention(*arguments), due)
        thread = threading.Thread(target=F.scaled_dot_product_attention, args=arguments)
        thread.start()
        thread.join()
    assert len(ours) == 1


def test_symbolic_tracing_records_torchs_function():
    def call(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    with enabled(), pytest.warns(FallbackWarning, match="an argument is a Proxy, a class with an"):
        graph = torch.fx.symbolic_trace(call).graph
    assert BUILTIN in {node.target for node in graph.nodes}


# --- the whole process


def test_process_from_on_to_off(ours: list):
    enable(strict=True)
    for call in (WAYS["attribute"], WAYS["from-import"], WAYS["keywords"]):
        call(X)
    thread = threading.Thread(target=WAYS["from-import"], args=(X,))
    thread.start()
    thread.join()
    assert len(ours) == 4
    kept = F.scaled_dot_product_attention
    assert kept.__name__ == BUILTIN.__name__
    assert kept.__doc__ == BUILTIN.__doc__
    disable()
    disable()
    for call in (WAYS["attribute"], WAYS["from-import"], lambda x: kept(x, x, x)):
        call(X)
    assert len(ours) == 4


def test_process_strictness():
    enable()
    with pytest.warns(FallbackWarning, match=REFUSAL):
        refused()
    enable(strict=True)
    with pytest.raises(ValueError, match=REFUSAL):
        refused()
    with enabled(), warnings.catch_warnings():
        warnings.simplefilter("error")
        refused()  # has been reported
    with pytest.raises(ValueError, match=REFUSAL):
        refused()
    enable()
    with enabled(strict=True), pytest.raises(ValueError, match=REFUSAL):
        refused()
    refused()


def test_somebody_elses_replacement_is_refused(monkeypatch: pytest.MonkeyPatch):
    text = r"must be torch's own to be replaced, but is <function .*>: undo that first"
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", lambda *arguments: None)
        with pytest.raises(RuntimeError, match=text):
            enable()
        with pytest.raises(RuntimeError, match=text), enabled():
            pass
        assert early is BUILTIN
    enable()
    with enabled():
        pass


def test_blocks_and_process_end_in_any_order(ours: list):
    with enabled(strict=True):
        enable()
        early(X, X, X)
    early(X, X, X)
    with enabled():
        disable()
        early(X, X, X)
    early(X, X, X)
    assert len(ours) == 3


def test_nothing_is_left_when_off():
    enable()
    with enabled():
        disable()
    assert F.scaled_dot_product_attention is BUILTIN
    assert F.multi_head_attention_forward is routing._torchs_multi_head
    assert torch.backends.mha.get_fastpath_enabled()
    assert routing._strict_in_block() is None


def test_modules_imported_meanwhile_are_restored():
    """In a process of its own, which may import what it likes."""
    code = """if True:
        import sys, types, torch, torch.nn.functional as F
        import online_attention
        def torchs():
            return torch._C._nn.scaled_dot_product_attention
        online_attention.enable()
        module = sys.modules["late"] = types.ModuleType("late")
        exec("from torch.nn.functional import scaled_dot_product_attention as f", vars(module))
        assert module.f is F.scaled_dot_product_attention is not torchs()
        online_attention.disable()
        assert module.f is F.scaled_dot_product_attention is torchs()
        exec("from torch.nn.functional import scaled_dot_product_attention as g", vars(module))
        online_attention.enable()
        assert module.f is module.g is F.scaled_dot_product_attention is not torchs()
        assert "torch._dynamo" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", code], check=True, timeout=240)
