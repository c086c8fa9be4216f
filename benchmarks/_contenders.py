# SPDX-License-Identifier: BSD-3-Clause
"""Who is timed: ours, each SDPA backend, and optional peers, all behind one small interface."""

from __future__ import annotations

import importlib
import importlib.util
import re
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from _cases import Case

TORCH_DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}

SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
BASELINES = ("sdpa", *SDPA_BACKENDS, "fa3")
FA3_MODULE = "fa3_fwd_interface"

Call = Callable[[], Any]
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Contender:
    """One implementation.

    bind: makes the call that is timed from a case and its q, k, v; everything that is not the
        attention itself (views, masks) happens here, outside the timing.
    out: takes what the call returned to an output of shape (B, H, S_q, D_v).
    context: entered around a block of calls, not around each one.
    """

    name: str
    bind: Callable[[Case, Tensors], Call]
    out: Callable[[Any], torch.Tensor] = lambda result: result
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    is_sdpa: bool = False


def make_inputs(case: Case, dtype: str, device: torch.device, seed: int) -> Tensors:
    """Random normal q, k, v: laid out (B, S, H, D) in memory, passed as (B, H, S, D) views.

    This is how a model has them: a projection writes (B, S, H * D) and a transpose costs nothing.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(length: int, heads: int, d: int) -> torch.Tensor:
        shape = (case.batch, length, heads, d)
        drawn = torch.randn(shape, generator=generator, device=device, dtype=TORCH_DTYPES[dtype])
        return drawn.transpose(1, 2)

    return (
        draw(case.s_q, case.heads, case.d),
        draw(case.s_kv, case.heads_kv, case.d),
        draw(case.s_kv, case.heads_kv, case.d_v),
    )


def _bind_ours(case: Case, tensors: Tensors, return_lse: bool = False) -> Call:
    import online_attention

    q, k, v = tensors
    if return_lse:
        return partial(online_attention.attention, q, k, v, causal=case.causal, return_lse=True)
    return partial(online_attention.attention, q, k, v, causal=case.causal)


def _bind_sdpa(case: Case, tensors: Tensors) -> Call:
    q, k, v = tensors
    options: dict[str, Any] = {}
    if case.heads != case.heads_kv:
        options["enable_gqa"] = True
    if case.causal and case.masks_agree:
        options["is_causal"] = True
    elif case.causal:
        # SDPA can say "bottom right" only with a mask tensor; it is made once, before the timing.
        visible = torch.ones(case.s_q, case.s_kv, dtype=torch.bool, device=q.device)
        options["attn_mask"] = visible.tril(case.s_kv - case.s_q)
    return partial(F.scaled_dot_product_attention, q, k, v, **options)


def _bind_fa3(case: Case, tensors: Tensors) -> Call:
    module = importlib.import_module(FA3_MODULE)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    return partial(module.flash_attn_func, q, k, v, causal=case.causal)


def _fa3_out(result: Any) -> torch.Tensor:
    """Some releases return (out, lse), others out alone; the layout is (B, S, H, D)."""
    out = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)


OURS = Contender("ours", _bind_ours)
OURS_WITH_LSE = Contender("ours + lse", partial(_bind_ours, return_lse=True), out=lambda r: r[0])


def _baseline(name: str) -> Contender:
    if name == "sdpa":
        return Contender(name, _bind_sdpa, is_sdpa=True)
    if name == "fa3":
        return Contender(name, _bind_fa3, out=_fa3_out)
    return Contender(
        name, _bind_sdpa, context=partial(sdpa_kernel, SDPA_BACKENDS[name]), is_sdpa=True
    )


def default_baselines(device_type: str, host_time: bool) -> tuple[str, ...]:
    """The baselines a device can have.

    On a GPU plain SDPA is one of the backends listed beside it, so it is timed only where the
    choice itself costs: in the host's time. On the CPU it is what everyone calls.
    """
    if device_type == "cpu":
        return ("sdpa", "flash", "math")
    backends: tuple[str, ...] = tuple(SDPA_BACKENDS)
    if importlib.util.find_spec(FA3_MODULE) is not None:
        backends = (*backends, "fa3")
    return ("sdpa", *backends) if host_time else backends


def contenders(names: tuple[str, ...], host_time: bool) -> list[Contender]:
    """Ours first, then the baselines in the order asked for."""
    ours = [OURS, OURS_WITH_LSE] if host_time else [OURS]
    return ours + [_baseline(name) for name in names]


def math_does_not_fit(case: Case, device: torch.device) -> str | None:
    """A sentence if the score matrix of the math backend would not fit, else None.

    It keeps scores, weights and one temporary, in fp32 whatever the 16-bit input dtype.
    """
    needed = 3 * 4 * case.batch * case.heads * case.s_q * case.s_kv
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


def first_call(contender: Contender, case: Case, tensors: Tensors) -> tuple[Any, Refusal | None]:
    """Calls once: (what it returned, None), or (None, why this contender does not take the case).

    SDPA says why a backend refuses only in warnings, so they are collected into the reason.
    """
    if contender.name == "math":
        reason = math_does_not_fit(case, tensors[0].device)
        if reason:
            return None, Refusal(reason)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with torch.no_grad(), contender.context():
                result = contender.bind(case, tensors)()
            if tensors[0].is_cuda:
                torch.cuda.synchronize()
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return None, Refusal("out of memory")
        except (RuntimeError, ValueError, TypeError, NotImplementedError, ImportError) as error:
            said = [_sentence(str(warning.message)) for warning in caught]
            # Headings, and the other backends' reason, that they are switched off, say nothing.
            noise = ("not used because:", "runtime disabled.")
            reasons = [text for text in said if text and not text.endswith(noise)]
            # Every other backend explains itself too; the one asked for is named in its own.
            own = [text for text in reasons if contender.name in text.lower()]
            chosen = own or reasons or [_sentence(str(error)) or type(error).__name__]
            not_built = isinstance(error, NotImplementedError)
            return None, Refusal(" ".join(dict.fromkeys(chosen)), not_built)
    return result, None


def _sentence(message: str) -> str:
    """The first line of a message, without the source position of the build it came from."""
    lines = message.strip().splitlines()
    return re.sub(r"\s*\(Triggered internally at .*", "", lines[0]).strip() if lines else ""
