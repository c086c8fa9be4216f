# SPDX-License-Identifier: BSD-3-Clause
"""Gradients under what torch does with a model: torch.func, compile, checkpoints, hooks, graphs."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils.checkpoint import checkpoint

from cases import Case, Inputs
from gradients import Cotangents, cotangents_of, differentiate
from online_attention import attention
from oracle import CAUSAL
from rows import Target
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")
FP32 = {"dtypes": (torch.float32,)}
FP64 = {"dtypes": (torch.float64,)}
ALL = (0, 1, 2)


def inputs_of(target: Target, S_q: int = 5, S_kv: int = 7, **sizes: int) -> Inputs:
    return Case("any", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out, lse = attention(q, k, v, causal=True, return_lse=True, deterministic=True)
    return out.square().sum() + lse.sin().sum()


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by plain torch operations, for S_q <= S_kv."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    visible = CAUSAL.visible(q.shape[2], k.shape[2]).to(q.device)
    scores = (q @ k.mT * q.shape[3] ** -0.5).masked_fill(~visible, -torch.inf)
    lse = scores.logsumexp(-1)
    return (torch.softmax(scores, -1) @ v).square().sum() + lse.sin().sum()


class Block(torch.nn.Module):
    """Self-attention between two projections."""

    def __init__(self, target: Target, heads: int = 2):
        super().__init__()
        self.heads, width = heads, heads * target.head_dim
        options = {"device": target.device, "dtype": target.dtype}
        self.qkv = torch.nn.Linear(width, 3 * width, **options)
        self.out = torch.nn.Linear(width, width, **options)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        B, S, _ = x.shape
        q, k, v = self.qkv(x).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(attention(q, k, v, causal=True).transpose(1, 2).flatten(2))


def batch_for(block: Block, target: Target, B: int = 2, S: int = 5) -> Tensor:
    return torch.randn(B, S, block.width, device=target.device, dtype=target.dtype)


# --- autograd's own machinery


def test_wrong_cotangents_of_autograd_are_refused_by_torch():
    q = torch.ones(1, 2, 3, 4, requires_grad=True)
    out = attention(q, q, q)
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        torch.autograd.grad(out, q, torch.ones(1, 2, 3, 5))
    with pytest.raises(RuntimeError, match="Mismatch in dtype"):
        torch.autograd.grad(out, q, torch.ones(1, 2, 3, 4, dtype=torch.complex64))


@pytest.mark.parametrize("transform", ["autograd", "torch.func"])
def test_refusals_are_the_same_where_gradients_are_asked_for(transform: str):
    q = torch.ones(1, 2, 3, 4)
    for k, error, text in (
        (None, TypeError, r"k must be a torch\.Tensor, but is None"),
        (q[..., :3], ValueError, "k must have D = 4 as q, but"),
        (q.double(), TypeError, "k must have the dtype of q, float32, but is float64"),
    ):

        def number(x: Tensor, k=k) -> Tensor:
            return attention(x, k, q).sum()

        call = grad(number) if transform == "torch.func" else number
        with pytest.raises(error, match=text):
            call(q.clone().requires_grad_())


def test_graph_may_be_kept_and_run_twice(target: Target):
    leaves = [x.requires_grad_() for x in inputs_of(target)]
    number = loss(*leaves)
    first = torch.autograd.grad(number, leaves, retain_graph=True)
    for x, y in zip(torch.autograd.grad(number, leaves), first, strict=True):
        assert_bitwise_equal(x, y)
    with pytest.raises(RuntimeError, match="a second time"):
        torch.autograd.grad(number, leaves)


@pytest.mark.parametrize("which", ["q", "k", "v", "out", "lse"])
def test_changed_saved_tensor_is_noticed(target: Target, which: str):
    leaves = [x.requires_grad_() for x in inputs_of(target)]
    q, k, v = (x * 1 for x in leaves)
    out, lse = attention(q, k, v, return_lse=True)
    number = out.sum() + lse.sum()
    with torch.no_grad():
        {"q": q, "k": k, "v": v, "out": out, "lse": lse}[which].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        number.backward()


def test_saved_tensors_pass_through_hooks(target: Target):
    leaves = [x.requires_grad_() for x in inputs_of(target)]
    due = torch.autograd.grad(loss(*leaves), leaves)
    packed: list[tuple[int, ...]] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(tuple(x.shape))
        return x.cpu()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x.to(target.device)):
        number = loss(*leaves)
    assert tuple(leaves[0].shape) in packed
    for x, y in zip(torch.autograd.grad(number, leaves), due, strict=True):
        assert_bitwise_equal(x, y)


def test_hooks_of_inputs_see_their_gradients(target: Target):
    leaves = [x.requires_grad_() for x in inputs_of(target)]
    seen: dict[str, Tensor] = {}
    for name, x in zip("qkv", leaves, strict=True):
        x.register_hook(lambda gradient, name=name: seen.update({name: gradient.clone()}))
    loss(*leaves).backward()
    for name, x in zip("qkv", leaves, strict=True):
        assert_bitwise_equal(seen[name], x.grad)


@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(target: Target, use_reentrant: bool):
    leaves = [x.requires_grad_() for x in inputs_of(target)]
    due = torch.autograd.grad(loss(*leaves), leaves)
    checkpoint(loss, *leaves, use_reentrant=use_reentrant).backward()
    for x, y in zip(leaves, due, strict=True):
        assert_bitwise_equal(x.grad, y)


@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_gradients_in_the_dtype_of_parameters(target: Target, dtype: torch.dtype):
    block = Block(target)
    with torch.autocast(target.device, dtype=dtype):
        result = block(batch_for(block, target))
    assert result.dtype == dtype
    result.float().square().mean().backward()
    for parameter in block.parameters():
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()


@pytest.mark.targets(**FP32)
def test_autocast_rounds_what_it_differentiates(target: Target):
    inputs = inputs_of(target)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with torch.autocast(target.device, dtype=torch.bfloat16):
        out = attention(*leaves, causal=True, deterministic=True)
    dout = torch.ones_like(out)
    ours = torch.autograd.grad(out, leaves, dout)
    rounded = Inputs(*(x.bfloat16() for x in inputs))
    due = differentiate(rounded, Cotangents(dout, None), CAUSAL, deterministic=True)
    for x, y in zip(ours, due, strict=True):
        assert_bitwise_equal(x, y.float())


# --- torch.func


@pytest.mark.targets(**FP64)
def test_derivatives_of_torch_func(target: Target):
    q, k, v = (x[..., :2].contiguous() for x in inputs_of(target, 3, 4, H=2, H_kv=1))
    wanted = {
        "grad": lambda f: grad(f, ALL),
        "jacrev": lambda f: jacrev(f, ALL),
        "jacfwd": lambda f: jacfwd(f, ALL),
        "hessian": lambda f: hessian(f, ALL),
        "reverse over reverse": lambda f: jacrev(jacrev(f, ALL), ALL),
        "reverse over forward": lambda f: jacrev(jacfwd(f, ALL), ALL),
        "jvp of grad": lambda f: lambda *x: jvp(grad(f, ALL), x, (q.sin(), k + 1, v.cos())),
        "vjp of jvp": lambda f: lambda *x: vjp(lambda *y: jvp(f, y, x)[1], *x)[1](q.new_ones(())),
    }
    if not target.takes(2, 2):
        pytest.skip("an earlier row takes this head dim")
    for name, transform in wanted.items():
        ours, due = transform(loss)(q, k, v), transform(formula)(q, k, v)
        torch.testing.assert_close(ours, due, msg=lambda text, name=name: f"{name}: {text}")


MAPPED = [dims for dims in itertools.product([None, 0, 1], repeat=3) if any(
    dim is not None for dim in dims
)]  # fmt: skip


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize("in_dims", MAPPED[::2], ids=str)
def test_vmap_and_grad_in_either_order(target: Target, in_dims: tuple[int | None, ...]):
    single = inputs_of(target, 3, 4, B=2, H=2, H_kv=1)
    inputs = [
        x if dim is None else torch.stack([x, -x, 2 * x], dim)
        for x, dim in zip(single, in_dims, strict=True)
    ]

    def per_sample(f):
        return vmap(grad(f, ALL), in_dims=in_dims)(*inputs)

    def of_sum(f):
        return grad(lambda *x: vmap(f, in_dims=in_dims)(*x).sum(), ALL)(*inputs)

    torch.testing.assert_close(per_sample(loss), per_sample(formula))
    torch.testing.assert_close(of_sum(loss), of_sum(formula))
    leaves = [x.clone().requires_grad_() for x in inputs]  # vmap alone, autograd outside
    vmap(loss, in_dims=in_dims)(*leaves).sum().backward()
    torch.testing.assert_close(tuple(x.grad for x in leaves), of_sum(formula))


@pytest.mark.targets(**FP64)
def test_gradients_per_sample(target: Target):
    block = Block(target)
    x = batch_for(block, target, B=3)
    parameters = dict(block.named_parameters())

    def loss_of(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(block, parameters, (sample[None],)).square().sum()

    ours = vmap(grad(loss_of), in_dims=(None, 0))(parameters, x)
    for index, sample in enumerate(x):
        due = grad(loss_of)(parameters, sample)
        for name, gradient in due.items():
            torch.testing.assert_close(ours[name][index], gradient)


# --- compiled


def trained(
    step_of, block: Block, lengths: tuple[int, ...], target: Target
) -> tuple[list[float], dict[str, Tensor]]:
    block = copy.deepcopy(block)
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    torch.manual_seed(0)
    step = step_of(block, optimiser)
    losses = [float(step(batch_for(block, target, S=S))) for S in lengths]
    return losses, block.state_dict()


def eager_step(block: Block, optimiser: torch.optim.Optimizer, wrap=lambda f: f):
    measure = wrap(lambda x: block(x).square().mean())

    def step(x: Tensor) -> Tensor:
        number = measure(x)
        number.backward()
        optimiser.step()
        optimiser.zero_grad()
        return number.detach()

    return step


@pytest.mark.slow
@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_training_is_eager_training(target: Target, backend: str, dynamic: bool):
    """fullgraph: no graph break; dynamic: every length."""
    torch.compiler.reset()
    block = Block(target)
    lengths = (5, 9, 12) if dynamic else (5, 5, 5)

    def compiled_step(block, optimiser):
        return eager_step(
            block,
            optimiser,
            lambda f: torch.compile(f, backend=backend, fullgraph=True, dynamic=dynamic),
        )

    losses, state = trained(compiled_step, block, lengths, target)
    due_losses, due_state = trained(eager_step, block, lengths, target)
    torch.testing.assert_close(losses, due_losses)
    torch.testing.assert_close(state, due_state)


@pytest.mark.targets(**FP32)
def test_whole_step_may_be_compiled(target: Target):
    """Backward and optimiser inside, where torch breaks the graph by itself."""
    torch.compiler.reset()
    block = Block(target)

    def compiled_step(block, optimiser):
        return torch.compile(eager_step(block, optimiser), backend="aot_eager")

    losses, state = trained(compiled_step, block, (5, 5), target)
    due_losses, due_state = trained(eager_step, block, (5, 5), target)
    torch.testing.assert_close(losses, due_losses)
    torch.testing.assert_close(state, due_state)


@pytest.mark.targets(**FP64)
@pytest.mark.parametrize("name", ["grad", "vmap", "vmap of grad", "hessian", "jvp"])
def test_compiled_transforms_are_right(target: Target, name: str):
    """They run eagerly: torch.compile cannot follow the levels of torch.func into a Function."""
    if "grad" in name and torch.__version__ < "2.12":
        pytest.skip("Dynamo of torch 2.11 fails on its own frames after a graph break in grad")
    torch.compiler.reset()
    q, k, v = inputs_of(target, 3, 4)
    function, first = {
        "grad": (grad(loss), q),
        "vmap": (vmap(loss, in_dims=(0, None, None)), torch.stack([q, -q])),
        "vmap of grad": (vmap(grad(loss), in_dims=(0, None, None)), torch.stack([q, -q])),
        "hessian": (hessian(loss), q),
        "jvp": (lambda q, k, v: jvp(lambda q: loss(q, k, v), (q,), (q,))[1], q),
    }[name]
    ours = torch.compile(function, backend="eager")(first, k, v)
    torch.testing.assert_close(ours, function(first, k, v))


@pytest.mark.targets(**FP32)
def test_export_of_a_model_with_parameters(target: Target):
    block = Block(target)
    length = torch.export.Dim("length", max=512)
    program = torch.export.export(block, (batch_for(block, target),), dynamic_shapes=({1: length},))
    x = batch_for(block, target, S=33)
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.targets(**FP32)
def test_export_of_mapped_attention(target: Target):
    class Mapped(Block):
        def forward(self, x: Tensor) -> Tensor:
            return vmap(lambda sample: Block.forward(self, sample[None])[0])(x)

    block = Mapped(target)
    x = batch_for(block, target, B=3)
    program = torch.export.export(block, (x,))
    torch.testing.assert_close(program.module()(x), block(x))


# --- CUDA graphs


@pytest.mark.cuda
@pytest.mark.targets(device="cuda")
def test_training_step_in_a_cuda_graph(target: Target):
    inputs = Case("graph", 65, 130, H=4, H_kv=2).inputs(
        target.dtype, target.device, target.head_dim
    )
    leaves = [x.clone().requires_grad_() for x in inputs]
    dout, dlse = cotangents_of(inputs)

    def step() -> tuple[Tensor, ...]:
        results = attention(*leaves, causal=True, return_lse=True, deterministic=True)
        return torch.autograd.grad(results, leaves, (dout, dlse))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in leaves:
            x.mul_(-0.5)
    graph.replay()
    for mine, due in zip(captured, step(), strict=True):
        assert_bitwise_equal(mine, due)
