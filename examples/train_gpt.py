# SPDX-License-Identifier: BSD-3-Clause
"""Trains a small byte-level GPT with this package's attention, with torch's, or with both.

    python examples/train_gpt.py [--impl online_attention sdpa] [--steps 300] [--out out]

The text is Python's own documentation of the language (pydoc's topics), which comes with Python;
--text takes a file of yours. With two names after --impl, as by default, the same model is trained
twice from the same seed: the two loss curves differ by rounding alone. The name `enabled` trains
with torch's call as it stands, inside `online_attention.enabled()`. A run of about a minute on two
CPU cores; for a GPU, --context 1024 --layers 8 --heads 8 --width 512 --batch 32 --dtype bf16.
Ctrl-C ends the training, and what there is by then is still shown and written. The weights are not
kept. Progress bar and plot need rich and matplotlib: pip install '.[bench]'.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _curves import INSTALL, Curve, Display, comparison, summary, write_plot
from _gpt import ATTENTIONS, GPT, Sizes, routed

RIGHT, INTERRUPTED = 0, 130
DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
VALIDATION_BATCHES = 4

# --- the text


def read_text(path: Path | None) -> bytes:
    if path is not None:
        return path.read_bytes()
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError("this Python comes without pydoc's topics: give a --text") from None
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


class Trainer:
    """One model, its optimizer and its curve."""

    def __init__(self, name: str, text: Text, options: argparse.Namespace) -> None:
        self.options, self.text = options, text
        self.curve = Curve(name, options.batch * options.context)
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
                curve.step_seconds.append(time.perf_counter() - begin)
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


# --- what is written


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
        "curves": [
            asdict(curve) | {"tokens_per_second": curve.tokens_per_second} for curve in curves
        ],
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
    add(
        "--impl",
        nargs="+",
        choices=ATTENTIONS,
        default=["online_attention", "sdpa"],
        metavar="NAME",
        help=f"whose attention, one or two of {', '.join(ATTENTIONS)}",
    )
    for name, default, meaning in (
        ("steps", 300, "batches trained on"),
        ("batch", 8, "sequences of a batch"),
        ("context", 128, "bytes of a sequence"),
        ("layers", 4, "blocks of the model"),
        ("heads", 4, "query heads"),
        ("kv-heads", 2, "key/value heads, a divisor of --heads"),
        ("width", 128, "features of a byte, a multiple of 2 * heads"),
    ):
        add(f"--{name}", type=positive, default=default, help=meaning)
    add("--rate", type=float, default=4e-3, help="largest learning rate")
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
    if len(options.impl) > 2 or len(set(options.impl)) < len(options.impl):
        raise ValueError(f"--impl takes one name or two different ones, got {options.impl}")
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
        print(f"matplotlib is not installed, so there is no plot; {INSTALL}", file=sys.stderr)
        options.no_plot = True
    display = Display(options, len(options.impl))
    curves: list[Curve] = []
    with display.shown():
        for name in options.impl:
            with routed(name):
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
