# SPDX-License-Identifier: BSD-3-Clause
"""The walkthrough runs, its steps agree, and it says so."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from scripts import EXAMPLES, load_script

SMALL = ["--queries", "7", "--keys", "11", "--head-dim", "8", "--value-dim", "5"]


@pytest.fixture(scope="module")
def walkthrough() -> ModuleType:
    return load_script(EXAMPLES / "walkthrough.py")


@pytest.mark.parametrize(
    "options",
    [
        ["--block-size", "1", "--tile-q", "3", "--tile-kv", "4"],
        ["--block-size", "100", "--tile-q", "100", "--tile-kv", "100", "--no-causal"],
    ],
)
def test_every_step_equals_the_one_before(
    walkthrough: ModuleType, options: list[str], tmp_path: Path
):
    differences = walkthrough.main([*SMALL, *options, "--out", str(tmp_path / "new")])
    assert sum("tiled" in name for name in differences) >= 2 * 2 * 3
    for step in ("online softmax", "online sums", "flash", "float32 out", "float64 lse"):
        assert any(step in name for name in differences)
    for name, difference in differences.items():
        # Results are of the size of 1; 1e3 roundings would be a mistake, not rounding.
        assert difference <= (1e-5 if "float32" in name else 1e-13), name
    plot = tmp_path / "new" / "traffic_and_memory.png"
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_story_shows_states_routes_costs_and_the_runner(
    walkthrough: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(walkthrough.console, "file", sys.stdout)  # the captured one
    differences = walkthrough.main([*SMALL, "--out", str(tmp_path)])
    text = capsys.readouterr().out
    for word in ("alpha", "1.686705", "probability p", "flash", "tile_kv", "16384", "runs this"):
        assert word in text
    assert f"{max(differences.values()):.1e}" in text
    assert "inf" not in text


def test_a_difference_cannot_hide(walkthrough: ModuleType):
    torch = walkthrough.torch
    a = torch.tensor([0.0, -torch.inf, 2.0])
    assert walkthrough.largest_difference(a, a) == 0
    assert walkthrough.largest_difference(a, torch.tensor([0.0, -torch.inf, 2.5])) == 0.5
    assert walkthrough.largest_difference(a, torch.tensor([0.0, 1.0, 2.0])) == torch.inf
    nan = walkthrough.largest_difference(a, torch.tensor([torch.nan, -torch.inf, 2.0]))
    assert nan != nan


@pytest.mark.parametrize("missing", ["rich", "matplotlib"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, missing: str):
    for name in list(sys.modules):
        if name.split(".")[0] == missing:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    sentence = rf"{missing}.* is not installed; install it with: pip install '\.\[bench\]'"
    with pytest.raises(SystemExit, match=sentence):
        load_script(EXAMPLES / "walkthrough.py")


def test_sizes_below_one_are_refused(walkthrough: ModuleType, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        walkthrough.main(["--tile-q", "0"])
    assert "--tile-q: must be at least 1, but is 0" in capsys.readouterr().err
