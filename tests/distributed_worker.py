# SPDX-License-Identifier: BSD-3-Clause
"""One of two processes that train a block in parallel: `python distributed_worker.py RANK FILE`.

Each holds half of the batch; the gradients must be those of one process with all of it.
"""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from models import Block

WORLD = 2


def gradients_of(module: torch.nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    module(x).square().mean().backward()
    return {
        name.removeprefix("module."): p.grad.full_tensor() if isinstance(p, DTensor) else p.grad
        for name, p in module.named_parameters()
    }


def main() -> None:
    rank = int(sys.argv[1])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{sys.argv[2]}",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    block = Block(dtype=torch.float64)
    x = torch.randn(2 * WORLD, 9, block.embed_dim, dtype=torch.float64)
    due = gradients_of(copy.deepcopy(block), x)
    mine = x.chunk(WORLD)[rank]

    sharded = copy.deepcopy(block)
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(sharded.attention, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    for way, module in (("DDP", DistributedDataParallel(block)), ("FSDP", sharded)):
        found = gradients_of(module, mine)
        assert list(found) == list(due)
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, due[name], msg=lambda text, n=name: f"{n}: {text}")
        print(f"{way}: the gradients are equal")
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may still run, and abort an orderly exit


if __name__ == "__main__":
    main()
