# SPDX-License-Identifier: BSD-3-Clause
"""`nn.MultiheadAttention` takes torch's parameters and arguments, and gives torch's results."""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle

import pytest
import torch
from torch import Tensor

import online_attention
from online_attention.nn import MultiheadAttention
from rows import Target
from tolerance import assert_bitwise_equal, assert_close

Theirs = torch.nn.MultiheadAttention


def pair(*arguments, seed: int = 0, **keywords) -> tuple[MultiheadAttention, Theirs]:
    """Ours and torch's with the same parameters, none of them 0, in fp64 unless told."""
    keywords.setdefault("dtype", torch.float64)
    theirs = Theirs(*arguments, **keywords)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in theirs.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn * 0.4)
    ours = MultiheadAttention(*arguments, **keywords)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def gradients_of(module: Theirs, inputs: list[Tensor], **keywords) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of inputs and parameters."""
    leaves = list({id(x): x for x in inputs}.values())
    for x in leaves:
        x.requires_grad_()
    out, weights = module(*inputs, need_weights=False, **keywords)
    assert weights is None
    dout = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = [*leaves, *module.parameters()]
    found = torch.autograd.grad((out * dout.to(out)).sum(), wanted)
    return out.detach(), list(found)


def assert_same(ours: Theirs, theirs: Theirs, inputs: list[Tensor], **keywords) -> Tensor:
    hint = keywords.pop("is_causal", False)
    mine = gradients_of(ours, inputs, **keywords, is_causal=hint)
    due = gradients_of(theirs, inputs, **keywords)
    torch.testing.assert_close(mine[0], due[0])
    for a, b in zip(mine[1], due[1], strict=True):
        torch.testing.assert_close(a, b)
    return mine[0]


# --- one interface


def test_signatures_are_torchs_but_for_one_default():
    def bare(function) -> str:
        return str([(p.name, p.default) for p in inspect.signature(function).parameters.values()])

    assert bare(MultiheadAttention.__init__) == bare(Theirs.__init__)
    ours, theirs = bare(MultiheadAttention.forward), bare(Theirs.forward)
    assert ours.replace("('need_weights', False)", "('need_weights', True)") == theirs
    assert ours != theirs


@pytest.mark.parametrize("options", [{}, {"kdim": 5}, {"add_bias_kv": True}, {"bias": False}])
def test_drawn_parameters_are_torchs(options):
    torch.manual_seed(3)
    theirs = Theirs(12, 3, **options).state_dict()
    torch.manual_seed(3)
    ours = MultiheadAttention(12, 3, **options).state_dict()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        assert_bitwise_equal(ours[name], value, name)


@pytest.mark.parametrize("options", [{}, {"kdim": 5, "vdim": 7, "add_bias_kv": True}])
def test_state_dicts_load_both_ways(options):
    ours, theirs = MultiheadAttention(12, 3, **options), Theirs(12, 3, **options)
    theirs.load_state_dict(ours.state_dict())
    back = MultiheadAttention(12, 3, **options)
    back.load_state_dict(theirs.state_dict())
    for name, value in ours.state_dict().items():
        assert_bitwise_equal(back.state_dict()[name], value, name)


def test_device_and_dtype_of_the_parameters():
    module = MultiheadAttention(12, 3, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}


def test_pickled_and_copied_modules_are_the_same():
    module = MultiheadAttention(12, 3, dropout=0.25, add_zero_attn=True, batch_first=True).eval()
    x = torch.randn(2, 5, 12)
    due = module(x, x, x)[0]
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    for other in (
        pickle.loads(pickle.dumps(module)),
        copy.deepcopy(module),
        torch.load(saved, weights_only=False),
    ):
        assert type(other) is MultiheadAttention
        assert (other.dropout, other.batch_first, other.training) == (0.25, True, False)
        assert_bitwise_equal(other(x, x, x)[0], due)
        assert other.in_proj_weight.data_ptr() != module.in_proj_weight.data_ptr()


def test_it_is_what_the_package_shows():
    assert online_attention.nn.MultiheadAttention is MultiheadAttention


# --- the same results


@pytest.mark.targets(device="cpu", dtypes=(torch.float16, torch.bfloat16, torch.float32))
@pytest.mark.parametrize("batch_first", [False, True])
def test_every_dtype(target: Target, batch_first: bool):
    exact = pair(24, 3, batch_first=batch_first)[1]
    ours, theirs = pair(24, 3, batch_first=batch_first, dtype=target.dtype)
    x = torch.randn(33, 35, 24).to(target.dtype)
    hidden = torch.rand(35 if not batch_first else 33, x.shape[1 if batch_first else 0]) < 0.3
    mine, plain = (m(x, x, x, hidden, need_weights=False)[0] for m in (ours, theirs))
    exact.load_state_dict(theirs.state_dict())
    due = exact(*[x.double()] * 3, hidden, need_weights=False)[0]
    assert_close(mine, due, plain)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_causal_needs_no_mask(training: bool, padding: bool):
    ours, theirs = (module.train(training) for module in pair(12, 3, batch_first=True))
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    hidden = torch.tensor([[False, True, False, False, True], [False] * 5]) if padding else None
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    due = theirs(x, x, x, hidden, False, causal)[0]
    torch.testing.assert_close(ours(x, x, x, hidden, is_causal=True)[0], due)
    torch.testing.assert_close(ours(x, x, x, hidden, False, causal, True, True)[0], due)


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_causal_does_not_hide_the_added_key(option: str):
    """As torch's masks and need_weights=True have it; its is_causal alone hides that key."""
    ours, theirs = pair(12, 3, **{option: True})
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    due = theirs(x, x, x, attn_mask=causal, is_causal=True, need_weights=True)[0]
    torch.testing.assert_close(ours(x, x, x, attn_mask=causal, is_causal=True)[0], due)
    torch.testing.assert_close(ours(x, x, x, is_causal=True)[0], due)


