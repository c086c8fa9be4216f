# SPDX-License-Identifier: BSD-3-Clause
"""What a call must satisfy, in sentences.

An error names argument, what it must be, what it is, and what to do.
"""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from . import _C

DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
DEVICES = frozenset({"cpu", "cuda"} if _C.built_with_cuda() else {"cpu"})
LENGTH_MAX = 2**31 - 1024  # kMaxLength of csrc/core/problem.h
HEADS_MAX = 2**31 - 1

Names = tuple[str, ...]
NAMES: Names = ("q", "k", "v", "bias")
_SHAPES = ("(B, H, S_q, D)", "(B, H_kv, S_kv, D)", "(B, H_kv, S_kv, D_v)")


def fault_of_call(names: Names, *call: object) -> Exception | None:
    """What `check_call` would raise."""
    try:
        check_call(names, *call)
    except (TypeError, ValueError, NotImplementedError) as error:
        return error
    return None


def check_call(
    names: Names,
    q: Any,
    k: Any,
    v: Any,
    scale: object,
    bias: Any = None,
    dropout_p: object = 0.0,
) -> None:
    """Refuse whatever the operator refuses."""
    tensors = (q, k, v)
    check_tensors(names[:3], *tensors)
    check_shapes(names[:3], *tensors)
    check_limits(names[:3], *tensors)
    if scale is not None:
        check_scale(scale)
    if bias is not None:
        check_bias(names, q, k, bias)
    check_dropout(dropout_p)


def check_tensors(names: Names, *tensors: Any) -> None:
    """Refuse what is no tensor, and layouts, dtypes and devices not taken or not equal."""
    for name, value in zip(names, tensors, strict=True):
        check_is_tensor(name, value)
    first_name, first = names[0], tensors[0]
    for name, tensor in zip(names, tensors, strict=True):
        check_is_dense(name, tensor)
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16, float32 or float64, but is "
                f"{_dtype(tensor)}: convert it with .to()."
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"{name} must have the dtype of {first_name}, {_dtype(first)}, but is "
                f"{_dtype(tensor)}: convert it with .to({first_name}.dtype)."
            )
        if tensor.device.type == "cuda" and "cuda" not in DEVICES:
            raise NotImplementedError(
                f"{name} is a CUDA tensor, but this build of online_attention holds no CUDA "
                "kernels: reinstall it with a CUDA compiler and without ONLINE_ATTENTION_CUDA=0, "
                "or move the inputs to the CPU."
            )
        if tensor.device.type not in DEVICES:
            raise NotImplementedError(
                f"{name} must be on a device of type {' or '.join(sorted(DEVICES))}, but is on "
                f"{tensor.device}: move it with .to()."
            )
        check_device(name, tensor, first_name, first)


def check_is_tensor(name: str, value: object) -> None:
    """Refuse what is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, but is {_kind(value)}: "
            "convert it with torch.as_tensor()."
        )


def check_is_dense(name: str, tensor: Tensor) -> None:
    """Refuse sparse and nested tensors."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "it is nested" if tensor.is_nested else f"its layout is {tensor.layout}"
        raise TypeError(
            f"{name} must be a dense tensor, but {kind}: call .to_dense() or pad it first."
        )


