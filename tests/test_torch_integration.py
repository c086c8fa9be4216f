# SPDX-License-Identifier: BSD-3-Clause
"""What torch does with an operator: fake tensors, compile, export, autocast, vmap, autograd."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import Case, Inputs
from online_attention import attention, scaled_dot_product_attention
from rows import Target
from test_strides import LAYOUTS
from tolerance import assert_bitwise_equal

forward = torch.ops.online_attention.forward.default
ONE_TYPE_EACH = {"dtypes": (torch.float32, torch.bfloat16)}


def inputs_of(target: Target, S_q: int = 5, S_kv: int = 7, **sizes: int) -> Inputs:
    return Case("any", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


# --- the operator's own description


OPCHECK = {
    "plain": {},
    "grouped": {"H": 4, "H_kv": 2},
    "no-batch": {"B": 0},
    "no-queries": {"S_q": 0},
    "no-keys": {"S_kv": 0},
}


@pytest.mark.parametrize("sizes", OPCHECK.values(), ids=OPCHECK)
def test_opcheck(target: Target, sizes: dict[str, int]):
    inputs = inputs_of(target, **sizes)
    torch.library.opcheck(forward, (*inputs, 0.3, 1, -1, 0, False))
    torch.library.opcheck(forward, (*inputs, None, 0, 3, 2, True))


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_of_every_layout(target: Target, layout: str):
    inputs = (LAYOUTS[layout](x) for x in inputs_of(target, H=4, H_kv=2))
    torch.library.opcheck(forward, (*inputs, 0.3, 1, -1, 0, False))


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded-batch", "expanded-rows"])
@pytest.mark.parametrize("D_v", [0, -1])
def test_fake_results_have_the_real_strides(target: Target, layout: str, D_v: int):
    q, k, v = inputs_of(target, B=2, H=3, D_v=target.head_dim + D_v)
    if layout in LAYOUTS:
        q = LAYOUTS[layout](q)
    else:
        q = q.narrow(0 if "batch" in layout else 2, 0, 1).expand_as(q)
    real = attention(q, k, v, return_lse=True)
    with FakeTensorMode() as mode:
        fake = attention(*(mode.from_tensor(x) for x in (q, k, v)), return_lse=True)
    for mine, due in zip(fake, real, strict=True):
        assert (mine.shape, mine.dtype, mine.device) == (due.shape, due.dtype, due.device)
        assert mine.stride() == due.stride()


def test_fake_call_refuses_what_the_real_one_refuses():
    q, k = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 5)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match="k must have D = 4 as q"):
        attention(*(mode.from_tensor(x) for x in (q, k, k)))


# --- compile and export


@pytest.mark.slow
@pytest.mark.targets(**ONE_TYPE_EACH)
def test_compile_equals_eager_for_every_length(target: Target):
    def block(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(q * 1, k, v, causal=True, return_lse=True)
        return out.transpose(1, 2).flatten(2), lse + 1

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for S_q, S_kv in ((5, 7), (33, 65), (70, 66)):
        inputs = inputs_of(target, S_q, S_kv, B=2, H=4, H_kv=2)
        for mine, due in zip(compiled(*inputs), block(*inputs), strict=True):
            assert_bitwise_equal(mine, due)
            assert mine.stride() == due.stride()


@pytest.mark.targets(**ONE_TYPE_EACH)
def test_one_graph_serves_every_length(target: Target):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for S_q, S_kv in ((5, 7), (33, 65), (9, 129), (2, 3)):
        inputs = inputs_of(target, S_q, S_kv, B=2, H=4, H_kv=2)
        assert_bitwise_equal(compiled(*inputs), step(*inputs))
    assert len(graphs) == 1


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize("places", [(0, 0, 0), (0, 1, 1), (0, 0, 1), (0, 1, 0)], ids=str)
def test_compiled_gradients_of_one_tensor_in_two_places(target: Target, places):
    leaves = [x.requires_grad_() for x in inputs_of(target, 5, 5)[:2]]

    def loss(*tensors: Tensor) -> Tensor:
        return attention(*(tensors[i] for i in places), causal=True).square().sum()

    torch._dynamo.reset()  # the code of `loss` is compiled for every row
    used = [leaves[i] for i in sorted(set(places))]
    due = torch.autograd.grad(loss(*leaves), used)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for mine, x in zip(torch.autograd.grad(compiled(*leaves), used), due, strict=True):
        torch.testing.assert_close(mine, x)


@pytest.mark.targets(**ONE_TYPE_EACH)
def test_export_round_trip_with_dynamic_lengths(target: Target, tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return attention(q, k, v, causal=True, return_lse=True)

    s_q, s_kv = torch.export.Dim("s_q", max=4096), torch.export.Dim("s_kv", max=4096)
    program = torch.export.export(
        Attention(), inputs_of(target, 5, 7), dynamic_shapes=({2: s_q}, {2: s_kv}, {2: s_kv})
    )
    torch.export.save(program, tmp_path / "attention.pt2")
    loaded = torch.export.load(tmp_path / "attention.pt2").module()
    for S_q, S_kv in ((5, 7), (33, 65), (70, 66)):
        inputs = inputs_of(target, S_q, S_kv)
        due = attention(*inputs, causal=True, return_lse=True)
        for mine, wanted in zip(loaded(*inputs), due, strict=True):
            assert_bitwise_equal(mine, wanted)


# --- modes


def test_inference_mode(target: Target):
    inputs = inputs_of(target)
    due = attention(*inputs)
    with torch.inference_mode():
        assert_bitwise_equal(attention(*inputs).clone(), due)


def test_parameters_without_gradient(target: Target):
    q, k, v = inputs_of(target)
    with torch.no_grad():
        ours = attention(torch.nn.Parameter(q), k, v)
    assert_bitwise_equal(ours, attention(q, k, v))


@pytest.mark.targets(dtypes=(torch.float32,))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [attention, scaled_dot_product_attention])
def test_autocast_converts_the_inputs(target: Target, dtype: torch.dtype, function):
    q, k, v = inputs_of(target)
    due = function(q.to(dtype), k.to(dtype), v.to(dtype))
    with torch.autocast(target.device, dtype=dtype):
        assert_bitwise_equal(function(q, k, v), due)
        assert_bitwise_equal(function(q.to(dtype), k, v), due)
    with torch.autocast(target.device, enabled=False):
        assert function(q, k, v).dtype == torch.float32


@pytest.mark.targets(dtypes=(torch.float64,))
def test_autocast_leaves_double_precision_alone(target: Target):
    inputs = inputs_of(target)
    due = attention(*inputs)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        assert_bitwise_equal(attention(*inputs), due)


# --- vmap

IN_DIMS = [dims for dims in itertools.product([None, 0, 2], repeat=3) if any(
    dim is not None for dim in dims
)]  # fmt: skip


@pytest.mark.targets(**ONE_TYPE_EACH)
@pytest.mark.parametrize("in_dims", [*IN_DIMS, (1, 4, 3), (-1, -2, None)], ids=str)
def test_vmap_is_a_loop(target: Target, in_dims: tuple[int | None, ...]):
    def mapped(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention(q, k, v, causal=True, return_lse=True, deterministic=True)

    size = 3
    single = inputs_of(target, B=2, H=4, H_kv=2)
    inputs = [
        x if dim is None else torch.stack([x, -x, 2 * x], dim)
        for x, dim in zip(single, in_dims, strict=True)
    ]
    out, lse = torch.vmap(mapped, in_dims=in_dims)(*inputs)
    for index in range(size):
        parts = (
            x if dim is None else x.select(dim, index)
            for x, dim in zip(inputs, in_dims, strict=True)
        )
        due = mapped(*parts)
        assert_bitwise_equal(out[index], due[0])
        assert_bitwise_equal(lse[index], due[1], "lse")


@pytest.mark.targets(**ONE_TYPE_EACH)
def test_vmap_in_vmap(target: Target):
    inputs = [torch.stack([x, -x]) for x in inputs_of(target, B=2)]

    def over_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One batch element, (H, S, D), at a time."""
        return torch.vmap(lambda q, k, v: attention(q[None], k[None], v[None])[0])(q, k, v)

    out = torch.vmap(over_batch)(*inputs)
    for index in range(2):
        due = attention(*(x[index] for x in inputs))
        torch.testing.assert_close(out[index], due)


# --- the operators themselves, past the Python functions


def test_operator_never_drops_a_gradient_in_silence():
    """The derivatives belong to the Python functions: under them torch itself warns."""
    q, k, v = (torch.randn(1, 2, 3, 4, requires_grad=True) for _ in range(3))
    with pytest.warns(UserWarning, match="autograd kernel was not registered"):
        forward(q, k, v, 0.5, 1, -1, -1, False)[0].sum().backward()


def test_import_does_not_load_the_compiler():
    """Dynamo would take seconds of every program that computes without it."""
    script = "import sys, online_attention; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
