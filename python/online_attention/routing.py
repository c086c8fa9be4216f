# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.functional.scaled_dot_product_attention made ours, in a block or in the process."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from . import sdpa

# What an import of this module before anything was replaced finds, as `torch._C._nn` always has it.
_torchs: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
# What the modules' inference path calls instead: kernels with an attention of their own inside.
_FUSED_MODULES = frozenset(
    {torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd}
)
_INHERITED = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]
_REFUSALS = (TypeError, ValueError, NotImplementedError)


class FallbackWarning(UserWarning):
    """A call stayed with torch's own attention, although `enabled` or `enable` was on."""


def enabled(strict: bool = False) -> TorchFunctionMode:
    """A context manager in which torch's scaled_dot_product_attention is ours.

    However the function was imported: the block is a ``torch.overrides.TorchFunctionMode``, which
    torch asks at every call of its Python functions. So an early
    ``from torch.nn.functional import scaled_dot_product_attention``, a ``functools.partial`` and
    ``torch.nn.MultiheadAttention`` are all caught, which replacing the attribute of the module
    would miss; and ``torch.compile`` traces through it (``fullgraph=True`` too) and compiles anew
    where the mode changes, whether the block is inside or around the compiled function.

    The block holds for the thread that entered it, and for the threads in which autograd runs
    a backward pass that is started inside. Blocks nest with each other and with other modes; of
    several the innermost decides. Inside, every eager torch call costs about 2 µs of host time
    more; :func:`enable` does not. Outside, nothing does.

    Not seen, because Python calls no such function there: TorchScript, C++ callers, and the
    operator ``torch.ops.aten.scaled_dot_product_attention``, which is what exported programs hold.
    The fused inference path of ``torch.nn.MultiheadAttention`` and
    ``torch.nn.TransformerEncoderLayer`` is treated as a call that we do not take;
    ``torch.backends.mha.set_fastpath_enabled(False)`` turns it off. A backward pass that computes
    a checkpointed block once more needs the same block around it.

    Args:
        strict: What becomes of a call that :func:`scaled_dot_product_attention` of this package
            refuses, such as a nested tensor, another device or dtype, an argument that is not
            built, or a tensor class that overrides the function itself. False: torch computes it,
            and one :class:`FallbackWarning` for each distinct sentence says why. True: the refusal
            is raised. What torch refuses as well raises torch's error in the first case.

    Raises:
        TypeError: ``strict`` is no boolean; in strict blocks, as
            :func:`scaled_dot_product_attention`.
        ValueError: In strict blocks, as :func:`scaled_dot_product_attention`.
        NotImplementedError: In strict blocks, as :func:`scaled_dot_product_attention`.

    Results are differentiable as those of :func:`attention` are.

    Example:
        >>> import torch, online_attention
        >>> x = torch.randn(1, 2, 5, 8)
        >>> with online_attention.enabled(strict=True):
        ...     out = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> out.shape
        torch.Size([1, 2, 5, 8])
    """
    _check_strict(strict)
    return _Routing(strict)


def enable(strict: bool = False) -> None:
    """Make torch's scaled_dot_product_attention ours in the whole process, until :func:`disable`.

    All threads are affected. Torch has no mode for more than one thread, so this replaces the
    function: in ``torch.nn.functional`` and in every imported module that has it as a global name,
    as ``from torch.nn.functional import scaled_dot_product_attention`` leaves it. Copies elsewhere
    (default arguments, ``functools.partial``, attributes of objects) made before stay torch's: call
    this first, or use :func:`enabled`, which catches them. It also turns off the fused inference
    path of ``torch.nn.MultiheadAttention`` (``torch.backends.mha.set_fastpath_enabled(False)``),
    which calls no such function. No other torch call costs more than before.

    Inside an :func:`enabled` block the block decides. A second call changes ``strict``.
    ``torch.compile`` compiles anew after a change. ``torch.jit.script`` cannot compile the
    replaced name.

    Args:
        strict: As in :func:`enabled`.

    Raises:
        TypeError: ``strict`` is no boolean.
        RuntimeError: Somebody else has replaced ``F.scaled_dot_product_attention`` already.
    """
    _check_strict(strict)
    with _process.lock:
        if _process.strict is None:
            present = F.scaled_dot_product_attention
            if present is not _torchs and present is not _routed:
                raise RuntimeError(
                    "torch.nn.functional.scaled_dot_product_attention must be torch's own to be "
                    f"replaced, but is {present!r}: undo that first, or use "
                    "online_attention.enabled()."
                )
            _replace(_torchs, _routed)
            _process.had_fused_modules = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        _process.strict = strict


