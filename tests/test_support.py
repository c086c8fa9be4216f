# SPDX-License-Identifier: BSD-3-Clause
"""The support table: what it says is what runs, and the README repeats it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import cases
import online_attention
from cases import normal
from online_attention import explain, supported
from rows import Target
from test_forward import HEAD_DIM_CASES

README = Path(__file__).resolve().parent.parent / "README.md"
Q = torch.ones(2, 4, 5, 8)


def test_table_ends_with_the_cpu_row_that_takes_everything():
    last = supported()[-1]
    assert (last.name, last.device) == ("cpu.tiled", "cpu")
    assert set(last.dtypes) == {"float16", "bfloat16", "float32", "float64"}
    assert last.head_dim_max is None


def test_rows_are_well_formed():
    for row in supported():
        assert row.device in ("cpu", "cuda")
        assert row.name.startswith(row.device + ".")
        assert row.dtypes
        assert all(isinstance(getattr(torch, dtype), torch.dtype) for dtype in row.dtypes)
        assert row.arch_min <= row.arch_max
        assert row.head_dim_max is None or row.head_dim_max > 0


def test_table_prints_one_line_a_row():
    lines = str(supported()).splitlines()
    assert len(lines) == len(supported()) + 1
    for row, line in zip(supported(), lines[1:], strict=True):
        assert line.startswith(row.name)
        assert all(dtype in line for dtype in row.dtypes)


def test_markdown_is_a_table():
    header, rule, *rows = supported().to_markdown().splitlines()
    columns = header.count("|")
    assert set(rule) <= set("|-: ")
    assert all(line.count("|") == columns for line in (rule, *rows))
    assert [line.split("|")[1].strip() for line in rows] == [row.name for row in supported()]


def test_readme_repeats_the_table():
    text = README.read_text()
    assert text.count("<!-- support:begin -->") == 1
    assert text.count("<!-- support:end -->") == 1
    block = text.split("<!-- support:begin -->")[1].split("<!-- support:end -->")[0].strip()
    table = supported().to_markdown()
    if any(row.device == "cuda" for row in supported()):
        assert block == table
    else:  # a build for the CPU alone knows the last rows
        header, rule, *rows = table.splitlines()
        assert block.splitlines()[:2] == [header, rule]
        assert block.splitlines()[-len(rows) :] == rows


# --- explain


def test_explain_names_the_row_that_runs(target: Target):
    D = target.head_dim
    q, k, v = normal((1, 2, 3, D), (1, 2, 5, D), (1, 2, 5, D),
                     dtype=target.dtype, device=target.device)  # fmt: skip
    assert explain(q, k, v).startswith(f"{target.row} runs this problem.")
    assert explain(q, k, v, causal=True, scale=0.5, return_lse=True).startswith(target.row)


def test_explain_says_why_an_earlier_row_does_not(target: Target):
    if target.head_dims[0] == 1:
        pytest.skip("no earlier row takes this dtype on this device")
    D = target.head_dims[0]
    x = torch.ones(1, 1, 2, D, dtype=target.dtype, device=target.device)
    said = re.search(r"does not take it: head_dim (\d+) is above (\d+)\.", explain(x, x, x))
    assert said is not None
    assert int(said[1]) == D > int(said[2])


@pytest.mark.parametrize("edge", ["first", "last"])
def test_rows_take_what_they_say(target: Target, edge: str):
    """Both ends of the head dims of a row run, and run there."""
    D = target.head_dims[0] if edge == "first" else min(target.head_dims[-1], 1000)
    x = torch.ones(1, 1, 2, D, dtype=target.dtype, device=target.device)
    assert explain(x, x, x).startswith(f"{target.row} runs this problem.")
    narrow = torch.ones(1, 1, 2, 1, dtype=target.dtype, device=target.device)
    assert explain(x, x, narrow).startswith(f"{target.row} runs this problem.")
    assert torch.equal(online_attention.attention(x, x, x), x)


def test_every_target_has_cases(target: Target):
    """No row is left out of the tests by its head dims."""
    for each in (cases.SMALL, cases.FULL_CASES, cases.SPLIT, HEAD_DIM_CASES):
        assert any(target.takes_case(case) for case in each)


@pytest.mark.parametrize(
    ("inputs", "keywords", "text"),
    [
        ((Q, Q, Q[:, :, :1]), {}, "Nothing runs this call: v must have S_kv = 5"),
        ((Q, Q.half(), Q), {}, "Nothing runs this call: k must have the dtype of q"),
        ((Q, None, Q), {}, "Nothing runs this call: k must be a torch.Tensor"),
        ((Q, Q, Q), {"scale": "1"}, "Nothing runs this call: scale must be a number"),
        ((Q, Q, Q), {"window": (1, 0)}, "Nothing runs this call: window is not built yet"),
        ((Q, Q, Q), {"causal": 1}, "Nothing runs this call: causal must be True or False"),
    ],
)
def test_explain_of_a_refused_call_is_its_error(inputs, keywords, text: str):
    assert explain(*inputs, **keywords).startswith(text)


def test_explain_says_what_the_gradients_take():
    text = explain(Q.clone().requires_grad_(), Q, Q)
    assert text.startswith("cpu.tiled runs this problem. ")
    assert "The gradients run in one operator; a second derivative, and forward mode," in text


def test_explain_computes_nothing():
    huge = Q[:1, :1].expand(2**15, 2**15, 5, 8)  # 5 * 2^30 rows in no memory
    assert explain(huge, huge, huge).startswith("cpu.tiled runs this problem.")
