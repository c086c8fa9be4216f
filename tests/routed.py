# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of `enabled` and `enable` share: calls to route, and what watches them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as early

import online_attention
from online_attention import routing

X = torch.randn(2, 3, 5, 8)
OURS = online_attention.scaled_dot_product_attention
BUILTIN = torch._C._nn.scaled_dot_product_attention


def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is on before or after, and every sentence is reported again."""
    monkeypatch.setattr(routing, "_reported", set())
    yield
    online_attention.disable()
    assert F.scaled_dot_product_attention is BUILTIN
    assert early is BUILTIN


def watched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that our function will be called with."""
    seen: list[tuple[int, ...]] = []

    def counted(query: Tensor, *arguments: object, **keywords: object) -> Tensor:
        seen.append(tuple(query.shape))
        return OURS(query, *arguments, **keywords)

    monkeypatch.setattr(routing.sdpa, "scaled_dot_product_attention", counted)
    return seen


def refused(x: Tensor = X) -> Tensor:
    """A call that torch computes and ours refuses."""
    return F.scaled_dot_product_attention(x, x, x, dropout_p=1.0)


REFUSAL = r"dropout_p must be at least 0 and below 1, but is 1\.0"


def attention_module() -> torch.nn.MultiheadAttention:
    return torch.nn.MultiheadAttention(8, 2, batch_first=True)


WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "attribute": lambda x: F.scaled_dot_product_attention(x, x, x),
    "from-import": lambda x: early(x, x, x),
    "late-import": lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x),
    "keywords": lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x, dropout_p=0.0),
}
