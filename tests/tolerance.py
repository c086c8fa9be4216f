# SPDX-License-Identifier: BSD-3-Clause
"""How close is close enough: at most twice the error PyTorch's own arithmetic makes.

A fixed tolerance is either too loose for easy inputs or too tight for hard ones. Here the inputs
set it: err(ours) <= 2 * err(plain) + a rounding floor, where `plain` is PyTorch in the same dtype
and both errors are taken against `exact`. Two errors are compared, since one alone would let a
small row hide behind a large one:

- the largest of all elements;
- the largest relative to its own query's magnitude (rows that average many keys are small),
  unless a query has too few elements for its largest one to be a magnitude.

Where `exact` is not finite there is no error to measure: NaN and inf must be matched first.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FACTOR = 2.0
ELEMENTS_OF_A_MAGNITUDE = 16


def eps_of(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def _coordinate(flat_index: int, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat_index), shape))


def _first(where: Tensor) -> tuple[int, ...]:
    return tuple(where.nonzero()[0].tolist())


def _assert_same_kind(ours: Tensor, exact: Tensor, what: str) -> None:
    """NaN where exact is NaN, the same infinity where it is infinite, finite elsewhere."""
    maps = {
        "NaN": (ours.isnan(), exact.isnan()),
        "inf": (ours == math.inf, exact == math.inf),
        "-inf": (ours == -math.inf, exact == -math.inf),
    }
    for name, (mine, due) in maps.items():
        for where, side in ((mine & ~due, "ours alone"), (due & ~mine, "exact alone")):
            if bool(where.any()):
                at = _first(where)
                raise AssertionError(
                    f"{what}: {name} in {side} at {int(where.sum())} of {where.numel()} elements, "
                    f"first at {at}: ours {ours[at].item()}, exact {exact[at].item()}"
                )


def _query_magnitude(exact: Tensor) -> Tensor:
    """The largest finite |exact| of each query (dim -2), shaped to divide by; 1 where all are 0."""
    finite = torch.where(exact.isfinite(), exact.abs(), 0.0)
    if finite.numel() == 0:
        return finite
    other = [d for d in range(finite.dim()) if d != finite.dim() - 2]
    magnitude = finite.amax(dim=other, keepdim=True) if other else finite
    return torch.where(magnitude == 0, 1.0, magnitude)


def _error(result: Tensor, exact: Tensor) -> Tensor:
    """|result - exact| where both are finite, 0 elsewhere."""
    both_finite = exact.isfinite() & result.isfinite()
    return torch.where(both_finite, (result - exact).abs(), 0.0)


def _assert_error_at_most(
    errors: tuple[Tensor, Tensor], values: tuple[Tensor, Tensor, Tensor], floor: float, what: str
) -> None:
    error_ours, error_plain = errors
    ours, exact, plain = values
    worst = int(error_ours.argmax())
    bound = FACTOR * float(error_plain.max()) + floor
    if float(error_ours.flatten()[worst]) <= bound:
        return
    at = _coordinate(worst, exact.shape)
    side = "above" if ours[at] > exact[at] else "below"
    raise AssertionError(
        f"{what} {float(error_ours.flatten()[worst]):.3g} is over the bound {bound:.3g} "
        f"= {FACTOR:g} * {float(error_plain.max()):.3g} (plain PyTorch) + {floor:.3g} (floor). "
        f"Worst at {at}: ours {ours[at].item()!r} is {side} exact {exact[at].item()!r}; "
        f"plain PyTorch has {plain[at].item()!r}"
    )


def assert_close(
    ours: Tensor, exact: Tensor, plain: Tensor, *, magnitude: float | None = None, what: str = "out"
) -> None:
    """Asserts that `ours` is as near to `exact` as `plain` is, up to a factor of two.

    Args:
        ours: the result, (..., S_q, D_v), any floating dtype: it sets the rounding floor.
        exact: fp64, the same shape.
        plain: PyTorch's result in the dtype of `ours`, the same shape.
        magnitude: of the values that were averaged. By default that of the results, which is
            right unless a few large values cancel: then PyTorch may be exact by luck.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert plain.shape == exact.shape, f"{what}: plain has shape {tuple(plain.shape)}"
    assert plain.dtype == ours.dtype, f"{what}: {ours.dtype}, but plain PyTorch has {plain.dtype}"
    floor = eps_of(ours.dtype)
    ours, exact, plain = (x.detach().double().to(exact.device) for x in (ours, exact, plain))
    _assert_same_kind(ours, exact, what)
    if exact.numel() == 0:
        return
    values = (ours, exact, plain)
    errors = _error(ours, exact), _error(plain, exact)
    per_query = _query_magnitude(exact)
    largest = float(torch.where(exact.isfinite(), exact.abs(), 0.0).max())
    scale = largest if magnitude is None else magnitude
    _assert_error_at_most(errors, values, floor * scale, f"{what}: error")
    per_query_elements = exact.numel() // exact.shape[-2] if exact.dim() > 1 else 1
    if magnitude is None and per_query_elements >= ELEMENTS_OF_A_MAGNITUDE:
        relative = errors[0] / per_query, errors[1] / per_query
        _assert_error_at_most(relative, values, floor, f"{what}: error relative to its query")


def assert_lse_close(
    ours: Tensor, exact: Tensor, plain: Tensor, *, ulps: float = 4.0, what: str = "lse"
) -> None:
    """Asserts that a log-sum-exp is within twice PyTorch's error and `ulps` ulp of `exact`.

    An ulp is that of the larger of |exact| and 1: near 0 the lse is a difference of the row's
    maximum and the log of its sum, each of them about 1 or more.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    assert plain.dtype == ours.dtype, f"{what}: {ours.dtype}, but plain PyTorch has {plain.dtype}"
    eps = eps_of(ours.dtype)
    ours, exact, plain = (x.detach().double().to(exact.device) for x in (ours, exact, plain))
    _assert_same_kind(ours, exact, what)
    if exact.numel() == 0:
        return
    one_ulp = eps * torch.where(exact.isfinite(), exact.abs(), 1.0).clamp(min=1.0)
    errors = _error(ours, exact) / one_ulp, _error(plain, exact) / one_ulp
    _assert_error_at_most(errors, (ours, exact, plain), ulps, f"{what}: error in ulp")


def assert_bitwise_equal(a: Tensor, b: Tensor, what: str = "out") -> None:
    """The same bits, NaN payloads and signs of zero included."""
    assert a.dtype == b.dtype, f"{what}: {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    as_integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    differ = a.contiguous().view(as_integers) != b.contiguous().view(as_integers)
    if bool(differ.any()):
        at = _first(differ)
        raise AssertionError(
            f"{what}: {int(differ.sum())} of {differ.numel()} elements differ in bits, first at "
            f"{at}: {a[at].item()!r} and {b[at].item()!r}"
        )
