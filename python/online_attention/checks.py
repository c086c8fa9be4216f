# SPDX-License-Identifier: BSD-3-Clause
"""What a call must satisfy. A valid call passes one condition; only a failing one is explained.

Every error is one sentence: the argument, what it must be, what it is, and what to do.
"""

from __future__ import annotations

import math
import numbers
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _C

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
DEVICES = frozenset({"cpu", "cuda"} if _C.built_with_cuda() else {"cpu"})
SIZE_LIMIT = 2**31

_SYMBOLS = {"q": "(B, H, S_q, D)", "k": "(B, H_kv, S_kv, D)", "v": "(B, H_kv, S_kv, D_v)"}


def are_inputs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether three tensors are of a kind that attention takes, whatever their shapes."""
    dtype, device = q.dtype, q.device
    return (
        k.dtype is dtype
        and v.dtype is dtype
        and dtype in DTYPES
        and k.device == device
        and v.device == device
        and device.type in DEVICES
        and q.layout is k.layout is v.layout is torch.strided
    )


def is_problem(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the shapes of three tensors fit each other."""
    q_shape, k_shape, v_shape = q.shape, k.shape, v.shape
    if not (len(q_shape) == len(k_shape) == len(v_shape) == 4):
        return False
    B, H, S_q, D = q_shape
    B_k, H_kv, S_kv, D_k = k_shape
    B_v, H_v, S_v, D_v = v_shape
    return (
        B == B_k == B_v
        and D == D_k
        and H_kv == H_v
        and S_kv == S_v
        and (H == H_kv or (H_kv != 0 and H % H_kv == 0))
        and 0 < D < SIZE_LIMIT
        and 0 < D_v < SIZE_LIMIT
        and S_q < SIZE_LIMIT
        and S_kv < SIZE_LIMIT
    )


def check_tensors(**tensors: object) -> None:
    """Refuse anything but tensors, by name."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"{name} must be a torch.Tensor, but is {_kind(value)}: "
                "convert it with torch.as_tensor()."
            )


def check_inputs(names: tuple[str, str, str], *tensors: Tensor) -> None:
    """Refuse three tensors of which `are_inputs` is false."""
    first_name, first = names[0], tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        if tensor.layout is not torch.strided:
            raise TypeError(
                f"{name} must be a dense tensor, but its layout is {tensor.layout}: "
                "call .to_dense() first."
            )
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, but is "
                f"{_dtype(tensor)}: convert it with .to()."
            )
        if tensor.dtype is not first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {_dtype(first)}, but is "
                f"{_dtype(tensor)}: convert it with .to({first_name}.dtype)."
            )
        if tensor.device.type == "cuda" and "cuda" not in DEVICES:
            raise NotImplementedError(
                f"{name} is a CUDA tensor, but this build of online_attention holds no CUDA "
                "kernels: reinstall it without ONLINE_ATTENTION_CUDA=0, or move the inputs to "
                "the CPU."
            )
        if tensor.device.type not in DEVICES:
            raise NotImplementedError(
                f"{name} must be on one of the devices {', '.join(sorted(DEVICES))}, but is on "
                f"{tensor.device}: move it with .to()."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"{name} must be on the device of {first_name}, {first.device}, but is on "
                f"{tensor.device}: move it with .to({first_name}.device)."
            )


def check_problem(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse three tensors of which `is_problem` is false."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions {_SYMBOLS[name]}, but its shape is "
                f"{tuple(tensor.shape)}: add or merge dimensions with .reshape()."
            )
    B, H, _, D = q.shape
    _, H_kv, S_kv, _ = k.shape
    for name, tensor, dim, symbol, of, size in (
        ("k", k, 0, "B", "q", B),
        ("v", v, 0, "B", "q", B),
        ("k", k, 3, "D", "q", D),
        ("v", v, 1, "H_kv", "k", H_kv),
        ("v", v, 2, "S_kv", "k", S_kv),
    ):
        if tensor.shape[dim] != size:
            raise ValueError(
                f"{name} must have shape {_SYMBOLS[name]} with {symbol} = {size} as in {of}, but "
                f"its shape is {tuple(tensor.shape)}: make {name}.shape[{dim}] equal to {size}."
            )
    if H != H_kv and (H_kv == 0 or H % H_kv != 0):
        raise ValueError(
            f"H must be a multiple of H_kv, but q has H = {H} heads and k has H_kv = {H_kv}: "
            "repeat or drop key and value heads."
        )
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[3] == 0:
            raise ValueError(
                f"{name} must have a last dimension of at least 1, but its shape is "
                f"{tuple(tensor.shape)}."
            )
    raise ValueError(
        "S_q, S_kv, D and D_v must be below 2^31, but the shapes are "
        f"{tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}: split the sequence and use "
        "online_attention.merge."
    )


def check_flags(**flags: object) -> None:
    """Refuse anything but booleans, by name."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, but is {_kind(value)}.")


def check_scale(scale: Any) -> float:
    """The scale as a float, if it is a finite number."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"scale must be a number or None, but is {_kind(scale)}: pass a Python float, or None "
            "for 1/sqrt(D)."
        )
    value = float(scale)
    if not math.isfinite(value):
        raise ValueError(f"scale must be finite, but is {value}: pass None for 1/sqrt(D).")
    return value


def check_unbuilt(**keywords: object) -> None:
    """Refuse keywords that ask for something this version does not compute, by name."""
    for name, value in keywords.items():
        if name in ("softcap", "dropout_p"):
            if isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(f"{name} must be a number, but is {_kind(value)}.")
            if value == 0:
                continue
        elif value is None:
            continue
        raise NotImplementedError(
            f"{name} is not built yet in this version of online_attention: leave it out, or use "
            "torch.nn.functional.scaled_dot_product_attention."
        )


def needs_gradient(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether autograd, backward or forward, would have to differentiate the result."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in (q, k, v))


def refuse_gradient() -> NoReturn:
    """Say that gradients are not built."""
    raise NotImplementedError(
        "q, k or v requires a gradient, which is not built yet in this version of "
        "online_attention: call it under torch.no_grad(), or detach the inputs."
    )


def _kind(value: object) -> str:
    text = repr(value)
    kind = type(value).__name__
    return kind if len(text) > 40 or isinstance(value, Tensor) else f"{text} ({kind})"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