def test_causal_is_aligned_at_the_top_left():
    ours, theirs = pair(12, 3)
    query, key = torch.randn(4, 2, 12).double(), torch.randn(6, 2, 12).double()
    causal = torch.ones(4, 6, dtype=torch.bool).triu(1)
    due = theirs(query, key, key, attn_mask=causal, is_causal=True, need_weights=False)[0]
    torch.testing.assert_close(ours(query, key, key, is_causal=True)[0], due)


def test_gradient_of_a_floating_mask():
    ours, theirs = pair(12, 3)
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    for shape in ((5, 5), (6, 5, 5)):
        mask = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        mine, due = (
            torch.autograd.grad(m(x, x, x, need_weights=False, attn_mask=mask)[0].sum(), mask)[0]
            for m in (ours, theirs)
        )
        torch.testing.assert_close(mine, due)


def test_a_float32_mask_of_half_projections():
    module = MultiheadAttention(8, 2, dtype=torch.bfloat16)
    x = torch.randn(5, 2, 8).bfloat16()
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), -math.inf)
    due = module(x, x, x, is_causal=True)[0]
    for dtype in (torch.float32, torch.bfloat16):
        torch.testing.assert_close(module(x, x, x, attn_mask=mask.to(dtype))[0], due)


def test_hidden_rows_are_zero():
    """torch's probabilities are NaN there, and so are all gradients behind them."""
    ours, theirs = pair(12, 3, batch_first=True)
    x = torch.randn(2, 4, 12, dtype=torch.float64, requires_grad=True)
    hidden = torch.tensor([[True] * 4, [False, True, False, False]])
    out = ours(x, x, x, hidden)[0]
    assert_bitwise_equal(out[0], ours.out_proj.bias.expand(4, 12))
    torch.testing.assert_close(out[1], theirs(x[1], x[1], x[1], hidden[1])[0])
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert (dx[0] == 0).all()
    assert (dx[1] != 0).all()
    assert theirs(x, x, x, hidden, need_weights=True)[0][0].isnan().all()


def test_what_is_hidden_does_not_exist():
    ours, _ = pair(12, 3, batch_first=True)
    x = torch.randn(2, 4, 12, dtype=torch.float64)
    hidden = torch.tensor([[False, False, True, True], [False, False, False, True]])
    key = x.masked_fill(hidden[:, :, None], math.nan).requires_grad_()
    out = ours(x, key, key, hidden)[0]
    torch.testing.assert_close(out, ours(x, x, x, hidden)[0])
    (dkey,) = torch.autograd.grad(out.sum(), key)
    assert (dkey[hidden] == 0).all()


