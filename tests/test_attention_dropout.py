# SPDX-License-Identifier: BSD-3-Clause
"""Dropout as a caller sees it: what it draws, what the backward pass repeats, what torch makes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from cases import Case, Inputs, normal
from gradients import cotangents_of
from online_attention import attention, philox, scaled_dot_product_attention
from online_attention.ops import RNG_END
from oracle import default_scale
from philox import factors_of, kept_pairs
from rows import Target
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")
FP64 = {"dtypes": (torch.float64,)}
FP32 = {"dtypes": (torch.float32,)}
operators = torch.ops.online_attention


def inputs_of(target: Target, S_q: int = 9, S_kv: int = 17, **sizes: int) -> Inputs:
    return Case("any", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


def drawn_rng(device: str, seed: int) -> Tensor:
    """The state that a call after this seed draws."""
    torch.manual_seed(seed)
    return torch.randint(RNG_END, (2,), device=device)


def dropped(q: Tensor, k: Tensor, v: Tensor, seed: int = 1, p: float = 0.3) -> Tensor:
    torch.manual_seed(seed)
    return attention(q, k, v, causal=True, dropout_p=p)


# --- which pairs


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("state", [(0, 0), (-1, -(2**63)), (123456789012345, 2**31)], ids=str)
def test_kept_pairs_in_torch_are_those_of_philox(state: tuple[int, int], p: float):
    rng = torch.tensor(state)
    due = kept_pairs(rng, p, 2, 3, 40, 75).flatten(0, 1)
    assert torch.equal(philox.kept(rng, p, range(6), range(40), range(75)), due)
    part = philox.kept(rng, p, range(2, 5), range(7, 11), range(37, 70))
    assert torch.equal(part, due[2:5, 7:11, 37:70])
    assert 0.9 < (~due).float().mean() / p < 1.1


def test_kept_pairs_are_those_of_the_kernels(target: Target):
    """With values that are the unit matrix, `out` is the weights themselves."""
    S_kv = target.head_dims[0] + 32
    if not target.takes(8, S_kv):
        pytest.skip("the values do not fit the head dims of this row")
    options = {"device": target.device, "dtype": target.dtype}
    q, k = torch.zeros(2, 3, 70, 8, **options), torch.zeros(2, 3, S_kv, 8, **options)
    v = torch.eye(S_kv, **options).expand(2, 3, S_kv, S_kv)
    rng = drawn_rng(target.device, 4)
    torch.manual_seed(4)
    out = attention(q, k, v, dropout_p=0.3)
    kept = philox.kept(rng, 0.3, range(6), range(70), range(S_kv)).view(2, 3, 70, S_kv)
    assert torch.equal(out != 0, kept)
    weight = torch.tensor(philox.keep_scale(0.3, target.dtype) / S_kv, **options)
    torch.testing.assert_close(out[kept], weight.expand(int(kept.sum())))


def test_probability_is_rounded_to_outcomes():
    assert philox.threshold_of(2.0**-17 - 1e-9) == 0
    assert philox.threshold_of(0.25) == 1 << 14
    assert philox.threshold_of(1 - 2.0**-30) == 65535
    assert philox.keep_scale(0.25, torch.float64) == 4 / 3
    assert philox.keep_scale(0.25, torch.bfloat16) == float(torch.tensor(4 / 3))


# --- what is drawn


def test_seed_replays_and_each_call_draws(target: Target):
    inputs = inputs_of(target)
    first, second = dropped(*inputs), attention(*inputs, causal=True, dropout_p=0.3)
    assert_bitwise_equal(dropped(*inputs), first)
    assert_bitwise_equal(attention(*inputs, causal=True, dropout_p=0.3), second)
    assert not torch.equal(first, second)
    assert not torch.equal(first, dropped(*inputs, seed=2))


@pytest.mark.targets(**FP32)
def test_drop_in_drops(target: Target):
    """As torch's function, whatever mode a module is in."""
    q, k, v = inputs_of(target)
    torch.manual_seed(1)
    ours = scaled_dot_product_attention(q, k, v, dropout_p=0.3)
    torch.manual_seed(1)
    assert_bitwise_equal(ours, attention(q, k, v, dropout_p=0.3))


