# SPDX-License-Identifier: BSD-3-Clause
"""What is timed: one `Case` is one attention problem, a suite is a list of them.

The attention alone or, in the suite `block`, the transformer block around it. Shapes are written
B, H, H_kv, S_q, S_kv, D, D_v throughout, as in the documentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

PASSES = ("forward", "backward", "forward_backward")


def pass_text(which_pass: str) -> str:
    """The pass in words."""
    return which_pass.replace("_", " and ")


DTYPES = ("fp64", "fp32", "bf16", "fp16")
ELEMENT_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}

# The grid keeps the work comparable from row to row: the same number of tokens and the same
# model width, so that a longer sequence means fewer of them and a larger head fewer heads.
GRID_TOKENS = 16384
GRID_WIDTH = 2048
GRID_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
MASKS = (False, True)
BIASES = ("key_padding", "boolean", "additive")

SHAPE_FIELDS = "B,H,H_kv,S_q,S_kv,D,D_v"


@dataclass(frozen=True)
class Case:
    """One attention problem; `family` names the group of rows it belongs to."""

    family: str
    batch: int
    heads: int
    heads_kv: int
    s_q: int
    s_kv: int
    d: int
    d_v: int
    causal: bool
    bias: str = "none"  # a mask given as a tensor, one of BIASES
    heads_first: bool = False  # in memory (B, H, S, D), as a cache of keys, not (B, S, H, D)
    block: bool = False  # the whole block of a transformer, self-attention: see _block.py

    @property
    def shape(self) -> str:
        """B, H (and H_kv when it differs), S_q (and S_kv when it differs), short for a table."""
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        length = f"{self.s_q}" if self.s_q == self.s_kv else f"{self.s_q}/{self.s_kv}"
        return f"{self.batch} x {heads} x {length}"

    @property
    def head_dim(self) -> str:
        """D, or D, D_v where they differ."""
        return f"{self.d}" if self.d == self.d_v else f"{self.d}, {self.d_v}"

    @property
    def mask(self) -> str:
        return mask_text(self.causal, self.bias)

    @property
    def label(self) -> str:
        return f"{self.shape}, D {self.head_dim}, {self.mask}"

    @property
    def width(self) -> int:
        """E, the features of a token between the layers of a model."""
        return self.heads * self.d

    @property
    def block_weights(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the weights of a block; those of a product are (outputs, inputs)."""
        width, heads_out = self.width, self.heads * self.d_v
        return {
            "norm_attention": (width,),
            "qkv": (width + self.heads_kv * (self.d + self.d_v), width),
            "projection": (width, heads_out),
            "norm_network": (width,),
            "widen": (4 * width, width),
            "narrow": (width, 4 * width),
        }

    @property
    def masks_agree(self) -> bool:
        """Whether SDPA's `is_causal` means our `causal`.

        Ours is aligned to the bottom right, SDPA's to the top left: the same only for S_q == S_kv.
        """
        return not self.causal or self.s_q == self.s_kv

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def mask_text(causal: bool, bias: str) -> str:
    """The mask in words."""
    parts = (["causal"] if causal else []) + ([bias.replace("_", " ")] if bias != "none" else [])
    return " + ".join(parts) or "full"


def _square(family: str, batch: int, heads: int, length: int, d: int, causal: bool) -> Case:
    return Case(family, batch, heads, heads, length, length, d, d, causal)


