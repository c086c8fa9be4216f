# SPDX-License-Identifier: BSD-3-Clause
"""The functions of the package flash-attn 2.8, by name, order and default of every parameter.

What they share:

- Tensors are ``(B, S, H, D)``: read in place, and so is the result written. Any dtype, device and
  head dimension that :func:`online_attention.attention` takes is fine.
- ``softmax_scale=None`` means ``1 / sqrt(D)``; a negative one is taken too.
- ``causal=True`` is aligned at the bottom right: the last query sees every key.
- ``window_size=(left, right)``: query ``i`` sees the keys from ``i + S_k - S_q - left`` to
  ``i + S_k - S_q + right``; a negative number is unbounded, ``causal=True`` makes ``right`` 0. The
  two integers come in a tuple, a list or a tensor, which is read on the host. A window that hides
  no more than the causal mask does is computed; a narrower one is not built yet.
- ``dropout_p`` drops probabilities whenever it is not 0: pass 0 in evaluation. Which ones are
  dropped follows torch's generator, not the numbers that flash-attn would draw.
- ``softcap`` (above 0) and ``alibi_slopes`` are not built yet.
- ``deterministic=True`` asks for gradients that are the same from run to run; so does torch's
  deterministic mode, which flash-attn does not look at.
- ``return_attn_probs=True`` returns ``(out, softmax_lse, None)``. ``softmax_lse`` is ``(B, H,
  S_q)``, the natural logarithm of the sum of ``exp(score)``, float32 (float64 for float64). It is
  differentiable, and ``-inf`` for a query that sees no key, where flash-attn has ``+inf`` and no
  gradient. The third is where flash-attn has the probabilities with the dropout pattern in their
  signs, for its own tests: they are never formed here.

Errors are those of :func:`online_attention.attention`; what is not built yet raises
``NotImplementedError`` when a call asks for it, never when this module is imported.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from .. import checks
from ..ops import attention

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

Window = Sequence[int] | Tensor
Result = Tensor | tuple[Tensor, Tensor, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Attention of queries, keys and values; the module's text says what each setting means.

    Args:
        q: ``(B, S_q, H, D)``; float16, bfloat16, float32 or float64.
        k: ``(B, S_k, H_k, D)``, of the dtype and device of ``q``; ``H % H_k == 0``.
        v: ``(B, S_k, H_k, D_v)``, of the dtype and device of ``q``.
        dropout_p: Probability of dropping a pair, from 0 up to but not including 1.
        softmax_scale: Factor of the scores; None means ``1 / sqrt(D)``.
        causal: Whether queries see no later keys, aligned at the bottom right.
        window_size: ``(left, right)``, negative for unbounded.
        softcap: Not built yet above 0.
        alibi_slopes: Not built yet.
        deterministic: Whether gradients must be the same from run to run.
        return_attn_probs: Whether to return ``(out, softmax_lse, None)``.

    Returns:
        ``out``, ``(B, S_q, H, D_v)`` in the dtype of ``q``; with ``return_attn_probs=True`` the
        triple ``(out, softmax_lse, None)``. ``out`` and ``softmax_lse`` are differentiable with
        respect to ``q``, ``k`` and ``v``. A query that sees no key gives 0.

    Raises:
        TypeError: An argument has a wrong type, dtype or layout.
        ValueError: Shapes or devices do not fit together, or a number is out of range.
        NotImplementedError: A window, softcap, slopes or a device that is not built.

    Example:
        >>> import torch
        >>> import online_attention.compat.flash_attn as flash_attn
        >>> q = torch.randn(2, 100, 8, 64)
        >>> k, v = torch.randn(2, 2, 100, 2, 64)
        >>> flash_attn.flash_attn_func(q, k, v, causal=True).shape
        torch.Size([2, 100, 8, 64])
    """
    checks.check_flags(
        causal=causal, deterministic=deterministic, return_attn_probs=return_attn_probs
    )
    _check_unbuilt(softcap, alibi_slopes)
    scale = None if softmax_scale is None else checks.check_scale(softmax_scale, "softmax_scale")
    try:
        out, lse = attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            causal=_is_causal(window_size, causal, q.shape[1], k.shape[1]),
            scale=scale,
            return_lse=True,
            dropout_p=dropout_p,
            deterministic=True if deterministic else None,
        )
    except Exception:  # said in the words of this layout: `attention` shows shapes transposed
        fault = _fault_of(q, k, v)
        if fault is None:
            raise
        raise fault from None
    out = out.transpose(1, 2)
    return (out, lse, None) if return_attn_probs else out


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of keys and values in one tensor, which is read in place.

    Args:
        q: ``(B, S_q, H, D)``; float16, bfloat16, float32 or float64.
        kv: ``(B, S_k, 2, H_k, D)``, of the dtype and device of ``q``; ``H % H_k == 0``.
        dropout_p, softmax_scale, ...: As those of :func:`flash_attn_func`.

    Returns:
        As :func:`flash_attn_func`; the gradient of ``kv`` is one tensor.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`flash_attn_func`.

    Example:
        >>> import torch
        >>> import online_attention.compat.flash_attn as flash_attn
        >>> q, kv = torch.randn(2, 100, 8, 64), torch.randn(2, 100, 2, 2, 64)
        >>> flash_attn.flash_attn_kvpacked_func(q, kv).shape
        torch.Size([2, 100, 8, 64])
    """
    _check_packed("kv", kv, 2, "(B, S_k, 2, H_k, D)")
    k, v = kv.unbind(2)  # not indexed: the gradient is then written once, not added to zeros
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """:func:`flash_attn_func` of queries, keys and values in one tensor, which is read in place.

    Args:
        qkv: ``(B, S, 3, H, D)``; float16, bfloat16, float32 or float64.
        dropout_p, softmax_scale, ...: As those of :func:`flash_attn_func`.

    Returns:
        As :func:`flash_attn_func`; the gradient of ``qkv`` is one tensor.

    Raises:
        TypeError, ValueError, NotImplementedError: As :func:`flash_attn_func`.

    Example:
        >>> import torch
        >>> import online_attention.compat.flash_attn as flash_attn
        >>> flash_attn.flash_attn_qkvpacked_func(torch.randn(2, 100, 3, 8, 64)).shape
        torch.Size([2, 100, 8, 64])
    """
    _check_packed("qkv", qkv, 3, "(B, S, 3, H, D)")
    q, k, v = qkv.unbind(2)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> NoReturn:
    """Not built yet: raises ``NotImplementedError``."""
    _refuse("flash_attn_varlen_func", _PADDED)


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> NoReturn:
    """Not built yet: raises ``NotImplementedError``."""
    _refuse("flash_attn_varlen_kvpacked_func", _PADDED)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> NoReturn:
    """Not built yet: raises ``NotImplementedError``."""
    _refuse("flash_attn_varlen_qkvpacked_func", _PADDED)


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> NoReturn:
    """Not built yet: raises ``NotImplementedError``."""
    _refuse("flash_attn_with_kvcache", "pass the part of the cache in use to flash_attn_func")


_PADDED = "pad the sequences to one length, or call flash_attn_func for each"


def _refuse(name: str, instead: str) -> NoReturn:
    raise NotImplementedError(
        f"{name} is not built yet in this version of online_attention: {instead}."
    )


def _check_unbuilt(softcap: object, alibi_slopes: object) -> None:
    if isinstance(softcap, bool) or not isinstance(softcap, numbers.Real):
        raise TypeError(f"softcap must be a number, but is {softcap!r}: pass 0.0 for none.")
    if not float(softcap) <= 0:  # flash-attn takes negative numbers for none too; NaN is neither
        _refuse(f"softcap={softcap}", "pass softcap=0.0")
    if alibi_slopes is not None:
        _refuse("alibi_slopes", "leave it out")


def _check_packed(name: str, packed: object, count: int, shape: str) -> None:
    if not isinstance(packed, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, but is of type {type(packed).__name__}: "
            "convert it with torch.as_tensor()."
        )
    if packed.dim() != 5 or packed.shape[2] != count:
        raise ValueError(
            f"{name} must have the shape {shape}, but its shape is {tuple(packed.shape)}: stack "
            "its parts with torch.stack(..., dim=2)."
        )


def _fault_of(q: Tensor, k: Tensor, v: Tensor) -> Exception | None:
    """What is wrong with the tensors, if anything is."""
    try:
        checks.check_tensors(checks.NAMES[:3], q, k, v)
        _check_shapes(q, k, v)
    except (TypeError, ValueError, NotImplementedError) as error:
        return error
    return None


def _check_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    shapes = ("(B, S_q, H, D)", "(B, S_k, H_k, D)", "(B, S_k, H_k, D_v)")
    for name, shape, tensor in zip(checks.NAMES[:3], shapes, (q, k, v), strict=True):
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions {shape}, but its shape is {tuple(tensor.shape)}: "
                "add or merge dimensions with .reshape()."
            )
    batch = ((1, 0, 0, "B"), (2, 0, 0, "B"))
    keys = ((2, 1, 1, "S_k"), (2, 2, 1, "H_k"), (1, 3, 0, "D"))
    checks.check_sizes(checks.NAMES, (q, k, v), (*batch, *keys))
    H, H_k = q.shape[2], k.shape[2]
    if H_k != H and (H_k == 0 or H % H_k != 0):
        raise ValueError(
            f"H must be a multiple of H_k, but q has H = {H} heads and k has H_k = {H_k} (their "
            f"shapes are {tuple(q.shape)} and {tuple(k.shape)}): repeat or drop heads of k and v."
        )


def _is_causal(window_size: object, causal: bool, s_q: int, s_k: int) -> bool:
    """Whether the window and the flag together mean the causal mask; else they mean no mask."""
    left, right = _bounds(window_size)
    if causal:
        right = 0
    # The last query's diagonal is key s_k - 1, the first one's s_k - s_q: wider hides nothing.
    if 0 <= left < s_k - 1 or 0 < right < s_q - 1:
        _refuse(f"window_size=({left}, {right})", "pass window_size=(-1, -1)")
    return right == 0


def _bounds(window_size: object) -> tuple[int, int]:
    pair = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if (
        not isinstance(pair, list | tuple)
        or len(pair) != 2
        or not all(isinstance(x, numbers.Integral) and not isinstance(x, bool) for x in pair)
    ):
        raise TypeError(
            "window_size must be two integers (left, right), in a tuple, a list or a tensor, but "
            f"is {window_size!r}: pass (-1, -1) for no window."
        )
    return int(pair[0]), int(pair[1])
