# SPDX-License-Identifier: BSD-3-Clause
"""`enabled` and `enable` under torch.compile: traced through, and compiled anew for each state."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as early

import routed
from online_attention import FallbackWarning, disable, enable, enabled
from routed import REFUSAL, X, attention_module
from tolerance import assert_bitwise_equal


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from routed.restored(monkeypatch)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our function was called with."""
    return routed.watched(monkeypatch)


@pytest.fixture(autouse=True)
def _compiled_anew() -> Iterator[None]:
    """Whatever other tests have compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


OUR_OPERATOR = torch.ops.online_attention.forward.default


def step(x: Tensor) -> Tensor:
    return early(x * 2, x, x.clone(), is_causal=True) + 1


def refused_step(x: Tensor) -> Tensor:
    return early(x, x, x, dropout_p=1.0) * 1


class Graphs(list):
    """A backend for torch.compile that keeps whether each graph calls our operator."""

    def __call__(self, graph: torch.fx.GraphModule, _: object) -> Callable:
        self.append(OUR_OPERATOR in {node.target for node in graph.graph.nodes})
        return graph.forward


def test_compiled_function_follows_the_block():
    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    due = step(X)
    assert_bitwise_equal(compiled(X), due)
    for _ in range(2):
        with enabled(strict=True):
            assert_bitwise_equal(compiled(X), step(X))
        assert_bitwise_equal(compiled(X), due)
    assert graphs == [False, True]


def test_compiled_function_follows_the_process():
    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    for _ in range(2):
        due = compiled(X)
        enable(strict=True)
        assert_bitwise_equal(compiled(X), step(X))
        disable()
        assert_bitwise_equal(compiled(X), due)
    assert graphs == [False, True]


def test_compiled_function_follows_the_thread():
    graphs = Graphs()
    compiled = torch.compile(step, fullgraph=True, backend=graphs)
    with enabled(strict=True):
        compiled(X)
        thread = threading.Thread(target=compiled, args=(X,))
        thread.start()
        thread.join()
        compiled(X)
    assert graphs == [True, False]


def test_block_in_a_compiled_function_runs_eagerly(ours: list):
    def block(x: Tensor) -> Tensor:
        with enabled(strict=True):
            return step(x)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(block, backend="eager", fullgraph=True)(X)
    torch._dynamo.reset()
    assert_bitwise_equal(torch.compile(block, backend="eager")(X), block(X))
    assert len(ours) == 2


def test_compiled_gradients():
    x = X.clone().requires_grad_()
    with enabled(strict=True):
        results = [torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x)]
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    assert_bitwise_equal(*results)
    assert_bitwise_equal(*gradients)


def test_compiled_modules_are_traced_through():
    module, x = attention_module(), torch.randn(2, 5, 8)
    graphs = Graphs()

    def call(x: Tensor) -> Tensor:
        return module(x, x, x, need_weights=False)[0]

    with torch.no_grad():
        compiled = torch.compile(call, fullgraph=True, backend=graphs)
        due = compiled(x)
        with enabled(strict=True):
            torch.testing.assert_close(compiled(x), due)
        enable(strict=True)
        torch.testing.assert_close(compiled(x), due)
        disable()
        assert_bitwise_equal(compiled(x), due)
    assert graphs == [False, True, True]


def test_compiled_refusals():
    graphs = Graphs()
    compiled = torch.compile(refused_step, fullgraph=True, backend=graphs)
    due = refused_step(X)
    with enabled(), pytest.warns(FallbackWarning, match=REFUSAL):
        assert_bitwise_equal(compiled(X), due)
    with enabled(strict=True):
        with enabled():
            assert_bitwise_equal(compiled(X), due)
        with pytest.raises(Exception, match=REFUSAL):
            compiled(X)
    assert graphs == [False]


def test_compiled_refusals_of_the_operator():
    def call(x: Tensor, scale: float) -> Tensor:
        return early(x, x, x, scale=scale) * 1

    compiled = torch.compile(call, fullgraph=True, backend=Graphs())
    meta = X.to("meta")
    with enabled():
        with pytest.warns(FallbackWarning, match="query must be on a device of type"):
            assert compiled(meta, 0.5).shape == X.shape
        with pytest.warns(FallbackWarning, match="scale must be finite, but is inf"):
            compiled(X, math.inf)
