# SPDX-License-Identifier: BSD-3-Clause
"""What one call is: the forward pass, the backward pass alone, or both.

The backward pass alone is `torch.autograd.grad` on a graph that an earlier forward has left, which
is kept for the next call; that forward is not timed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import _block
from _cases import Case
from _contenders import Call, Contender, Inputs, make_inputs
from _gradients import GRADIENTS


def gradients_wanted(which_pass: str) -> bool:
    return which_pass != "forward"


def draw_inputs(case: Case, dtype: str, device: torch.device, seed: int, gradients: bool) -> Inputs:
    """Random inputs, in memory as a model has them; they require gradients if wanted."""
    make = _block.make_tensors if case.block else make_inputs
    tensors = make(case, dtype, device, seed)
    if not gradients:
        return Inputs(tensors)
    # Any other seed will do: a gradient equal to q or x would be a special case.
    like_out = case if case.block else replace(case, d=case.d_v)
    dout = make(like_out, dtype, device, seed=seed + 1_000_003)[0]
    for tensor in tensors:
        tensor.requires_grad_()
    return Inputs(tensors, dout)


@contextmanager
def entered(contender: Contender, which_pass: str) -> Iterator[None]:
    """What surrounds a block of calls: the contender's own context, and autograd if it is timed."""
    with torch.set_grad_enabled(gradients_wanted(which_pass)), contender.context():
        yield


def bind(contender: Contender, case: Case, inputs: Inputs, which_pass: str) -> Call:
    """The call that is timed; to be made, as it is called, inside `entered`.

    It returns what the contender returns, or the gradients of the inputs' tensors.
    """
    forward = contender.bind(case, inputs.tensors)
    if not gradients_wanted(which_pass):
        return forward
    out, gradients = contender.out, partial(torch.autograd.grad, inputs=inputs.tensors)
    dout = inputs.dout
    if which_pass == "forward_backward":
        return lambda: gradients(out(forward()), grad_outputs=dout)
    return partial(gradients, out(forward()), grad_outputs=dout, retain_graph=True)


def tensors_of(
    contender: Contender, case: Case, result: Any, which_pass: str
) -> dict[str, torch.Tensor]:
    """What a call returned, by name: all that is checked."""
    if gradients_wanted(which_pass):
        names = _block.gradient_names(case) if case.block else GRADIENTS
        return dict(zip(names, result, strict=True))
    return {"out": contender.out(result)}


@contextmanager
def deterministic_mode(wanted: bool) -> Iterator[None]:
    """torch's deterministic mode, in which a baseline without such a kernel refuses the case."""
    if not wanted:
        with nullcontext():
            yield
        return
    # cuBLAS reads it when it is first used; without it torch refuses every matmul in this mode.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    # Filling every new tensor with NaN would be timed, and is not what determinism costs.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled  # type: ignore[attr-defined]
        torch.use_deterministic_algorithms(before)
