# SPDX-License-Identifier: BSD-3-Clause
"""The rows of `online_attention.supported()` as test parameters: one target for each row and dtype.

A target that this machine cannot run keeps its place in the list and says why, so that a missing
GPU is counted as skips, never as silence.
"""

from __future__ import annotations

import functools
import itertools
import os
from dataclasses import dataclass

import pytest
import torch

import online_attention
from cases import Case

REQUIRE_CUDA = os.environ.get("ONLINE_ATTENTION_REQUIRE_CUDA") == "1"


@dataclass(frozen=True)
class Target:
    row: str
    device: str
    dtype: torch.dtype
    head_dims: range  # of max(D, D_v): those this row takes and no earlier row does
    missing: str = ""  # why it cannot run here

    @property
    def id(self) -> str:
        return f"{self.row}-{str(self.dtype).removeprefix('torch.')}"

    @property
    def lse_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def head_dim(self) -> int:
        """One that the row takes; odd where that is possible, to leave tiles half full."""
        return 40 if 40 in self.head_dims else self.head_dims[0] + 3

    def takes(self, D: int, D_v: int) -> bool:
        return max(D, D_v) in self.head_dims

    def takes_case(self, case: Case) -> bool:
        D = self.head_dim if case.D is None else case.D
        return self.takes(D, D if case.D_v is None else case.D_v)


ANY_HEAD_DIM = 1 << 20
ALL_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ALL_DEVICES = "cpu cuda"


def _compute_capability() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _why_no_cuda(has_kernels: bool) -> str:
    if not has_kernels:
        return "this build holds no CUDA kernels"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""


@functools.cache
def targets() -> tuple[Target, ...]:
    table = online_attention.supported()
    missing = _why_no_cuda(any(row.device == "cuda" for row in table))
    arch = 0 if missing else _compute_capability()
    found: list[Target] = []
    taken: dict[tuple[str, str], int] = {}  # the largest head dim an earlier row takes
    for row in table:
        is_cuda = row.device == "cuda"
        if is_cuda and not missing and not row.arch_min <= arch <= row.arch_max:
            continue  # made for other GPUs
        for dtype in row.dtypes:
            first = taken.get((row.device, dtype), 0) + 1
            last = row.head_dim_max or ANY_HEAD_DIM
            if first > last:
                continue
            if not missing or not is_cuda:
                taken[row.device, dtype] = last
            found.append(
                Target(
                    row.name,
                    row.device,
                    getattr(torch, dtype),
                    range(first, last + 1),
                    missing if is_cuda else "",
                )
            )
    if not any(target.device == "cuda" for target in found):
        reason = missing or "no row of this build takes this GPU"
        found.append(Target("cuda", "cuda", torch.float16, range(1, ANY_HEAD_DIM), reason))
    return tuple(found)


def marks_of(target: Target) -> list[pytest.MarkDecorator]:
    return [pytest.mark.cuda] if target.device == "cuda" else []


def parameters(
    cases: list[Case] | None, dtypes: tuple[torch.dtype, ...] | None, device: str | None
) -> list[object]:
    """The targets, or every case with every target whose row runs it."""
    params: list[object] = []
    chosen = [
        target
        for target in targets()
        if (dtypes is None or target.dtype in dtypes)
        and (device is None or target.device == device)
    ]
    if cases is None:
        return [pytest.param(target, id=target.id, marks=marks_of(target)) for target in chosen]
    for target in chosen:
        runs = (case for case in cases if target.takes_case(case))
        for case in itertools.islice(runs, 1 if target.missing else None):
            name = f"{target.id}-{case.name}"
            params.append(pytest.param(target, case, id=name, marks=marks_of(target)))
    return params
