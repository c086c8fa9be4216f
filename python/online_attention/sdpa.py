# SPDX-License-Identifier: BSD-3-Clause
"""A drop-in for torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from . import checks
from .operators import TOP_LEFT
from .ops import forward

NAMES = ("query", "key", "value", "attn_mask")


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
        attn_mask: Broadcastable to ``(..., H, S_q, S_kv)``. Boolean: True where a pair is visible.
            Of the dtype of ``query``, or float32: added to the scores; -inf hides a pair. Not
            together with ``is_causal``. Read where it lies, with any strides, never expanded or
            copied. Should its dimensions before the last three allow no view as one, the instances
            of the first of them are computed one after the other.
        dropout_p: The probability, at least 0 and below 1, with which a pair loses its weight,
            whatever the mode of a module is. As in :func:`attention`.
        is_causal: Query ``i`` sees key ``j`` only if ``j <= i``: aligned at the top left, unlike
            ``attention(..., causal=True)``.
        scale: Factor of the scores, any finite number; None means ``1 / sqrt(D)``.
        enable_gqa: Whether ``H`` may be a multiple of ``H_kv``. Otherwise the heads, like all
            dimensions before them, must be equal or broadcast.

    Returns:
        ``(..., H, S_q, D_v)`` in the dtype of ``query``, differentiable as the result of
        :func:`attention` is, with respect to a float mask too. A row that sees no key, by the mask
        or without keys, is 0 and so are its gradients.

    Raises:
        TypeError: An argument has a wrong type, dtype or layout.
        ValueError: Shapes or devices do not fit together, the scale is not finite, ``dropout_p`` is
            out of range, or there is a mask beside ``is_causal``.
        NotImplementedError: A keyword or a device that is not built.

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
    if attn_mask is not None and is_causal:
        raise ValueError(
            "attn_mask must be None where is_causal is True: leave one of them out, or make the "
            "mask causal itself."
        )
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        checks.check_tensors(NAMES[:3], query, key, value)
    q_shape, k_shape, v_shape = query.shape, key.shape, value.shape
    if (
        len(q_shape) == len(k_shape) == len(v_shape) == 4
        and q_shape[0] == k_shape[0]
        and k_shape[:2] == v_shape[:2]
        and (enable_gqa or q_shape[1] == k_shape[1])
    ):  # already (B, H, S, D), with nothing to broadcast
        return forward(
            query,
            key,
            value,
            is_causal,
            scale,
            TOP_LEFT,
            None,
            NAMES,
            bias=attn_mask,
            dropout_p=dropout_p,
        )[0]
    return _general(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def _general(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    gqa: bool,
) -> Tensor:
    """Any rank, broadcast batch dimensions, grouped heads."""
    least = 3 if gqa else 2
    for name, tensor in zip(NAMES, (query, key, value), strict=False):
        if tensor.dim() < least:
            raise ValueError(
                f"{name} must have at least {least} dimensions, but its shape is "
                f"{tuple(tensor.shape)}: add dimensions with .unsqueeze(0)."
            )
    last = ((1, -1, 0, "D"), (2, -2, 1, "S_kv"))
    checks.check_sizes(NAMES[:3], (query, key, value), last)
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
    if mask is not None:
        scores = (*lead, *query.shape[end:-1], key.shape[-2])
        checks.check_is_tensor(NAMES[3], mask)
        checks.check_broadcasts(NAMES[3], mask, scores, "(..., H, S_q, S_kv)")
        mask = mask[(None,) * (len(scores) - mask.dim())]

    def attend(lead: tuple[int, ...], inputs: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """Instances `lead`, to which the inputs are expanded and the mask is broadcastable."""
        for split in [len(lead)] if gqa else range(max(len(lead) - 1, 0), -1, -1):
            if mask is None or (_merges(mask, lead, 0, split) and _merges(mask, lead, split)):
                bias = None if mask is None else _rank_4_mask(mask, lead, split)
                q, k, v = (_rank_4(t, lead, split, gqa) for t in inputs)
                out = forward(
                    q,
                    k,
                    v,
                    is_causal,
                    scale,
                    TOP_LEFT,
                    None,
                    NAMES,
                    bias=bias,
                    dropout_p=dropout_p,
                )[0]
                return out.reshape(*lead, *out.shape[1 if gqa else 2 :])
        assert mask is not None
        masks = mask.expand(lead[0], *mask.shape[1:])
        return torch.stack(
            [attend(lead[1:], [t[i] for t in inputs], masks[i]) for i in range(lead[0])]
        )

    inputs = [t.expand(*lead, *t.shape[end:]) for t in (query, key, value)]
    return attend(lead, inputs, mask)


def _merges(mask: Tensor, lead: tuple[int, ...], begin: int, end: int | None = None) -> bool:
    """Whether dimensions of the mask, broadcast to `lead`, are one dimension where it lies."""
    sizes = mask.shape[: len(lead)][begin:end]
    if all(n == 1 for n in sizes):
        return True
    strides = [
        0 if n == 1 else stride for n, stride in zip(sizes, mask.stride()[begin:], strict=False)
    ]
    dims = [(n, stride) for n, stride in zip(lead[begin:end], strides, strict=True) if n != 1]
    return all(outer == n * inner for (_, outer), (n, inner) in pairwise(dims))


def _rank_4_mask(mask: Tensor, lead: tuple[int, ...], split: int) -> Tensor:
    """A mask (*lead, [H,] S_q, S_kv), or broadcastable to it, as (B, H, S_q, S_kv): a view."""
    n = len(lead)
    sizes, merged = list(mask.shape), []
    for group in (slice(0, split), slice(split, n)):
        if any(size != 1 for size in mask.shape[group]):
            sizes[group] = lead[group]
        merged.append(math.prod(sizes[group]))
    if mask.dim() == n + 3:
        merged[1] = mask.shape[-3]
    return mask.expand(sizes).view(*merged, *mask.shape[-2:])


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


def _rank_4(tensor: Tensor, lead: tuple[int, ...], split: int, gqa: bool) -> Tensor:
    """(*lead, [H,] S, D) as (B, H, S, D), in place where strides allow."""
    heads = tensor.shape[-3] if gqa else math.prod(lead[split:])
    return tensor.reshape(math.prod(lead[:split]), heads, *tensor.shape[-2:])
