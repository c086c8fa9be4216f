# SPDX-License-Identifier: BSD-3-Clause
"""torch's scaled_dot_product_attention made ours in a block: what is caught, what is refused."""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as early
from torch.utils.checkpoint import checkpoint

import routed
from online_attention import FallbackWarning, disable, enable, enabled
from routed import OURS, REFUSAL, WAYS, X, attention_module, refused
from rows import Target
from tolerance import assert_bitwise_equal


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from routed.restored(monkeypatch)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our function was called with."""
    return routed.watched(monkeypatch)


# --- what a block catches


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
    assert caught[0].filename == routed.__file__


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
