# SPDX-License-Identifier: BSD-3-Clause
"""Beyond 32 bits: strides, offsets and element counts above 2^31, and very many tiles."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from attend import assert_right, attend
from cases import Case, Inputs
from oracle import CAUSAL, Mask
from rows import Target
from tolerance import assert_bitwise_equal

FAR = 2**31 + 64  # elements


def sparse_storage(target: Target, elements: int, folder: Path) -> Tensor:
    """That many elements: on the CPU of a file with holes, so that only what is touched exists."""
    nbytes = elements * target.dtype.itemsize
    if target.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        if free < nbytes + 2**30:
            pytest.skip(f"needs {nbytes / 2**30:.0f} GiB of free device memory")
        return torch.empty(elements, dtype=target.dtype, device=target.device)
    path = folder / "storage"
    with path.open("wb") as file:
        file.truncate(nbytes)
    return torch.from_file(str(path), shared=True, size=elements, dtype=target.dtype)


STRIDES = {"batch": 0, "head": 1, "sequence": 2}


@pytest.mark.slow
@pytest.mark.parametrize("dim", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("which", ["q", "k", "v"])
def test_strides_above_two_to_the_31(target: Target, dim: int, which: str, tmp_path: Path):
    D = target.head_dim
    sizes = {0: (2, 2, 3), 1: (1, 2, 3), 2: (1, 1, 2)}[dim]
    case = Case("far", sizes[2], sizes[2], D=D, B=sizes[0], H=sizes[1])
    inputs = case.inputs(target.dtype, target.device, D)
    due = attend(*inputs)
    near = getattr(inputs, which)
    strides = list(near.stride())
    strides[dim] = FAR
    storage = sparse_storage(target, (near.shape[dim] - 1) * FAR + 4096, tmp_path)
    far = storage.as_strided(near.shape, strides)
    far.copy_(near)
    ours = attend(*inputs._replace(**{which: far}))
    assert_bitwise_equal(ours.out, due.out)
    assert_bitwise_equal(ours.lse, due.lse, "lse")


@pytest.mark.slow
@pytest.mark.targets(device="cuda")
def test_outputs_above_two_to_the_31_elements(target: Target):
    """The query and the keys are expanded, so that the output alone is large."""
    D, H, S_q = target.head_dim, 64, 2**14
    B = math.ceil((2**31 + 1) / (H * S_q * D))
    needed = B * H * S_q * (D * target.dtype.itemsize + 8)
    free, _ = torch.cuda.mem_get_info()
    if free < needed + 2**30:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    inputs = Case("one", S_q, 33, D=D, H=1).inputs(target.dtype, target.device, D)
    due = attend(*inputs, CAUSAL, deterministic=True)
    ours = attend(*(x.expand(B, H, -1, -1) for x in inputs), CAUSAL, deterministic=True)
    assert ours.out.numel() > 2**31
    for b, h in ((0, 0), (B // 2, H // 2), (B - 1, H - 1)):
        assert_bitwise_equal(ours.out[b, h], due.out[0, 0])
        assert_bitwise_equal(ours.lse[b, h], due.lse[0, 0], "lse")
    assert bool((ours.lse[:, :, -1] == due.lse[0, 0, -1]).all())


@pytest.mark.slow
def test_more_query_tiles_than_a_grid_dimension_holds(target: Target):
    D = target.head_dims[0] + 1
    tile = 128 if D < 64 else 16
    S_q = 65_536 * tile + 77 if target.device == "cuda" else 131_101
    inputs = Case("tiles", S_q, 3, D=D, H=1).inputs(target.dtype, target.device, D)
    mask = Mask("top_left")
    ours = attend(*inputs, mask)
    for rows in (slice(0, 300), slice(S_q // 2, S_q // 2 + 300), slice(S_q - 300, S_q)):
        part = Inputs(inputs.q[:, :, rows], inputs.k, inputs.v)
        assert_right(type(ours)(ours.out[:, :, rows], ours.lse[:, :, rows]), part, mask)


@pytest.mark.slow
def test_mask_of_very_long_sequences(target: Target, tmp_path: Path):
    """2^20 keys, of which a window sees a few: positions are exact far from the start."""
    length, D = 2**20 + 7, target.head_dims[0]
    inputs = Case("long", 5, length, D=D, H=1).inputs(target.dtype, target.device, D)
    mask = Mask(left=3, right=0)
    ours = attend(*inputs, mask)
    tail = Inputs(inputs.q, inputs.k[:, :, -16:], inputs.v[:, :, -16:])
    assert_right(ours, tail, mask)
