# SPDX-License-Identifier: BSD-3-Clause
"""Who takes a case, and why the others do not."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from _cases import Case
from _contenders import Contender, Inputs
from _passes import bind, entered, gradients_wanted

# Matrices of B H S_q S_kv elements that the math backend has at a time: scores, weights and one
# temporary; backward the weights, two gradients and their temporaries.
MATH_MATRICES = {"forward": 3, "backward": 6, "forward_backward": 6}


def math_does_not_fit(case: Case, device: torch.device, which_pass: str) -> str | None:
    """A sentence if the matrices of the math backend would not fit, else None.

    They are in fp32 whatever the 16-bit input dtype.
    """
    needed = MATH_MATRICES[which_pass] * 4 * case.batch * case.heads * case.s_q * case.s_kv
    free = free_memory(device)
    if needed <= free / 2:
        return None
    return (
        f"not timed: its score matrix and temporaries need about {needed / 2**30:.0f} GiB, "
        f"more than half of the {free / 2**30:.0f} GiB free"
    )


def free_memory(device: torch.device) -> int:
    """Free bytes of the device; on a CPU the kernel's estimate, or 4 GiB where there is none."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = dict(line.split(":", 1) for line in meminfo)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 4 * 2**30


@dataclass(frozen=True)
class Refusal:
    """Why a contender did not take a case; `not_built` if it says so itself."""

    reason: str
    not_built: bool = False


def first_call(
    contender: Contender, case: Case, inputs: Inputs, which_pass: str = "forward"
) -> tuple[Any, Refusal | None]:
    """Calls once: (what it returned, None), or (None, why this contender does not take the case).

    SDPA says why a backend refuses only in warnings, so they are collected into the reason.
    """
    device = inputs.tensors[0].device
    if gradients_wanted(which_pass) and contender.no_gradients:
        return None, Refusal(f"not timed: {contender.no_gradients}")
    if contender.name == "math":
        reason = math_does_not_fit(case, device, which_pass)
        if reason:
            return None, Refusal(reason)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with entered(contender, which_pass):
                result = bind(contender, case, inputs, which_pass)()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None, Refusal("out of memory")
        except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
            said = [_sentence(str(warning.message)) for warning in caught]
            return None, Refusal(
                _reason(contender, said, error), isinstance(error, NotImplementedError)
            )
    return result, None


def _reason(contender: Contender, said: list[str], error: Exception) -> str:
    # Headings, and the other backends' reason, that they are switched off, say nothing.
    noise = ("not used because:", "runtime disabled.")
    reasons = [text for text in said if text and not text.endswith(noise)]
    # Every other backend explains itself too; the one asked for is named in its own.
    own = [text for text in reasons if contender.name in text.lower()]
    chosen = own or reasons or [_sentence(str(error)) or type(error).__name__]
    return " ".join(dict.fromkeys(chosen))


def _sentence(message: str) -> str:
    """The first line of a message, without the source position of the build it came from."""
    lines = message.strip().splitlines()
    return re.sub(r"\s*\(Triggered internally at .*", "", lines[0]).strip() if lines else ""
