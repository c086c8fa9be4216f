# SPDX-License-Identifier: BSD-3-Clause
"""Compiles tests/whitebox, the pybind11 window into the headers of csrc, and loads it.

The compiled module lies in build/whitebox/<hash of all that went into it>, so a second run, or an
edit of a file that is not part of it, compiles nothing.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCES = REPOSITORY / "tests" / "whitebox"
CSRC = REPOSITORY / "csrc"
# What the headers declare and a test binds, as far as it needs no CUDA.
COMPILED_WITH = [
    CSRC / "cuda" / "tile_plan.cpp",
    CSRC / "cuda" / "backward_plan.cpp",
    CSRC / "cuda" / "hopper" / "forward_plan.cpp",
]
CACHE = REPOSITORY / "build" / "whitebox"
# Not optimised: to compile takes longest.
FLAGS = ["-std=c++20", "-O0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror"]


class NoCompilerError(RuntimeError):
    """This machine has no C++ compiler."""


def compiler() -> list[str]:
    for candidate in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if candidate and shutil.which(shlex.split(candidate)[0]):
            return shlex.split(candidate)
    raise NoCompilerError("no C++ compiler: none of $CXX, g++, clang++ and c++ was found")


def pybind11_include() -> str:
    """The headers of the pybind11 package, else those that torch carries."""
    try:
        import pybind11
    except ImportError:
        import torch

        return str(Path(torch.__file__).parent / "include")
    return pybind11.get_include()


def cache_key(command: list[str], inputs: list[Path]) -> str:
    digest = hashlib.sha256()
    digest.update(subprocess.check_output([*command[:1], "--version"]))
    digest.update(" ".join(command).encode())
    for path in inputs:
        digest.update(str(path.relative_to(REPOSITORY)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")


def compile_module(command: list[str], sources: list[Path], target: Path) -> None:
    """Compiles beside the target and renames, so that runs at the same time cannot meet."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        # Numbered, for a binding is named like the source that it binds.
        objects = [Path(folder) / f"{i}_{source.stem}.o" for i, source in enumerate(sources)]
        jobs = [
            [*command, "-c", str(source), "-o", str(out)]
            for source, out in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, jobs))
        linked = Path(folder) / target.name
        run([*command, "-shared", *map(str, objects), "-o", str(linked)])
        linked.replace(target)


def load() -> ModuleType:
    command = [
        *compiler(),
        *FLAGS,
        f"-I{CSRC}",
        f"-isystem{pybind11_include()}",
        f"-isystem{sysconfig.get_paths()['include']}",
    ]
    sources = sorted(SOURCES.glob("*.cpp")) + COMPILED_WITH
    headers = sorted(SOURCES.glob("*.h")) + sorted((CSRC / "core").glob("*.h"))
    headers += [source.with_suffix(".h") for source in COMPILED_WITH]
    headers.append(CSRC / "cpu" / "split_keys.h")
    headers += sorted((CSRC / "cuda" / "hopper").glob("*.h"))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    target = CACHE / cache_key(command, sources + headers) / f"whitebox{suffix}"
    if not target.exists():
        compile_module(command, sources, target)
    spec = importlib.util.spec_from_file_location("whitebox", target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
