# SPDX-License-Identifier: BSD-3-Clause
"""Models of Hugging Face transformers on this attention, by one call of `register`.

    >>> from online_attention.integrations import transformers
    >>> transformers.register()
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="online_attention")

Masks are those of transformers' own `sdpa`, which hold padding, packed sequences, sliding windows
and chunks. Where a mask is only causal, or causal and padded, attention takes the causal range
instead and so never looks at what it hides.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .. import ops
from ..operators import BOTTOM_RIGHT, TOP_LEFT
from ..sdpa import NAMES, scaled_dot_product_attention

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import causal_mask_function, sdpa_mask
except ImportError as error:
    raise ImportError(
        "online_attention.integrations.transformers needs the package transformers, 4.56 or newer, "
        f"but importing it failed ({error}): install it with: pip install 'transformers>=4.56'"
    ) from error

NAME = "online_attention"

# Arguments that change the result and are not built: what each asks for, and what to do.
_UNBUILT = {
    "softcap": ("a cap of the scores", 'use attn_implementation="eager"'),
    "s_aux": ("attention sinks", 'use attn_implementation="eager"'),
    "sinks": ("attention sinks", 'use attn_implementation="eager"'),
    "learnable_sink": ("attention sinks", 'use attn_implementation="eager"'),
    "position_bias": ("a bias of positions", 'use attn_implementation="sdpa"'),
    "head_mask": ("a factor for each head", 'use attn_implementation="eager"'),
    "cu_seq_lens_q": ("packed sequences by their lengths", "pass position_ids alone"),
    "cu_seq_lens_k": ("packed sequences by their lengths", "pass position_ids alone"),
    "cache": ("a paged cache", 'use attn_implementation="sdpa"'),
    "block_table": ("a paged cache", 'use attn_implementation="sdpa"'),
    "page_table": ("a paged cache", 'use attn_implementation="sdpa"'),
    "indices": ("keys by their indices", 'use attn_implementation="sdpa"'),
    "block_indices": ("blocks of keys by their indices", 'use attn_implementation="sdpa"'),
    "qv_latents": ("compressed values", 'use attn_implementation="sdpa"'),
}


class _CausalRange(NamedTuple):
    """What a mask that `make_mask` made is equal to."""

    alignment: int
    keys: Tensor | None  # (B, 1, 1, S_kv), False for padding; None where there is none
    version: int  # of the mask when it was made


# By the identity of the mask: a slice or a copy of it is another mask, and run as one.
_ranges: Any = WeakTensorKeyDictionary()


def register() -> None:
    """Offer ``attn_implementation="online_attention"`` to the models of transformers.

    Registers :func:`attention_forward` and :func:`make_mask` under that name. Nothing changes for
    models that do not ask for it, and a second call changes nothing.

    Models run forward and backward in any dtype of :func:`online_attention.attention`, with dynamic
    and static caches, padded on either side, packed by ``position_ids``, with sliding windows and
    chunks (as masks). Grouped heads are not repeated. What :func:`attention_forward` cannot compute
    it refuses.

    Example:
        >>> from online_attention.integrations import transformers
        >>> transformers.register()
        >>> from transformers import AutoModelForCausalLM, LlamaConfig
        >>> config = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2)
        >>> AutoModelForCausalLM.from_config(config, attn_implementation="online_attention")
    """
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, make_mask)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention as the models of transformers call it.

    Args:
        module: The attention layer; its ``is_causal`` (True if it has none) counts where the
            argument of that name is None.
        query: ``(B, H, S_q, D)``.
        key: ``(B, H_kv, S_kv, D)``, not repeated.
        value: ``(B, H_kv, S_kv, D_v)``, not repeated.
        attention_mask: None, or ``(B or 1, H or 1, S_q or 1, S_kv or 1)``: boolean, True where a
            query sees a key, or a float that is added to the scores. It holds all that hides keys,
            causality and windows too. None means no mask, or a causal one aligned at the top left
            if the layer is causal and ``S_q > 1``, as transformers means it for ``sdpa``.
        dropout: Probability with which a weight is dropped.
        scaling: Factor of the scores; None means ``1 / sqrt(D)``.
        sliding_window: Number of keys that a query sees, which the mask holds; without a mask it
            must not be smaller than the number of keys.
        is_causal: See ``module``.
        kwargs: Ignored, but for arguments that change the result.

    Returns:
        ``(B, S_q, H, D_v)``, contiguous, in the dtype of ``query`` and differentiable as
        :func:`online_attention.attention` is; and None for the weights, which are never formed.

    Raises:
        NotImplementedError: An argument asks for what is not built, or for the weights.
        TypeError: An argument has a wrong type, dtype or layout.
        ValueError: Shapes or devices do not fit together.
    """
    _check_arguments(attention_mask, kwargs)
    if scaling is None:
        _check_scaling(module)
    if attention_mask is None:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        # A single query is the last one: it sees all keys.
        causal = bool(is_causal) and query.shape[2] > 1
        _check_window(sliding_window, query, key, causal)
        out = scaled_dot_product_attention(
            query, key, value, None, dropout, causal, scaling, enable_gqa=True
        )
    elif (causal_range := _range_of(attention_mask, query, key)) is not None:
        out = ops.forward(
            query,
            key,
            value,
            True,
            scaling,
            causal_range.alignment,
            None,
            NAMES,
            bias=causal_range.keys,
            dropout_p=dropout,
        )[0]
    else:
        out = scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, False, scaling, enable_gqa=True
        )
    return out.transpose(1, 2).contiguous(), None


