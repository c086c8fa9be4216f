# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark command with gradients: its reference, its passes, its deterministic mode."""

import json
import math

import pytest
import torch

from benchmark_scripts import TINY, assert_ours_within_limits, naive_attention

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.fixture(scope="module")
def cases(benchmarks_on_path):
    import _cases

    return _cases


@pytest.mark.parametrize(("s_q", "s_kv"), [(7, 7), (5, 11), (11, 5), (5, 1)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_gradients_reference_agrees_with_autograd(cases, monkeypatch, s_q, s_kv, causal):
    import _gradients
    from _passes import draw_inputs

    case = cases.Case("any", 3, 4, 2, s_q, s_kv, 8, 12, causal)
    inputs = draw_inputs(case, "fp64", torch.device("cpu"), seed=3, gradients=True)
    assert inputs.dout.shape == (3, 4, s_q, 12)
    out, _ = naive_attention(*inputs.tensors, causal)
    gradients = torch.autograd.grad(out, inputs.tensors, inputs.dout)
    expected = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
    monkeypatch.setitem(_gradients.REFERENCE_BYTES, "cpu", 3 * 4 * s_kv * 8)  # a few rows at a time
    for budget in (1e9, 1.0):  # all heads; the first, the last
        monkeypatch.setitem(_gradients.REFERENCE_FLOPS, "cpu", budget)
        reference = _gradients.make_reference(case, "fp64", inputs.tensors, inputs.dout)
        assert (reference.checked, reference.of) == (6 if budget > 1 else 2, 6)
        assert reference.heads[-1][1][-1] == 1
        assert max(reference.errors(expected).values()) <= 1e-14
        wrong = {name: tensor.clone() for name, tensor in expected.items()}
        for tensor in wrong.values():
            tensor[-1, -1, -1] += 1e-3
        assert all(e > reference.limits[name] for name, e in reference.errors(wrong).items())


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("which", ["backward", "forward_backward"])
def test_a_pass_with_gradients(attention_script, tmp_path, capsys, which, dtype):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    argv = [*TINY, "--shapes", "1,2,2,7,7,16,8", "--pass", which, "--dtype", dtype]
    assert attention_script.main([*argv, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob(f"*_custom-{which}_{dtype}.json")
    assert path.with_suffix(".png").stat().st_size > 0
    report = json.loads(path.read_text())
    assert (report["schema"], report["pass"], report["deterministic"]) == (2, which, False)
    assert "torch.autograd.grad" in report["function"]
    assert len(report["rows"]) == 4
    for row in report["rows"]:
        assert row["status"] == "ok"
        assert_ours_within_limits(row, {"dq", "dk", "dv"})
        assert set(row["check"]["difference_to"][1]) == {"dq", "dk", "dv"}
        assert {"ours", "sdpa", "math"} <= set(row["results"])
        for name, result in row["results"].items():
            assert len(result["samples_ms"]) == 2
            assert result["tflops"] * result["median_ms"] * 1e9 == pytest.approx(row["flops"])
            assert set(row["check"]["errors"][name]) == {"dq", "dk", "dv"}
    case = report["rows"][-1]["case"]
    widths = {"backward": 3 * 16 + 2 * 8, "forward_backward": 4 * 16 + 3 * 8}
    assert case["causal"]
    assert report["rows"][-1]["flops"] == 2 * 2 * 7 * 7 * widths[which] / 2
    printed = capsys.readouterr().out
    for word in ("Speed:", f"custom-{which}", "dq", "dk", "dv", "two forward, five backward"):
        assert word in printed


def test_backward_is_what_the_backward_suite_times(attention_script):
    parse, name = attention_script.parse_arguments, attention_script.suite_name
    assert parse([]).which_pass == "forward"
    assert parse(["--suite", "backward"]).which_pass == "backward"
    assert parse(["--suite", "backward", "--shapes", "x"]).which_pass == "forward"
    names = [
        ([], "quick"),
        (["--suite", "backward"], "backward"),
        (["--suite", "backward", "--pass", "forward_backward"], "backward-forward_backward"),
        (["--suite", "fp32", "--pass", "backward"], "fp32-backward"),
        (["--pass", "backward", "--deterministic", "--full"], "quick-backward-deterministic-full"),
    ]
    assert [name(parse(argv)) for argv, _ in names] == [expected for _, expected in names]


def test_backward_alone_leaves_its_forward_untimed(attention_script, tmp_path, monkeypatch):
    import online_attention

    right, calls = online_attention.attention, []

    def counted(*arguments, **keywords):
        calls.append(torch.is_grad_enabled())
        return right(*arguments, **keywords)

    monkeypatch.setattr(online_attention, "attention", counted)
    argv = [*TINY, "--full", "--dtype", "fp32", "--quiet", "--no-plot", "--baselines"]
    assert attention_script.main([*argv, "--pass", "backward", "--out", str(tmp_path)]) == 0
    assert calls == [True, True]  # the check's and the one whose graph is kept
    calls.clear()
    assert attention_script.main([*argv, "--pass", "forward_backward", "--out", str(tmp_path)]) == 0
    assert len(calls) >= 1 + 1 + 2  # the check, how long a call takes, two rounds
    assert all(calls)


def test_a_wrong_gradient_is_shown_and_fails(attention_script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    import online_attention

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k):
            return k.view_as(k)

        @staticmethod
        def backward(ctx, dk):
            dk = dk.clone()
            dk[-1, -1, -1] = math.nan
            return dk

    right = online_attention.attention
    monkeypatch.setattr(
        online_attention,
        "attention",
        lambda q, k, v, **keywords: right(q, WrongGradient.apply(k), v, **keywords),
    )
    argv = [*TINY, "--dtype", "fp32", "--full", "--check-only", "--pass", "backward"]
    assert attention_script.main([*argv, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "dk of ours is off by inf" in printed
    assert "dk differs from sdpa by" in printed
    assert "dq of ours" not in printed
    (path,) = tmp_path.glob("*_custom-backward-full-check_fp32.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["status"] == "wrong"
    assert row["results"] == {}


def test_who_has_no_gradients_says_so(attention_script, tmp_path, capsys):
    pytest.importorskip("rich")
    argv = [*TINY, "--full", "--dtype", "fp32", "--pass", "backward", "--no-plot"]
    argv += ["--baselines", "sdpa", "fa3", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    assert report["baselines"] == ["sdpa"]
    sentence = "not timed: its package has the forward pass alone"
    assert report["rows"][0]["skipped"] == {"fa3": sentence}
    assert f"Without fa3: {sentence}" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_deterministic_mode_is_entered_and_left(attention_script, tmp_path, capsys, which):
    pytest.importorskip("rich")
    argv = [*TINY, "--full", "--dtype", "fp32", "--pass", which, "--deterministic", "--no-plot"]
    argv += ["--baselines", "sdpa", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    (path,) = tmp_path.glob("*-deterministic-full_fp32.json")
    report = json.loads(path.read_text())
    assert report["deterministic"]
    assert report["baselines"] == ["ours, any order", "sdpa"]
    assert "deterministic mode" in capsys.readouterr().out


def test_what_differs_from_call_to_call_is_wrong(attention_script, tmp_path, monkeypatch):
    import online_attention

    right, calls = online_attention.attention, []

    def unsteady(q, k, v, **keywords):
        calls.append(keywords)
        return right(q, k, v, **keywords) * (1 + 1e-7 * len(calls))

    monkeypatch.setattr(online_attention, "attention", unsteady)
    argv = [*TINY, "--full", "--dtype", "fp32", "--pass", "backward", "--deterministic"]
    argv += ["--quiet", "--no-plot", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 1
    (path,) = tmp_path.glob("*.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert "dq of ours differs from call to call in deterministic mode" in row["reason"]
