# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark's suite `block`: the attention within a transformer's block."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")

RUN = ["--suite", "block", "--device", "cpu", "--rounds", "2", "--min-time", "0"]
QUIET = ["--quiet", "--no-plot"]
WEIGHTS = {"norm_attention", "qkv", "projection", "norm_network", "widen", "narrow"}
GRADIENTS = {"dx", *(f"d{name}" for name in WEIGHTS)}


@pytest.fixture
def tiny(attention_script, monkeypatch):
    """The suite with one small case: grouped heads, D_v below D."""
    import _cases

    case = _cases.Case("block", 2, 4, 2, 24, 24, 16, 8, causal=True, block=True)
    small = replace(_cases.SUITES["block"], cases=lambda device_type: [case])
    monkeypatch.setitem(_cases.SUITES, "block", small)
    return case


def only_report(folder):
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_the_block_is_that_of_torchs_modules():
    import _block
    import _cases

    case = _cases.Case("block", 2, 4, 4, 24, 24, 16, 16, causal=True, block=True)
    x, *weights = _block.make_tensors(case, "fp64", torch.device("cpu"), seed=3)
    layer = torch.nn.TransformerEncoderLayer(
        64, 4, 256, 0.0, F.gelu, batch_first=True, norm_first=True, bias=False
    ).double()
    attention = layer.self_attn
    places = [layer.norm1.weight, attention.in_proj_weight, attention.out_proj.weight]
    places += [layer.norm2.weight, layer.linear1.weight, layer.linear2.weight]
    with torch.no_grad():
        for place, weight in zip(places, weights, strict=True):
            place.copy_(weight)
    hidden = torch.ones(24, 24, dtype=torch.bool).triu(1)
    expected = layer(x, src_mask=hidden)
    (by_definition,) = _block.results_by_definition(
        case, _block.Inputs((x, *weights)), torch.float64
    ).values()
    torch.testing.assert_close(by_definition, expected)


def test_both_sizes_of_the_suite_are_self_attention():
    import _cases

    suite = _cases.SUITES["block"]
    assert suite.which_pass == "forward_backward"
    for device_type, width in (("cuda", 2048), ("cpu", 256)):
        cases = suite.cases(device_type)
        assert all(case.block and case.causal and case.s_q == case.s_kv for case in cases)
        assert {case.width for case in cases} == {width}
        assert len({case.batch * case.s_q for case in cases}) == 1
    assert suite.cases("cuda")[0].shape == "8 x 16 x 2048"


def test_every_product_of_a_weight_counts(tiny):
    import _metrics

    alone = replace(tiny, block=False)
    weights = 64 * (64 + 2 * (16 + 8)) + 64 * 4 * 8 + 2 * 64 * 4 * 64
    for which_pass, products in (("forward", 1), ("backward", 2), ("forward_backward", 3)):
        around = _metrics.flops(tiny, which_pass) - _metrics.flops(alone, which_pass)
        assert around == 2 * products * 2 * 24 * weights
    assert _metrics.moved_bytes(tiny, "bf16") == 2 * (2 * 2 * 24 * 64 + weights + 2 * 64)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run(tiny, attention_script, tmp_path, capsys, dtype):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert attention_script.main([*RUN, "--dtype", dtype, "--out", str(tmp_path)]) == 0
    report = only_report(tmp_path)
    assert (report["suite"], report["pass"]) == ("block", "forward_backward")
    assert "pre-norm block" in report["function"]
    (row,) = report["rows"]
    assert row["status"] == "ok"
    assert "cpu.tiled runs this problem" in row["explain"]
    assert {"ours", "sdpa", "math"} <= set(row["results"])
    for errors in row["check"]["errors"].values():
        assert set(errors) == set(row["check"]["limits"]) == GRADIENTS
    assert set(row["check"]["difference_to"][1]) == GRADIENTS
    assert report["geometric_means"][-1]["ratios"].keys() >= {"sdpa", "math"}
    printed = capsys.readouterr().out
    assert "those of every weight" in printed
    assert "dprojection" in printed


@pytest.mark.parametrize("which_pass", ["forward", "backward"])
def test_other_passes(tiny, attention_script, tmp_path, which_pass):
    argv = [*RUN, *QUIET, "--dtype", "fp32", "--pass", which_pass, "--out", str(tmp_path)]
    assert attention_script.main([*argv, "--deterministic"]) == 0
    report = only_report(tmp_path)
    assert report["suite"] == f"block-{which_pass}-deterministic"
    (row,) = report["rows"]
    assert set(row["check"]["errors"]["ours"]) == (
        {"out"} if which_pass == "forward" else GRADIENTS
    )
    assert {"ours", "ours, any order"} <= set(row["results"])


def test_a_wrong_attention_makes_the_block_wrong(tiny, attention_script, tmp_path, monkeypatch):
    import online_attention

    right = online_attention.attention

    def wrong(q, k, v, **keywords):
        return right(q, k, v, **keywords) * 1.01

    monkeypatch.setattr(online_attention, "attention", wrong)
    argv = [*RUN, *QUIET, "--dtype", "fp32", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 1
    (row,) = only_report(tmp_path)["rows"]
    assert (row["status"], row["results"]) == ("wrong", {})
    for name in GRADIENTS - {"dnarrow"}:  # which sees little of the attention
        assert f"{name} of ours is off by" in row["reason"]


def test_an_attention_that_changes_from_call_to_call_is_wrong(
    tiny, attention_script, tmp_path, monkeypatch
):
    import online_attention

    right, calls = online_attention.attention, []

    def unsteady(q, k, v, **keywords):
        calls.append(keywords)
        return right(q, k, v, **keywords) * (1 + 1e-7 * len(calls))

    monkeypatch.setattr(online_attention, "attention", unsteady)
    argv = [*RUN, *QUIET, "--dtype", "fp32", "--deterministic", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 1
    (row,) = only_report(tmp_path)["rows"]
    assert "dqkv of ours differs from call to call in deterministic mode" in row["reason"]


def test_the_table_says_what_it_counts(tiny, attention_script, report_script, tmp_path):
    argv = [*RUN, *QUIET, "--dtype", "fp32", "--baselines", "sdpa", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    text = report_script.markdown([only_report(tmp_path)])
    assert "fp32 forward and backward, suite `block`" in text
    assert "which counts the matrix products of the attention and of every weight" in text
    assert "| block 2×4/2×24 | 16, 8, causal |" in text
