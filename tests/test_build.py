# SPDX-License-Identifier: BSD-3-Clause
"""The built file: loads with every torch from 2.11 on, with or without CUDA, and holds no path."""

from __future__ import annotations

import functools
import importlib.metadata
import re
import subprocess
import zlib
from itertools import groupby
from pathlib import Path

import pytest

import elf
import ptxas
from online_attention import _C

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build"
LIBRARY = Path(_C.__file__)

LIBRARIES = {
    "libtorch.so",
    "libtorch_cpu.so",
    "libstdc++.so.6",
    "libgcc_s.so.1",
    "libc.so.6",
    "libm.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
# Functions of torch's stable ABI that torch 2.11 has. A new one goes in only after a look at the
# versions torch documents for it.
SHIMS = {
    "aoti_torch_abi_version",
    "aoti_torch_create_device_guard",
    "aoti_torch_delete_device_guard",
    "aoti_torch_delete_library_object",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_device_type_cuda",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_bool",
    "aoti_torch_dtype_float16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float64",
    "aoti_torch_dtype_int64",
    "aoti_torch_dtype_uint8",
    "aoti_torch_empty_strided",
    "aoti_torch_get_current_cuda_stream",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_device_index",
    "aoti_torch_get_device_type",
    "aoti_torch_get_dim",
    "aoti_torch_get_dtype",
    "aoti_torch_get_layout",
    "aoti_torch_get_size",
    "aoti_torch_get_stride",
    "aoti_torch_is_defined",
    "aoti_torch_layout_strided",
    "aoti_torch_library_def",
    "aoti_torch_library_init_def",
    "aoti_torch_library_init_fragment",
    "aoti_torch_library_init_impl",
    "aoti_torch_memory_format_contiguous_format",
    "aoti_torch_new_tensor_handle",
    "torch_call_dispatcher",
    "torch_delete_list",
    "torch_library_impl",
    "torch_list_get_item",
    "torch_list_size",
    "torch_parallel_for",
}
# Functions of Python's limited API, version 3.10.
PYTHON = {
    "PyBool_FromLong",
    "PyErr_Format",
    "PyErr_SetString",
    "PyExc_ValueError",
    "PyList_Append",
    "PyList_New",
    "PyModuleDef_Init",
    "PyUnicode_FromString",
    "_PyArg_ParseTuple_SizeT",
    "_Py_BuildValue_SizeT",
    "_Py_Dealloc",
}
# Kernels that may use local memory, by a part of their names, with the reason.
LOCAL_MEMORY_ALLOWED: dict[str, str] = {
    "simt_forward_kernelIdLi64ELi32E": "fp64 fills registers twice as fast; not tuned",
    "combine_kernelIddE": "exp2 of fp64 is a library function with a stack of its own",
    "merge_kernelIdd": "as combine_kernel",
    "merge_backward_kernelIdd": "as combine_kernel",
}


@pytest.fixture(scope="module")
def library() -> elf.SharedLibrary:
    return elf.read(LIBRARY)


@pytest.fixture(scope="module")
def printed() -> dict[str, list[str]]:
    """What each CUDA object's compilation printed."""
    objects = ptxas.of_build(BUILD)
    if not objects:
        pytest.skip("no CUDA kernel was compiled in this checkout")
    return objects


def test_needs_torch_and_the_c_library_alone(library: elf.SharedLibrary):
    assert set(library.needed) <= LIBRARIES
    # libtorch.so is the shell that pulls in the CUDA part of a torch that has one.
    assert {"libtorch.so", "libtorch_cpu.so"} <= set(library.needed)
    assert library.rpath == []


def test_calls_what_torch_2_11_has(library: elf.SharedLibrary):
    shims = {name for name in library.undefined if re.match(r"(aoti_)?torch_", name)}
    assert shims <= SHIMS
    unstable = [name for name in library.undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]
    assert unstable == []


def test_loads_without_cuda(library: elf.SharedLibrary):
    assert library.undefined["aoti_torch_get_current_cuda_stream"], "must be weak"
    cuda = {name for name in library.undefined if re.match(r"cuda[A-Z]|cu[A-Z]|__cuda", name)}
    assert cuda == set()


def test_calls_the_limited_api_of_python(library: elf.SharedLibrary):
    assert {name for name in library.undefined if re.match(r"_?Py", name)} <= PYTHON


def test_exports_the_module(library: elf.SharedLibrary):
    assert "PyInit__C" in library.exported
    ours = {name for name in library.exported if "online_attention" in name}
    assert ours == set()


def test_file_and_wheel_are_for_every_python():
    assert LIBRARY.name == "_C.abi3.so"
    wheel = importlib.metadata.distribution("online-attention").read_text("WHEEL")
    assert wheel is not None
    assert re.search(r"^Tag: cp310-abi3-linux", wheel, re.MULTILINE)


def test_holds_no_path_of_the_build_machine():
    data = LIBRARY.read_bytes()
    for path in (str(REPOSITORY), str(Path.home()), "site-packages", "/pip-"):
        assert path.encode() not in data


def test_is_small():
    """In a wheel, which is compressed."""
    assert len(zlib.compress(LIBRARY.read_bytes())) < 10e6


def test_kernels_stay_in_registers(printed: dict[str, list[str]]):
    spilling = [
        function
        for function in ptxas.functions(printed)
        if function.stack_frame or function.spill_stores or function.spill_loads
        if not any(part in function.name for part in LOCAL_MEMORY_ALLOWED)
    ]
    assert spilling == []


def test_ptxas_has_no_warning(printed: dict[str, list[str]]):
    assert ptxas.warnings(printed) == []


# wgmma instructions of a Hopper forward kernel: S = Q K^T of D / 16 for the first key tile of a
# query tile, a step with masks and a step without, O += P V of the keys of a tile / 16 for the two
# steps and the last key tile; one more of each where query tiles are chained. More of them means
# that the compiler has copied the main loop, fewer that it is not there. Tiles:
# csrc/cuda/hopper/config.h.
def forward_products(head_dim: int, keys: int, *, chained: bool) -> int:
    return (3 + chained) * (head_dim // 16 + keys // 16)


HOPPER_FORWARD_PRODUCTS = {
    "64": 2 * forward_products(64, 128, chained=True),
    "96": forward_products(96, 128, chained=True) + forward_products(96, 96, chained=False),
    "128": 2 * forward_products(128, 128, chained=True) + forward_products(128, 80, chained=True),
    "192_128": forward_products(192, 128, chained=False) + 192 // 16,  # S of the first keys alone
    "192": forward_products(192, 80, chained=True),
    "256": forward_products(256, 80, chained=False) + forward_products(256, 64, chained=False),
}


# The same of a backward object, which holds a kernel without and one with masks. A copy of the step
# has S, dP, dV, dK and dQ; dQ of 128 keys / 16 comes once more behind the last step. Queries of a
# step and copies of it: csrc/cuda/hopper/backward_config.h.
def backward_products(head_dim: int, queries: int, copies: int) -> int:
    step = 2 * (head_dim // 16) + 2 * (queries // 16) + 128 // 16
    return copies * step + 128 // 16


HOPPER_BACKWARD_PRODUCTS = {
    "64": backward_products(64, 128, 2) + backward_products(64, 128, 4),
    "96": backward_products(96, 80, 2) + backward_products(96, 64, 4),
    "128": backward_products(128, 80, 2) + backward_products(128, 64, 4),
}


# The same for wide heads: one copy of a step of 64 queries and 64 keys, which has S, dP, dV, dK and
# dQ for half of the columns and the keys of both blocks; where those are no whole boxes of 64, dQ
# for two boxes and for one. Gradients of 256 columns are two products.
def wide_backward_products(head_dim: int, value_dim: int) -> int:
    halves = [2 if columns == 256 else 1 for columns in (head_dim, value_dim)]
    dq = 2 if head_dim == 256 else 4
    return 2 * (head_dim // 16 + value_dim // 16 + 64 // 16 * (sum(halves) + dq))


HOPPER_WIDE_BACKWARD_PRODUCTS = {
    "192_128": wide_backward_products(192, 128),
    "192": wide_backward_products(192, 192),
    "256": wide_backward_products(256, 256),
}


def hopper_objects(printed: dict[str, list[str]], name: str) -> list[str]:
    return [target for target in printed if re.search(rf"/hopper/{name}_b?f16_d", target)]


@functools.cache
def disassembled(target: str) -> str:
    cuobjdump = ptxas.disassembler()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump here")
    return subprocess.run(
        [cuobjdump, "-sass", BUILD / target], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("name", "products"),
    [
        ("forward", HOPPER_FORWARD_PRODUCTS),
        ("backward", HOPPER_BACKWARD_PRODUCTS),
        ("wide_backward", HOPPER_WIDE_BACKWARD_PRODUCTS),
    ],
)
def test_hopper_kernels_hold_their_products(
    printed: dict[str, list[str]], name: str, products: dict[str, int]
):
    objects = hopper_objects(printed, name)
    assert len(objects) == 2 * len(products)
    for target in objects:
        sass = disassembled(target)
        found = re.search(r"_d(\w+)\.cu", target)
        assert found is not None
        assert sass.count("HGMMA.64x") == products[found[1]], target
        assert "USETMAXREG" in sass


def longest_run(sass: str, instruction: str) -> int:
    """The most of these instructions behind each other."""
    code = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@\S+ )?(\S+)", sass, re.MULTILINE)
    runs = (len(list(run)) for same, run in groupby(code, instruction.__eq__) if same)
    return max(runs, default=0)


def test_hopper_forward_keeps_its_schedule(printed: dict[str, list[str]]):
    """ptxas has the last word on two things that cost a tenth of the speed when they went wrong:
    other instructions stand between exponentials, and warps are known to run together, so that
    nothing makes them meet before each product (docs/hopper_forward.md)."""
    for target in hopper_objects(printed, "forward"):
        sass = disassembled(target)
        assert 1 <= longest_run(sass, "MUFU.EX2") <= 4, target
        assert "WARPSYNC.ALL" not in sass, target


def test_runs_of_instructions_are_counted():
    line = "        /*{:04x}*/                   {} R1, R2 ;   /* 0x0000000000000000 */\n"
    code = ["MUFU.EX2", "FADD", "@P1 MUFU.EX2", "@!P0 MUFU.EX2", "MUFU.LG2", "MUFU.EX2"]
    sass = "".join(line.format(16 * i, x) for i, x in enumerate(code))
    assert longest_run(sass, "MUFU.EX2") == 2
    assert longest_run(sass, "HGMMA") == 0


def test_the_log_is_understood():
    old = "[1/2] nvcc -c a.cu -o x/a.cu.o\nptxas info    : Function properties for f\n"
    old += "    8 bytes stack frame, 4 bytes spill stores, 2 bytes spill loads\n"
    new = old.replace(" 8 bytes", " 0 bytes").replace(" 4 ", " 0 ").replace(" 2 bytes", " 0 bytes")
    function = ptxas.Function("x/a.cu.o", "f", 8, 4, 2)
    assert ptxas.functions(ptxas.outputs(old)) == [function]
    rebuilt = ptxas.functions(ptxas.outputs(old + new))
    assert rebuilt == [ptxas.Function("x/a.cu.o", "f", 0, 0, 0)]
    warning = "ptxas info: (C7510) wgmma is serialized due to ...\n"
    assert ptxas.warnings(ptxas.outputs(old + warning)) != []
    ignored = "ptxas info : (C7508) Potential Performance Loss: 'setmaxnreg' ignored ...\n"
    assert ptxas.warnings(ptxas.outputs(old + ignored)) != []
