# SPDX-License-Identifier: BSD-3-Clause
"""Test files run again as scripts, by the CPU kernels of a narrower instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from online_attention import _C

INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16")


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