def check_device(name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    """Refuse a tensor that is not where the first one is."""
    if tensor.device != first.device:
        raise ValueError(
            f"{name} must be on the device of {first_name}, {first.device}, but is on "
            f"{tensor.device}: move it with .to({first_name}.device)."
        )


def check_bias(names: Names, q: Tensor, k: Tensor, bias: Any) -> None:
    """Refuse a bias that does not fit the scores of q (B, H, S_q, D) and k (B, H_kv, S_kv, D)."""
    name = names[3]
    check_is_tensor(name, bias)
    check_is_dense(name, bias)
    if bias.dtype not in (torch.bool, torch.float32, q.dtype):
        own = "" if q.dtype == torch.float32 else f"of the dtype of {names[0]}, {_dtype(q)}, or "
        raise TypeError(
            f"{name} must be boolean, {own}float32, but is {_dtype(bias)}: convert it with "
            f".bool() or .to({names[0]}.dtype)."
        )
    check_device(name, bias, names[0], q)
    check_broadcasts(name, bias, (*q.shape[:3], k.shape[2]), "(B, H, S_q, S_kv)")


def check_broadcasts(name: str, tensor: Tensor, shape: tuple[int, ...], symbols: str) -> None:
    """Refuse a tensor that does not broadcast to the shape."""
    sizes = zip(reversed(tensor.shape), reversed(shape), strict=False)
    if tensor.dim() > len(shape) or any(own not in (1, size) for own, size in sizes):
        raise ValueError(
            f"{name} must be broadcastable to {symbols} = {tuple(shape)}, but its shape is "
            f"{tuple(tensor.shape)}: make each size 1 or equal, counted from the last."
        )


def check_shapes(names: Names, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Refuse shapes that are no attention problem."""
    for name, shape, tensor in zip(names, _SHAPES, (q, k, v), strict=True):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions {shape}, but its shape is {tuple(tensor.shape)}: "
                "add or merge dimensions with .reshape()."
            )
    H, H_kv = q.shape[1], k.shape[1]
    check_sizes(names, (q, k, v), ((1, 0, 0, "B"), (2, 0, 0, "B"), (2, 1, 1, "H_kv")))
    check_sizes(names, (q, k, v), ((1, 3, 0, "D"), (2, 2, 1, "S_kv")))
    if H_kv != H and (H_kv == 0 or H % H_kv != 0):
        raise ValueError(
            f"H must be a multiple of H_kv, but {names[0]} has H = {H} heads and {names[1]} has "
            f"H_kv = {H_kv}: repeat or drop heads of {names[1]} and {names[2]}."
        )
    for name, tensor in zip(names, (q, k, v), strict=True):
        if tensor.shape[3] < 1:
            raise ValueError(
                f"{name} must have a last dimension of at least 1, but its shape is "
                f"{tuple(tensor.shape)}."
            )


def check_limits(names: Names, *tensors: Tensor) -> None:
    """Refuse sizes that the kernels do not count."""
    for name, shape, tensor in zip(names, _SHAPES, tensors, strict=True):
        if tensor.shape[2] > LENGTH_MAX or tensor.shape[3] > LENGTH_MAX:
            raise ValueError(
                f"{name} must have a shape {shape} whose last two sizes are at most {LENGTH_MAX}, "
                f"but its shape is {tuple(tensor.shape)}: split the sequence and use "
                "online_attention.merge."
            )
    if tensors[0].shape[0] * tensors[0].shape[1] > HEADS_MAX:
        raise ValueError(
            f"B * H must be below 2^31, but {names[0]} has the shape {tuple(tensors[0].shape)}: "
            "split the batch."
        )


def check_sizes(
    names: Names,
    tensors: tuple[Tensor, Tensor, Tensor],
    equalities: tuple[tuple[int, int, int, str], ...],
) -> None:
    """Refuse sizes that differ.

    An equality is the index of a tensor, a dimension, the index of the tensor that has the
    expected size there, and the symbol of that size.
    """
    for index, dim, reference, symbol in equalities:
        actual, expected = tensors[index].shape[dim], tensors[reference].shape[dim]
        if actual != expected:
            raise ValueError(
                f"{names[index]} must have {symbol} = {expected} as {names[reference]}, but "
                f"{names[index]}.shape[{dim}] is {actual} (shape "
                f"{tuple(tensors[index].shape)}): make the two sizes equal."
            )


def check_keywords(
    *, causal: object, return_lse: object, deterministic: object, **unbuilt: object
) -> None:
    """Refuse keywords of a wrong type and those that ask for what is not built yet."""
    check_flags(causal=causal, return_lse=return_lse)
    if deterministic is not None:
        check_flags(deterministic=deterministic)
    check_unbuilt(**unbuilt)


def check_flags(**flags: object) -> None:
    """Refuse anything but booleans, by name."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, but is {_kind(value)}.")


def check_scale(scale: object, name: str = "scale") -> float:
    """The scale as a float, if it is a finite number; `name` is the argument's."""
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(
            f"{name} must be a number or None, but is {_kind(scale)}: pass a Python float, or None "
            "for 1/sqrt(D)."
        )
    value = float(scale)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, but is {value}: pass None for 1/sqrt(D).")
    return value


def check_dropout(dropout_p: object) -> float:
    """The probability as a float, if it is one and below 1."""
    if isinstance(dropout_p, bool) or not isinstance(dropout_p, numbers.Real):
        raise TypeError(
            f"dropout_p must be a number, but is {_kind(dropout_p)}: pass a Python float."
        )
    value = float(dropout_p)
    if not 0 <= value < 1:
        raise ValueError(
            f"dropout_p must be at least 0 and below 1, but is {value}: pass the probability of "
            "dropping, 0 for none."
        )
    return value


def check_unbuilt(**keywords: object) -> None:
    """Refuse keywords that ask for something this version does not compute, by name."""
    for name, value in keywords.items():
        if name == "softcap":
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


def _kind(value: object) -> str:
    text = repr(value)
    kind = type(value).__name__
    return kind if len(text) > 40 or isinstance(value, Tensor) else f"{text} ({kind})"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
