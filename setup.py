# SPDX-License-Identifier: BSD-3-Clause
"""Builds online_attention._C with CMake and ninja. Everything else is in pyproject.toml.

Environment: ONLINE_ATTENTION_CUDA=0 builds for the CPU alone, CUDA_HOME names a CUDA toolkit,
MAX_JOBS limits parallel compilation, CMAKE_ARGS is passed on to CMake.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD = ROOT / "build"


def find_nvcc() -> Path | None:
    """nvcc of CUDA_HOME, else of PATH, else of the CUDA 13 packages from PyPI."""
    if os.environ.get("ONLINE_ATTENTION_CUDA", "1") == "0":
        return None
    if home := os.environ.get("CUDA_HOME"):
        nvcc = Path(home) / "bin" / "nvcc"
        if not nvcc.is_file():
            raise SystemExit(f"CUDA_HOME is set, but {nvcc} does not exist.")
        return nvcc
    if on_path := shutil.which("nvcc"):
        return Path(on_path)
    try:
        package = importlib.util.find_spec("nvidia.cu13")
    except ModuleNotFoundError:
        package = None
    for folder in (package and package.submodule_search_locations) or ():
        nvcc = Path(folder) / "bin" / "nvcc"
        if nvcc.is_file():
            for tool in (*nvcc.parent.iterdir(), nvcc.parents[1] / "nvvm" / "bin" / "cicc"):
                if tool.is_file():
                    tool.chmod(tool.stat().st_mode | 0o111)  # some wheels lose the execute bits
            return nvcc
    return None


def tool(package: str, folder: str) -> str:
    """A build tool: the one installed from PyPI, else the one of PATH."""
    try:
        return str(Path(getattr(importlib.import_module(package), folder)) / package)
    except ImportError:
        return shutil.which(package) or package


def cached(variable: str) -> str | None:
    """The value of a variable in CMake's cache of the last build."""
    cache = BUILD / "CMakeCache.txt"
    text = cache.read_text() if cache.exists() else ""
    found = re.search(rf"^{variable}:\w+=(.*)$", text, re.MULTILINE)
    return found[1] if found else None


NINJA = tool("ninja", "BIN_DIR")


class BuildExtension(build_ext):
    def build_extension(self, ext: Extension) -> None:
        nvcc = find_nvcc()
        print(
            f"online_attention: CUDA kernels with {nvcc}"
            if nvcc
            else "online_attention: no CUDA compiler, building for the CPU alone",
            flush=True,
        )
        env = dict(os.environ)
        if nvcc and (nvcc.parents[1] / "lib").is_dir():  # the packages from PyPI have no lib64
            paths = [str(nvcc.parents[1] / "lib"), env.get("LIBRARY_PATH")]
            env["LIBRARY_PATH"] = os.pathsep.join(filter(None, paths))

        self.configure(nvcc, env)
        self.compile(env)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(BUILD / "_C.abi3.so", target)

    def configure(self, nvcc: Path | None, env: dict[str, str]) -> None:
        from torch.utils.cpp_extension import include_paths, library_paths

        variables = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": str(nvcc or ""),
            "CMAKE_MAKE_PROGRAM": NINJA,
            "PYTHON_INCLUDE_DIR": sysconfig.get_paths()["include"],
            "TORCH_INCLUDE_DIRS": ";".join(include_paths("cpu")),
            "TORCH_LIBRARY_DIRS": ";".join(library_paths("cpu")),
        }
        command = [tool("cmake", "CMAKE_BIN_DIR"), "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja"]
        command += [f"-D{name}={value}" for name, value in variables.items()]
        if cached("CMAKE_CUDA_COMPILER") != variables["CMAKE_CUDA_COMPILER"]:
            command.append("--fresh")  # CMake cannot change the compiler of a configured folder
            (BUILD / "build.log").unlink(missing_ok=True)
        subprocess.run(command + shlex.split(env.get("CMAKE_ARGS", "")), check=True, env=env)

    def compile(self, env: dict[str, str]) -> None:
        """Runs ninja; appends what it and ptxas say to build.log, which tests read."""
        jobs = env.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        command = [NINJA, "-C", str(BUILD), "-v", "-j", jobs]
        with (
            (BUILD / "build.log").open("a") as log,
            subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as ninja,
        ):
            for line in ninja.stdout or ():
                log.write(line)
                sys.stdout.write(line)
        if ninja.returncode:
            raise SystemExit("online_attention: compilation failed, see the messages above.")


setup(
    ext_modules=[Extension("online_attention._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}, "build": {"build_base": "build/python"}},
)
