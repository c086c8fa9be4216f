# SPDX-License-Identifier: BSD-3-Clause
"""README.md agrees with the code: its example runs, its support table is the registry's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import online_attention
from online_attention import _C

README = Path(__file__).resolve().parent.parent / "README.md"


def between(begin: str, end: str) -> str:
    found = re.search(rf"{re.escape(begin)}\n(.*?){re.escape(end)}", README.read_text(), re.DOTALL)
    assert found is not None
    return found[1].strip()


def test_support_table_is_the_registry():
    table = between("<!-- support:begin -->", "<!-- support:end -->")
    ours = online_attention.supported().to_markdown()
    if not _C.built_with_cuda():  # this build has the CPU's rows alone
        table = "\n".join(row for row in table.splitlines() if "| CUDA" not in row)
    assert table == ours, f"between the support markers README.md needs:\n{ours}"


def test_example_runs():
    names: dict[str, torch.Tensor] = {}
    exec(between("```python", "```"), names)
    q, k, v = names["q"], names["k"], names["v"]
    expected, lse = online_attention.attention(q, k, v, return_lse=True)
    torch.testing.assert_close(names["out"], expected)
    torch.testing.assert_close(names["lse"], lse)


def test_every_example_runs():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) > 1
    for example in examples:
        if "from transformers import" in example:
            pytest.importorskip("transformers", minversion="4.56")
        exec(example, {})


@pytest.mark.parametrize("extra", ["test", "bench"])
def test_commands_are_there(extra: str):
    assert f"pip install '.[{extra}]' && " in README.read_text()
