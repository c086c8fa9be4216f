# SPDX-License-Identifier: BSD-3-Clause
"""The derivatives of merging: of every order and mode, in every dtype, empty-safe, under torch's
transforms and its compiler."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import Case, normal
from online_attention import attention, merge
from rows import Target
from test_merge import exact_merge, parts_and_lses, tolerance
from test_strides import LAYOUTS
from tolerance import assert_bitwise_equal

INF = math.inf
merge_op = torch.ops.online_attention.merge.default
backward_op = torch.ops.online_attention.merge_backward.default


def doubles(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [x.requires_grad_() for x in normal(*shapes, dtype=torch.float64)]


def of_sequences(*tensors: Tensor) -> tuple[Tensor, Tensor]:
    half = len(tensors) // 2
    return merge(tensors[:half], tensors[half:])


def gradients(function, outs: Tensor, lses: Tensor, cotangents) -> tuple[Tensor, Tensor]:
    """Of stacked parts, by the function of stacked parts."""
    outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
    return torch.autograd.grad(function(outs, lses), (outs, lses), cotangents)


# --- by definition


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_gradients_of_stacked_parts(parts: int):
    inputs = doubles((parts, 2, 3), (parts, 2))
    assert torch.autograd.gradcheck(
        merge, inputs, check_forward_ad=True, check_batched_grad=True,
        check_batched_forward_grad=True,
    )  # fmt: skip
    assert torch.autograd.gradgradcheck(merge, inputs)


@pytest.mark.parametrize("parts", [1, 2])
def test_gradients_of_sequences(parts: int):
    inputs = doubles(*[(1, 2, 2, 3)] * parts, *[(1, 2, 2)] * parts)
    assert torch.autograd.gradcheck(
        of_sequences, inputs, check_forward_ad=True, check_batched_grad=True
    )
    assert torch.autograd.gradgradcheck(of_sequences, inputs, check_fwd_over_rev=True)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=4)), ids=str)
def test_gradient_of_some_inputs_alone(wanted: tuple[bool, ...]):
    inputs = doubles((2, 3), (2, 3), (2,), (2,))
    for tensor, want in zip(inputs, wanted, strict=True):
        tensor.requires_grad_(want)
    results = of_sequences(*inputs)
    assert all(result.requires_grad == any(wanted) for result in results)
    if any(wanted):
        assert torch.autograd.gradcheck(of_sequences, inputs, check_forward_ad=True)


@pytest.mark.parametrize("which", [0, 1])
def test_gradient_of_one_result_alone(which: int):
    inputs = doubles((3, 2, 3), (3, 2))
    wanted = inputs if which == 0 else inputs[1:]
    assert torch.autograd.gradcheck(lambda *x: merge(*inputs)[which], wanted)
    assert torch.autograd.gradgradcheck(lambda *x: merge(*inputs)[which], wanted)


def test_third_derivative():
    inputs = doubles((2, 1, 2), (2, 1))

    def second(*inputs: Tensor):
        results = [result.pow(2).sum() for result in merge(*inputs)]
        first = torch.autograd.grad(sum(results), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), inputs, create_graph=True)

    assert torch.autograd.gradcheck(second, inputs)


def test_hessian_by_both_modes():
    outs, lses = normal((3, 2, 3), (3, 2), dtype=torch.float64)

    def energy(lses: Tensor) -> Tensor:
        out, lse = merge(outs, lses)
        return out.pow(2).sum() + lse.sin().sum()

    forward_over_reverse = torch.func.hessian(energy)(lses)
    reverse_over_reverse = torch.func.jacrev(torch.func.jacrev(energy))(lses)
    torch.testing.assert_close(forward_over_reverse, reverse_over_reverse)
    assert forward_over_reverse.abs().max() > 0.01


# --- the kernel


@pytest.mark.parametrize(
    ("parts", "columns"), [(1, 8), (2, 64), (3, 40), (3, 7), (49, 24), (131, 3)]
)
def test_gradient_of_every_dtype(target: Target, parts: int, columns: int):
    outs, lses = parts_and_lses(target, parts, rows=(2, 3, 5), columns=columns)
    cotangents = (
        torch.randn((2, 3, 5, columns), device=target.device).to(target.dtype),
        torch.randn((2, 3, 5), device=target.device).to(target.lse_dtype),
    )
    due = gradients(exact_merge, outs, lses, [x.double() for x in cotangents])
    mine = gradients(merge, outs, lses, cotangents)
    torch.testing.assert_close(mine[0].double(), due[0].double(), **tolerance(target))
    torch.testing.assert_close(mine[1].double(), due[1].double(), rtol=1e-5, atol=1e-5)
    assert_bitwise_equal(mine[0], gradients(merge, outs, lses, cotangents)[0])


def test_gradient_of_large_lse_keeps_its_weights(target: Target):
    outs, lses = parts_and_lses(target, 3, rows=(6,), columns=8)
    lses = lses + 1e4
    ones, zeros = torch.ones(6, 8).to(outs), torch.zeros(6).to(lses)
    due = gradients(exact_merge, outs, lses, (ones.double(), zeros.double()))
    mine = gradients(merge, outs, lses, (ones, zeros))
    torch.testing.assert_close(mine[0].double(), due[0].double(), **tolerance(target))


def test_operator_leaves_out_what_is_not_needed(target: Target):
    outs, lses = (list(x) for x in parts_and_lses(target, 2, rows=(1, 2, 3), columns=5))
    dout, dlse = torch.ones_like(outs[0]), torch.ones_like(lses[0])
    both = backward_op(dout, dlse, outs, lses, True, True)
    d_outs, none = backward_op(dout, dlse, outs, lses, True, False)
    assert_bitwise_equal(d_outs, both[0])
    assert none.shape == (0,)
    none, d_lses = backward_op(dout, dlse, outs, lses, False, True)
    assert_bitwise_equal(d_lses, both[1])
    assert none.shape == (0,)
    absent = backward_op(None, None, outs, lses, True, True)
    assert [x.abs().max() for x in absent] == [0, 0]
    of_lse = backward_op(None, dlse, outs, lses, True, True)
    zero = backward_op(torch.zeros_like(dout), dlse, outs, lses, True, True)
    assert_bitwise_equal(of_lse[0], zero[0])
    assert_bitwise_equal(of_lse[1], zero[1])


def test_expanded_cotangents_and_strides(target: Target):
    outs, lses = parts_and_lses(target, 3, rows=(2, 3, 5), columns=8)
    ones = torch.ones(2, 3, 5, 8).to(outs), torch.ones(2, 3, 5).to(lses)
    due = gradients(merge, outs, lses, ones)
    mine = gradients(merge, outs, lses, [x[:1, :1, :1, ..., :1].expand_as(x) for x in (ones[0],)]
                     + [ones[1].mT.contiguous().mT])  # fmt: skip
    assert_bitwise_equal(mine[0], due[0])
    assert_bitwise_equal(mine[1], due[1])
    transposed = outs.transpose(2, 3).contiguous().transpose(2, 3)
    mine = gradients(merge, transposed, lses, ones)
    assert_bitwise_equal(mine[0], due[0])
    assert mine[0].stride() == transposed.stride()


# --- empty parts


def with_empty_parts(target: Target) -> tuple[Tensor, Tensor]:
    """Part 1 is empty in row 0, every part in row 1; garbage stands there."""
    outs, lses = parts_and_lses(target, 3, rows=(3,), columns=8)
    lses[1, 0], lses[:, 1] = -INF, -INF
    outs[1, 0], outs[:, 1] = math.nan, INF
    return outs, lses


@pytest.mark.parametrize("create_graph", [False, True])
def test_empty_parts_have_no_gradient(target: Target, create_graph: bool):
    outs, lses = (x.requires_grad_() for x in with_empty_parts(target))
    out, lse = merge(outs, lses)
    dout, dlse = torch.ones_like(out), torch.ones_like(lse)
    dout[1], dlse[1] = math.nan, math.nan  # what comes to an empty row goes nowhere
    d_outs, d_lses = torch.autograd.grad(
        (out, lse), (outs, lses), (dout, dlse), create_graph=create_graph
    )
    for gradient in (d_outs, d_lses):
        assert gradient.isfinite().all()
        assert gradient[:, 1].abs().max() == 0
        assert gradient[1, 0].abs().max() == 0
    if create_graph:
        second = torch.autograd.grad(d_outs.pow(2).sum() + d_lses.pow(2).sum(), (outs, lses))
        for gradient in second:
            assert gradient.isfinite().all()
            assert gradient[:, 1].abs().max() == 0


def test_empty_parts_have_no_tangent(target: Target):
    outs, lses = with_empty_parts(target)
    tangents = torch.ones_like(outs), torch.ones_like(lses)
    tangents[0][1, 0], tangents[1][1, 0] = math.nan, math.nan
    (out, lse), (d_out, d_lse) = torch.func.jvp(merge, (outs, lses), tangents)
    due, due_lse = merge(outs, lses)
    assert_bitwise_equal(out, due)
    assert_bitwise_equal(lse, due_lse)
    assert d_out[1].abs().max() == 0
    assert d_lse[1] == 0
    assert d_out.isfinite().all()
    assert d_lse.isfinite().all()


# --- through attention


@given(cuts=st.lists(st.integers(0, 37), max_size=4), data=st.data())
@pytest.mark.targets(dtypes=(torch.float32, torch.float64))
def test_gradient_of_any_cut_equals_that_of_the_whole(
    target: Target, cuts: list[int], data: st.DataObject
):
    inputs = Case("cut", 5, 37, H=4, H_kv=2).inputs(target.dtype, target.device, 16)
    leaves = [x.requires_grad_() for x in inputs]
    q, k, v = leaves
    edges = [0, *sorted(cuts), 37]
    parts = [
        attention(q, k[:, :, begin:end], v[:, :, begin:end], return_lse=True)
        for begin, end in itertools.pairwise(edges)
    ]
    merged = merge(*zip(*data.draw(st.permutations(parts)), strict=True))
    cotangents = [torch.linspace(-1, 1, x.numel()).view_as(x).to(x) for x in merged]
    mine = torch.autograd.grad(merged, leaves, cotangents)
    due = torch.autograd.grad(attention(q, k, v, return_lse=True), leaves, cotangents)
    eps = torch.finfo(target.dtype).eps
    for gradient, whole in zip(mine, due, strict=True):
        torch.testing.assert_close(gradient, whole, rtol=100 * eps, atol=100 * eps)


# --- torch's transforms and compiler


@pytest.mark.parametrize("in_dims", [(1, 1), (2, 0), (1, None), (None, 1), (-1, -1)], ids=str)
def test_vmap_is_a_loop(target: Target, in_dims: tuple[int | None, ...]):
    inputs = parts_and_lses(target, 3, rows=(2, 3, 5), columns=8)
    mapped = [
        x if dim is None else torch.stack([x, -x, 2 * x], dim)
        for x, dim in zip(inputs, in_dims, strict=True)
    ]
    out, lse = torch.vmap(merge, in_dims=in_dims)(*mapped)
    for index in range(3):
        due = merge(*(x if dim is None else x.select(dim, index)
                      for x, dim in zip(mapped, in_dims, strict=True)))  # fmt: skip
        assert_bitwise_equal(out[index], due[0])
        assert_bitwise_equal(lse[index], due[1])


def test_gradient_reaches_what_vmap_maps():
    """There a tensor that requires a gradient says that it does not."""
    outs, lses = doubles((3, 4, 2, 5), (3, 4, 2))
    mapped = torch.vmap(merge, in_dims=(1, 1))(outs, lses)
    mine = torch.autograd.grad(mapped, (outs, lses), [torch.ones_like(x) for x in mapped])
    whole = merge(outs, lses)
    due = torch.autograd.grad(whole, (outs, lses), [torch.ones_like(x) for x in whole])
    torch.testing.assert_close(mine, due)


@pytest.mark.parametrize("needs", [(True, True), (True, False), (False, True)], ids=str)
def test_vmap_of_the_gradient_operator(needs: tuple[bool, bool]):
    outs, lses = normal((2, 4, 1, 2, 3, 5), (2, 4, 1, 2, 3), dtype=torch.float32)
    dout, dlse = outs[0] * 2, lses[0] - 1

    def one(dout: Tensor, dlse: Tensor, *parts: Tensor) -> list[Tensor]:
        both = backward_op(dout, dlse, list(parts[:2]), list(parts[2:]), *needs)
        return [x for x, need in zip(both, needs, strict=True) if need]

    mapped = torch.vmap(one)(dout, dlse, *outs, *lses)
    for index in range(4):
        due = one(dout[index], dlse[index], *outs[:, index], *lses[:, index])
        for mine, alone in zip(mapped, due, strict=True):
            assert_bitwise_equal(mine[index], alone)


def test_gradient_for_each_sample():
    outs, lses = normal((3, 4, 2, 5), (3, 4, 2), dtype=torch.float64)

    def energy(outs: Tensor, lses: Tensor) -> Tensor:
        out, lse = merge(outs, lses)
        return out.pow(2).sum() + lse.sin().sum()

    gradient = torch.func.grad(energy, (0, 1))
    each = torch.vmap(gradient, in_dims=(1, 1), out_dims=1)(outs, lses)
    torch.testing.assert_close(each, gradient(outs, lses))


def test_mapped_cotangents():
    inputs = doubles((3, 2, 4), (3, 2))
    lse = merge(*inputs)[1]
    rows = torch.eye(2, dtype=torch.float64)
    mapped = torch.autograd.grad(lse, inputs[1], rows, is_grads_batched=True, retain_graph=True)
    for row, mine in zip(rows, mapped[0], strict=True):
        due = torch.autograd.grad(lse, inputs[1], row, retain_graph=True)
        torch.testing.assert_close(mine, due[0])


@pytest.mark.targets(dtypes=(torch.float16,))  # the lse has another: none hides behind it
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck_and_strides_of_fake_results(target: Target, layout: str):
    outs, lses = parts_and_lses(target, 2, rows=(2, 3, 5), columns=8)
    parts = [LAYOUTS[layout](out) for out in outs]
    cases = [(merge_op, (parts, list(lses)))]
    for given_ in itertools.product([None, outs[0]], [None, lses[0]], [False, True], [False, True]):
        dout, dlse, *needs = given_
        cases.append((backward_op, (dout, dlse, parts, list(lses), *needs)))
    for operator, arguments in cases:
        torch.library.opcheck(operator, arguments, test_utils="test_schema")
        torch.library.opcheck(operator, arguments, test_utils="test_faketensor")
        with FakeTensorMode() as mode:
            fake = operator(*torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, arguments))
        for mine, due in zip(fake, operator(*arguments), strict=True):
            assert (mine.shape, mine.dtype, mine.stride()) == (due.shape, due.dtype, due.stride())
    for operator, arguments in (cases[0], cases[-1]):
        torch.library.opcheck(operator, arguments)


@pytest.mark.targets(dtypes=(torch.bfloat16, torch.float32))
@pytest.mark.parametrize("stacked", [False, True])
def test_compiled_training_runs_the_operators(target: Target, stacked: bool):
    torch._dynamo.reset()
    names = []

    def record(graph, example_inputs):
        names.extend(str(node.target) for node in graph.graph.nodes)
        return functorch_boxed(graph.forward)

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func as functorch_boxed

    def step(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return merge(*(x if stacked else x.unbind() for x in (outs, lses)))

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for rows in ((2, 3, 5), (3, 4, 7)):
        outs, lses = parts_and_lses(target, 3, rows=rows, columns=8)
        for mine, due in zip(compiled(outs, lses), step(outs, lses), strict=True):
            assert_bitwise_equal(mine, due)
            assert mine.stride() == due.stride()
        cotangents = [torch.ones_like(x) for x in step(outs, lses)]
        mine = gradients(compiled, outs, lses, cotangents)
        due = gradients(step, outs, lses, cotangents)
        assert_bitwise_equal(mine[0], due[0])
        assert_bitwise_equal(mine[1], due[1])
    assert {"online_attention.merge.default", "online_attention.merge_backward.default"} <= {*names}


def test_compiled_transforms():
    outs, lses = doubles((3, 4, 2, 5), (3, 4, 2))

    def mapped(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        return torch.vmap(merge, in_dims=(1, 1))(outs, lses)

    compiled = torch.compile(mapped, fullgraph=True, backend="aot_eager")
    cotangents = [torch.ones_like(x) for x in mapped(outs, lses)]
    mine = gradients(compiled, outs, lses, cotangents)
    torch.testing.assert_close(mine, gradients(mapped, outs, lses, cotangents))


def test_autocast_changes_nothing(target: Target):
    outs, lses = parts_and_lses(target, 2, rows=(3,), columns=8)
    due = merge(outs, lses)
    with torch.autocast(target.device, dtype=torch.bfloat16):
        out, lse = merge(outs, lses)
    assert_bitwise_equal(out, due[0])
    assert_bitwise_equal(lse, due[1])