@pytest.mark.parametrize("p", [0, 0.0, -0.0])
def test_no_dropout_draws_nothing(p: float):
    q = torch.randn(1, 2, 3, 4)
    state = torch.get_rng_state()
    due = attention(q, q, q)
    assert_bitwise_equal(attention(q, q, q, dropout_p=p), due)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.targets(**FP32)
def test_lse_is_that_without_dropout(target: Target):
    inputs = inputs_of(target)
    due = attention(*inputs, return_lse=True)[1]
    assert_bitwise_equal(attention(*inputs, dropout_p=0.5, return_lse=True)[1], due)


@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_expectation_is_the_result_without_dropout(target: Target, p: float):
    """The mean of 2000 batch elements is within 5 of its standard deviations."""
    q, k, v = (x.expand(2000, -1, -1, -1) for x in inputs_of(target, 2, 40))
    out = dropped(q, k, v, p=p).double()
    due = attention(q, k, v, causal=True)[0].double()
    assert ((out.mean(0) - due).abs() < 5 * out.std(0) / 2000**0.5).all()


# --- derivatives drop the same pairs


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_kept_pairs(target: Target, causal: bool):
    inputs = inputs_of(target, 33, 33, B=2, H=4, H_kv=2)
    cotangents = cotangents_of(inputs)
    factors = factors_of(drawn_rng(target.device, 6), 0.3, 2, 4, 33, 33)

    def formula(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = q @ k.mT * default_scale(q, None)
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1) == 1, -torch.inf)
        return (torch.softmax(scores, -1) * factors) @ v, scores.logsumexp(-1)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(6)
        return attention(q, k, v, causal=causal, dropout_p=0.3, return_lse=True)

    def gradients(function, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
        results = function(*leaves)
        pairs = zip(cotangents, results, strict=True)
        return torch.autograd.grad(results, leaves, [dy.to(y) for dy, y in pairs])

    eps = torch.finfo(target.dtype).eps
    for mine, due in zip(gradients(ours, target.dtype), gradients(formula, torch.float64),
                         strict=True):  # fmt: skip
        largest = float(due.abs().max())
        torch.testing.assert_close(mine.double(), due, rtol=16 * eps, atol=16 * eps * largest)


@pytest.mark.targets(**FP64)
def test_gradcheck_in_every_element(target: Target):
    if not target.takes(2, 2):
        pytest.skip("an earlier row takes this head dim")
    leaves = [x.requires_grad_() for x in Case("any", 3, 5, 2, 2, H=2, H_kv=1).inputs(
        target.dtype, target.device, 2)]  # fmt: skip
    assert gradcheck(dropped, leaves, check_forward_ad=True)


@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_repeat_what_was_dropped(target: Target, use_reentrant: bool):
    leaves = [x.requires_grad_() for x in inputs_of(target)]

    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.3)

    torch.manual_seed(1)
    due = torch.autograd.grad(block(*leaves).square().sum(), leaves)
    torch.manual_seed(1)
    out = checkpoint(block, *leaves, use_reentrant=use_reentrant, preserve_rng_state=True)
    torch.randn(5, device=target.device)  # other draws in between
    out.square().sum().backward()
    for x, y in zip(leaves, due, strict=True):
        assert_bitwise_equal(x.grad, y)


# --- torch.vmap


@pytest.mark.targets(**FP32)
def test_vmap_refuses_without_randomness(target: Target):
    q, k, v = inputs_of(target)
    with pytest.raises(RuntimeError, match="randomness error mode"):
        vmap(lambda q: attention(q, k, v, dropout_p=0.3))(torch.stack([q, q]))


@pytest.mark.targets(**FP64)
def test_vmap_with_the_same_randomness(target: Target):
    """Each sample is what it is alone, and so are its gradients."""
    q, k, v = inputs_of(target, B=2, H=4, H_kv=2)
    samples = torch.stack([q, -q, q.sin()])

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.3).square().sum()

    torch.manual_seed(3)
    ours = vmap(grad(loss, (0, 1, 2)), (0, None, None), randomness="same")(samples, k, v)
    for index, sample in enumerate(samples):
        torch.manual_seed(3)
        due = grad(loss, (0, 1, 2))(sample, k, v)
        torch.testing.assert_close(tuple(x[index] for x in ours), due)


@pytest.mark.targets(**FP32)
def test_vmap_with_different_randomness(target: Target):
    q, k, v = inputs_of(target)

    def call(q: Tensor) -> Tensor:
        return attention(q, k, v, dropout_p=0.3)

    first, second = vmap(call, randomness="different")(torch.stack([q, q]))
    assert not torch.equal(first, second)


