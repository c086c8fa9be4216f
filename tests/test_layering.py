# SPDX-License-Identifier: BSD-3-Clause
"""The house rules that a reader relies on: who may include whom, and how long things may be."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CSRC = REPOSITORY / "csrc"

# Folder -> the folders whose headers it may include. "" is csrc itself, which holds the registry.
LAYERS = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "cuda/ptx": {"core", "cuda/ptx"},
    "cuda": {"core", "cuda/ptx", "cuda"},
    "cuda/portable": {"core", "cuda/ptx", "cuda", "cuda/portable"},
    "cuda/portable/instances": {"cuda/portable"},
    "cuda/hopper": {"core", "cuda/ptx", "cuda", "cuda/hopper"},
    "": {"core", "cpu", "cuda", "cuda/portable", "cuda/hopper", ""},
    "bindings": {"core", "cpu", "", "bindings"},
}
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
# What is longer, with the reason.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

CPP_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}
SOURCE_FOLDERS = ("csrc", "python", "tests", "benchmarks", "examples")
TEXT_SUFFIXES = CPP_SUFFIXES | {".py", ".pyi", ".md", ".toml", ".txt", ".in", ".yaml", ".json"}


def sources(*suffixes: str) -> list[Path]:
    return sorted(
        path
        for folder in SOURCE_FOLDERS
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    )


def name(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def cpp_files() -> list[Path]:
    return [path for path in sources(*CPP_SUFFIXES) if path.is_relative_to(CSRC)]


def folder_of(path: Path) -> str:
    return path.parent.relative_to(CSRC).as_posix().removeprefix(".")


def ids(paths: list[Path]) -> list[str]:
    return [name(path) for path in paths]


@pytest.mark.parametrize("path", cpp_files(), ids=ids(cpp_files()))
def test_includes_point_one_way(path: Path):
    text = path.read_text()
    allowed = LAYERS[folder_of(path)]
    for included in re.findall(r'^#include "(.*)"', text, re.MULTILINE):
        assert (CSRC / included).is_file(), f'"{included}" is not written from csrc'
        assert folder_of(CSRC / included) in allowed, f'"{included}" is not below'


@pytest.mark.parametrize("path", cpp_files(), ids=ids(cpp_files()))
def test_outer_headers_stay_in_their_layer(path: Path):
    included = re.findall(r"^#include <(.*)>", path.read_text(), re.MULTILINE)
    layer = folder_of(path)
    if layer != "bindings":
        assert not [h for h in included if re.match(r"(torch|ATen|c10)/|Python\.h", h)]
    if not layer.startswith("cuda"):
        assert not [h for h in included if re.match(r"cuda|cooperative_groups|mma\.h", h)]


@pytest.mark.parametrize("path", cpp_files(), ids=ids(cpp_files()))
def test_cpp_conventions(path: Path):
    text = path.read_text()
    if path.suffix in {".h", ".cuh"}:
        assert "#pragma once" in text
        assert not re.search(r"^\s*using namespace", text, re.MULTILINE)
    if path.name != "registry.cpp":
        assert "#if ONLINE_ATTENTION_WITH_CUDA" not in text
    if name(path) != "csrc/core/hd.h":
        macros = re.findall(r"^#\s*define (\w+)", text, re.MULTILINE)
        assert macros in ([], ["PY_SSIZE_T_CLEAN"]), "csrc/core/hd.h holds the only macro"


def test_every_source_names_its_licence():
    for path in sources(*CPP_SUFFIXES, ".py"):
        first = path.read_text().partition("\n")[0]
        assert first in (
            "// SPDX-License-Identifier: BSD-3-Clause",
            "# SPDX-License-Identifier: BSD-3-Clause",
        ), name(path)


def test_files_are_short():
    long = {
        name(path): lines
        for path in sources(*CPP_SUFFIXES, ".py")
        if (lines := path.read_text().count("\n")) > MAX_FILE_LINES
    }
    assert long.keys() <= LONG_FILES.keys(), long


def python_functions(path: Path) -> dict[str, int]:
    """Lines of each function, its docstring aside."""
    lengths = {}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            begin = node.body[0].lineno
            if ast.get_docstring(node) is not None:
                begin = node.body[0].end_lineno or begin
            lengths[node.name] = node.end_lineno - begin + 1
    return lengths


def cpp_functions(path: Path) -> dict[str, int]:
    """Lines of each function at the outermost level or in a type there, as clang-format sets it."""
    lengths = {}
    lines = path.read_text().splitlines()
    for begin, line in enumerate(lines):
        opening = re.match(r"^( {0,2})(?! |namespace|struct|class|enum|extern).*\{$", line)
        if opening is None or ")" not in line:
            continue
        closing = re.compile(rf"^{opening[1]}\}}")
        end = next((i for i in range(begin + 1, len(lines)) if closing.match(lines[i])), begin)
        lengths[line.strip()] = end - begin + 1
    return lengths


def test_functions_are_short():
    lengths = {
        f"{name(path)}: {function}": lines
        for path in sources(*CPP_SUFFIXES, ".py")
        for function, lines in (
            python_functions(path) if path.suffix == ".py" else cpp_functions(path)
        ).items()
    }
    long = {key: lines for key, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert long.keys() <= LONG_FUNCTIONS.keys(), long


def test_no_path_of_a_machine_and_nothing_left_open():
    outside = [path for path in REPOSITORY.glob("*") if path.suffix in TEXT_SUFFIXES]
    documents = [path for path in (REPOSITORY / "docs").rglob("*") if path.suffix in TEXT_SUFFIXES]
    path_or_mark = re.compile(
        r"(?<![\w.])/(?:home/(?!me/)|root/|work/|opt/|Users/)\w|\b(?:TODO|FIXME|XXX)\b"
    )
    for path in [*sources(*TEXT_SUFFIXES), *outside, *documents]:
        if path != Path(__file__):
            found = path_or_mark.search(path.read_text())
            assert found is None, f"{name(path)}: {found and found[0]}"