def grid(head_dims: tuple[int, ...], lengths: tuple[int, ...]) -> list[Case]:
    """16384 tokens, H * D = 2048."""
    return [
        _square("grid", GRID_TOKENS // length, GRID_WIDTH // d, length, d, causal)
        for d in head_dims
        for causal in MASKS
        for length in lengths
    ]


def quick(device_type: str) -> list[Case]:
    """A cross-section: seconds on two CPU cores, about a minute on a GPU."""
    if device_type == "cuda":
        model = Case("llama_gqa", 1, 64, 8, 8192, 8192, 128, 128, True)
        small = _square("small", 1, 8, 1024, 128, True)
        return [*grid((64, 128, 256), (1024, 4096, 16384)), model, small]
    return [
        _square("cpu", 1, 4, length, d, causal)
        for d in (64, 128)
        for causal in MASKS
        for length in (128, 512, 1024)
    ]


def forward(device_type: str) -> list[Case]:
    return grid((64, 128, 256), GRID_LENGTHS)


def backward(device_type: str) -> list[Case]:
    """The forward suite's grid, and the grouped heads of a large model."""
    model = [Case("llama_gqa", 1, 64, 8, 8192, 8192, 128, 128, causal) for causal in MASKS]
    return [*forward(device_type), *model]


def shapes(device_type: str) -> list[Case]:
    """What the grid leaves out: grouped heads, little work, and head sizes off the powers of 2."""
    cases = [
        Case("llama_gqa", 1, 64, 8, length, length, 128, 128, causal)
        for length in (8192, 32768)
        for causal in MASKS
    ]
    cases += [
        _square("small", 1, 8, length, d, causal)
        for d in (64, 128)
        for length in (1024, 2048, 4096)
        for causal in MASKS
    ]
    cases += [
        Case("dims", 4, 16, 16, 4096, 4096, d, d_v, causal)
        for d, d_v in ((80, 80), (96, 96), (192, 192), (192, 128))
        for causal in MASKS
    ]
    cases.append(_square("gpt_block", 8, 16, 2048, 128, True))
    return cases


def block(device_type: str) -> list[Case]:
    """A block of a GPT of 2048 features; on the CPU of 256."""
    on_gpu = device_type == "cuda"
    tokens, heads, d = (GRID_TOKENS, 16, 128) if on_gpu else (512, 4, 64)
    return [
        replace(_square("block", tokens // length, heads, length, d, True), block=True)
        for length in ((2048, 8192) if on_gpu else (128, 512))
    ]


def fp32(device_type: str) -> list[Case]:
    return [
        _square("fp32", 4, GRID_WIDTH // d, 4096, d, causal) for d in (64, 128) for causal in MASKS
    ]


def masks(device_type: str) -> list[Case]:
    """Masks given as tensors, beside none at all."""
    lengths = (1024, 4096) if device_type == "cuda" else (512,)
    tokens = GRID_TOKENS if device_type == "cuda" else 1024
    width = GRID_WIDTH if device_type == "cuda" else 256
    return [
        replace(_square("masks", tokens // length, width // d, length, d, False), bias=bias)
        for d in (64, 128)
        for bias in ("none", *BIASES)
        for length in lengths
    ]


def cpu(device_type: str) -> list[Case]:
    """Lengths 128 to 8192 with 1 to 32 heads; the longer, the fewer, to end within minutes.

    The rows with one head show whether the work of a single head reaches every core.
    """
    heads_and_lengths = (
        (1, 128),
        (32, 128),
        (32, 256),
        (32, 512),
        (1, 1024),
        (16, 1024),
        (8, 2048),
        (4, 4096),
        (1, 8192),
        (2, 8192),
    )
    return [
        _square("cpu", 1, heads, length, d, causal)
        for d in (64, 128)
        for causal in MASKS
        for heads, length in heads_and_lengths
    ]


def decode(device_type: str) -> list[Case]:
    """Few queries against a cache of keys and values: one token, a group of heads, a draft."""
    heads_and_lengths = {
        (1, 8, 8, 1): (512, 4096, 16384),
        (1, 32, 32, 1): (512, 4096, 16384),
        (1, 32, 8, 1): (512, 4096, 16384),
        (1, 8, 1, 1): (512, 4096, 16384),
        (8, 32, 8, 1): (512, 4096),
        (1, 32, 8, 4): (512, 4096),
        (1, 8, 8, 16): (512, 4096),
    }
    return [
        Case("decode", *heads, length, d, d, causal=False, heads_first=True)
        for d in (64, 128)
        for heads, lengths in heads_and_lengths.items()
        for length in lengths
    ]


def host(device_type: str) -> list[Case]:
    """Calls so small that the time is the host's: argument checks, dispatch, allocation.

    The longer ones fill a tile, so that the first row of the table for the device takes them.
    """
    return [_square("host", 1, 4, length, 64, causal) for causal in MASKS for length in (16, 128)]


@dataclass(frozen=True)
class Suite:
    """A named list of cases, with the dtypes it is meant for on each kind of device.

    case_seconds: how long the rounds of one case go on at most, once there are three of them; a
        busy machine then costs samples and not patience.
    which_pass: what is timed unless --pass says otherwise.
    """

    name: str
    cases: Callable[[str], list[Case]]
    gpu_dtypes: tuple[str, ...] = ("bf16",)
    cpu_dtypes: tuple[str, ...] = ("fp32", "bf16")
    measures_host_time: bool = False
    case_seconds: float = 30.0
    which_pass: str = "forward"

    def dtypes(self, device_type: str) -> tuple[str, ...]:
        return self.gpu_dtypes if device_type == "cuda" else self.cpu_dtypes


SUITES = {
    suite.name: suite
    for suite in (
        Suite("quick", quick, case_seconds=1.2),
        Suite("forward", forward),
        Suite("backward", backward, case_seconds=3.0, which_pass="backward"),
        Suite("shapes", shapes),
        Suite("masks", masks, case_seconds=1.5),
        Suite("block", block, case_seconds=4.0, which_pass="forward_backward"),
        Suite("fp32", fp32, gpu_dtypes=("fp32",), cpu_dtypes=("fp32",)),
        Suite("cpu", cpu, gpu_dtypes=("fp32", "bf16"), case_seconds=0.8),
        Suite("decode", decode, case_seconds=2.0),
        Suite("host", host, cpu_dtypes=("fp32",), measures_host_time=True),
    )
}


def custom(shapes_given: list[str]) -> list[Case]:
    """The cases of `--shapes`; raises ValueError with a sentence for one that cannot be."""
    return [parse_shape(text, causal) for text in shapes_given for causal in MASKS]


def parse_shape(text: str, causal: bool) -> Case:
    """One Case from "B,H,H_kv,S_q,S_kv,D,D_v"."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if len(numbers) != 7 or min(numbers) < 1:
        raise ValueError(
            f"--shapes expects seven positive integers {SHAPE_FIELDS}, got {text!r}; "
            "for example --shapes 1,8,8,1024,1024,64,64"
        )
    batch, heads, heads_kv, s_q, s_kv, d, d_v = numbers
    case = Case("custom", batch, heads, heads_kv, s_q, s_kv, d, d_v, causal)
    if case.heads % case.heads_kv != 0:
        raise ValueError(
            f"--shapes {text}: H must be a multiple of H_kv, "
            f"got H = {case.heads} and H_kv = {case.heads_kv}"
        )
    return case
