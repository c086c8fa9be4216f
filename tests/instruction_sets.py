# SPDX-License-Identifier: BSD-3-Clause
"""Checks of the CPU kernels that run once for each instruction set.

A test file has them by `test_widest_instruction_set, test_instruction_set = for_each_set(__file__,
CHECKS)`: by the widest set in its own process, and by each narrower one in a process where
ONLINE_ATTENTION_CPU asks for it, which is read when the library is first used. There the file is
a script, and ends with `run(CHECKS)`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence

import pytest

from online_attention import _C

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


Check = Callable[[], None]
Tests = tuple[Callable[[Check], None], Callable[[str], None]]


def for_each_set(path: str, checks: Sequence[Check]) -> Tests:
    """The two tests of the file `path`."""

    @pytest.mark.parametrize("check", checks, ids=lambda check: check.__name__)
    def test_widest_instruction_set(check: Check) -> None:
        check()

    @pytest.mark.parametrize("name", INSTRUCTION_SETS)
    def test_instruction_set(name: str) -> None:
        check_script(path, name)

    return test_widest_instruction_set, test_instruction_set


def run(checks: Sequence[Check]) -> None:
    """What the script does."""
    for check in checks:
        check()
    print(_C.cpu_instruction_set())


def check_script(path: str, name: str) -> None:
    """The script must succeed with the instruction set, and print which one it ran by."""
    widest = INSTRUCTION_SETS.index(_C.cpu_instruction_set())
    if INSTRUCTION_SETS.index(name) >= widest:
        pytest.skip("not narrower than the one of this process")
    environment = {**os.environ, "ONLINE_ATTENTION_CPU": name}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == [name]
