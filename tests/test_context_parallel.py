# SPDX-License-Identifier: BSD-3-Clause
"""Attention over a sequence that two processes share: by hand, and by torch's context_parallel.

On the CPU torch itself picks an operator that context_parallel has no rule for; there the flash
operators are called by name, registered for the CPU as they are for CUDA otherwise.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import two_processes
from online_attention import _C

WORKER = Path(two_processes.__file__)
SECONDS = 240


@functools.cache
def outcomes(device: str) -> dict[str, str]:
    """What the checks of two_processes.py came to: "" or tracebacks, by name."""
    with tempfile.TemporaryDirectory() as folder:
        workers = [
            subprocess.Popen(
                [sys.executable, WORKER, str(rank), f"{folder}/rendezvous", device],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(two_processes.WORLD)
        ]
        try:
            texts = [worker.communicate(timeout=SECONDS) for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
    errors = "\n".join(err for _, err in texts)
    assert all(worker.returncode == 0 for worker in workers), errors
    return json.loads(texts[0][0].splitlines()[-1])


def devices() -> list[object]:
    missing = not _C.built_with_cuda() or torch.cuda.device_count() < two_processes.WORLD
    skip = pytest.mark.skipif(missing, reason="needs two CUDA devices and CUDA kernels")
    return ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, skip])]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package")
@pytest.mark.parametrize("device", devices())
@pytest.mark.parametrize("check", two_processes.CHECKS)
def test_sharded_sequence(check: str, device: str):
    outcome = outcomes(device)[check]
    assert outcome == "", outcome
