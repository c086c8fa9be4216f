# SPDX-License-Identifier: BSD-3-Clause
"""One of the processes of test_context_parallel.py: `two_processes.py RANK FILE DEVICE`.

Each check shards one problem over two processes along its length and compares with the whole of it.
The first process prints, as JSON, what became of every check: "" if it is right.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sys
import traceback
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.experimental import _attention as torchs
from torch.nn.attention import SDPBackend, activate_flash_attention_impl, sdpa_kernel

import online_attention
from cases import normal
from online_attention import attention, flash_registry, merge
from tolerance import assert_close

WORLD = 2
B, H, S, D = 2, 3, 32, 16


def of(rank: int, whole: Tensor) -> Tensor:
    return whole.chunk(WORLD, dim=2)[rank].contiguous()


def passed_on(tensor: Tensor, rank: int) -> Tensor:
    """What the process before has, for what this one gives to the next."""
    received = torch.empty_like(tensor)
    peers = [
        dist.P2POp(dist.isend, tensor, (rank + 1) % WORLD),
        dist.P2POp(dist.irecv, received, (rank - 1) % WORLD),
    ]
    for request in dist.batch_isend_irecv(peers):
        request.wait()
    return received


def ring_attention(rank: int, whole: list[Tensor], is_causal: bool) -> list[Tensor]:
    """By hand: out, lse and the gradients of this process's shards; keys and values go round."""
    q, k, v, dout = (of(rank, x) for x in whole)
    q.requires_grad_()
    shards, parts = {}, []
    kv = torch.stack((k, v))
    for step in range(WORLD):
        owner = (rank - step) % WORLD
        if step > 0:
            kv = passed_on(kv.detach(), rank)
        if owner <= rank or not is_causal:
            shards[owner] = kv.requires_grad_()
            causal = is_causal and owner == rank
            parts.append(attention(q, kv[0], kv[1], causal=causal, return_lse=True))
    out, lse = merge(*zip(*parts, strict=True))
    cotangents = [dout, torch.ones_like(lse)]
    dq, *dkv = torch.autograd.grad([out, lse], [q, *shards.values()], cotangents)
    home = torch.zeros(WORLD, *kv.shape, dtype=kv.dtype, device=kv.device)
    home[list(shards)] = torch.stack(dkv)
    dist.all_reduce(home)  # each shard's gradient is the sum over who used it
    return [out.detach(), lse.detach(), dq, *home[rank]]


def check_by_hand(rank: int, mesh: DeviceMesh, is_causal: bool) -> None:
    whole = problem(mesh.device_type)
    results = []
    for dtype in (torch.float64, whole[0].dtype):
        q, k, v, dout = (x.detach().to(dtype) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        scores = q @ k.mT * D**-0.5
        if is_causal:
            scores = scores.masked_fill(above_diagonal(mesh.device_type), -torch.inf)
        out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        gradients = torch.autograd.grad([out, lse], leaves, [dout, torch.ones_like(lse)])
        results.append([of(rank, x.detach()) for x in (out, lse, *gradients)])
    ours = ring_attention(rank, whole, is_causal)
    for name, mine, exact, plain in zip(RESULTS, ours, *results, strict=True):
        assert_close(mine, exact, plain, what=name)


RESULTS = ("out", "lse", "dq", "dk", "dv")


def check_torchs(rank: int, mesh: DeviceMesh, is_causal: bool, is_balanced: bool) -> None:
    """torch's context_parallel, which calls the flash operators on parts of the problem."""
    whole = problem(mesh.device_type)
    on_cpu = mesh.device_type == "cpu"
    torchs._cp_options.enable_load_balance = is_balanced
    buffers = [x.clone() for x in whole]
    with torchs.context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4):
        q, k, v, dout = (x.detach() for x in buffers)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        run = flash_operator if on_cpu else F.scaled_dot_product_attention
        backend = contextlib.nullcontext() if on_cpu else sdpa_kernel(SDPBackend.FLASH_ATTENTION)
        with backend:
            out = run(*leaves, is_causal=is_causal, **({"mesh": mesh} if on_cpu else {}))
        gradients = torch.autograd.grad(out, leaves, dout)
        ours = torchs.context_parallel_unshard(mesh, [out.detach(), *gradients], [2] * 4)
    results = []
    for dtype in (torch.float64, whole[0].dtype):
        q, k, v, dout = (x.detach().to(dtype) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(*leaves, is_causal=is_causal)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, dout)])
    for name, mine, exact, plain in zip(("out", "dq", "dk", "dv"), ours, *results, strict=True):
        magnitude = 4 * float(exact.abs().max())  # torch rounds while it merges, too
        assert_close(mine, exact, plain, magnitude=magnitude, what=name)


def flash_operator(q: Tensor, k: Tensor, v: Tensor, is_causal: bool, mesh: DeviceMesh) -> Tensor:
    """What torch's function would run on CUDA: on the CPU it picks one that cannot be sharded."""
    sharded = [DTensor.from_local(x, mesh, [Shard(2)], run_check=False) for x in (q, k, v)]
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    return operator(*sharded, 0.0, is_causal)[0].to_local()


def problem(device: str) -> list[Tensor]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return normal(*[(B, H, S, D)] * 4, dtype=dtype, device=device)


def above_diagonal(device: str) -> Tensor:
    return torch.ones(S, S, dtype=torch.bool, device=device).triu(1)


CHECKS: dict[str, Callable[[int, DeviceMesh], None]] = {
    "by-hand": lambda rank, mesh: check_by_hand(rank, mesh, False),
    "by-hand-causal": lambda rank, mesh: check_by_hand(rank, mesh, True),
    "torchs": lambda rank, mesh: check_torchs(rank, mesh, False, False),
    "torchs-causal": lambda rank, mesh: check_torchs(rank, mesh, True, False),
    "torchs-balanced": lambda rank, mesh: check_torchs(rank, mesh, True, True),
}


def main(rank: int, file: str, device: str) -> None:
    torch.set_num_threads(1)
    if device == "cuda":
        torch.cuda.set_device(rank)
        online_attention.register()
        activate_flash_attention_impl("online_attention")
    else:
        library = flash_registry.implement("CPU")  # noqa: F841  where torch has no kernel
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
    )
    mesh = init_device_mesh(device, (WORLD,))
    outcomes = {}
    for name, check in CHECKS.items():
        try:
            check(rank, mesh)
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
    gathered: list[dict[str, str] | None] = [None] * WORLD
    dist.all_gather_object(gathered, outcomes)
    if rank == 0:
        print(json.dumps({name: "".join(one[name] for one in gathered) for name in CHECKS}))
    sys.stdout.flush()
    os._exit(0)  # threads of the process group may still run, and abort an orderly exit


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
