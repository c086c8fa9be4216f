# SPDX-License-Identifier: BSD-3-Clause
"""Modules with attention inside, in the place of torch's of the same name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, ops
from .operators import TOP_LEFT

NAMES: checks.Names = ("query", "key", "value", "attn_mask")


class MultiheadAttention(torch.nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` with this package's attention inside.

    It has torch's parameters under torch's names, so state dicts load both ways, its constructor
    and its arguments. What differs:

    - ``need_weights`` is False by default, and True raises ``NotImplementedError``: the
      probabilities are never formed, which is what makes the memory linear in the lengths.
    - A query from which the masks hide every key gives 0, hence ``out_proj.bias``, and passes no
      gradient back to queries, keys and values, where torch gives NaN in some of its paths.
    - ``is_causal=True`` needs no ``attn_mask``.
    - Masks are not converted to floating point nor repeated for heads: ``key_padding_mask`` stays
      one byte for a key, an ``attn_mask`` one element for a pair and for each head only if it has
      heads. Boolean ones are negated, a copy of that size. The two masks together take one tensor
      ``(N, 1, L, S)``, or ``(N, H, L, S)`` if ``attn_mask`` has heads; with ``is_causal=True``
      none but ``key_padding_mask``.

    Args:
        embed_dim: Size ``E`` of an embedding.
        num_heads: Number of heads ``H``, a divisor of ``E``.
        dropout: Probability of dropping a pair of query and key in training.
        bias: Whether the projections add a bias.
        add_bias_kv: Whether one more key and value, which are learned, follow those of the input.
        add_zero_attn: Whether one more key and value of zeros follow.
        kdim: Size of an embedding in ``key``; None means ``embed_dim``.
        vdim: Size of an embedding in ``value``; None means ``embed_dim``.
        batch_first: Whether batched tensors are ``(N, L, E)`` rather than ``(L, N, E)``.
        device: Device of the parameters.
        dtype: Floating dtype of the parameters.

    Raises:
        ValueError: ``embed_dim`` or ``num_heads`` is below 1, or ``embed_dim`` is no multiple.

    Example:
        >>> import torch
        >>> from online_attention.nn import MultiheadAttention
        >>> module = MultiheadAttention(64, 4, batch_first=True)
        >>> x = torch.randn(2, 100, 64)
        >>> out, _ = module(x, x, x, is_causal=True)
        >>> out.shape
        torch.Size([2, 100, 64])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Draw the parameters, as torch does from the same state of its generator."""
        if num_heads > 0 and embed_dim % num_heads != 0:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, but is {embed_dim} for "
                f"{num_heads} heads: change one of them."
            )
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Project, attend, project.

        Args:
            query: ``(L, N, E)``, with ``batch_first`` ``(N, L, E)``, or unbatched ``(L, E)``.
            key: ``(S, N, kdim)``, ``(N, S, kdim)`` or ``(S, kdim)``.
            value: ``(S, N, vdim)``, ``(N, S, vdim)`` or ``(S, vdim)``. Where the three are one
                tensor, or the last two, they are projected at once.
            key_padding_mask: ``(N, S)``, unbatched ``(S,)``: boolean, True **hides** a key (the
                opposite of ``scaled_dot_product_attention``); or floating, added to its scores.
            need_weights: False; True is not built.
            attn_mask: ``(L, S)``, or ``(N * H, L, S)`` with heads: boolean, True **hides** a
                pair; or floating, added to its score. Floating masks have the dtype that the
                projections give or float32; ``-inf`` hides as True does.
            average_attn_weights: Without effect, as in torch where no weights are needed.
            is_causal: Query ``i`` sees key ``j`` of the input only if ``j <= i``. An
                ``attn_mask`` beside it is taken to say the same, as in torch, and is not read;
                with ``add_bias_kv`` or ``add_zero_attn`` it is.

        Returns:
            The attention, shaped as ``query``, and None for the weights.

        Raises:
            TypeError: An argument has a wrong type, dtype or layout.
            ValueError: Shapes or devices do not fit together.
            NotImplementedError: ``need_weights=True``, or a device that is not built.
        """
        if need_weights:
            raise NotImplementedError(
                "need_weights=True is not built in online_attention: the probabilities are never "
                "formed; pass need_weights=False, or use torch.nn.MultiheadAttention to look at "
                "them."
            )
        self._check(query, key, value, attn_mask, key_padding_mask)
        q, k, v = (self._with_heads(x) for x in self._project(query, key, value))
        k, v = self._append(k, v)
        S = key.shape[1] if key.dim() == 3 and self.batch_first else key.shape[0]
        appended = k.shape[2] - S  # which is_causal must not hide: they are no later keys
        if is_causal and not appended:
            attn_mask = None
        elif is_causal and attn_mask is None:
            attn_mask = torch.ones(q.shape[2], S, dtype=torch.bool, device=q.device).triu(1)
        bias = _bias(attn_mask, key_padding_mask, q, appended)
        causal = is_causal and not appended
        dropout_p = self.dropout if self.training else 0.0
        out, _ = ops.forward(
            q, k, v, causal, None, TOP_LEFT, None, NAMES, bias=bias, dropout_p=dropout_p
        )
        if query.dim() == 2:
            out = out[0].transpose(0, 1)
        else:
            out = out.transpose(1, 2) if self.batch_first else out.permute(2, 0, 1, 3)
        return self.out_proj(out.flatten(-2)), None

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of all heads, `(..., E)`; of one tensor by one product."""
        E, bias = self.embed_dim, self.in_proj_bias
        if self.in_proj_weight is None:
            weights = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        elif query is key is value:
            q, k, v = F.linear(query, self.in_proj_weight, bias).split(E, -1)
            return q, k, v
        elif key is value:
            w_q, w_kv = self.in_proj_weight.split([E, 2 * E])
            b_q, b_kv = (None, None) if bias is None else bias.split([E, 2 * E])
            return F.linear(query, w_q, b_q), *F.linear(key, w_kv, b_kv).split(E, -1)
        else:
            weights = self.in_proj_weight.split(E)
        biases = (None,) * 3 if bias is None else bias.split(E)
        inputs = query, key, value
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))

    def _with_heads(self, x: Tensor) -> Tensor:
        """A projection as (N, H, S, D), in place."""
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        if x.dim() == 3:
            return x.transpose(0, 1).unsqueeze(0)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values, followed by the learned ones and by zeros if there are to be."""
        keys, values = [k], [v]
        one_key = (k.shape[0], self.num_heads, 1, self.head_dim)
        if self.bias_k is not None and self.bias_v is not None:
            for parts, appended in ((keys, self.bias_k), (values, self.bias_v)):
                parts.append(appended.view(1, self.num_heads, 1, self.head_dim).expand(one_key))
        if self.add_zero_attn:
            keys.append(k.new_zeros(one_key))
            values.append(v.new_zeros(one_key))
        if len(keys) == 1:
            return k, v
        return torch.cat(keys, 2), torch.cat(values, 2)

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        key_padding_mask: Tensor | None,
    ) -> None:
        """Refuse what cannot be projected, and masks of wrong shapes."""
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        layout = "(N, {0}, {1})" if self.batch_first else "({0}, N, {1})"
        inputs = (query, "L", "E", self.embed_dim), (key, "S", "kdim", self.kdim)
        for name, (x, length, symbol, size) in zip(
            NAMES[:3], (*inputs, (value, "S", "vdim", self.vdim)), strict=True
        ):
            _check_input(name, x, weight)
            if x.dim() not in (2, 3) or x.dim() != query.dim() or x.shape[-1] != size:
                raise ValueError(
                    f"{name} must have the shape {layout.format(length, symbol)}, or "
                    f"({length}, {symbol}) if all three are unbatched, with {symbol} = {size}, "
                    f"but its shape is {tuple(x.shape)}."
                )
        S_dim, N_dim = (1, 0) if query.dim() == 3 and self.batch_first else (0, 1)
        same = [(2, S_dim, 1, "S")]
        if query.dim() == 3:
            same += [(1, N_dim, 0, "N"), (2, N_dim, 0, "N")]
        checks.check_sizes(NAMES, (query, key, value), tuple(same))
        N = query.shape[N_dim] if query.dim() == 3 else 1
        L, S = query.shape[S_dim], key.shape[S_dim]
        H = self.num_heads
        _check_mask(
            "attn_mask", attn_mask, {"(L, S)": (L, S), "(N * H, L, S)": (N * H, L, S)}, query
        )
        shapes = {"(S,)": (S,)} if query.dim() == 2 else {"(N, S)": (N, S)}
        _check_mask("key_padding_mask", key_padding_mask, shapes, query)


def _check_input(name: str, x: object, weight: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a torch.Tensor, but is of type {type(x).__name__}: convert it with "
            "torch.as_tensor()."
        )
    if x.is_nested:
        raise TypeError(
            f"{name} must be a dense tensor, but is nested: call "
            "torch.nested.to_padded_tensor() and pass a key_padding_mask."
        )
    if x.dtype != weight.dtype and not ops.any_autocast_enabled():
        raise TypeError(
            f"{name} must have the dtype of the module, {weight.dtype}, but is {x.dtype}: convert "
            "one of them with .to()."
        )
    if x.device != weight.device:
        raise ValueError(
            f"{name} must be on the device of the module, {weight.device}, but is on {x.device}: "
            "move one of them with .to()."
        )


def _check_mask(
    name: str, mask: object, shapes: Mapping[str, tuple[int, ...]], query: Tensor
) -> None:
    """Refuse a mask unless it has one of the shapes, given by their symbols."""
    if mask is None:
        return
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else f"of type {type(mask).__name__}"
        raise TypeError(
            f"{name} must be a boolean tensor, True to hide, or a floating one, but is {kind}: "
            "convert it with .bool()."
        )
    if tuple(mask.shape) not in shapes.values():
        wanted = " or ".join(f"{symbols} = {shape}" for symbols, shape in shapes.items())
        raise ValueError(
            f"{name} must have the shape {wanted}, but its shape is {tuple(mask.shape)}."
        )
    if mask.device != query.device:
        raise ValueError(
            f"{name} must be on the device of query, {query.device}, but is on {mask.device}: "
            "move it with .to()."
        )


def _bias(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, q: Tensor, appended: int
) -> Tensor | None:
    """Both masks as one of `online_attention.attention`, which broadcasts to (N, H, L, S).

    A boolean one says what is visible. Keys that were appended are visible, at no cost in score.
    """
    N, H = q.shape[:2]
    masks: list[Tensor] = []
    for name, mask in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
        if mask is None:
            continue
        if mask.is_floating_point() and mask.dtype not in (q.dtype, torch.float32):
            raise TypeError(
                f"{name} must be boolean, float32, or {q.dtype} as the projected queries, but is "
                f"{mask.dtype}: convert it with .to()."
            )
        if appended:
            mask = F.pad(mask, (0, appended))
        if name == "key_padding_mask":
            mask = (mask if mask.dim() == 2 else mask[None])[:, None, None]
        else:
            mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (N, H))
        # Negated before the two are combined: the combination is the large tensor.
        masks.append(~mask if mask.dtype == torch.bool else mask)
    if len(masks) < 2:
        return masks[0] if masks else None
    first, second = masks
    if first.dtype == second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    if second.dtype == torch.bool:
        return torch.where(second, first, -math.inf)
    return first + second