def test_masks_are_not_repeated_for_heads(monkeypatch):
    seen = []
    forward = online_attention.ops.forward

    def spy(*arguments, bias, **keywords):
        seen.append(None if bias is None else (tuple(bias.shape), bias.dtype))
        return forward(*arguments, bias=bias, **keywords)

    monkeypatch.setattr(online_attention.ops, "forward", spy)
    module = MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12)
    pairs, padding = torch.zeros(5, 5, dtype=torch.bool), torch.zeros(2, 5, dtype=torch.bool)
    module(x, x, x, padding)
    module(x, x, x, attn_mask=pairs)
    module(x, x, x, padding, attn_mask=pairs)
    module(x, x, x, padding, attn_mask=pairs, is_causal=True)
    module(x, x, x, attn_mask=pairs, is_causal=True)
    module(x, x, x, padding.float(), attn_mask=pairs)
    module(x, x, x, attn_mask=pairs.expand(6, 5, 5))
    boolean = torch.bool
    assert seen == [
        ((2, 1, 1, 5), boolean),
        ((1, 1, 5, 5), boolean),
        ((2, 1, 5, 5), boolean),
        ((2, 1, 1, 5), boolean),
        None,
        ((2, 1, 5, 5), torch.float32),
        ((2, 3, 5, 5), boolean),
    ]


def test_self_attention_is_one_product_without_copies():
    ran = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            ran.append(function.overloadpacket.__name__.split(".")[-1])
            return function(*args, **(kwargs or {}))

    module = MultiheadAttention(12, 3, batch_first=True)
    x = torch.randn(2, 5, 12)
    with torch.no_grad(), Watch():
        module(x, x, x)
    views = ("view", "t", "split", "transpose", "unsqueeze", "_unsafe_view", "_reshape_alias")
    assert [name for name in ran if name not in views] == ["addmm", "forward", "addmm"]


# --- dropout


def test_dropout_drops_probabilities_in_training_alone():
    """Values and projections of ones and zeros show the dropped probabilities themselves."""
    S, p = 8, 0.25
    module = MultiheadAttention(S, 1, dropout=p, bias=False, batch_first=True)
    with torch.no_grad():
        module.in_proj_weight.copy_(torch.cat([torch.zeros(2 * S, S), torch.eye(S)]))
        module.out_proj.weight.copy_(torch.eye(S))
    one_hot = torch.eye(S).expand(64, S, S)
    dropped = module(one_hot, one_hot, one_hot)[0]
    kept = 1 / S / (1 - p)
    assert ((dropped == 0) | ((dropped - kept).abs() < 1e-5)).all()
    share = float((dropped == 0).float().mean())
    assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / dropped.numel())
    torch.manual_seed(11)
    first = module(one_hot, one_hot, one_hot)[0]
    torch.manual_seed(11)
    assert_bitwise_equal(module(one_hot, one_hot, one_hot)[0], first)
    module.eval()
    torch.testing.assert_close(module(one_hot, one_hot, one_hot)[0], one_hot * 0 + 1 / S)


# --- in the place of torch's


def test_inside_a_torch_encoder_layer():
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(
        12, 3, 24, dropout=0.0, batch_first=True, dtype=torch.float64
    )
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    causal = torch.nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)
    due = layer(x, causal, hidden, is_causal=True)
    ours = MultiheadAttention(12, 3, batch_first=True, dtype=torch.float64)
    ours.load_state_dict(layer.self_attn.state_dict())
    layer.self_attn = ours
    torch.testing.assert_close(layer(x, causal, hidden, is_causal=True), due)


def test_autocast():
    ours, theirs = pair(12, 3, dtype=torch.float32)
    x = torch.randn(5, 2, 12)
    hidden = torch.tensor([[False] * 5, [False, False, False, True, True]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, due = (m(x, x, x, hidden, need_weights=False)[0] for m in (ours, theirs))
    assert mine.dtype == due.dtype == torch.bfloat16
    torch.testing.assert_close(mine, due, atol=0.03, rtol=0.03)


def test_no_queries_and_no_batch():
    module = MultiheadAttention(12, 3, batch_first=True)
    key = torch.randn(2, 4, 12)
    hidden = torch.zeros(2, 4, dtype=torch.bool)
    assert module(key[:, :0], key, key, hidden)[0].shape == (2, 0, 12)
    assert module(key[:0], key[:0], key[:0], hidden[:0])[0].shape == (0, 4, 12)
    no_keys = module(key, key[:, :0], key[:, :0])[0]
    assert_bitwise_equal(no_keys, module.out_proj.bias.expand(2, 4, 12))
