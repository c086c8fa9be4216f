# SPDX-License-Identifier: BSD-3-Clause
"""Is it right? Errors against an fp64 reference, before anything is timed.

Forward that is the output, and the log-sum-exp of ours; with gradients dq, dk and dv. Each tensor
has an error and a limit of its own. What they are, `_reference` and `_gradients` say, and `_block`
for the block of a transformer.
"""

from __future__ import annotations

import math
from typing import Any

import torch

import _block
import _gradients
import _reference
from _cases import Case
from _contenders import OURS_WITH_LSE, Contender, Inputs
from _passes import gradients_wanted, tensors_of
from _reference import relative_error
from _refusals import Refusal, first_call

Tensors = dict[str, torch.Tensor]


def make_reference(
    case: Case, dtype: str, inputs: Inputs
) -> _reference.ForwardReference | _gradients.GradientReference | _block.BlockReference:
    if case.block:
        return _block.make_reference(case, dtype, inputs)
    if inputs.dout is None:
        return _reference.make_reference(case, dtype, inputs.tensors)
    return _gradients.make_reference(case, dtype, inputs.tensors, inputs.dout)


def _poison(case: Case, inputs: Inputs) -> None:
    """Leaves NaN in the blocks that the allocator will probably hand out for the next results.

    An element that is never written then shows as NaN and not as a right old result.
    """
    like = inputs.tensors[0]
    shapes: list[tuple[int, ...]] = [(case.batch, case.s_q, case.heads, case.d_v)]
    if inputs.dout is not None:
        shapes += [tuple(tensor.shape) for tensor in inputs.tensors]
    blocks = [torch.full(s, math.nan, dtype=like.dtype, device=like.device) for s in shapes]
    del blocks  # all of them at once, as a call needs them


def check(
    case: Case, dtype: str, inputs: Inputs, takers: list[Contender], which_pass: str
) -> tuple[dict[str, Any], dict[str, Refusal]]:
    """Calls every contender once.

    Returns the check, ready for JSON, and for each contender that does not take the case the
    reason. `check["wrong"]` is a list of sentences, empty if ours is right.
    """
    reference = make_reference(case, dtype, inputs)
    errors: dict[str, dict[str, float]] = {}
    refused: dict[str, Refusal] = {}
    ours: Tensors | None = None
    against: tuple[str, dict[str, float]] | None = None
    for contender in takers:
        _poison(case, inputs)
        result, refusal = first_call(contender, case, inputs, which_pass)
        if refusal is not None:
            refused[contender.name] = refusal
            continue
        tensors = tensors_of(contender, case, result, which_pass)
        errors[contender.name] = reference.errors(tensors)
        if contender.name == "ours":
            ours = tensors
        elif contender.is_sdpa and ours is not None and against is None:
            # The whole result this time, in case only a sample of it met the reference.
            differences = {name: relative_error(ours[name], tensors[name]) for name in tensors}
            against = (contender.name, differences)
        del result, tensors
    wrong = []
    if ours is not None and not (case.block or gradients_wanted(which_pass)):
        result, refusal = first_call(OURS_WITH_LSE, case, inputs)
        if refusal is None:
            errors["ours"] |= reference.errors({"lse": result[1]})
        else:
            wrong.append(f"return_lse=True failed: {refusal.reason}")
    if ours is not None and torch.are_deterministic_algorithms_enabled():
        wrong += _what_differs(takers[0], case, inputs, ours, which_pass)
    found = {
        "checked": reference.checked,
        "of": reference.of,
        "unit": reference.unit,
        "limits": reference.limits,
        "errors": errors,
        "difference_to": against,
    }
    return found | {"wrong": _what_is_wrong(found) + wrong}, refused


def _what_differs(
    ours: Contender, case: Case, inputs: Inputs, before: Tensors, which_pass: str
) -> list[str]:
    """In deterministic mode a second call must give the same bits."""
    result, refusal = first_call(ours, case, inputs, which_pass)
    if refusal is not None:
        return [f"a second call failed: {refusal.reason}"]
    again = tensors_of(ours, case, result, which_pass)
    return [
        f"{name} of ours differs from call to call in deterministic mode"
        for name, tensor in before.items()
        if not torch.equal(tensor, again[name])
    ]


def _what_is_wrong(found: dict[str, Any]) -> list[str]:
    limits = found["limits"]
    wrong = []
    for contender, errors in found["errors"].items():
        if not contender.startswith("ours"):
            continue
        for name, error in errors.items():
            if not error <= limits[name]:
                said = f"is off by {error:.1e}, allowed is {limits[name]:.1e}"
                wrong.append(f"{name} of {contender} {said}")
    if found["difference_to"] is not None:
        peer, differences = found["difference_to"]
        for name, difference in differences.items():
            # Two right results can each be a limit away from the truth, on opposite sides.
            allowed = 2 * limits[name]
            if found["errors"][peer][name] <= limits[name] and not difference <= allowed:
                said = f"differs from {peer} by {difference:.1e}, allowed is {allowed:.1e}"
                wrong.append(f"{name} {said}")
    return wrong
