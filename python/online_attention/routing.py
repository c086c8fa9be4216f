# SPDX-License-Identifier: BSD-3-Clause
"""torch.nn.functional.scaled_dot_product_attention made ours, in a block or in the process."""

from __future__ import annotations

import sys
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo  # torch.compiler's imports Dynamo at once
from torch.overrides import handle_torch_function, has_torch_function

from . import checks, sdpa

_torchs: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
_torchs_multi_head: Callable[..., Any] = F.multi_head_attention_forward
_REFUSALS = (TypeError, ValueError, NotImplementedError)
# Of classes that have no rule, and of those that inherit the one that keeps the class of a result.
_NO_RULE = torch._C._disabled_torch_function_impl
_INHERITED_RULE = Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


class FallbackWarning(UserWarning):
    """A call was left to torch's own attention, although `enabled` or `enable` was on."""


def enabled(strict: bool = False) -> Block:
    """A context manager in which torch's scaled_dot_product_attention is ours.

    The block holds for the thread that entered it, and for the threads in which autograd runs
    a backward pass that is started inside, as checkpoints need. Other threads keep torch's. Blocks
    nest; of several the innermost decides, and what was before comes back, after an exception too.

    While any block is entered, or :func:`enable` is on, the function is replaced in
    ``torch.nn.functional`` and in every imported module that has it as a global name, as an early
    ``from torch.nn.functional import scaled_dot_product_attention`` leaves it, and what replaces it
    asks the thread. A ``torch.overrides.TorchFunctionMode`` would catch more, copies that somebody
    took as a default argument, a ``functools.partial`` or an attribute of an object, which stay
    torch's here. But it would cost host time in every torch call of the block, would miss what runs
    inside torch's own Python functions (``Tensor.backward``, so checkpoints, and
    ``torch.nn.MultiheadAttention``), and would keep ``torch.compile`` from tracing some calls.
    TorchScript, C++ and ``torch.ops.aten.scaled_dot_product_attention``, which exported programs
    hold, do not call the function and are not affected; ``torch.jit.script`` cannot compile it
    meanwhile. Modes and tensor classes with a ``__torch_function__`` see the call before we do.

    ``torch.compile`` with ``fullgraph=True`` traces through, and compiles once for each state.
    Enter the block outside the compiled function; one inside it runs that function eagerly. A
    compiled function inside a checkpoint needs :func:`enable` instead on CUDA, where it is
    computed again in another thread. The fused inference path of ``torch.nn.MultiheadAttention``
    and ``torch.nn.TransformerEncoderLayer``, which never calls the function, is off meanwhile
    (``torch.backends.mha.set_fastpath_enabled``), in all threads. Do not ``await`` or ``yield``
    inside: the thread goes on with something else. Entering and leaving take about a millisecond in
    a process of many modules, so enter a block around a step, not around each call; a call takes
    1 to 2 µs more than our function.

    Args:
        strict: What becomes of a call that :func:`scaled_dot_product_attention` of this package
            refuses, such as a nested tensor, or a device or dtype without kernels. False: torch
            computes it, or raises what it raises, and one :class:`FallbackWarning` for each
            distinct sentence says why; from compiled code when it is compiled. True: the refusal
            is raised.

    Raises:
        TypeError: ``strict`` is no boolean; in strict blocks, as
            :func:`scaled_dot_product_attention`.
        ValueError: In strict blocks, as :func:`scaled_dot_product_attention`.
        NotImplementedError: In strict blocks, as :func:`scaled_dot_product_attention`.
        RuntimeError: When it is entered, and somebody else has replaced the function already.

    Results are differentiable as those of :func:`attention` are.

    Example:
        >>> import torch, online_attention
        >>> x = torch.randn(1, 2, 5, 8)
        >>> with online_attention.enabled(strict=True):
        ...     out = torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        >>> out.shape
        torch.Size([1, 2, 5, 8])
    """
    return Block(strict)


