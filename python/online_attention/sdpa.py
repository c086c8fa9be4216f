# SPDX-License-Identifier: BSD-3-Clause
"""A drop-in for torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .ops import TOP_LEFT, autocast, forward


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention with the signature and the meaning of torch's function of the same name.

    Args:
        query: ``(..., H, S_q, D)``.
        key: ``(..., H_kv, S_kv, D)``, of the dtype and device of ``query``.
        value: ``(..., H_kv, S_kv, D_v)``, of the dtype and device of ``query``.
        attn_mask: Not built yet.
        dropout_p: Not built yet.
        is_causal: Query ``i`` sees key ``j`` only if ``j <= i``: aligned at the top left, unlike
            ``attention(..., causal=True)``.
        scale: Factor of the scores, any finite number; None means ``1 / sqrt(D)``.
        enable_gqa: Whether ``H`` may be a multiple of ``H_kv``. Otherwise the heads, like all
            dimensions before them, must be equal or broadcast.

    Returns:
        ``(..., H, S_q, D_v)`` in the dtype of ``query``. A row that sees no key is 0.

    Example:
        >>> import torch
        >>> from online_attention import scaled_dot_product_attention
        >>> x = torch.randn(2, 8, 100, 64)
        >>> scaled_dot_product_attention(x, x, x, is_causal=True).shape
        torch.Size([2, 8, 100, 64])
    """
    if not (
        (is_causal is True or is_causal is False) and (enable_gqa is True or enable_gqa is False)
    ):
        checks.check_flags(is_causal=is_causal, enable_gqa=enable_gqa)
    if not (attn_mask is None and type(dropout_p) is float and dropout_p == 0.0):
        checks.check_unbuilt(attn_mask=attn_mask, dropout_p=dropout_p)
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        checks.check_tensors(query=query, key=key, value=value)
    if (
        query.dim() == 4
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and checks.is_problem(query, key, value)
    ):
        return forward(query, key, value, is_causal, scale, TOP_LEFT, None)[0]
    return _general(query, key, value, is_causal, scale, enable_gqa)


def _general(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """Any rank, broadcast batch dimensions, grouped heads."""
    if torch.is_autocast_enabled(query.device.type):
        query, key, value = autocast(query, key, value)
    names = ("query", "key", "value")
    if not checks.are_inputs(query, key, value):
        checks.check_inputs(names, query, key, value)
    for name, tensor in zip(names, (query, key, value), strict=True):
        if tensor.dim() < (3 if gqa else 2):
            raise ValueError(
                f"{name} must have at least {3 if gqa else 2} dimensions, but its shape is "
                f"{tuple(tensor.shape)}: add dimensions with .unsqueeze(0)."
            )
    heads_q, heads_k, heads_v = (t.shape[-3] if gqa else 1 for t in (query, key, value))
    if gqa:
        _check_groups(heads_q, heads_k, heads_v)
        if heads_k != heads_v:  # one of them has larger groups: give both a head for each query's
            key = key.repeat_interleave(heads_q // heads_k, -3)
            value = value.repeat_interleave(heads_q // heads_v, -3)
    # Dimensions that only count instances; the heads are among them unless they are grouped.
    end = -3 if gqa else -2
    leads = [t.shape[:end] for t in (query, key, value)]
    try:
        lead = torch.broadcast_shapes(*leads)
    except RuntimeError:
        raise ValueError(
            "query, key and value must have equal or broadcastable dimensions before "
            f"{'(H, S, D)' if gqa else '(S, D)'}, but their shapes are {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}: expand them, or pass enable_gqa=True "
            "for grouped heads."
        ) from None
    q, k, v = (_rank_4(t, lead, end) for t in (query, key, value))
    out = forward(q, k, v, is_causal, scale, TOP_LEFT, None)[0]
    return out.reshape(*lead, *out.shape[1 if gqa else 2 :])


def _check_groups(heads_q: int, heads_k: int, heads_v: int) -> None:
    for name, heads in (("key", heads_k), ("value", heads_v)):
        if heads != heads_q and (heads == 0 or heads_q % heads != 0):
            raise ValueError(
                f"the {heads_q} heads of query must be a multiple of the heads of {name}, but "
                f"there are {heads}: repeat or drop heads."
            )


def _rank_4(tensor: Tensor, lead: torch.Size, end: int) -> Tensor:
    """(*lead, [H,] S, D) as (B, H, S, D), in place where strides allow."""
    own = tensor.shape[end:]
    tensor = tensor.expand(*lead, *own)
    if end == -3:
        return tensor.reshape(math.prod(lead), *own)
    heads = lead[-1] if lead else 1
    return tensor.reshape(math.prod(lead[:-1]), heads, *own)
