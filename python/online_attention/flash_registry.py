# SPDX-License-Identifier: BSD-3-Clause
"""Our kernels under torch's own flash attention operators, through torch's registry for them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.attention
from torch import Tensor
from torch.library import Library

from . import checks, operators
from .operators import BOTTOM_RIGHT, UNBOUNDED
from .ops import random_state

NAME = "online_attention"
_NAMES = ("query", "key", "value", "bias")
# Their lse is float32.
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)

ForwardResult = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
SdpaResult = tuple[Tensor, Tensor, None, None, int, int, Tensor, Tensor, Tensor]
Gradients = tuple[Tensor, Tensor, Tensor]


def register() -> None:
    """Offer ``"online_attention"`` to torch's registry of flash attention implementations.

    Nothing changes until ``torch.nn.attention.activate_flash_attention_impl("online_attention")``.
    From then on the flash operators of torch, ``_scaled_dot_product_flash_attention`` and
    ``_flash_attention_forward`` with their gradients, are ours for CUDA tensors in the whole
    process: so is what calls them, which is ``scaled_dot_product_attention`` wherever torch picks
    its flash backend (``sdpa_kernel(SDPBackend.FLASH_ATTENTION)`` makes it), compiled code, and
    ``torch.distributed.tensor.experimental.context_parallel``.
    ``torch.nn.attention.restore_flash_attention_impl()`` gives torch's kernels back.

    Inputs are float16, bfloat16 or float32, with one head dimension for keys and values; results
    have the dtypes, shapes and strides of torch's, the lse is the natural logarithm, float32. A row
    that sees no key has ``lse = -inf`` (torch's kernel: +inf). Causal masks and windows are aligned
    at the bottom right, as in torch's kernel. Dropout draws from torch's generator, but other
    numbers than torch's kernel would. Gradients are those of the output, as in torch.

    What these operators know and we do not compute raises ``NotImplementedError``, since torch's
    kernel cannot be reached while another one is active: sequences of unequal lengths
    (``cum_seq_q``, so ``torch.nn.attention.varlen`` and nested tensors too), ``seqused_k``,
    ``block_table``, ``alibi_slopes``, ``num_splits`` above 1 (1 is taken: no result then depends on
    its batch), and debug masks.

    Calling this again changes nothing.

    Raises:
        RuntimeError: This torch has no such registry.

    Example:
        >>> import torch, online_attention
        >>> online_attention.register()
        >>> "online_attention" in torch.nn.attention.list_flash_attention_impls()
        True
    """
    offer = getattr(torch.nn.attention, "register_flash_attention_impl", None)
    if offer is None:
        raise RuntimeError(
            "register() needs torch.nn.attention.register_flash_attention_impl, which torch "
            f"{torch.__version__} does not have: upgrade torch, or use online_attention.enabled()."
        )
    offer(NAME, register_fn=_activate)


class _Activation:
    """What torch's registry keeps while our operators are in place."""

    def __init__(self, library: Library) -> None:
        self.library = library

    def remove(self) -> None:
        """Give torch's kernels back, at once: not whenever the last reference goes."""
        self.library._destroy()


def _activate() -> _Activation:
    return _Activation(implement("CUDA"))


def implement(dispatch_key: str) -> Library:
    """Our functions for one device under all of torch's flash operators that this torch has."""
    library = Library("aten", "IMPL", dispatch_key)
    for name, function in _IMPLEMENTATIONS.items():
        if hasattr(torch.ops.aten, name):
            library.impl(name, function, dispatch_key)
    return library


def sdpa_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **newer: object,
) -> SdpaResult:
    """``_scaled_dot_product_flash_attention``: (B, H, S, D), without variable lengths."""
    _check(query, key, value, return_debug_mask, newer)
    window = _window(is_causal, None, None)
    out, lse, rng = _forward(query, key, value, scale, window, dropout_p, False)
    unused, debug_mask = _unused(query)
    lengths = query.shape[2], key.shape[2]
    return _in_layout_of(out, query), lse, None, None, *lengths, rng, unused, debug_mask


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
    **newer: object,
) -> Gradients:
    """``_scaled_dot_product_flash_attention_backward``: gradients in the layouts of the inputs."""
    _check(query, key, value, False, {"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, **newer})
    window = _window(is_causal, None, None)
    inputs = (query, key, value)
    gradients = _backward(grad_out, inputs, out, logsumexp, scale, window, dropout_p, philox_seed)
    dq, dk, dv = (_in_layout_of(g, x) for g, x in zip(gradients, inputs, strict=True))
    return dq, dk, dv


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    num_splits: int | None = None,
    **unbuilt: object,
) -> ForwardResult:
    """``_flash_attention_forward``: (B, S, H, D), windows; lse is (B, H, S_q) all the same."""
    unbuilt = {"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, **unbuilt}
    _check(query, key, value, return_debug_mask, unbuilt, num_splits)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    window = _window(is_causal, window_size_left, window_size_right)
    out, lse, rng = _forward(q, k, v, scale, window, dropout_p, num_splits == 1)
    return _in_layout_of(out.transpose(1, 2), query), lse, rng, *_unused(query)


def flash_forward_inplace(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **keywords: Any,
) -> Tensor:
    """``_flash_attention_forward_no_dropout_inplace``: one copy into ``out``; returns the lse."""
    if dropout_p != 0:
        raise NotImplementedError(
            "dropout_p must be 0 in _flash_attention_forward_no_dropout_inplace, but is "
            f"{dropout_p}: call _flash_attention_forward."
        )
    result, lse, *_ = flash_forward(
        query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, 0.0, is_causal, return_debug_mask,
        **keywords,
    )  # fmt: skip
    out.copy_(result)
    return lse


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **unbuilt: object,
) -> Gradients:
    """``_flash_attention_backward``: gradients (B, S, H, D) in the layouts of the inputs."""
    _check(query, key, value, False, {"cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, **unbuilt})
    window = _window(is_causal, window_size_left, window_size_right)
    q, k, v, dout, o = (x.transpose(1, 2) for x in (query, key, value, grad_out, out))
    gradients = _backward(dout, (q, k, v), o, logsumexp, scale, window, dropout_p, rng_state)
    dq, dk, dv = (
        _in_layout_of(gradient.transpose(1, 2), x)
        for gradient, x in zip(gradients, (query, key, value), strict=True)
    )
    return dq, dk, dv


_IMPLEMENTATIONS = {
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
    "_flash_attention_forward": flash_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_forward_inplace,  # torch 2.12
    "_flash_attention_backward": flash_backward,
}


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    return_debug_mask: bool,
    unbuilt: dict[str, object],
    num_splits: int | None = None,
) -> None:
    """Refuse what torch's operators may be asked for and ours do not compute."""
    asked = [name for name, x in unbuilt.items() if not (x is None or x is False)]
    if num_splits is not None and num_splits > 1:
        asked.append("num_splits above 1")
    if return_debug_mask:
        asked.append("return_debug_mask")
    if asked:
        raise NotImplementedError(
            f"the flash attention implementation online_attention does not take {asked[0]}: leave "
            "it out, or call torch.nn.attention.restore_flash_attention_impl() first."
        )
    if query.dtype not in _DTYPES:
        raise TypeError(
            "query must be float16, bfloat16 or float32 in torch's flash attention operators, but "
            f"is {str(query.dtype).removeprefix('torch.')}: convert it with .to()."
        )
    if value.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"value must have D = {key.shape[-1]} as key in torch's flash attention operators, but "
            f"its shape is {tuple(value.shape)}: pad it, or call online_attention.attention."
        )


def _window(is_causal: bool, left: int | None, right: int | None) -> tuple[int, int]:
    """Torch's window as ours: None and anything below 0 are unbounded there."""
    left = UNBOUNDED if left is None or left < 0 else left
    right = UNBOUNDED if right is None or right < 0 else right
    return left, 0 if is_causal else right


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    window: tuple[int, int],
    dropout_p: float,
    batch_invariant: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, lse, rng state) of tensors (B, H, S, D)."""
    batch_invariant = batch_invariant or torch.are_deterministic_algorithms_enabled()
    rng = random_state(q.device) if dropout_p > 0 else None
    try:
        out, lse = operators.forward(
            q, k, v, scale, BOTTOM_RIGHT, *window, batch_invariant, None, rng, dropout_p
        )
    except Exception:
        fault = checks.fault_of_call(_NAMES, q, k, v, scale, None, dropout_p)
        if fault is None:
            raise
        raise fault from None
    # Two 64-bit numbers in both: torch passes them on to the backward pass and reads none.
    state = torch.zeros(2, dtype=torch.uint64, device=q.device) if rng is None else rng
    return out, lse, state.view(torch.uint64)


def _backward(
    dout: Tensor,
    inputs: Gradients,
    out: Tensor,
    lse: Tensor,
    scale: float | None,
    window: tuple[int, int],
    dropout_p: float,
    rng: Tensor,
) -> Gradients:
    """The gradients of tensors (B, H, S, D), all of them: torch asks for no fewer."""
    settings = (scale, BOTTOM_RIGHT, *window, torch.are_deterministic_algorithms_enabled())
    needs = (True, True, True)
    state = rng.view(torch.int64) if dropout_p > 0 else None
    result: Gradients = operators.backward(
        dout, None, *inputs, out, lse, *settings, *needs, None, state, dropout_p
    )
    return result


def _in_layout_of(result: Tensor, like: Tensor) -> Tensor:
    """The result with the strides of ``torch.empty_like(like)``, which torch's compiler expects."""
    if _strides(result) == _strides(like):
        return result
    if _strides(result) == _strides(torch.empty_like(like, device="meta")):
        return result
    return torch.empty_like(like).copy_(result)


def _strides(tensor: Tensor) -> list[int]:
    """Those that say where elements are."""
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in pairs if size != 1]


def _unused(query: Tensor) -> tuple[Tensor, Tensor]:
    """The second random number state, which nothing has a use for, and no debug mask."""
    return torch.zeros((), dtype=torch.uint64, device=query.device), query.new_empty(0)