def disable() -> None:
    """Undo :func:`enable`; without one, do nothing.

    A copy of the replaced function that somebody took in between computes as torch's does from now
    on. Blocks of :func:`enabled` stay as they are.
    """
    with _process.lock:
        if _process.strict is None:
            return
        _process.strict = None
        _replace(_routed, _torchs)
        if _process.had_fused_modules:
            torch.backends.mha.set_fastpath_enabled(True)


def _check_strict(strict: object) -> None:
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False, but is {strict!r}.")


class _Routing(TorchFunctionMode):
    def __init__(self, strict: bool) -> None:
        super().__init__()
        self.strict = strict
        self.passes = False  # while a block further in has decided for torch

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if self.passes or (func is not _torchs and func not in _FUSED_MODULES):
            return func(*args, **kwargs)
        refusal = _refusal(func, types, args, kwargs)
        if refusal is None:
            try:
                return sdpa.scaled_dot_product_attention(*args, **kwargs)
            except _REFUSALS as error:
                refusal = error
        if self.strict:
            raise refusal
        result = _past_outer_blocks(func, args, kwargs)
        _report(str(refusal))
        return result


def _refusal(func: Any, types: Iterable[type], args: Any, kwargs: Any) -> Exception | None:
    """What our function cannot notice itself, as the error it would raise."""
    if func is not _torchs:
        return NotImplementedError(
            f"the fused inference path of torch.nn modules, {func.__name__}, has an attention of "
            "its own: turn it off with torch.backends.mha.set_fastpath_enabled(False)."
        )
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor) and tensor.is_nested:
            return TypeError(
                "query, key and value must be dense tensors, but one of the arguments is nested: "
                "pad it first."
            )
    for kind in types:
        # The rule that classes inherit keeps the class of what was computed: so do we.
        own = getattr(kind.__torch_function__, "__func__", None)  # type: ignore[attr-defined]
        if own is not _INHERITED:
            return TypeError(
                f"an argument is a {kind.__name__}, a class with a __torch_function__ of its own: "
                "pass a plain tensor."
            )
    return None


def _outer_blocks() -> list[_Routing]:
    """The blocks that the running one is in; while torch asks a mode, that is not among them."""
    return [mode for mode in _get_current_function_mode_stack() if isinstance(mode, _Routing)]


def _past_outer_blocks(func: Any, args: Any, kwargs: Any) -> Any:
    """Torch's result; other modes further out see the call, blocks do not decide once more."""
    blocks = [block for block in _outer_blocks() if not block.passes]
    for block in blocks:
        block.passes = True
    try:
        return func(*args, **kwargs)
    finally:
        for block in blocks:
            block.passes = False


_reported: set[str] = set()


def _report(sentence: str) -> None:
    if sentence not in _reported:
        warnings.warn(
            f"torch's own attention ran a call, because online_attention refused it: {sentence}",
            FallbackWarning,
            stacklevel=3,
        )
        _reported.add(sentence)


# Dynamo then calls it while it compiles: a compiled call is reported when it is traced.
_report._dynamo_marked_constant = True  # type: ignore[attr-defined]


class _Process:
    """What `enable` has set."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.strict: bool | None = None  # None: off
        self.had_fused_modules = True


_process = _Process()


def _routed(*args: Any, **kwargs: Any) -> Tensor:
    strict = _process.strict
    if strict is None or _outer_blocks():
        return _torchs(*args, **kwargs)
    with _Routing(strict):
        return _torchs(*args, **kwargs)


_routed.__name__ = _routed.__qualname__ = "scaled_dot_product_attention"
_routed.__doc__ = _torchs.__doc__


def _replace(old: object, new: object) -> None:
    """In the global names of every module but torch's compiled ones and this."""
    for name, module in list(sys.modules.items()):
        if module is None or name == __name__ or name.startswith("torch._C"):
            continue
        names = getattr(module, "__dict__", {})
        for key, value in list(names.items()):
            if value is old:
                names[key] = new
