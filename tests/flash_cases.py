# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of torch's flash operators share: devices and inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cases import normal
from online_attention import _C

aten = torch.ops.aten
HAS_INPLACE = hasattr(aten, "_flash_attention_forward_no_dropout_inplace")
needs_inplace = pytest.mark.skipif(not HAS_INPLACE, reason="this torch has no such operator")
needs_cuda = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and _C.built_with_cuda()),
        reason="needs a CUDA device and CUDA kernels",
    ),
]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


def heads_first(
    device: str, S_q: int = 33, S_kv: int = 33, H: int = 4, H_kv: int = 4, D: int = 16
) -> list[Tensor]:
    """query, key, value and a gradient of the output, (B, H, S, D)."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    shapes = (2, H, S_q, D), (2, H_kv, S_kv, D), (2, H_kv, S_kv, D), (2, H, S_q, D)
    return normal(*shapes, dtype=dtype, device=device)


def swapped(*tensors: Tensor) -> list[Tensor]:
    """(B, S, H, D) from (B, H, S, D) and back, each in memory of its own order."""
    return [x.transpose(1, 2).contiguous() for x in tensors]
