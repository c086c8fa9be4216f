# SPDX-License-Identifier: BSD-3-Clause
"""What this build can run, read from the one table that calls are dispatched by."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from . import _C, autograd, checks, ops
from .blocks import BLOCK_BYTES

_ANY_ARCH = 2**31 - 1


@dataclass(frozen=True)
class Runner:
    """One kernel family and the problems it takes; of several, the first in the table runs."""

    name: str
    device: str
    arch_min: int  # 10 * major + minor of the compute capability; 0 on the CPU
    arch_max: int
    dtypes: tuple[str, ...]
    head_dim_max: int | None  # of both D and D_v; None is any

    @property
    def device_text(self) -> str:
        """The device as a reader wants it, e.g. ``CUDA, compute capability 8.0 and above``."""
        if self.device == "cpu":
            return "CPU"
        low, high = (f"{arch // 10}.{arch % 10}" for arch in (self.arch_min, self.arch_max))
        upto = " and above" if self.arch_max == _ANY_ARCH else f" to {high}"
        return f"CUDA, compute capability {low}{upto if low != high else ''}"

    def cells(self) -> tuple[str, str, str, str]:
        """The fields as text, one for each column of the table."""
        head_dim = "any" if self.head_dim_max is None else f"up to {self.head_dim_max}"
        return self.name, self.device_text, ", ".join(self.dtypes), head_dim


class SupportTable(tuple[Runner, ...]):
    """The rows in the order they are tried; prints as a table."""

    __slots__ = ()
    HEADER = ("runner", "device", "dtypes", "head dims D, D_v")

    def __str__(self) -> str:
        """A table for the terminal."""
        rows = [self.HEADER, *(row.cells() for row in self)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        )
        return "\n".join(lines)

    __repr__ = __str__

    def to_markdown(self) -> str:
        """The same table in Markdown."""
        rows = [self.HEADER, ("---",) * len(self.HEADER), *(row.cells() for row in self)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def supported() -> SupportTable:
    """List what this build can run, fastest first.

    Example:
        >>> import online_attention
        >>> [row.name for row in online_attention.supported()][-1]
        'cpu.tiled'
    """
    return SupportTable(
        Runner(
            name=row["name"],
            device=row["device"],
            arch_min=row["arch_min"],
            arch_max=row["arch_max"],
            dtypes=tuple(row["dtypes"]),
            head_dim_max=row["head_dim_max"] or None,
        )
        for row in _C.supported()
    )


def explain(q: Any, k: Any, v: Any, **keywords: Any) -> str:
    """Say what ``attention(q, k, v, **keywords)`` would run, or why it would not.

    If a gradient may be asked for, one more sentence says what that takes. Nothing is computed, and
    nothing is raised for a call that is not supported.

    Example:
        >>> import torch, online_attention
        >>> q = k = v = torch.randn(1, 2, 3, 4)
        >>> online_attention.explain(q, k, v)
        'cpu.tiled runs this problem.'
    """
    try:
        settings = inspect.signature(ops.attention).bind(q, k, v, **keywords)
        settings.apply_defaults()
        keywords = dict(settings.kwargs)
        scale, bias, dropout_p = (keywords.pop(name) for name in ("scale", "bias", "dropout_p"))
        checks.check_keywords(**keywords)
        if all(isinstance(tensor, torch.Tensor) for tensor in (q, k, v)):
            q, k, v = ops.autocast(q, k, v)
            bias = ops.autocast_bias(bias) if isinstance(bias, torch.Tensor) else bias
        checks.check_call(checks.NAMES, q, k, v, scale, bias, dropout_p)
    except (TypeError, ValueError, NotImplementedError) as error:
        return f"Nothing runs this call: {error}"
    arch = 0
    if q.is_cuda:
        major, minor = torch.cuda.get_device_capability(q.device)
        arch = 10 * major + minor
    B, H, S_q, D = q.shape
    H_kv, S_kv, D_v = k.shape[1], k.shape[2], v.shape[3]
    dtype = str(q.dtype).removeprefix("torch.")
    text = _C.explain(q.device.type, arch, dtype, B, H, H_kv, S_q, S_kv, D, D_v)
    of_bias = autograd.needs_gradient(bias)
    if not (of_bias or autograd.is_active(q, k, v)):
        return text
    composed = "that of the bias, a second derivative" if of_bias else "a second derivative"
    return (
        f"{text} The gradients run in one operator; {composed}, and forward mode, run "
        "composed in torch operations over blocks of query rows, with memory for a few blocks of "
        f"{BLOCK_BYTES[q.device.type] >> 20} MiB of scores beside inputs and results."
    )
