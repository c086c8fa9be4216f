# SPDX-License-Identifier: BSD-3-Clause
"""The benchmark command: its counts, its files, its exit status and its sentences; no timings."""

import importlib.util
import itertools
import json

import pytest
import torch

from benchmark_scripts import TINY, assert_ours_within_limits, naive_attention

pytestmark = pytest.mark.usefixtures("benchmarks_on_path")


@pytest.fixture(scope="module")
def metrics(benchmarks_on_path):
    import _metrics

    return _metrics


@pytest.fixture(scope="module")
def cases(benchmarks_on_path):
    import _cases

    return _cases


def test_flops_follow_the_field(cases, metrics):
    square = cases.Case("any", 2, 4, 2, 32, 32, 16, 16, False)
    assert metrics.flops(square) == 4 * 2 * 4 * 32 * 32 * 16
    assert metrics.flops(square, "backward") == 2.5 * metrics.flops(square)
    assert metrics.flops(square, "forward_backward") == 3.5 * metrics.flops(square)
    causal = cases.Case("any", 2, 4, 2, 32, 32, 16, 16, True)
    assert metrics.flops(causal) == metrics.flops(square) / 2
    uneven = cases.Case("any", 1, 1, 1, 3, 5, 192, 128, False)
    assert metrics.flops(uneven) == 2 * 3 * 5 * (192 + 128)
    assert metrics.flops(uneven, "backward") == 2 * 3 * 5 * (3 * 192 + 2 * 128)
    assert metrics.flops(uneven, "forward_backward") == 2 * 3 * 5 * (4 * 192 + 3 * 128)


def test_bytes_count_each_tensor_once(cases, metrics):
    case = cases.Case("any", 2, 4, 2, 3, 5, 16, 8, False)
    q, k, v, out = 2 * 4 * 3 * 16, 2 * 2 * 5 * 16, 2 * 2 * 5 * 8, 2 * 4 * 3 * 8
    assert metrics.moved_bytes(case, "bf16") == 2 * (q + k + v + out)
    assert metrics.moved_bytes(case, "bf16", "backward") == 2 * 2 * (q + k + v + out)
    assert metrics.moved_bytes(case, "bf16", "forward_backward") == 3 * 2 * (q + k + v + out)
    assert metrics.naive_bytes(case, "fp32") == 4 * 2 * 4 * 3 * 5


def test_statistics(metrics):
    assert metrics.geometric_mean([0.5, 2.0]) == pytest.approx(1.0)
    assert metrics.geometric_mean([3.0]) == pytest.approx(3.0)
    with pytest.raises(ValueError, match="no values"):
        metrics.geometric_mean([])
    assert metrics.percentile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert metrics.percentile([5.0], 0.2) == 5.0