@pytest.mark.targets(**FP64)
def test_rows_of_a_jacobian_share_what_was_dropped(target: Target):
    q, k, v = inputs_of(target, 2, 5)

    def first_column(q: Tensor) -> Tensor:
        return dropped(q, k, v)[0, :, :, 0]

    due = torch.autograd.functional.jacobian(first_column, q)
    torch.testing.assert_close(jacrev(first_column)(q), due)


# --- what torch makes of a call


@pytest.mark.targets(dtypes=(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", ["none", "boolean", "element"])
def test_opcheck_of_the_operators(target: Target, kind: str):
    inputs = inputs_of(target, 5, 7, B=2, H=4, H_kv=2)
    (bias,) = normal((2, 1, 5, 7), dtype=target.dtype, device=target.device)
    modifiers = (
        {"none": None, "boolean": bias < 1, "element": bias}[kind],
        drawn_rng(target.device, 1),
        0.2,
    )
    settings = (0.3, 1, -1, 0, True)
    torch.library.opcheck(operators.forward.default, (*inputs, *settings, *modifiers))
    out, lse = operators.forward(*inputs, *settings, *modifiers)
    dout, dlse = cotangents_of(inputs)
    arguments = (dout, dlse, *inputs, out, lse, *settings, True, False, True, *modifiers)
    torch.library.opcheck(operators.backward.default, arguments)


@pytest.mark.slow
@pytest.mark.targets(**FP32)
def test_compiled_training_is_eager_training(target: Target):
    torch.compiler.reset()
    leaves = [x.requires_grad_() for x in inputs_of(target, H=4, H_kv=2)]

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal=True, dropout_p=0.3).square().sum()

    def gradients(function) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(function(*leaves), leaves)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(gradients(compiled), gradients(loss))


@pytest.mark.slow
@pytest.mark.targets(**FP32)
def test_inductor_draws_and_repeats(target: Target):
    """Its random numbers are others than eager ones; the gradient is still that of the result."""
    torch.compiler.reset()
    q, k, v = inputs_of(target)
    v.requires_grad_()
    compiled = torch.compile(attention, backend="inductor", fullgraph=True)
    first, second = (compiled(q, k, v, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    # out is linear in v: <dout, out> = <dv, v> holds only if both passes drop the same pairs.
    (dv,) = torch.autograd.grad(first, v, torch.ones_like(first))
    torch.testing.assert_close((dv * v).sum(), first.sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.targets(**FP32)
def test_export_of_a_mask_and_dropout(target: Target):
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
            kept = scaled_dot_product_attention(q, k, v, mask)
            return kept + scaled_dot_product_attention(q, k, v, mask, dropout_p=0.5)

    def arguments(S_q: int, S_kv: int) -> tuple[Tensor, ...]:
        inputs = inputs_of(target, S_q, S_kv)
        (drawn,) = normal((1, 1, S_q, S_kv), dtype=torch.float32, device=target.device)
        return *inputs, drawn < 1

    s_q, s_kv = torch.export.Dim("s_q", max=64), torch.export.Dim("s_kv", max=64)
    lengths = ({2: s_q}, {2: s_kv}, {2: s_kv}, {2: s_q, 3: s_kv})
    program = torch.export.export(Model(), arguments(5, 7), dynamic_shapes=lengths)
    torch.manual_seed(1)
    ours = program.module()(*arguments(9, 13))
    torch.manual_seed(1)
    assert_bitwise_equal(ours, Model()(*arguments(9, 13)))


@pytest.mark.cuda
@pytest.mark.targets(device="cuda", dtypes=(torch.float16, torch.float32))
def test_cuda_graph_draws_anew_in_each_replay(target: Target):
    leaves = [x.requires_grad_() for x in inputs_of(target, 65, 130)]

    def step() -> tuple[Tensor, ...]:
        out = attention(*leaves, dropout_p=0.5)
        (dv,) = torch.autograd.grad(out, leaves[2], torch.ones_like(out))
        return out, dv

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, dv = step()
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
        dots = (dv.float() * leaves[2].float()).sum(), out.float().sum()
        torch.testing.assert_close(*dots, rtol=1e-2, atol=1.0)
    assert not torch.equal(*results)
