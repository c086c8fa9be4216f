# SPDX-License-Identifier: BSD-3-Clause
"""What ptxas said of every kernel, from the log that a build keeps."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
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


def functions(printed: dict[str, list[str]]) -> list[Function]:
    found = []
    for target, lines in printed.items():
        for line, following in pairwise(lines):
            if name := _KERNEL.search(line):
                memory = _MEMORY.search(following)
                assert memory, f"{following!r} does not follow {line!r}"
                found.append(Function(target, name[1], *map(int, memory.groups())))
    return found


def warnings(printed: dict[str, list[str]]) -> list[str]:
    return [
        f"{target}: {line}"
        for target, lines in printed.items()
        for line in lines
        if re.search(r"ptxas (warning|error)|serialized|setmaxnreg", line)
    ]


def disassembler() -> str | None:
    """cuobjdump, of a toolkit on PATH or of one from PyPI; None if there is none."""
    if found := shutil.which("cuobjdump"):
        return found
    toolkits = importlib.util.find_spec("nvidia")
    places = toolkits.submodule_search_locations or [] if toolkits else []
    found_here = (next(Path(place).glob("cu*/bin/cuobjdump"), None) for place in places)
    return next((str(path) for path in found_here if path), None)


def of_build(build: Path) -> dict[str, list[str]]:
    """What the compilation of every CUDA object that is still part of a build printed."""
    log, commands = build / "build.log", build / "compile_commands.json"
    if not (log.exists() and commands.exists()):
        return {}
    current = {build / entry["output"] for entry in json.loads(commands.read_text())}
    printed = outputs(log.read_text())
    return {target: lines for target, lines in printed.items() if build / target in current}
