# SPDX-License-Identifier: BSD-3-Clause
"""What ptxas said of every kernel, from the log that a build keeps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

_EDGE = re.compile(r"^\[\d+/\d+\] (.*)$")
_OBJECT = re.compile(r" -o (\S+\.cu\.o)\b")
_KERNEL = re.compile(r"Function properties for (\S+)")
_MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")


@dataclass(frozen=True)
class Function:
    """One function compiled for one architecture; sizes in bytes."""

    object: str
    name: str
    stack_frame: int
    spill_stores: int
    spill_loads: int


def outputs(log: str) -> dict[str, list[str]]:
    """What the last compilation of each CUDA object printed, by object."""
    last: dict[str, list[str]] = {}
    current: list[str] = []
    for line in log.splitlines():
        if edge := _EDGE.match(line):
            current = []
            if compiled := _OBJECT.search(edge[1]):
                last[compiled[1]] = current
        else:
            current.append(line)
    return last


def functions(log: str) -> list[Function]:
    found = []
    for target, lines in outputs(log).items():
        for line, following in pairwise(lines):
            if name := _KERNEL.search(line):
                memory = _MEMORY.search(following)
                assert memory, f"{following!r} does not follow {line!r}"
                found.append(Function(target, name[1], *map(int, memory.groups())))
    return found


def warnings(log: str) -> list[str]:
    return [
        f"{target}: {line}"
        for target, lines in outputs(log).items()
        for line in lines
        if re.search(r"ptxas (warning|error)|serialized", line)
    ]


def read_log(build: Path) -> str | None:
    """The log, without objects that no longer exist; None if nothing was built here with CUDA."""
    log = build / "build.log"
    if not log.exists():
        return None
    text = log.read_text()
    return text if any((build / name).exists() for name in outputs(text)) else None
