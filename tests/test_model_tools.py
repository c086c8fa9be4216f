# SPDX-License-Identifier: BSD-3-Clause
"""What people do to whole models: compile, export, shard, copy and checkpoint them."""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from models import Block, Projected
from online_attention import attention
from tolerance import assert_bitwise_equal

MODELS = {"module": Block, "function": Projected}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)

LENGTHS = (5, 33, 66)


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch._dynamo.reset()


def input_of(length: int) -> Tensor:
    return torch.randn(2, length, Block.embed_dim)


def gradients_of(function, module: torch.nn.Module, x: Tensor) -> list[Tensor]:
    """The result, and the gradients of input and parameters."""
    leaf = x.detach().requires_grad_()
    out = function(leaf)
    wanted = [leaf, *module.parameters()]
    return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]


def assert_trains_alike(function, module: torch.nn.Module, x: Tensor) -> None:
    mine, due = gradients_of(function, module, x), gradients_of(module, module, x)
    for a, b in zip(mine, due, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- compile; the backend traces forward and backward, and runs both eagerly

recompiling_fails = torch._dynamo.config.patch(error_on_recompile=True)


@recompiling_fails
def test_a_compiled_block_trains_as_the_eager_one():
    module = Block()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        assert_trains_alike(compiled, module, input_of(length))


@recompiling_fails
def test_a_marked_length_is_compiled_once():
    module = Projected()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for length in LENGTHS:
        x = input_of(length)
        torch._dynamo.mark_dynamic(x, 1)
        assert_bitwise_equal(compiled(x), module(x))


@recompiling_fails
def test_padding_and_dropout_are_compiled_too():
    module = Block(dropout=0.5)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in LENGTHS:
        x, hidden = input_of(length), torch.rand(2, length) < 0.3

        def drawn(seed: int, function=compiled, inputs=(x, hidden)) -> list[Tensor]:
            torch.manual_seed(seed)
            out = function(*inputs)
            return [out, *torch.autograd.grad(out.square().sum(), tuple(module.parameters()))]

        once, again, other = drawn(1), drawn(1), drawn(2)
        for a, b, c in zip(once, again, drawn(1, module), strict=True):
            assert_bitwise_equal(a, b)
            torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-5)
        assert not torch.equal(once[0], other[0])


def test_a_length_that_varies_is_compiled_twice():
    """Once for the first length, once for all others: torch's default."""
    module = Projected()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(input_of(LENGTHS[0]))
    with recompiling_fails, pytest.raises(torch._dynamo.exc.RecompileError):
        compiled(input_of(LENGTHS[1]))
    compiled(input_of(LENGTHS[1]))
    with recompiling_fails:
        for length in LENGTHS:
            x = input_of(length)
            assert_bitwise_equal(compiled(x), module(x))


@pytest.fixture
def generated_code_compiles() -> Iterator[None]:
    """Inductor writes C++: plain code, for speed here, and not a question for each extension."""
    import torch._inductor.config as inductor

    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        pytest.skip(f"Inductor on the CPU needs a C++ compiler: no {compiler} here")
    quick = {"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}
    quick["aot_inductor.compile_wrapper_opt_level"] = "O0"
    with inductor.patch(quick), inductor.patch(force_disable_caches=True):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("generated_code_compiles")
def test_inductor_compiles_forward_and_backward():
    def packed(qkv: Tensor) -> Tensor:
        return 2 * attention(*qkv.unbind(0), causal=True)

    compiled = torch.compile(packed, fullgraph=True, dynamic=True)
    for length in LENGTHS[:2]:
        qkv = torch.randn(3, 2, 2, length, 8, requires_grad=True)
        mine, due = compiled(qkv), packed(qkv)
        torch.testing.assert_close(mine, due)
        gradients = (torch.autograd.grad(x.square().sum(), qkv) for x in (mine, due))
        torch.testing.assert_close(*gradients)


# --- export


def exported(module: torch.nn.Module) -> torch.export.ExportedProgram:
    length = torch.export.Dim("length", max=4096)
    return torch.export.export(module, (input_of(7),), dynamic_shapes=({1: length},))


@every_model
def test_export_round_trip(model: type, tmp_path: Path):
    module = model().eval()
    torch.export.save(exported(module), tmp_path / "block.pt2")
    loaded = torch.export.load(tmp_path / "block.pt2").module()
    for length in LENGTHS:
        x = input_of(length)
        assert_bitwise_equal(loaded(x), module(x))


@pytest.mark.slow
@pytest.mark.usefixtures("generated_code_compiles")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_ahead_of_time_compilation(tmp_path: Path):
    """The package holds machine code and the operator's name: the loader imports this package."""
    module = Projected().eval()
    with torch.no_grad():
        package = torch._inductor.aoti_compile_and_package(
            exported(module), package_path=str(tmp_path / "block.pt2")
        )
        loaded = torch._inductor.aoti_load_package(package)
        for length in LENGTHS:
            x = input_of(length)
            torch.testing.assert_close(loaded(x), module(x))


# --- copies, checkpoints


@every_model
def test_pickled_and_copied_models_are_the_same(model: type):
    module = model()
    x = input_of(9)
    due = gradients_of(module, module, x)
    saved = io.BytesIO()
    torch.save(module.state_dict(), saved)
    saved.seek(0)
    loaded = model()
    loaded.load_state_dict(torch.load(saved))
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module), loaded):
        for mine, wanted in zip(gradients_of(other, other, x), due, strict=True):
            assert_bitwise_equal(mine, wanted)


WITH_DROPOUT = {**MODELS, "dropout": functools.partial(Block, dropout=0.5)}


@pytest.mark.parametrize("model", WITH_DROPOUT.values(), ids=WITH_DROPOUT)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints_change_nothing(model: type, use_reentrant: bool):
    """With dropout neither: the recomputation draws what the first computation drew."""
    module = model()
    start = input_of(9)

    def step(*, checkpointed: bool) -> list[Tensor]:
        torch.manual_seed(3)
        module.zero_grad()
        x = start.clone().requires_grad_()
        run = functools.partial(checkpoint, module, use_reentrant=use_reentrant)
        (run if checkpointed else module)(x).square().sum().backward()
        return [x.grad, *(p.grad for p in module.parameters())]

    for mine, due in zip(step(checkpointed=True), step(checkpointed=False), strict=True):
        assert_bitwise_equal(mine, due)


def test_checkpoints_inside_a_compiled_model():
    module = Projected()

    def checkpointed(x: Tensor) -> Tensor:
        return checkpoint(module, x, use_reentrant=False)

    compiled = torch.compile(checkpointed, fullgraph=True, backend="aot_eager")
    assert_trains_alike(compiled, module, input_of(9))


@every_model
def test_gradients_per_sample(model: type):
    """`torch.func`: vmap of the gradient of a functional call is a loop."""
    module = model()
    parameters = dict(module.named_parameters())
    batch = input_of(7)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    for index, x in enumerate(batch):
        due = gradients_of(module, module, x[None])[2:]
        for mine, wanted in zip(found.values(), due, strict=True):
            torch.testing.assert_close(mine[index], wanted, rtol=1e-4, atol=1e-5)


# --- parallel


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_as_one(tmp_path: Path):
    """DistributedDataParallel and FSDP2 (`fully_shard`) over Gloo."""
    script = Path(__file__).with_name("distributed_worker.py")
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=180)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert "DDP: the gradients are equal" in output
        assert "FSDP: the gradients are equal" in output