@pytest.mark.parametrize(("count", "rounds"), [(1, 1), (2, 2), (4, 4), (5, 10)])
def test_everyone_follows_everyone_equally_often(benchmarks_on_path, count, rounds):
    from _timing import balanced_order

    orders = [balanced_order(count, r) for r in range(rounds)]
    assert all(sorted(order) == list(range(count)) for order in orders)
    followed = [pair for order in orders for pair in itertools.pairwise(order)]
    pairs = list(itertools.permutations(range(count), 2))
    assert sorted(followed) == sorted(pairs * (rounds // max(count, 1)))


def test_the_grid_has_constant_tokens_and_width(cases):
    grid = cases.SUITES["forward"].cases("cuda")
    assert len(grid) == 3 * 2 * 6
    assert {case.batch * case.s_q for case in grid} == {16384}
    assert {case.heads * case.d for case in grid} == {2048}
    assert cases.SUITES["backward"].cases("cuda")[: len(grid)] == grid
    assert all(case.masks_agree for suite in cases.SUITES.values() for case in suite.cases("cpu"))


def test_the_baseline_names_are_those_of_the_contenders(attention_script):
    import _contenders

    assert attention_script.BASELINE_NAMES == _contenders.BASELINES


@pytest.mark.parametrize(("s_q", "s_kv"), [(7, 7), (5, 11), (11, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_the_reference_agrees_with_sdpa(cases, s_q, s_kv, causal):
    import _reference
    from _contenders import make_inputs

    case = cases.Case("any", 2, 4, 2, s_q, s_kv, 8, 12, causal)
    q, k, v = make_inputs(case, "fp64", torch.device("cpu"), seed=3)
    out, lse = _reference.attend_rows(case, (q, k, v), torch.arange(s_q), torch.float64)
    expected, scores = naive_attention(q, k, v, causal)
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    torch.testing.assert_close(out, expected)


def test_tiny_run_writes_json_and_plot(attention_script, tmp_path, capsys):
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    argv = [*TINY, "--dtype", "fp32", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    (path,) = tmp_path.glob("*_custom_fp32.json")
    assert path.with_suffix(".png").stat().st_size > 0
    text = path.read_text()
    report = json.loads(text)
    assert str(tmp_path) not in text
    assert report["environment"]["torch"] == torch.__version__
    assert report["environment"]["command"].startswith("python benchmarks/attention.py --device")
    for field in ("device", "driver", "cpu", "cores", "threads", "commit", "dirty", "python"):
        assert field in report["environment"]
    assert report["clocks_before"] is None
    assert [row["case"]["causal"] for row in report["rows"]] == [False, True]
    for row in report["rows"]:
        assert row["status"] == "ok"
        assert_ours_within_limits(row, {"out", "lse"})
        assert {"ours", "sdpa", "math"} <= set(row["results"])
        for result in row["results"].values():
            assert len(result["samples_ms"]) == 2
            assert result["tflops"] > 0
            assert result["peak_bytes"] is None
    printed = capsys.readouterr().out
    assert "Speed:" in printed
    assert "geometric mean" in printed
    assert "Error against fp64" in printed


def test_other_lengths_get_the_bottom_right_mask_as_a_tensor(attention_script, tmp_path):
    argv = [*TINY[:2], "--shapes", "1,2,2,5,9,16,16", *TINY[4:], "--causal", "--dtype", "fp32"]
    argv += ["--quiet", "--no-plot", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    (path,) = tmp_path.glob("*_custom-causal_fp32.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["check"]["errors"]["math"]["out"] <= row["check"]["limits"]["out"]


def test_a_wrong_result_is_shown_and_fails(attention_script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("rich")
    import online_attention

    right = online_attention.attention

    def wrong(q, k, v, **keywords):
        result = right(q, k, v, **keywords)
        if keywords.get("return_lse"):
            return result
        result[0, 0, -1] += 0.5
        return result

    monkeypatch.setattr(online_attention, "attention", wrong)
    argv = [*TINY, "--dtype", "fp32", "--full", "--check-only", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 1
    printed = capsys.readouterr().out
    assert "WRONG" in printed
    assert "out of ours is off by" in printed
    (path,) = tmp_path.glob("*_custom-full-check_fp32.json")
    (row,) = json.loads(path.read_text())["rows"]
    assert row["status"] == "wrong"
    assert row["results"] == {}


def test_what_is_not_built_is_no_failure(attention_script, tmp_path, monkeypatch):
    import online_attention

    def refuse(*_args, **_keywords):
        raise NotImplementedError("head_dim 16 is not built")

    monkeypatch.setattr(online_attention, "attention", refuse)
    argv = [*TINY, "--dtype", "fp32", "--quiet", "--no-plot", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert {(row["status"], row["reason"]) for row in rows} == {
        ("not built", "head_dim 16 is not built")
    }


@pytest.mark.parametrize("which_pass", ["forward", "backward"])
def test_masks_given_as_tensors_are_checked(attention_script, cases, tmp_path, which_pass: str):
    argv = ["--device", "cpu", "--suite", "masks", "--head-dim", "64", "--dtype", "fp32"]
    argv += ["--pass", which_pass, "--check-only", "--quiet", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    (path,) = tmp_path.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"]["bias"] for row in rows] == ["none", *cases.BIASES]
    tensors = {"out", "lse"} if which_pass == "forward" else {"dq", "dk", "dv"}
    for row in rows:
        assert row["status"] == "ok"
        assert row["check"]["errors"]["ours"].keys() == tensors
        assert "sdpa" in row["check"]["errors"]


def test_host_suite_times_the_log_sum_exp_and_the_drop_in_too(attention_script, tmp_path):
    argv = ["--device", "cpu", "--suite", "host", "--rounds", "2", "--min-time", "0", "--full"]
    argv += ["--baselines", "sdpa", "--quiet", "--no-plot", "--out", str(tmp_path)]
    assert attention_script.main(argv) == 0
    (path,) = tmp_path.glob("*_host-full_fp32.json")
    report = json.loads(path.read_text())
    assert report["baselines"] == ["ours + lse", "ours, as sdpa", "sdpa"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--shapes", "1,2,3"], "expects seven positive integers B,H,H_kv,S_q,S_kv,D,D_v"),
        (["--shapes", "1,3,2,8,8,16,16"], "H must be a multiple of H_kv"),
        (["--head-dim", "7"], "no case is left"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--min-time", "-1"], "--min-time must be a number of seconds"),
        (["--device", "tpu"], "--device expects cuda, cuda:N or cpu, got 'tpu'"),
        (["--device", "cuda:99"], "torch sees"),
    ],
)
def test_arguments_that_cannot_be(attention_script, capsys, argv, sentence):
    device = [] if "--device" in argv else ["--device", "cpu"]
    assert attention_script.main([*device, *argv, "--quiet", "--no-plot"]) == 2
    assert sentence in capsys.readouterr().err


def test_missing_packages_are_named(attention_script, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(attention_script, "HAS_RICH", False)
    assert attention_script.main(TINY) == 2
    said = capsys.readouterr().err
    assert "rich" in said
    assert "pip install '.[bench]'" in said
    hidden = "matplotlib"
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n == hidden else found(n))
    assert attention_script.main([*TINY, "--quiet"]) == 2
    assert "matplotlib" in capsys.readouterr().err
    hidden = "online_attention"
    assert attention_script.main([*TINY, "--quiet", "--no-plot"]) == 2
    assert "online_attention is not installed" in capsys.readouterr().err


def test_nothing_of_the_machine_is_recorded():
    from _environment import command_line, without_paths

    assert command_line(["--out", "/home/me/x", "--out=/a/b/y"]).endswith("--out x --out=y")
    assert without_paths("cannot load /usr/lib/x.so: no") == "cannot load x.so: no"
    assert without_paths("1/2 and https://a.b/c/d") == "1/2 and https://a.b/c/d"


def synthetic_report(length_and_ms, baseline_ms=2.0, families=("grid",)):
    rows = []
    for family, (length, ours_ms) in itertools.product(families, length_and_ms):
        case = {"family": family, "s_kv": length, "d": 64, "d_v": 64, "causal": False}
        times = {"ours": ours_ms, "flash": baseline_ms, "math": 10 * baseline_ms}
        results = {name: {"median_ms": ms, "tflops": 100 / ms} for name, ms in times.items()}
        shape = f"1 x 2 x {length}"
        rows.append({"case": case, "status": "ok", "shape": shape, "results": results})
    environment = {
        "device": "GPU", "device_type": "cuda", "driver": "1.2", "torch": "2.11", "threads": 4,
        "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05Z",
        "command": "python benchmarks/attention.py",
    }  # fmt: skip
    return {
        "schema": 1, "suite": "forward", "dtype": "bf16", "settings": {"host_time": False},
        "environment": environment, "baselines": ["flash", "math"], "rows": rows,
    }  # fmt: skip


def test_report_table(report_script, tmp_path, capsys):
    report = synthetic_report([(512, 1.0), (1024, 4.0)])
    (tmp_path / "gpu.json").write_text(json.dumps(report))
    readme = tmp_path / "README.md"
    readme.write_text("# A\n<!-- benchmark:begin -->\n<!-- benchmark:end -->\nafter\n")
    where = ["--results", str(tmp_path), "--readme", str(readme)]
    assert report_script.main([*where, "--check"]) == 1
    assert "out of date" in capsys.readouterr().err
    assert report_script.main([*where, "gpu.json"]) == 0
    text = readme.read_text()
    assert "| 64 | full | 100 (**2.00×**) | 25 (0.50×) | 1.00× |" in text
    assert "GPU, bf16, suite `forward`" in text
    assert "commit 0123456789" in text
    assert text.startswith("# A\n<!-- benchmark:begin gpu.json -->\n")
    assert text.endswith("<!-- benchmark:end -->\nafter\n")
    assert report_script.main([*where, "--check"]) == 0
    assert report_script.main(where) == 0
    assert readme.read_text() == text


def test_report_of_decoding_counts_bytes(report_script):
    report = synthetic_report([(512, 1.0), (4096, 4.0)], families=("decode",))
    for row in report["rows"]:
        row["case"] |= {"batch": 1, "heads": 8, "heads_kv": 2, "s_q": 1}
        row["results"]["ours"]["gbytes_per_s"] = 33.4
    text = report_script.markdown([report | {"suite": "decode"}])
    assert "GB/s, each of q, k, v and out counted once, of ours" in text
    assert "| 1×8/2×1 | 64 | 33 (**2.00×**) | 33 (0.50×) | 1.00× |" in text
    assert "| all |  |  |  | 1.00× |" in text


def test_decoding_reads_a_cache_with_the_heads_first(cases, benchmarks_on_path):
    from _contenders import make_inputs

    case = cases.SUITES["decode"].cases("cpu")[0]
    q, k, v = make_inputs(case, "fp32", torch.device("cpu"), 0)
    assert all(x.is_contiguous() for x in (q, k, v))
    assert k.shape == (case.batch, case.heads_kv, case.s_kv, case.d)


def test_report_of_several_passes(report_script, tmp_path):
    forward = synthetic_report([(512, 1.0), (1024, 4.0)])
    backward = synthetic_report([(512, 1.0)], families=("grid", "llama_gqa"))
    backward["rows"] += synthetic_report([(1024, 4.0)])["rows"]
    backward |= {"schema": 2, "suite": "backward", "pass": "backward", "deterministic": False}
    both = backward | {"pass": "forward_backward", "suite": "backward-forward_backward"}
    for name, report in (("f", forward), ("b", backward), ("fb", both)):
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- benchmark:begin -->\n<!-- benchmark:end -->\n")
    where = ["--results", str(tmp_path), "--readme", str(readme)]
    assert report_script.main([*where, "f.json", "b.json", "fb.json"]) == 0
    text = readme.read_text()
    assert text.startswith("<!-- benchmark:begin f.json b.json fb.json -->\n**GPU, bf16, suite")
    assert "**GPU, bf16 backward, suite `backward`**" in text
    assert "**GPU, bf16 forward and backward, suite `backward-forward_backward`**" in text
    assert "TFLOP/s of ours; in brackets" in text
    assert "TFLOP/s of ours, which counts five matrix products where the forward has two;" in text
    # The grid is a table over the lengths, and what is beside it a list.
    assert text.count("| 64 | full | 100 (**2.00×**) | 25 (0.50×) | 1.00× |") == 3
    assert text.count("| llama_gqa 1×2×512 | 64, full | 100 (**2.00×**) | flash |") == 2
    assert report_script.main([*where, "--check"]) == 0


def test_report_needs_its_markers(report_script, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("nothing\n")
    assert report_script.main(["--readme", str(readme), "--results", str(tmp_path)]) == 2
    assert "<!-- benchmark:begin -->" in capsys.readouterr().err
