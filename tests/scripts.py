# SPDX-License-Identifier: BSD-3-Clause
"""Commands of benchmarks/ and examples/ as modules, so that tests call their `main`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

REPOSITORY = Path(__file__).resolve().parents[1]
BENCHMARKS = REPOSITORY / "benchmarks"
EXAMPLES = REPOSITORY / "examples"


@contextmanager
def neighbours_importable(folder: Path) -> Iterator[None]:
    """A script imports its neighbours by name, as it does when run from the command line."""
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


def load_script(path: Path) -> ModuleType:
    """The script as a module of a name that no other module of the tests has."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their types up
    spec.loader.exec_module(module)
    return module
