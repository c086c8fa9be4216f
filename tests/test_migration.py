# SPDX-License-Identifier: BSD-3-Clause
"""Every line of code in docs/migration.md runs, and gives what the line it replaces gave."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import online_attention
import online_attention.compat.flash_attn
from tolerance import assert_bitwise_equal

PAGE = Path(__file__).resolve().parent.parent / "docs" / "migration.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)

Names = dict[str, Any]


def theirs(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal=False) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)


def transposed(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def check_sdpa(names: Names) -> None:
    due = theirs(names["q"], names["k"], names["v"], ~names["hidden"])
    torch.testing.assert_close(names["out"], due)


def check_enabled(names: Names) -> None:
    q, k, v = names["q"], names["k"], names["v"]
    ours = online_attention.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_bitwise_equal(names["out"], ours)
    torch.testing.assert_close(ours, theirs(q, k, v, causal=True))


def check_module(names: Names) -> None:
    module = torch.nn.MultiheadAttention(64, 8, batch_first=True)
    module.load_state_dict(names["module"].state_dict())
    x = names["x"]
    due = module(x, x, x, key_padding_mask=names["hidden"], need_weights=False)[0]
    torch.testing.assert_close(names["out"], due)


def check_flash_attn(names: Names) -> None:
    due = theirs(*transposed(*names["qkv"].unbind(2)), causal=True).transpose(1, 2)
    torch.testing.assert_close(names["out"], due)
    torch.testing.assert_close(names["same"], due)
    assert names["lse"].shape == (2, 8, 100)


def check_xformers(names: Names) -> None:
    due = theirs(*transposed(names["q"], names["k"], names["v"])).transpose(1, 2)
    torch.testing.assert_close(names["out"], due)


def check_xformers_bias(names: Names) -> None:
    due = theirs(names["q"], names["k"], names["v"], names["attn_bias"]).transpose(1, 2)
    torch.testing.assert_close(names["out"], due)
    assert names["out"].is_contiguous()


def check_transformers(names: Names) -> None:
    tokens = torch.arange(7)[None]
    mine = names["model"](tokens).logits
    names["model"].set_attn_implementation("eager")
    torch.testing.assert_close(mine, names["model"](tokens).logits)


CHECKS: dict[str, Callable[[Names], None]] = {
    "from torch.nn.functional import": check_sdpa,
    "online_attention.enabled()": check_enabled,
    "from torch.nn import": check_module,
    "from flash_attn import": check_flash_attn,
    "from xformers.ops import": check_xformers,
    "attn_bias = ": check_xformers_bias,
    "from transformers import": check_transformers,
}


def test_every_example_has_its_check():
    assert [sum(key in example for key in CHECKS) for example in EXAMPLES] == [1] * len(CHECKS)


@pytest.mark.parametrize("key", CHECKS)
def test_examples_give_what_they_replace(key: str):
    if "transformers" in key:
        pytest.importorskip("transformers", reason="needs transformers, of the extra [test]")
    (example,) = (example for example in EXAMPLES if key in example)
    names: Names = {}
    exec(example, names)
    CHECKS[key](names)


@pytest.mark.parametrize("module", [online_attention.nn, online_attention.compat.flash_attn])
def test_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
