# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.functional.scaled_dot_product_attention made ours: who calls it, where, and what not."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as early
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import online_attention
from online_attention import FallbackWarning, disable, enable, enabled, routing
from rows import Target
from tolerance import assert_bitwise_equal

X = torch.randn(2, 3, 5, 8)
OURS = online_attention.scaled_dot_product_attention
BUILTIN = torch._C._nn.scaled_dot_product_attention


@pytest.fixture
def _compiles() -> Iterator[None]:
    """Functions of this file are compiled anew, whatever other tests have compiled."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is on before or after, and every sentence is reported again."""
    monkeypatch.setattr(routing, "_reported", set())
    yield
    disable()
    assert F.scaled_dot_product_attention is BUILTIN
    assert early is BUILTIN


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our function was called with."""
    seen: list[tuple[int, ...]] = []

    def counted(query: Tensor, *arguments: object, **keywords: object) -> Tensor:
        seen.append(tuple(query.shape))
        return OURS(query, *arguments, **keywords)

    monkeypatch.setattr(routing.sdpa, "scaled_dot_product_attention", counted)
    return seen


def refused(x: Tensor = X) -> Tensor:
    """A call that torch computes and ours refuses."""
    return F.scaled_dot_product_attention(x, x, x, dropout_p=1.0)


REFUSAL = r"dropout_p must be at least 0 and below 1, but is 1\.0"


# --- what a block catches

WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "attribute": lambda x: F.scaled_dot_product_attention(x, x, x),
    "from-import": lambda x: early(x, x, x),
    "late-import": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "keywords": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x, dropout_p=0.0),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strict", [False, True])
def test_block_catches(ours: list, way: str, strict: bool):
    call = WAYS[way]
    call(X)
    assert ours == []
    with enabled(strict=strict):
        assert_bitwise_equal(call(X), OURS(X, X, X))
    assert ours == [(2, 3, 5, 8)]
    call(X)
    assert len(ours) == 1


def test_copies_stay_torchs(ours: list):
    partial = functools.partial(early, X, X)
    with enabled(strict=True):
        partial(X)
    assert ours == []


def test_results_are_ours_on_every_row(target: Target):
    q, k, v = (torch.randn(2, 3, 33, target.head_dim).to(target.dtype).to(target.device)
               for _ in range(3))  # fmt: skip
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with enabled(strict=True):
        out = F.scaled_dot_product_attention(*leaves, is_causal=True, scale=0.3)
    due = OURS(*leaves, is_causal=True, scale=0.3)
    assert_bitwise_equal(out, due)
    gradients = [torch.autograd.grad(y.sum(), leaves) for y in (out, due)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs)


def attention_module() -> torch.nn.MultiheadAttention:
    return torch.nn.MultiheadAttention(8, 2, batch_first=True)


def test_multihead_attention(ours: list):
    module, x = attention_module(), torch.randn(2, 5, 8)
    due = module(x, x, x, need_weights=False)[0]
    with enabled(strict=True):
        out = module(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(out, due)
    assert len(ours) == 1


@torch.no_grad()
@pytest.mark.parametrize("before", [True, False])
def test_modules_leave_their_fused_inference_path(ours: list, before: bool):
    module, x = attention_module().eval(), torch.randn(2, 5, 8)
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    due = module(x, x, x, need_weights=False)[0], layer(x)
    torch.backends.mha.set_fastpath_enabled(before)
    try:
        with enabled(strict=True):
            out = module(x, x, x, need_weights=False)[0], layer(x)
        assert len(ours) == 2
        enable(strict=True)
        with enabled():
            layer(x)
        layer(x)
        disable()
        assert len(ours) == 4
        assert torch.backends.mha.get_fastpath_enabled() is before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(out, due)


def test_plain_subclass_is_taken_and_kept(ours: list):
    class Named(torch.Tensor):
        pass

    x = X.as_subclass(Named)
    with enabled(strict=True):
        out = F.scaled_dot_product_attention(x, x, x)
    assert type(out) is Named
    assert len(ours) == 1


def test_transforms(ours: list):
    def loss(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x).square().sum()

    due = torch.vmap(torch.func.grad(loss))(X)
    with enabled(strict=True):
        out = torch.vmap(torch.func.grad(loss))(X)
    torch.testing.assert_close(out, due)
    assert len(ours) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_computes_ours_again(ours: list, reentrant: bool):
    x = X.clone().requires_grad_()
    with enabled(strict=True):
        out = checkpoint(early, x, x, x, use_reentrant=reentrant)
        out.sum().backward()
    assert len(ours) == 2


class Deeper(torch.autograd.Function):
    """A backward pass inside a backward pass inside ...: torch takes another thread after 60."""

    @staticmethod
    def forward(ctx, x: Tensor, depth: int, at_bottom: Callable) -> Tensor:
        ctx.rest = depth - 1, at_bottom
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        depth, at_bottom = ctx.rest
        with torch.enable_grad():
            if depth > 0:
                x = torch.ones((), requires_grad=True)
                Deeper.apply(x, depth, at_bottom).backward()
            else:
                at_bottom()
        return gradient, None, None


def test_threads_of_autograd_are_in_the_block(ours: list):
    threads = []

    def at_bottom() -> None:
        threads.append(threading.get_ident())
        early(X, X, X)

    x = torch.ones((), requires_grad=True)
    with enabled(strict=True):
        Deeper.apply(x, 80, at_bottom).backward()
    assert len(ours) == 1
    Deeper.apply(x, 80, at_bottom).backward()
    assert len(ours) == 1
    assert len(threads) == 2
    assert threading.get_ident() not in threads


@pytest.mark.cuda
@pytest.mark.targets(device="cuda", dtypes=(torch.float16,))
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_on_cuda(target: Target, ours: list, reentrant: bool):
    x = torch.randn(2, 3, 33, target.head_dim, device="cuda").half().requires_grad_()
    with enabled(strict=True):
        checkpoint(early, x, x, x, use_reentrant=reentrant).sum().backward()
    assert len(ours) == 2


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


# --- what is refused


def test_lenient_block_reports_each_sentence_once():
    due = refused()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with enabled():
            assert_bitwise_equal(refused(), due)
            refused()
            F.scaled_dot_product_attention(nested(), nested(), nested())
    caught = [w for w in caught if w.category is FallbackWarning]
    texts = [str(w.message) for w in caught]
    assert len(texts) == 2
    start = "online_attention left a call to torch's own attention: "
    assert texts[0].startswith(start + "dropout_p must be at least 0 and below 1, but is 1.0")
    assert texts[1].startswith(start + "an argument is a NestedTensor")
    assert caught[0].filename == __file__


def test_warning_made_an_error_is_raised_each_time():
    with warnings.catch_warnings(), enabled():
        warnings.simplefilter("error")
        for _ in range(2):
            with pytest.raises(FallbackWarning, match=REFUSAL):
                refused()


def nested(layout: torch.layout = torch.jagged) -> Tensor:
    parts = [torch.ones(3, 4, 8), torch.ones(5, 4, 8)]
    return torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_strict_block_raises_the_sentence():
    x, y, z = nested(), nested(torch.strided), X.to("meta")
    with enabled(strict=True):
        with pytest.raises(ValueError, match=REFUSAL):
            refused()
        with pytest.raises(TypeError, match="a NestedTensor, a class with an attention of its own"):
            F.scaled_dot_product_attention(x, x, x)
        with pytest.raises(TypeError, match="query must be a dense tensor, but it is nested"):
            F.scaled_dot_product_attention(y, y, y)
        with pytest.raises(NotImplementedError, match="query must be on a device of type"):
            F.scaled_dot_product_attention(z, z, z)


def test_nested_tensors_go_to_torch():
    x = nested()
    due = F.scaled_dot_product_attention(x, x, x)
    with enabled(), pytest.warns(FallbackWarning, match="an argument is a NestedTensor"):
        out = F.scaled_dot_product_attention(x, x, x)
    assert_bitwise_equal(out.values(), due.values())


@pytest.mark.parametrize("strict", [False, True])
def test_bad_shapes_raise(strict: bool):
    error = ValueError if strict else RuntimeError  # ours, torch's
    with warnings.catch_warnings(), enabled(strict=strict):
        warnings.simplefilter("error")
        with pytest.raises(error, match="must have D = 8" if strict else "size"):
            F.scaled_dot_product_attention(X, X[..., :7], X)
        with pytest.raises(TypeError, match=r"missing|required"):
            F.scaled_dot_product_attention(X, X)


@pytest.mark.parametrize("function", [enabled, enable])
def test_strict_must_be_a_boolean(function: Callable):
    with pytest.raises(TypeError, match="strict must be True or False, but is 1"):
        function(strict=1)


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


# --- torch.compile

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


@pytest.mark.usefixtures("_compiles")
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


@pytest.mark.usefixtures("_compiles")
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


@pytest.mark.usefixtures("_compiles")
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


@pytest.mark.usefixtures("_compiles")
def test_block_in_a_compiled_function_runs_eagerly(ours: list):
    def block(x: Tensor) -> Tensor:
        with enabled(strict=True):
            return step(x)

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(block, backend="eager", fullgraph=True)(X)
    torch._dynamo.reset()
    assert_bitwise_equal(torch.compile(block, backend="eager")(X), block(X))
    assert len(ours) == 2


@pytest.mark.usefixtures("_compiles")
def test_compiled_gradients():
    x = X.clone().requires_grad_()
    with enabled(strict=True):
        results = [torch.compile(step, fullgraph=True, backend="aot_eager")(x), step(x)]
    gradients = [torch.autograd.grad(result.square().sum(), x)[0] for result in results]
    assert_bitwise_equal(*results)
    assert_bitwise_equal(*gradients)


@pytest.mark.usefixtures("_compiles")
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


@pytest.mark.usefixtures("_compiles")
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


@pytest.mark.usefixtures("_compiles")
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