def enable(strict: bool = False) -> None:
    """Make torch's scaled_dot_product_attention ours in all threads, until :func:`disable`.

    What is caught, and what not, is what :func:`enabled` says; call this before others copy the
    function. In an :func:`enabled` block the block decides. A second call changes ``strict``.

    Args:
        strict: As in :func:`enabled`.

    Raises:
        TypeError: ``strict`` is no boolean.
        RuntimeError: Somebody else has replaced ``F.scaled_dot_product_attention`` already.
    """
    _check_strict(strict)
    with _names.lock:
        if _process.strict is None:
            _names.acquire()
        _process.strict = strict


def disable() -> None:
    """Undo :func:`enable`; without one, do nothing. Blocks of :func:`enabled` stay as they are.

    Where somebody took a copy of the replaced function in between, it computes as torch's does.
    """
    with _names.lock:
        if _process.strict is not None:
            _process.strict = None
            _names.release()


class Block:
    """What :func:`enabled` returns."""

    def __init__(self, strict: bool) -> None:
        """Change nothing yet."""
        _check_strict(strict)
        self._strict = strict
        self._before: list[bool | None] = []

    @_disable_dynamo
    def __enter__(self) -> None:
        """Route this thread's calls."""
        with _names.lock:
            _names.acquire()
        self._before.append(_strict_in_block())
        _set_strict_in_block(self._strict)

    @_disable_dynamo
    def __exit__(self, *_: object) -> None:
        """Go back to what was."""
        _set_strict_in_block(self._before.pop())
        with _names.lock:
            _names.release()


def _check_strict(strict: object) -> None:
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be True or False, but is {strict!r}.")


# --- what is on: None for nothing


class _Process:
    strict: bool | None = None


_process = _Process()
# The same fact twice: torch carries the second over to the threads of autograd, and Dynamo, which
# cannot read that, guards on the first.
_thread = threading.local()
_KEY = "online_attention.strict"


def _set_strict_in_block(strict: bool | None) -> None:
    _thread.strict = strict
    torch._C._stash_obj_in_tls(_KEY, strict)


def _strict_in_block() -> bool | None:
    strict: bool | None
    if torch.compiler.is_dynamo_compiling():
        strict = getattr(_thread, "strict", None)
    else:
        strict = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
    return strict


# --- what a call becomes


def _routed(*args: Any, **kwargs: Any) -> Tensor:
    arguments = (*args, *kwargs.values())
    refusal: Exception | None = None
    if has_torch_function(arguments):
        # Classes and modes come first, with the function that they find in torch.nn.functional to
        # compare with; what they call then comes back. Torch's own classes know the other one.
        kind = _class_of_torch(arguments)
        if kind is None:
            result: Tensor = handle_torch_function(_routed, arguments, *args, **kwargs)
            return result
        refusal = TypeError(
            f"an argument is a {kind.__name__}, a class with an attention of its own: pass a plain "
            "dense tensor."
        )
    strict = _strict_in_block()
    if strict is None:
        strict = _process.strict
    if strict is None:
        return _torchs(*args, **kwargs)
    try:
        if refusal is not None:
            raise refusal
        is_nested = len(arguments) > 0 and getattr(arguments[0], "is_nested", False)
        if is_nested or torch.compiler.is_dynamo_compiling():
            _check_early(*args, **kwargs)
        return sdpa.scaled_dot_product_attention(*args, **kwargs)
    except _REFUSALS as error:
        if strict:
            raise
        sentence = str(error)
    out = _torchs(*args, **kwargs)
    _report(sentence)
    return out


_routed.__name__ = _routed.__qualname__ = "scaled_dot_product_attention"
_routed.__doc__ = _torchs.__doc__


def _class_of_torch(arguments: tuple[Any, ...]) -> type | None:
    """The class of an argument that torch gave a rule of its own, for torch's function."""
    for argument in arguments:
        kind = type(argument)
        rule = getattr(kind, "__torch_function__", None)
        is_inherited = getattr(rule, "__func__", None) is _INHERITED_RULE
        is_own = rule is not None and rule is not _NO_RULE and not is_inherited
        if is_own and kind.__module__.startswith(("torch.nested.", "torch.fx.")):
            return kind
    return None


