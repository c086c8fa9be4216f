# SPDX-License-Identifier: BSD-3-Clause
"""Who is timed: ours, each SDPA backend, and optional peers, all behind one small interface."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from _bias import make_bias
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
Tensors = tuple[torch.Tensor, ...]  # q, k and v, or what a block has: see _block.py


@dataclass(frozen=True)
class Contender:
    """One implementation.

    bind: makes the call that is timed from a case and its q, k, v; everything that is not the
        attention itself (views, masks) happens here, outside the timing.
    out: takes what the call returned to an output of shape (B, H, S_q, D_v).
    context: entered around a block of calls, not around each one.
    no_gradients: why it has none; None if it has.
    """

    name: str
    bind: Callable[[Case, Tensors], Call]
    out: Callable[[Any], torch.Tensor] = lambda result: result
    context: Callable[[], AbstractContextManager[Any]] = nullcontext
    is_sdpa: bool = False
    no_gradients: str | None = None


@dataclass(frozen=True)
class Inputs:
    """q, k, v of one call; for the passes with gradients that of the output too, else None."""

    tensors: Tensors
    dout: torch.Tensor | None = None


def make_inputs(case: Case, dtype: str, device: torch.device, seed: int) -> Tensors:
    """Random normal q, k, v: laid out (B, S, H, D) in memory, passed as (B, H, S, D) views.

    This is how a model has them: a projection writes (B, S, H * D) and a transpose costs nothing.
    A cache of keys and values has the heads first.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def draw(length: int, heads: int, d: int) -> torch.Tensor:
        shape = (case.batch, length, heads, d)
        drawn = torch.randn(shape, generator=generator, device=device, dtype=TORCH_DTYPES[dtype])
        drawn = drawn.transpose(1, 2)
        return drawn.contiguous() if case.heads_first else drawn

    return (
        draw(case.s_q, case.heads, case.d),
        draw(case.s_kv, case.heads_kv, case.d),
        draw(case.s_kv, case.heads_kv, case.d_v),
    )


def _bind_ours(case: Case, tensors: Tensors, **keywords: Any) -> Call:
    import online_attention

    bias = make_bias(case, tensors[0].dtype, tensors[0].device)
    if bias is not None:
        keywords["bias"] = bias
    return partial(online_attention.attention, *tensors, causal=case.causal, **keywords)


def _bind_ours_as_sdpa(case: Case, tensors: Tensors) -> Call:
    if not case.masks_agree:
        raise NotImplementedError("its is_causal is aligned to the top left")
    import online_attention

    function = online_attention.scaled_dot_product_attention
    bias = make_bias(case, tensors[0].dtype, tensors[0].device)
    gqa = case.heads != case.heads_kv
    return partial(function, *tensors, attn_mask=bias, is_causal=case.causal, enable_gqa=gqa)


def _bind_sdpa(case: Case, tensors: Tensors) -> Call:
    q, k, v = tensors
    options: dict[str, Any] = {}
    if case.heads != case.heads_kv:
        options["enable_gqa"] = True
    bias = make_bias(case, q.dtype, q.device)
    if bias is not None and case.causal:
        raise NotImplementedError("it takes a mask or is_causal, not both")
    if bias is not None:
        options["attn_mask"] = bias
    elif case.causal and case.masks_agree:
        options["is_causal"] = True
    elif case.causal:
        # SDPA can say "bottom right" only with a mask tensor; it is made once, before the timing.
        visible = torch.ones(case.s_q, case.s_kv, dtype=torch.bool, device=q.device)
        options["attn_mask"] = visible.tril(case.s_kv - case.s_q)
    return partial(F.scaled_dot_product_attention, q, k, v, **options)


def _bind_fa3(case: Case, tensors: Tensors) -> Call:
    if case.bias != "none":
        raise NotImplementedError("it takes no mask tensor")
    module = importlib.import_module(FA3_MODULE)
    q, k, v = (x.transpose(1, 2) for x in tensors)
    return partial(module.flash_attn_func, q, k, v, causal=case.causal)


def _fa3_out(result: Any) -> torch.Tensor:
    """Some releases return (out, lse), others out alone; the layout is (B, S, H, D)."""
    out = result[0] if isinstance(result, tuple) else result
    return out.transpose(1, 2)


OURS = Contender("ours", _bind_ours)
OURS_WITH_LSE = Contender("ours + lse", partial(_bind_ours, return_lse=True), out=lambda r: r[0])
OURS_AS_SDPA = Contender("ours, as sdpa", _bind_ours_as_sdpa)
# Beside `ours` in torch's deterministic mode, which it does not follow.
OURS_ANY_ORDER = Contender("ours, any order", partial(_bind_ours, deterministic=False))


def _baseline(name: str) -> Contender:
    if name == "sdpa":
        return Contender(name, _bind_sdpa, is_sdpa=True)
    if name == "fa3":
        return Contender(
            name, _bind_fa3, out=_fa3_out, no_gradients="its package has the forward pass alone"
        )
    return Contender(
        name, _bind_sdpa, context=partial(sdpa_kernel, SDPA_BACKENDS[name]), is_sdpa=True
    )


def default_baselines(device_type: str, host_time: bool, which_pass: str) -> tuple[str, ...]:
    """The baselines a device can have.

    On a GPU plain SDPA is one of the backends listed beside it, so it is timed only where the
    choice itself costs: in the host's time. On the CPU it is what everyone calls.
    """
    if device_type == "cpu":
        return ("sdpa", "flash", "math")
    backends: tuple[str, ...] = tuple(SDPA_BACKENDS)
    if which_pass == "forward" and importlib.util.find_spec(FA3_MODULE) is not None:
        backends = (*backends, "fa3")
    return ("sdpa", *backends) if host_time else backends


def contenders(names: tuple[str, ...], host_time: bool, deterministic: bool) -> list[Contender]:
    """Ours first, then the baselines in the order asked for."""
    ours = [OURS]
    if host_time:
        ours += [OURS_WITH_LSE, OURS_AS_SDPA]
    if deterministic:
        ours.append(OURS_ANY_ORDER)
    return ours + [_baseline(name) for name in names]