def make_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' ``sdpa``, remembered if it is causal and padded and nothing else.

    Takes the arguments of ``transformers.masking_utils.sdpa_mask``.

    Returns:
        Boolean ``(B, 1, S_q, S_kv)``, True where a query sees a key; None where
        :func:`attention_forward` needs no mask.

    Raises:
        NotImplementedError: The mask is for a model that would not call :func:`attention_forward`.
    """
    if (config := kwargs.get("config")) is not None:
        _check_model(type(config))
    mask: Tensor | None = sdpa_mask(*args, **kwargs)
    if mask is not None and not torch.compiler.is_compiling():
        _remember(mask, **kwargs)
    return mask


def _remember(
    mask: Tensor,
    q_length: Any = None,
    kv_length: Any = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: object = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: object,
) -> None:
    """Note the causal range that a mask is equal to, if it is one.

    Query `i` is the token `q_offset + i`, key `j` the token `kv_offset + j`. Lengths and offsets
    that are no numbers, as under older versions of transformers, are left alone; so is a mask whose
    changes cannot be noticed.
    """
    if mask_function is not causal_mask_function or mask.is_inference():
        return
    if not all(type(size) is int for size in (q_length, kv_length, q_offset, kv_offset)):
        return
    if q_length == 1:  # nothing to gain: no key is hidden by being later
        return
    if q_offset == kv_offset:
        alignment = TOP_LEFT
    elif q_offset - kv_offset == kv_length - q_length:
        alignment = BOTTOM_RIGHT
    else:
        return
    padding = None
    if attention_mask is not None:
        if attention_mask.dtype is not torch.bool or attention_mask.dim() != 2:
            return
        end = kv_offset + kv_length
        padding = F.pad(attention_mask, (0, max(end - attention_mask.shape[1], 0)))
        padding = padding[:, None, None, kv_offset:end]
        if alignment == BOTTOM_RIGHT and padding.all():
            padding = None
    _ranges[mask] = _CausalRange(alignment, padding, mask._version)


def _range_of(mask: Tensor, query: Tensor, key: Tensor) -> _CausalRange | None:
    """The causal range that a mask of `make_mask` is equal to, if it is unchanged and fits."""
    if torch.compiler.is_compiling():
        return None
    found: _CausalRange | None = _ranges.get(mask)
    if found is None or found.version != mask._version:
        return None
    fits = mask.shape == (query.shape[0], 1, query.shape[2], key.shape[2])
    return found if fits and key.shape[0] == query.shape[0] else None


def _check_model(config_class: type) -> None:
    """Refuse models whose own attention would misread the mask.

    transformers lets them have any implementation and ignores it.
    """
    if _computes_its_own_attention(config_class):
        raise NotImplementedError(
            f"models of {config_class.__name__} compute their attention themselves and call no "
            'other implementation: use attn_implementation="eager".'
        )


_own_attention: dict[type, bool] = {}


def _computes_its_own_attention(config_class: type) -> bool:
    """Whether a model of such configs has layers of attention, but no way to ours."""
    known = _own_attention.get(config_class)
    if known is None:
        models: list[type[Any]] = [PreTrainedModel]
        for model in models:
            models.extend(model.__subclasses__())
        modules = {m.__module__ for m in models if getattr(m, "config_class", None) is config_class}
        known = any(_has_own_attention(sys.modules.get(name)) for name in modules)
        _own_attention[config_class] = known
    return known


# As torch.compiler.assume_constant_result does, which would import Dynamo: seconds.
_computes_its_own_attention._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _has_own_attention(module: object) -> bool:
    """Whether a module of transformers defines layers of attention that call no other."""
    if module is None or hasattr(module, "ALL_ATTENTION_FUNCTIONS"):
        return False
    return any(
        "Attention" in name and isinstance(layer, type) and issubclass(layer, nn.Module)
        for name, layer in vars(module).items()
        if getattr(layer, "__module__", None) == vars(module)["__name__"]
    )


def _check_arguments(attention_mask: object, kwargs: dict[str, Any]) -> None:
    """Refuse what would be ignored otherwise."""
    for name, (meaning, remedy) in _UNBUILT.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"{name} asks for {meaning}, which is not built yet in this version of "
                f"online_attention: {remedy}."
            )
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            "output_attentions=True asks for the attention weights, which online_attention never "
            'forms: leave it out, or use attn_implementation="eager".'
        )
    if attention_mask is None:
        return
    if not isinstance(attention_mask, Tensor):
        raise TypeError(
            "attention_mask must be a torch.Tensor or None, but is of type "
            f"{type(attention_mask).__name__}: pass a boolean tensor (B, 1, S_q, S_kv)."
        )
    if attention_mask.dim() != 4:
        raise ValueError(
            "attention_mask must have 4 dimensions (B, H or 1, S_q, S_kv) when it reaches a layer, "
            f"but its shape is {tuple(attention_mask.shape)}: this model makes no masks for "
            'other implementations, use attn_implementation="sdpa".'
        )


def _check_scaling(module: nn.Module) -> None:
    """Refuse GPT-2's own scales under versions of transformers that give them to eager alone."""
    weighted = getattr(module, "scale_attn_weights", True)
    if not weighted or getattr(module, "scale_attn_by_inverse_layer_idx", False):
        raise NotImplementedError(
            "scaling is None although scale_attn_weights or scale_attn_by_inverse_layer_idx of the "
            "layer asks for a scale of its own: upgrade transformers, or use "
            'attn_implementation="eager".'
        )


def _check_window(window: int | None, query: Tensor, key: Tensor, causal: bool) -> None:
    """Refuse a window that hides keys and that no mask holds."""
    if window is None:
        return
    # Aligned at the top left, no query sees a key behind the last query's.
    keys = min(query.shape[2], key.shape[2]) if causal else key.shape[2]
    if window < keys:
        raise NotImplementedError(
            f"sliding_window = {window} hides some of {keys} keys, but attention_mask is None, and "
            "windows without a mask are not built yet in this version of online_attention: pass "
            'the mask, or use attn_implementation="eager".'
        )
