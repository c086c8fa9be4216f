# SPDX-License-Identifier: BSD-3-Clause
"""Where it was measured: device, clocks, versions, commit. Never host names or local paths."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path, PurePath
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
CLOCK_FIELDS = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


def _output_of(command: list[str]) -> str | None:
    """What a command prints, or None where it is absent or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _nvidia_smi(device: torch.device, fields: tuple[str, ...]) -> list[str] | None:
    # By UUID: an index would name another card under CUDA_VISIBLE_DEVICES.
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    selected = ["-i", f"GPU-{uuid}"] if uuid else []
    query = f"--query-gpu={','.join(fields)}"
    printed = _output_of(["nvidia-smi", *selected, query, "--format=csv,noheader,nounits"])
    values = printed.splitlines()[0].split(", ") if printed else []
    return values if len(values) == len(fields) else None


def clocks(device: torch.device) -> dict[str, str] | None:
    """Clocks (MHz), power (W) and temperature (C) now; None on a CPU or without nvidia-smi."""
    values = _nvidia_smi(device, CLOCK_FIELDS) if device.type == "cuda" else None
    return dict(zip(CLOCK_FIELDS, values, strict=True)) if values else None


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()


def device_slug(device: torch.device) -> str:
    """A file name's worth of the device; a CPU's speed depends on its threads, so they count."""
    name = re.sub(r"\((r|tm)\)|\bnvidia\b|\bprocessor\b|@.*", "", device_name(device).lower())
    slug = re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "unknown"
    return slug if device.type == "cuda" else f"{slug}-{torch.get_num_threads()}t"


def commit() -> dict[str, Any]:
    """The checkout's commit and whether tracked files differ from it."""
    git = ["git", "-C", str(REPOSITORY)]
    # Only a checkout of this very folder counts, not one that happens to lie around it.
    top = _output_of([*git, "rev-parse", "--show-toplevel"])
    if top is None or Path(top).resolve() != REPOSITORY:
        return {"commit": None, "dirty": None}
    changes = _output_of([*git, "status", "--porcelain", "--untracked-files=no"])
    return {
        "commit": _output_of([*git, "rev-parse", "HEAD"]),
        "dirty": None if changes is None else bool(changes),
    }


def without_paths(text: str) -> str:
    """The text with every absolute path cut to its last part."""
    return re.sub(r"(?<![\w.:/])/(?:[^\s/'\":,]+/)+", "", text)


def command_line(argv: list[str]) -> str:
    """How to run it again; an absolute path in the arguments is cut to its last part."""
    words = ["python benchmarks/attention.py"]
    for word in argv:
        option, equals, value = word.partition("=")
        if equals and PurePath(value).is_absolute():
            words.append(f"{option}={PurePath(value).name}")
        else:
            words.append(PurePath(word).name if PurePath(word).is_absolute() else word)
    return " ".join(words)


def describe(device: torch.device, argv: list[str], given_commit: str | None) -> dict[str, Any]:
    """Everything that a reader needs to judge or repeat the numbers."""
    import online_attention

    affinity = getattr(os, "sched_getaffinity", None)
    found: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": command_line(argv),
        "device": device_name(device),
        "device_type": device.type,
        "driver": None,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.version.cuda else None,
        "online_attention": str(online_attention.__version__),
        "matmul_precision": torch.get_float32_matmul_precision(),
    }
    found.update(commit())
    if given_commit:
        found.update(commit=given_commit, dirty=None)
    if device.type == "cuda":
        driver = _nvidia_smi(device, ("driver_version",))
        properties = torch.cuda.get_device_properties(device)
        found["driver"] = driver[0] if driver else None
        found["multiprocessors"] = properties.multi_processor_count
        found["l2_bytes"] = properties.L2_cache_size
    return found
