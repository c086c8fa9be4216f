# SPDX-License-Identifier: BSD-3-Clause
"""A drop-in for torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import checks
from .operators import TOP_LEFT
from .ops import forward

NAMES = ("query", "key", "value")


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
        checks.check_tensors(NAMES, query, key, value)
    if (
        query.dim() == key.dim() == value.dim() == 4
        and query.size(0) == key.size(0) == value.size(0)
        and key.size(1) == value.size(1)
        and (enable_gqa or query.size(1) == key.size(1))
    ):  # already (B, H, S, D), with nothing to broadcast
        return forward(query, key, value, is_causal, scale, TOP_LEFT, None, NAMES)[0]
    return _general(query, key, value, is_causal, scale, enable_gqa)


def _general(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float | None, gqa: bool
) -> Tensor:
    """Any rank, broadcast batch dimensions, grouped heads."""
    least = 3 if gqa else 2
    for name, tensor in zip(NAMES, (query, key, value), strict=True):
        if tensor.dim() < least:
            raise ValueError(
                f"{name} must have at least {least} dimensions, but its shape is "
                f"{tuple(tensor.shape)}: add dimensions with .unsqueeze(0)."
            )
    last = ((1, -1, 0, "D"), (2, -2, 1, "S_kv"))
    checks.check_sizes(NAMES, (query, key, value), last)
    if gqa:
        key, value = _with_equal_groups(query, key, value)
    # Dimensions that only count instances; heads are among them unless they are grouped.
    end = -3 if gqa else -2
    try:
        lead = torch.broadcast_shapes(*(t.shape[:end] for t in (query, key, value)))
    except RuntimeError:
        raise ValueError(
            "query, key and value must have equal or broadcastable sizes before "
            f"{'(H, S, D)' if gqa else '(S, D)'}, but their shapes are {tuple(query.shape)}, "
            f"{tuple(key.shape)} and {tuple(value.shape)}: expand them, or pass enable_gqa=True "
            "for grouped heads."
        ) from None
    q, k, v = (_rank_4(t, lead, end) for t in (query, key, value))
    out = forward(q, k, v, is_causal, scale, TOP_LEFT, None, NAMES)[0]
    return out.reshape(*lead, *out.shape[1 if gqa else 2 :])


def _with_equal_groups(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value with one number of heads, which divides that of the query."""
    heads = query.shape[-3]
    for name, tensor in (("key", key), ("value", value)):
        own = tensor.shape[-3]
        if own != heads and (own == 0 or heads % own != 0):
            raise ValueError(
                f"the heads of query, {heads}, must be a multiple of those of {name}, {own}: "
                "repeat or drop heads."
            )
    if key.shape[-3] == value.shape[-3]:
        return key, value
    key = key.repeat_interleave(heads // key.shape[-3], -3)
    return key, value.repeat_interleave(heads // value.shape[-3], -3)


def _rank_4(tensor: Tensor, lead: torch.Size, end: int) -> Tensor:
    """(*lead, [H,] S, D) as (B, H, S, D), in place where strides allow."""
    own = tensor.shape[end:]
    tensor = tensor.expand(*lead, *own)
    if end == -3:
        return tensor.reshape(math.prod(lead), *own)
    heads = lead[-1] if lead else 1
    return tensor.reshape(math.prod(lead[:-1]), heads, *own)
