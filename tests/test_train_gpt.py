# SPDX-License-Identifier: BSD-3-Clause
"""The training example runs, with both attentions alike, and says what it cannot do."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from scripts import EXAMPLES, load_script, neighbours_importable

TINY = ["--device", "cpu", "--steps", "6", "--batch", "2", "--context", "16", "--layers", "2"]
TINY += ["--heads", "4", "--kv-heads", "2", "--width", "32", "--sample", "5"]


@pytest.fixture(scope="module")
def train_gpt() -> Iterator[ModuleType]:
    with neighbours_importable(EXAMPLES):
        yield load_script(EXAMPLES / "train_gpt.py")


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "train_gpt.json").read_text())
    return record


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(["--dtype", "fp64"], 1e-11), ([], 1e-4), (["--dtype", "bf16", "--kv-heads", "4"], 5e-2)],
)
def test_both_attentions_train_alike(
    train_gpt: ModuleType, options: list[str], tolerance: float, tmp_path: Path
):
    assert train_gpt.main([*TINY, *options, "--quiet", "--out", str(tmp_path / "new")]) == 0
    record = record_of(tmp_path / "new")
    ours, sdpa = record["curves"]
    assert (ours["attention"], sdpa["attention"]) == ("online_attention", "sdpa")
    for curve in (ours, sdpa):
        assert len(curve["training"]) == len(curve["step_seconds"]) == 6
        assert [step for step, _ in curve["validation"]] == list(range(7))
        assert len(curve["sample"]) > len('The "with"')
        assert curve["tokens_per_second"] > 0
    for a, b in zip(ours["training"], sdpa["training"], strict=True):
        assert abs(a - b) <= tolerance
    assert ours["training"][-1] != ours["training"][0]
    assert record["comparison"]["largest"] <= tolerance
    assert record["comparison"]["validation"] <= tolerance
    plot = tmp_path / "new" / "train_gpt.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_enabled_routes_torchs_call_to_ours(train_gpt: ModuleType, tmp_path: Path):
    before = train_gpt.F.scaled_dot_product_attention
    losses, ran = {}, {}
    for name in ("online_attention", "enabled", "sdpa"):
        argv = [*TINY, "--kv-heads", "4", "--impl", name, "--quiet", "--no-plot"]
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            assert train_gpt.main([*argv, "--out", str(tmp_path)]) == 0
        (curve,) = record_of(tmp_path)["curves"]
        losses[name] = curve["training"]
        ran[name] = any(e.key.startswith("online_attention::") for e in profile.key_averages())
    assert losses["enabled"] == losses["online_attention"]
    assert ran == {"online_attention": True, "enabled": True, "sdpa": False}
    assert train_gpt.F.scaled_dot_product_attention is before


def test_a_model_learns_and_shows_it(
    train_gpt: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 100)
    argv = [
        *TINY,
        "--impl",
        "online_attention",
        "--steps",
        "40",
        "--rate",
        "0.01",
        "--text",
        str(text),
    ]
    assert train_gpt.main([*argv, "--out", str(tmp_path)]) == 0
    (curve,) = record_of(tmp_path)["curves"]
    assert curve["validation"][-1][1] < 0.5 * curve["validation"][0][1]
    printed = capsys.readouterr().out
    for word in ("step    40", "validation", "tokens/s", "online_attention writes:", "bits a byte"):
        assert word in printed
    assert str(tmp_path / "train_gpt.png") in printed
    assert str(tmp_path) not in (tmp_path / "train_gpt.json").read_text()


def test_a_seed_is_a_run(train_gpt: ModuleType, tmp_path: Path):
    curves = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        argv = [*TINY, "--impl", "online_attention", "--seed", seed, "--quiet", "--no-plot"]
        assert train_gpt.main([*argv, "--out", str(tmp_path / name)]) == 0
        curves.append(record_of(tmp_path / name)["curves"][0])
    assert curves[0]["training"] == curves[1]["training"]
    assert curves[0]["sample"] == curves[1]["sample"]
    assert curves[0]["training"] != curves[2]["training"]


def test_what_an_interrupted_training_gave_is_kept(
    train_gpt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    step = train_gpt.Trainer.step

    def interrupted(self: Any, *batch: Any) -> None:
        if len(self.curve.training) == 3:
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(train_gpt.Trainer, "step", interrupted)
    assert train_gpt.main([*TINY, "--quiet", "--out", str(tmp_path)]) == 130
    record = record_of(tmp_path)
    (curve,) = record["curves"]
    assert curve["interrupted"]
    assert len(curve["training"]) == 3
    assert record["comparison"] is None
    assert (tmp_path / "train_gpt.png").exists()


def test_missing_packages_are_named(
    train_gpt: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    found = importlib.util.find_spec
    hidden = ("rich", "matplotlib")
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in hidden else found(n))
    assert train_gpt.main([*TINY, "--impl", "online_attention", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "rich is not installed, so there is no progress bar" in said.err
    assert "matplotlib is not installed, so there is no plot" in said.err
    assert "pip install '.[bench]'" in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["train_gpt.json"]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--steps", "0"], "--steps: must be at least 1, but is 0"),
        (["--heads", "3"], "--heads must be a multiple of --kv-heads, got 3 and 2"),
        (["--width", "36"], "--width must be a multiple of 2 * heads = 8, got 36"),
        (["--rate", "nan"], "--rate must be a positive number, got nan"),
        (["--sample", "-1"], "--sample must be at least 0, got -1"),
        (["--context", "99999"], "must be longer than --context 99999"),
        (["--device", "tpu"], "--device expects cuda, cuda:N or cpu, got 'tpu'"),
        (["--device", "cuda:99"], "CUDA devices here"),
        (["--text", "no/such/file"], "No such file"),
        (["--impl", "theirs"], "invalid choice"),
        (["--impl", "sdpa", "sdpa"], "--impl takes one name or two different ones, got ['sdpa',"),
    ],
)
def test_arguments_that_cannot_be(
    train_gpt: ModuleType,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    sentence: str,
):
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([*TINY, *argv])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err