def _check_early(
    query: Any, key: Any, value: Any, *_: object, scale: object = None, **__: object
) -> None:
    """Refuse what our operator would, too late for a graph, and tensors without sizes."""
    checks.check_tensors(sdpa.NAMES[:3], query, key, value)
    if scale is not None:
        checks.check_scale(scale)


_reported: set[str] = set()


def _report(sentence: str) -> None:
    if sentence not in _reported:
        warnings.warn(
            f"online_attention left a call to torch's own attention: {sentence}",
            FallbackWarning,
            stacklevel=3,
        )
        _reported.add(sentence)


# Dynamo then calls it while it compiles.
_report._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _without_module_name(function: Any) -> Any:
    """The same function, with our attention for torch's: for Dynamo alone.

    That takes F.multi_head_attention_forward for one operation, which a compiled graph then holds
    whatever is inside, and so do caches of graphs. It traces this, whose globals have no name to
    look up a module by. They are those of the time of our import.
    """
    names = {**function.__globals__, "scaled_dot_product_attention": _routed}
    del names["__name__"]
    code, name, defaults = function.__code__, function.__name__, function.__defaults__
    copy = types.FunctionType(code, names, name, defaults, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_multi_head_for_dynamo = _without_module_name(_torchs_multi_head)


def _routed_multi_head(*args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling():
        return _multi_head_for_dynamo(*args, **kwargs)
    return _torchs_multi_head(*args, **kwargs)


_routed_multi_head.__name__ = _routed_multi_head.__qualname__ = _torchs_multi_head.__name__
_routed_multi_head.__doc__ = _torchs_multi_head.__doc__


# --- the replaced names

_REPLACEMENTS: tuple[tuple[Any, Any], ...] = (
    (_torchs, _routed),
    (_torchs_multi_head, _routed_multi_head),
)


_REPLACED = frozenset(id(function) for pair in _REPLACEMENTS for function in pair)


class _Names:
    """Global names of imported modules, replaced while anybody needs it. Use under the lock."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._users = 0
        self._scanned: dict[str, tuple[int, int]] = {}
        self._places: dict[str, list[str]] = {}
        self._had_fused_modules = True

    def acquire(self) -> None:
        if self._users == 0:
            present = F.scaled_dot_product_attention
            if present is not _torchs and present is not _routed:
                raise RuntimeError(
                    "torch.nn.functional.scaled_dot_product_attention must be torch's own to be "
                    f"replaced, but is {present!r}: undo that first."
                )
            self._had_fused_modules = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        # Also for a second user: modules may have been imported since.
        self._scan()
        self._swap(_REPLACEMENTS)
        self._users += 1

    def release(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._scan()
            self._swap(tuple((routed, torchs) for torchs, routed in _REPLACEMENTS))
            torch.backends.mha.set_fastpath_enabled(self._had_fused_modules)

    def _scan(self) -> None:
        """Find the names, in modules that are new or have got new names since the last time."""
        for module_name, module in list(sys.modules.items()):
            names = getattr(module, "__dict__", None)
            if names is None or module_name.startswith("torch._C") or module_name == __name__:
                continue
            state = id(module), len(names)
            if self._scanned.get(module_name) == state and module_name != "__main__":
                continue
            self._scanned[module_name] = state
            found = [key for key, value in list(names.items()) if id(value) in _REPLACED]
            if found:
                self._places[module_name] = found

    def _swap(self, replacements: tuple[tuple[Any, Any], ...]) -> None:
        for module_name, keys in self._places.items():
            names = getattr(sys.modules.get(module_name), "__dict__", {})
            for key in keys:
                for old, new in replacements:
                    if names.get(key) is old:
                        names[key] = new


_names = _Names()
