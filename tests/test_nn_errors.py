# SPDX-License-Identifier: BSD-3-Clause
"""What `nn.MultiheadAttention` refuses, and how it says so."""

from __future__ import annotations

import pytest
import torch

from online_attention.nn import MultiheadAttention

X = torch.ones(5, 2, 12)
TRUE = torch.ones(2, 5, dtype=torch.bool)
REFUSED = {
    "weights": ((X, X, X), {"need_weights": True}, NotImplementedError, "never formed; pass need"),
    "no-tensor": ((X, None, X), {}, TypeError, r"key must be a torch\.Tensor, but is of type None"),
    "dtype": (
        (X.double(), X, X),
        {},
        TypeError,
        "query must have the dtype of the module, torch.f",
    ),
    "device": (
        (X, X, X.to("meta")),
        {},
        ValueError,
        "value must be on the device of the module, c",
    ),
    "rank": (
        (X[None], X, X),
        {},
        ValueError,
        r"query must have the shape \(L, N, E\), or \(L, E\)",
    ),
    "mixed": ((X, X[:, 0], X), {}, ValueError, r"key must have the shape \(S, N, kdim\), or \(S"),
    "size": ((X, X, X[..., 1:]), {}, ValueError, r"vdim = 12, but its shape is \(5, 2, 11\)"),
    "batch": ((X, X[:, :1], X[:, :1]), {}, ValueError, "key must have N = 2 as query, but"),
    "length": ((X, X, X[:4]), {}, ValueError, r"value must have S = 5 as key, but value\.shape\[0"),
    "integers": (
        (X, X, X),
        {"key_padding_mask": TRUE.int()},
        TypeError,
        "key_padding_mask must be a boolean tensor, True to hide, or a floating one, but is ",
    ),
    "list": ((X, X, X), {"attn_mask": [1]}, TypeError, "attn_mask must be .* but is of type list"),
    "padding": (
        (X, X, X),
        {"key_padding_mask": TRUE.T},
        ValueError,
        r"key_padding_mask must have the shape \(N, S\) = \(2, 5\), but its shape is \(5, 2\)",
    ),
    "unbatched-padding": (
        (X[:, 0], X[:, 0], X[:, 0]),
        {"key_padding_mask": TRUE},
        ValueError,
        r"key_padding_mask must have the shape \(S,\) = \(5,\), but its shape is \(2, 5\)",
    ),
    "mask": (
        (X, X, X),
        {"attn_mask": TRUE},
        ValueError,
        r"\(L, S\) = \(5, 5\) or \(N \* H, L, S\) = \(6, 5, 5\), but its shape is \(2, 5\)",
    ),
    "mask-device": (
        (X, X, X),
        {"key_padding_mask": TRUE.to("meta")},
        ValueError,
        "key_padding_mask must be on the device of query, cpu, but is on meta",
    ),
    "mask-dtype": (
        (X, X, X),
        {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)},
        TypeError,
        "attn_mask must be boolean, float32, or torch.float32 as the projected queries, but is",
    ),
}


@pytest.mark.parametrize(("inputs", "keywords", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_refusals(inputs, keywords, error: type[Exception], text: str):
    module = MultiheadAttention(12, 3)
    with pytest.raises(error, match=text):
        module(*inputs, **keywords)
    assert module(X, X, X)[0].shape == X.shape


def test_batch_first_refusal_names_its_layout():
    with pytest.raises(ValueError, match=r"query must have the shape \(N, L, E\), or \(L, E\)"):
        MultiheadAttention(12, 3, batch_first=True)(X[..., :3], X, X)


def test_nested_tensors_are_refused():
    nested = torch.nested.nested_tensor([torch.ones(3, 12), torch.ones(2, 12)])
    with pytest.raises(TypeError, match="query must be a dense tensor, but is nested: call"):
        MultiheadAttention(12, 3, batch_first=True)(nested, nested, nested)


def test_heads_must_divide_the_embedding():
    with pytest.raises(
        ValueError, match="embed_dim must be a multiple of num_heads, but is 12 for"
    ):
        MultiheadAttention(12, 5)
    with pytest.raises(ValueError, match="must be greater than 0"):
        MultiheadAttention(12, 0)
