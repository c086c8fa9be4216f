# SPDX-License-Identifier: BSD-3-Clause
"""Trains a small byte-level GPT with this package's attention, with torch's, or with both.

    python examples/train_gpt.py [--attention both] [--steps 150] [--out out]

The text is Python's own documentation of the language (pydoc's topics), which comes with Python;
--text takes a file of yours. With `--attention both` the same model is trained twice from the same
seed: the two loss curves differ by rounding alone. A checkpoint is not kept.
Progress bar and plot need rich and matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import online_attention

RIGHT, USAGE, INTERRUPTED = 0, 2, 130
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
BYTES = 256  # the vocabulary
VALIDATION_BATCHES = 4
COLOURS = {"ours": "#000000", "sdpa": "#E69F00"}
INSTALL = "install it with: pip install '.[bench]'"

# --- attention: (B, H, S, D) queries, (B, H_kv, S, D) keys and values -> (B, H, S, D)

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return online_attention.attention(q, k, v, causal=True)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


ATTENTIONS: dict[str, Attend] = {"ours": ours, "sdpa": sdpa}

# --- the model


@dataclass(frozen=True)
class Sizes:
    context: int
    layers: int
    heads: int
    kv_heads: int
    width: int

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


class Rotation(nn.Module):
    """Rotary positions: a pair of features turns by an angle that grows with the position."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        half = sizes.head_dim // 2
        frequencies = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        angles = torch.outer(torch.arange(sizes.context, dtype=torch.float64), frequencies)
        self.register_buffer("cos", angles.cos().float().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().float().unsqueeze(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Of (B, S, H, D), whose first feature lies at position 0."""
        cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention; each key/value head serves a group of query heads."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.sizes, self.attend = sizes, attend
        kv_width = sizes.kv_heads * sizes.head_dim
        self.qkv = nn.Linear(sizes.width, sizes.width + 2 * kv_width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.width, bias=False)
        self.split = [sizes.heads, sizes.kv_heads, sizes.kv_heads]

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        # (B, S, H, D) in memory, (B, H, S, D) by strides: nothing is copied for the attention.
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.sizes.head_dim)).split(self.split, dim=2)
        q, k, v = (t.transpose(1, 2) for t in (rotate(q), rotate(k), v))
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm: attention, then a two-layer network, each added to what it reads."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.norm_attention, self.norm_network = nn.RMSNorm(sizes.width), nn.RMSNorm(sizes.width)
        self.attention = Attention(sizes, attend)
        self.widen = nn.Linear(sizes.width, 4 * sizes.width, bias=False)
        self.out = nn.Linear(4 * sizes.width, sizes.width, bias=False)

    def forward(self, x: Tensor, rotate: Rotation) -> Tensor:
        x = x + self.attention(self.norm_attention(x), rotate)
        return x + self.out(F.gelu(self.widen(self.norm_network(x))))


class GPT(nn.Module):
    """Logits of the next byte for every byte of (B, S); input and output share their embedding."""

    def __init__(self, sizes: Sizes, attend: Attend) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, sizes.width)
        self.rotation = Rotation(sizes)
        self.blocks = nn.ModuleList(Block(sizes, attend) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.width)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                # What is added up over the layers starts smaller, so that the sum does not grow.
                depth = 2 * sizes.layers if name.endswith("out.weight") else 1
                nn.init.normal_(weight, std=0.02 / math.sqrt(depth))

    def forward(self, text: Tensor) -> Tensor:
        x = self.embedding(text)
        for block in self.blocks:
            x = block(x, self.rotation)
        return F.linear(self.norm(x), self.embedding.weight)


# --- the text


def read_text(path: Path | None) -> bytes:
    if path is not None:
        return path.read_bytes()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics)).encode()


class Text:
    """Training and validation windows: the last tenth of the bytes is never trained on."""

    def __init__(self, text: bytes, options: argparse.Namespace) -> None:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(options.device)
        self.window = torch.arange(options.context + 1, device=options.device)
        self.training, self.held_out = data[: -(len(data) // 10)], data[-(len(data) // 10) :]
        self.batch = options.batch

    def batches(self, data: Tensor, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """`count` pairs (bytes, the bytes that follow them), each (B, S), the same for a seed."""
        generator = torch.Generator().manual_seed(seed)  # of the CPU: the same on every device
        for _ in range(count):
            starts = torch.randint(
                len(data) - len(self.window) + 1, (self.batch, 1), generator=generator
            )
            rows = data[starts.to(data.device) + self.window].long()
            yield rows[:, :-1], rows[:, 1:]


# --- training


@dataclass
class Curve:
    """What one training gave. validation: pairs (steps done, loss)."""

    attention: str
    training: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens_per_second: float = 0.0
    interrupted: bool = False
    sample: str = ""


class Trainer:
    """One model, its optimizer and its curve."""

    def __init__(self, name: str, text: Text, options: argparse.Namespace) -> None:
        self.options, self.text, self.curve = options, text, Curve(name)
        torch.manual_seed(options.seed)
        sizes = Sizes(
            options.context, options.layers, options.heads, options.kv_heads, options.width
        )
        self.model = GPT(sizes, ATTENTIONS[name]).to(options.device)
        # Weights and optimizer stay in fp32 for bf16: autocast computes in bf16.
        if options.dtype == "fp64":
            self.model.double()
        self.forward = torch.compile(self.model) if options.compile else self.model
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() == 2], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() != 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.rate, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self.rate_factor)

    def rate_factor(self, step: int) -> float:
        """Up in a line over the first tenth, then down along a cosine to a tenth."""
        warm_up = max(self.options.steps // 10, 1)
        if step < warm_up:
            return (step + 1) / warm_up
        done = (step - warm_up) / max(self.options.steps - warm_up, 1)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

    def loss(self, text: Tensor, following: Tensor) -> Tensor:
        half = self.options.dtype == "bf16"
        with torch.autocast(self.options.device.type, torch.bfloat16, enabled=half):
            logits = self.forward(text)
        if half:
            logits = logits.float()
        return F.cross_entropy(logits.flatten(0, 1), following.flatten())

    def step(self, text: Tensor, following: Tensor) -> None:
        loss = self.loss(text, following)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.curve.training.append(loss.item())  # waits for the device, so that clocks are right

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss over the same few batches of the held-out text each time."""
        batches = self.text.batches(self.text.held_out, VALIDATION_BATCHES, self.options.seed + 1)
        mean = sum(self.loss(*pair).item() for pair in batches) / VALIDATION_BATCHES
        self.curve.validation.append((len(self.curve.training), mean))
        return mean

    def train(self, display: Display) -> Curve:
        """All steps, or those until Ctrl-C."""
        options, curve = self.options, self.curve
        every = max(options.steps // 10, 1)
        batches = self.text.batches(self.text.training, options.steps, options.seed)
        try:
            # Compiles, fills caches; its gradients are dropped, so that nothing else changes.
            self.loss(*next(self.text.batches(self.text.training, 1, options.seed))).backward()
            self.optimizer.zero_grad(set_to_none=True)
            self.validate()
            for number, batch in enumerate(batches, start=1):
                begin = time.perf_counter()
                self.step(*batch)
                curve.seconds += time.perf_counter() - begin
                curve.tokens_per_second = number * batch[0].numel() / curve.seconds
                if number % every == 0 or number == options.steps:
                    self.validate()
                    display.line(curve)
                display.advance(curve)
            curve.sample = self.sample()
        except KeyboardInterrupt:
            curve.interrupted = True
        return curve

    @torch.no_grad()
    def sample(self) -> str:
        """Text that the model writes after a heading; each byte looks at the whole context anew."""
        generator = torch.Generator().manual_seed(self.options.seed)
        written = list(b'The "with" statement\n')[: self.options.context]
        for _ in range(self.options.sample):
            window = torch.tensor([written[-self.options.context :]], device=self.options.device)
            # Below 1 a temperature makes likely bytes likelier, and a small model less silly.
            weights = (self.model(window)[0, -1].double().cpu() / 0.7).softmax(-1)
            written.append(int(torch.multinomial(weights, 1, generator=generator)))
        text = bytes(written).decode(errors="replace")
        return "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text
        )


# --- what is shown and written


class Display:
    """A line per validation, and rich's progress bar below them where rich is installed."""

    def __init__(self, options: argparse.Namespace, trainings: int) -> None:
        self.quiet, self.steps, self.bar = options.quiet, options.steps, None
        if self.quiet:
            return
        if importlib.util.find_spec("rich") is None:
            print(f"rich is not installed, so there is no progress bar; {INSTALL}")
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
        self.bar = Progress(*columns, TextColumn("{task.description}"), transient=True)
        self.task = self.bar.add_task("starting", total=trainings * options.steps)

    def shown(self) -> AbstractContextManager[Any]:
        return self.bar or nullcontext()

    def advance(self, curve: Curve) -> None:
        if self.bar:
            loss, speed = curve.training[-1], curve.tokens_per_second
            text = f"{curve.attention}: loss {loss:.3f}, {speed:,.0f} tokens/s"
            self.bar.update(self.task, advance=1, description=text)

    def line(self, curve: Curve) -> None:
        step, validation = curve.validation[-1]
        self.say(
            f"{curve.attention:>4}  step {step:>5}  loss {curve.training[-1]:.4f}  "
            f"validation {validation:.4f}  {curve.tokens_per_second:,.0f} tokens/s"
        )

    def say(self, text: str) -> None:
        if not self.quiet:
            print(text)  # above the bar: rich takes over the standard output while it is shown


def comparison(curves: list[Curve]) -> dict[str, Any] | None:
    """How far two curves differ, and how fast the first is beside the second."""
    if len(curves) < 2 or not all(curve.validation for curve in curves):
        return None
    first, second = curves
    differences = [abs(a - b) for a, b in zip(first.training, second.training, strict=False)]
    largest = max(range(len(differences)), key=differences.__getitem__, default=None)
    return {
        "differences": differences,
        "largest": 0.0 if largest is None else differences[largest],
        "largest_at_step": 0 if largest is None else largest + 1,
        "validation": abs(first.validation[-1][1] - second.validation[-1][1]),
        "speed_ratio": first.tokens_per_second / (second.tokens_per_second or math.nan),
    }


def summary(curves: list[Curve], compared: dict[str, Any] | None) -> Iterator[str]:
    for curve in curves:
        if curve.validation:
            loss = curve.validation[-1][1]
            yield (
                f"{curve.attention}: {len(curve.training)} steps in {curve.seconds:.1f} s, "
                f"{curve.tokens_per_second:,.0f} tokens/s; validation loss {loss:.4f}, "
                f"{loss / math.log(2):.2f} bits a byte"
            )
    if compared:
        a, b = (curve.attention for curve in curves)
        ratio = compared["speed_ratio"]
        faster, slower, ratio = (a, b, ratio) if ratio >= 1 else (b, a, 1 / ratio)
        yield (
            f"Training losses of {a} and {b} differ by {compared['largest']:.1e} at most (step "
            f"{compared['largest_at_step']}), validation losses at the end by "
            f"{compared['validation']:.1e}."
        )
        yield f"A step with {faster} is {ratio:.2f} times as fast as one with {slower}."


def write_plot(curves: list[Curve], compared: dict[str, Any] | None, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # needs no display
    import matplotlib.pyplot as plt

    heights = [3, 1] if compared else [1]
    figure, axes = plt.subplots(
        len(heights), 1, figsize=(7, 5), sharex=True, squeeze=False, height_ratios=heights
    )
    top, bottom = axes[0, 0], axes[-1, 0]
    # The second lies on the first wherever the two agree, so it is dashed.
    for curve, dashes in zip(curves, ("-", (0, (4, 4))), strict=False):
        name, colour = curve.attention, COLOURS[curve.attention]
        steps = range(1, len(curve.training) + 1)
        top.plot(steps, curve.training, color=colour, linestyle=dashes, alpha=0.7, label=name)
        points = tuple(zip(*curve.validation, strict=True)) or ((), ())
        marker = "o" if dashes == "-" else "x"
        top.plot(*points, marker, color=colour, label=f"{name}, validation")
    top.set_ylabel("loss, nats a byte")
    top.legend(frameon=False)
    if compared:
        differences = [difference or math.nan for difference in compared["differences"]]
        bottom.semilogy(range(1, len(differences) + 1), differences, color="#0072B2")
        bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(
    curves: list[Curve], compared: dict[str, Any] | None, options: argparse.Namespace
) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    on_gpu = options.device.type == "cuda"
    settings = {k: v for k, v in vars(options).items() if k not in ("out", "quiet", "no_plot")}
    settings |= {"text": options.text and options.text.name, "device": options.device.type}
    record = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(options.device) if on_gpu else "cpu",
        "settings": settings,
        "curves": [asdict(curve) for curve in curves],
        "comparison": compared,
    }
    paths = [options.out / "train_gpt.json"]
    paths[0].write_text(json.dumps(record, indent=1) + "\n")
    if not options.no_plot:
        paths.append(options.out / "train_gpt.png")
        write_plot(curves, compared, paths[1])
    print("wrote " + " and ".join(str(path) for path in paths))


# --- the command


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Text]:
    parser = argparse.ArgumentParser(
        prog="examples/train_gpt.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--attention", choices=[*ATTENTIONS, "both"], default="both", help="whose attention")
    for name, default, meaning in (
        ("steps", 150, "batches trained on"),
        ("batch", 8, "sequences of a batch"),
        ("context", 256, "bytes of a sequence"),
        ("layers", 4, "blocks of the model"),
        ("heads", 4, "query heads"),
        ("kv-heads", 2, "key/value heads, a divisor of --heads"),
        ("width", 128, "features of a byte, a multiple of 2 * heads"),
    ):
        add(f"--{name}", type=positive, default=default, help=meaning)
    add("--rate", type=float, default=3e-3, help="largest learning rate")
    add("--sample", type=int, default=300, help="bytes written by the model at the end")
    add("--seed", type=int, default=1, help="of weights, batches and the sample")
    add("--device", help="cuda, cuda:1 or cpu; by default cuda if there is one")
    add("--dtype", choices=DTYPES, default="fp32", help="of the arithmetic; bf16 is by autocast")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--text", type=Path, metavar="FILE", help="train on this file")
    add("--out", type=Path, default=Path("out"), metavar="DIR", help="where JSON and plot go")
    add("--no-plot", action="store_true", help="write no PNG")
    add("--quiet", action="store_true", help="print nothing but where the files are")
    options = parser.parse_args(argv)
    try:
        return options, checked(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def checked(options: argparse.Namespace) -> Text:
    """The text; raises ValueError with a sentence for what cannot be."""
    if options.heads % options.kv_heads:
        raise ValueError(
            f"--heads must be a multiple of --kv-heads, got {options.heads} and {options.kv_heads}"
        )
    if options.width % (2 * options.heads):
        raise ValueError(
            f"--width must be a multiple of 2 * heads = {2 * options.heads}, got {options.width}: "
            "rotary positions turn pairs of a head's features"
        )
    if not 0 < options.rate < math.inf:
        raise ValueError(f"--rate must be a positive number, got {options.rate}")
    if options.sample < 0:
        raise ValueError(f"--sample must be at least 0, got {options.sample}")
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        options.device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device expects cuda, cuda:N or cpu, got {name!r}") from None
    if options.device.type not in ("cuda", "cpu"):
        raise ValueError(f"--device expects cuda, cuda:N or cpu, got {name!r}")
    count = torch.cuda.device_count()
    if options.device.type == "cuda" and (options.device.index or 0) >= count:
        raise ValueError(f"--device {name}: torch sees {count} CUDA devices here")
    text = read_text(options.text)
    if len(text) // 10 <= options.context:
        raise ValueError(
            f"a tenth of the text, {len(text) // 10} bytes, must be longer than --context "
            f"{options.context}: give a longer --text or a shorter --context"
        )
    return Text(text, options)


def main(argv: Sequence[str] | None = None) -> int:
    options, text = parse(argv)
    if not options.no_plot and importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed, so there will be no plot; {INSTALL}", file=sys.stderr)
        options.no_plot = True
    names = list(ATTENTIONS) if options.attention == "both" else [options.attention]
    display = Display(options, len(names))
    curves: list[Curve] = []
    with display.shown():
        for name in names:
            curves.append(Trainer(name, text, options).train(display))
            if curves[-1].interrupted:
                break
    compared = comparison(curves)
    if curves[0].sample:
        display.say(f"\n{curves[0].attention} writes:\n\n{curves[0].sample}\n")
    for line in summary(curves, compared):
        display.say(line)
    write(curves, compared, options)
    return INTERRUPTED if curves[-1].interrupted else RIGHT


if __name__ == "__main__":
    sys.exit(main())
