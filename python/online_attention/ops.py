# SPDX-License-Identifier: BSD-3-Clause
"""`attention`: the keywords checked, the inputs converted, the right route taken."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from . import autograd, checks, operators
from .operators import BOTTOM_RIGHT, UNBOUNDED

RNG_END = 2**63 - 1  # random words are below it


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    window: tuple[int, int] | None = ...,
    softcap: float = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool | None = ...,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    window: tuple[int, int] | None = ...,
    softcap: float = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool | None = ...,
) -> tuple[Tensor, Tensor]: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    scale: float | None = ...,
    return_lse: bool,
    window: tuple[int, int] | None = ...,
    softcap: float = ...,
    bias: Tensor | None = ...,
    alibi_slopes: Tensor | None = ...,
    sinks: Tensor | None = ...,
    dropout_p: float = ...,
    deterministic: bool | None = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    deterministic: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, ``softmax(q kᵀ * scale + mask) v``, in one pass over the keys.

    Query head ``h`` attends to key and value head ``h // (H // H_kv)``, so grouped-query and
    multi-query attention need no repeated heads.

    Args:
        q: Queries ``(B, H, S_q, D)``; float16, bfloat16, float32 or float64.
        k: Keys ``(B, H_kv, S_kv, D)``, of the dtype and device of ``q``; ``H % H_kv == 0``.
        v: Values ``(B, H_kv, S_kv, D_v)``, of the dtype and device of ``q``.
        causal: Query ``i`` sees key ``j`` only if ``j <= i + S_kv - S_q``: the last query sees
            every key.
        scale: Factor of the scores, any finite number; None means ``1 / sqrt(D)``.
        return_lse: Whether to return the log-sum-exp of each row too.
        window: Not built yet.
        softcap: Not built yet.
        bias: Broadcastable to ``(B, H, S_q, S_kv)``. Boolean: True where a pair is visible. Of the
            dtype of ``q``, or float32: added to the scores, ``q kᵀ * scale + bias``, and -inf hides
            a pair as False does. Read where it lies, with any strides, and never expanded. Together
            with ``causal`` a pair is visible if both say so.
        alibi_slopes: Not built yet.
        sinks: Not built yet.
        dropout_p: The probability, at least 0 and below 1, with which a pair loses its weight after
            the softmax; weights that stay are divided by ``1 - dropout_p``, a multiple of 2⁻¹⁶. The
            state is drawn from torch's default generator of the device; the same state drops the
            same pairs on every device. ``lse`` is that without dropout.
        deterministic: Whether no result may depend on the batch it is computed in, and gradients
            must be the same from run to run (results are in any case). None follows
            ``torch.are_deterministic_algorithms_enabled()``, which backward asks once more.

    Returns:
        ``out``, ``(B, H, S_q, D_v)`` in the dtype and the memory order of ``q``; with
        ``return_lse=True`` the pair ``(out, lse)``, where ``lse`` is the natural logarithm of
        the sum of ``exp(score)`` over the keys, ``(B, H, S_q)``, float32 (float64 for float64).
        A row that sees no key has ``out = 0`` and ``lse = -inf``.

    Inputs are read in place, whatever their strides, if their last dimension is contiguous, and are
    copied once otherwise. The work is ``O(S_q * S_kv)``, the memory beside inputs and outputs is
    bounded, whatever ``S_kv`` is. :func:`supported` lists what runs where.

    Both results are differentiable with respect to ``q``, ``k``, ``v`` and a float ``bias``;
    gradients have the dtype and the memory order of their inputs, are computed only for inputs that
    ask, and are 0 for rows that see no key. That of a bias has the shape the bias was given in, so
    pass a broadcast bias unexpanded. Second derivatives, forward mode and the transforms of
    ``torch.func`` work too, with bounded memory; ``torch.vmap`` runs samples one after the other
    under dropout, and follows its ``randomness``. A third derivative, and forward mode over forward
    mode, raise ``NotImplementedError``. Section 8 of docs/algorithm.md derives all of them.

    Raises:
        TypeError: An argument has a wrong type, dtype or layout.
        ValueError: Shapes or devices do not fit together, or a size, the scale or ``dropout_p`` is
            out of range.
        NotImplementedError: A keyword or a device that is not built.

    Example:
        >>> import torch
        >>> from online_attention import attention
        >>> q = torch.randn(2, 8, 100, 64)
        >>> k, v = torch.randn(2, 2, 2, 100, 64)
        >>> out, lse = attention(q, k, v, causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 100, 64]), torch.Size([2, 8, 100]))
        >>> dq, = torch.autograd.grad(attention(q.requires_grad_(), k, v).sum(), q)
        >>> dq.shape
        torch.Size([2, 8, 100, 64])
    """
    if not (
        (causal is True or causal is False)
        and (return_lse is True or return_lse is False)
        and (deterministic is None or deterministic is True or deterministic is False)
        and window is None
        and alibi_slopes is None
        and sinks is None
        and type(softcap) is float
        and softcap == 0.0
    ):
        checks.check_keywords(
            causal=causal,
            return_lse=return_lse,
            deterministic=deterministic,
            window=window,
            softcap=softcap,
            alibi_slopes=alibi_slopes,
            sinks=sinks,
        )
    out, lse = forward(
        q, k, v, causal, scale, BOTTOM_RIGHT, deterministic, bias=bias, dropout_p=dropout_p
    )
    return (out, lse) if return_lse else out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float | None,
    alignment: int,
    deterministic: bool | None,
    names: checks.Names = checks.NAMES,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Run the operator; inputs are checked here only for what the operator cannot notice.

    It refuses whatever it cannot compute before it does anything, so a call that succeeds does not
    pay for the checks that explain one that fails.
    """
    try:
        if any_autocast_enabled():
            q, k, v = autocast(q, k, v)
            bias = autocast_bias(bias)
        if not (scale is None or type(scale) is float):
            scale = checks.check_scale(scale)
        if deterministic is None and torch.are_deterministic_algorithms_enabled():
            deterministic = True
        right = 0 if causal else UNBOUNDED
        if bias is None and type(dropout_p) is float and dropout_p == 0.0:
            # Most calls, apart from the others so that they do not pay for them.
            if autograd.is_active(q, k, v):
                return autograd.attention(
                    q, k, v, scale, alignment, UNBOUNDED, right, deterministic
                )
            result: tuple[Tensor, Tensor] = operators.forward(
                q, k, v, scale, alignment, UNBOUNDED, right, deterministic is True
            )
            return result
        modifiers = _modifiers(q, bias, dropout_p)
        if autograd.is_active(q, k, v) or autograd.needs_gradient(bias):
            return autograd.attention(
                q, k, v, scale, alignment, UNBOUNDED, right, deterministic, *modifiers
            )
        result = operators.forward(
            q, k, v, scale, alignment, UNBOUNDED, right, deterministic is True, *modifiers
        )
    except Exception:
        fault = checks.fault_of_call(names, q, k, v, scale, bias, dropout_p)
        if fault is None:
            raise
        raise fault from None
    return result


def _modifiers(q: Tensor, bias: Tensor | None, dropout_p: float) -> tuple[Any, ...]:
    """bias, rng and dropout_p as the operators take them; nothing where there is none."""
    if not (type(dropout_p) is float and 0.0 <= dropout_p < 1.0):
        dropout_p = checks.check_dropout(dropout_p)
    if bias is not None and bias.dim() != 4:
        bias = bias[(None,) * (4 - bias.dim())]
    rng = None
    if dropout_p != 0.0:
        rng = random_state(q.device)
    return () if bias is None and rng is None else (bias, rng, dropout_p)


def random_state(device: torch.device) -> Tensor:
    """The two numbers that decide what dropout drops.

    From the default generator, by an operation that seeds, checkpoints, CUDA graphs and compilers
    know.
    """
    return torch.randint(RNG_END, (2,), dtype=torch.int64, device=device)


def any_autocast_enabled() -> bool:
    """Whether autocast is on for a device that attention runs on."""
    return torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as torch's own attention gets them under autocast: float64 stays as it is."""
    device_type = tensors[0].device.type
    if device_type not in checks.DEVICES or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype)
        if t.is_floating_point() and t.dtype is not torch.float64 and t.device.type == device_type
        else t
        for t in tensors
    )


def autocast_bias(bias: Tensor | None) -> Tensor | None:
    """The bias under autocast: as another input, but float32, which scores are, stays too."""
    if bias is None or bias.dtype is torch.float32:
        return bias
    return autocast(bias)[0]
