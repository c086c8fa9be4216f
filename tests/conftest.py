# SPDX-License-Identifier: BSD-3-Clause
"""What every test shares: targets from the support table, fixed seeds, hypothesis profiles.

A test that takes `target` runs once for every row and dtype of `online_attention.supported()` that
this machine can run; one marked `@pytest.mark.cases(LIST)` that takes `case` too, once for every
case of the list on every such row. `@pytest.mark.targets(dtypes=..., device=...)` narrows the rows.
Rows for CUDA skip where there is no GPU; ONLINE_ATTENTION_REQUIRE_CUDA=1 makes them fail instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the tests' own modules

import whitebox_build

settings.register_profile("local", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

SEED = 20_260


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "cuda: needs an NVIDIA GPU",
        "slow: takes more than a few seconds",
        "small: tiny shapes that reach every kernel, e.g. under compute-sanitizer",
        "cases(list): the cases a test of `target` and `case` runs",
        "targets(dtypes, device): the rows a test of `target` runs for",
    ):
        config.addinivalue_line("markers", line)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" not in metafunc.fixturenames:
        return
    import rows

    cases = metafunc.definition.get_closest_marker("cases")
    narrowed = metafunc.definition.get_closest_marker("targets")
    kwargs = narrowed.kwargs if narrowed else {}
    params = rows.parameters(
        cases.args[0] if cases else None, kwargs.get("dtypes"), kwargs.get("device")
    )
    metafunc.parametrize("target, case" if cases else "target", params)


@pytest.fixture(autouse=True)
def _runs_here(request: pytest.FixtureRequest) -> None:
    """Skips, or with ONLINE_ATTENTION_REQUIRE_CUDA=1 fails, what this machine cannot run."""
    if not hasattr(request.node, "callspec"):
        return
    target = request.node.callspec.params.get("target")
    if target is None or not target.missing:
        return
    import rows

    if rows.REQUIRE_CUDA:
        pytest.fail(f"ONLINE_ATTENTION_REQUIRE_CUDA=1, but {target.missing}")
    pytest.skip(f"needs a CUDA device: {target.missing}")


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    if torch := sys.modules.get("torch"):
        torch.manual_seed(SEED)


@pytest.fixture
def deterministic_mode() -> Iterator[None]:
    """torch.use_deterministic_algorithms(True), in which torch also fills new tensors with NaN."""
    import torch

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    """For tests that set the number of threads."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads_restored: None) -> None:
    """For thousands of tiny products, where waking threads would cost more than the work."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def benchmarks_on_path() -> Iterator[None]:
    """Tests import the modules of benchmarks/ by name, as its scripts do."""
    import scripts

    with scripts.neighbours_importable(scripts.BENCHMARKS):
        yield


@pytest.fixture(scope="module")
def attention_script(benchmarks_on_path: None) -> ModuleType:
    """The module benchmarks/attention.py."""
    import scripts

    return scripts.load_script(scripts.BENCHMARKS / "attention.py")


@pytest.fixture(scope="module")
def report_script(benchmarks_on_path: None) -> ModuleType:
    """The module benchmarks/report.py."""
    import scripts

    return scripts.load_script(scripts.BENCHMARKS / "report.py")


@pytest.fixture(scope="session")
def whitebox() -> ModuleType:
    """The headers of csrc/core, compiled from tests/whitebox."""
    try:
        return whitebox_build.load()
    except whitebox_build.NoCompilerError as reason:
        pytest.skip(str(reason))
