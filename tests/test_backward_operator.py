# SPDX-License-Identifier: BSD-3-Clause
"""The operator `backward` itself: its description, its errors, its rule of vmap."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, vmap
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import Case, Inputs
from gradients import Cotangents, cotangents_of
from rows import Target
from test_strides import LAYOUTS
from test_torch_integration import OPCHECK
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")
backward = torch.ops.online_attention.backward.default
forward = torch.ops.online_attention.forward.default
FP32 = {"dtypes": (torch.float32,)}


def inputs_of(target: Target, S_q: int = 5, S_kv: int = 7, **sizes: int) -> Inputs:
    return Case("any", S_q, S_kv, **sizes).inputs(target.dtype, target.device, target.head_dim)


def operands(inputs: Inputs, cotangents: Cotangents) -> tuple[Tensor | None, ...]:
    return (*cotangents, *inputs, *forward(*inputs, 0.3, 1, -1, 0, True))


@pytest.mark.parametrize("sizes", OPCHECK.values(), ids=OPCHECK)
def test_opcheck(target: Target, sizes: dict[str, int]):
    inputs = inputs_of(target, **sizes)
    dout, dlse = cotangents_of(inputs)
    for needs in ((True, True, True), (False, True, False)):
        arguments = operands(inputs, Cotangents(dout, dlse if needs[0] else None))
        torch.library.opcheck(backward, (*arguments, 0.3, 1, -1, 0, True, *needs))


@pytest.mark.targets(**FP32)
@pytest.mark.parametrize("layout", [*LAYOUTS, "expanded-batch", "expanded-rows"])
def test_fake_gradients_have_the_real_strides(target: Target, layout: str):
    inputs = inputs_of(target, B=2, H=4, H_kv=2)
    if layout in LAYOUTS:
        inputs = Inputs(*(LAYOUTS[layout](x) for x in inputs))
    else:
        dim = 0 if "batch" in layout else 2
        inputs = Inputs(*(x.narrow(dim, 0, 1).expand_as(x) for x in inputs))
    arguments = operands(inputs, cotangents_of(inputs))
    for needs in itertools.product([True, False], repeat=3):
        real = backward(*arguments, None, 1, -1, 0, True, *needs)
        with FakeTensorMode() as mode:
            fakes = (mode.from_tensor(x) for x in arguments)
            fake = backward(*fakes, None, 1, -1, 0, True, *needs)
        for mine, due, needed in zip(fake, real, needs, strict=True):
            assert (mine.shape, mine.dtype) == (due.shape, due.dtype)
            assert mine.stride() == due.stride()
            assert needed or due.shape == (0,)


def test_operator_refuses_wrong_cotangents():
    q = torch.ones(1, 2, 3, 4)
    out, lse = forward(q, q, q, None, 1, -1, -1, False)
    rest = (q, q, q, out, lse, None, 1, -1, -1, False, True, True, True)
    for dout, dlse, text in (
        (out[..., :3], None, r"dout must have the shape \(1, 2, 3, 4\)"),
        (out.double(), None, "dout has the wrong dtype"),
        (out, lse[0], r"dlse must have the shape \(1, 2, 3\)"),
        (out, lse.double(), "dlse has the wrong dtype"),
    ):
        with pytest.raises(ValueError, match=text):
            backward(dout, dlse, *rest)


@pytest.mark.targets(**FP32)
def test_mapped_backward_operator_is_a_loop(target: Target):
    inputs = inputs_of(target, B=2, H=4, H_kv=2)
    arguments = operands(inputs, cotangents_of(inputs))
    douts = torch.stack([arguments[0], 2 * arguments[0]], 1)
    rest = (0.3, 1, -1, 0, True, True, False, True)
    dq, _, dv = vmap(lambda dout: backward(dout, *arguments[1:], *rest), in_dims=1)(douts)
    for index in range(2):
        due = backward(douts[:, index], *arguments[1:], *rest)
        assert_bitwise_equal(dq[index], due[0])
        assert_bitwise_equal(dv[index], due[2])
