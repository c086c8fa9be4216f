# SPDX-License-Identifier: BSD-3-Clause
"""Generates with a model of Hugging Face transformers, on this package's attention or another.

    python examples/transformers_generate.py [--impl online_attention sdpa eager]

Without --model it builds a small Llama with random weights and gives it random tokens: nothing is
downloaded, and every attention must choose the same tokens. With --model, a name on the hub or a
folder, it continues --prompt. Needs the package transformers: pip install 'transformers>=4.56'.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

IMPLEMENTATIONS = ("online_attention", "sdpa", "eager")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
VOCABULARY = 1000
RIGHT, DIFFERENT = 0, 1


@dataclass
class Generated:
    """What one implementation wrote; tokens: (B, --tokens), without the prompt."""

    implementation: str
    tokens: Tensor
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens.numel() / self.seconds


def random_model(implementation: str, options: argparse.Namespace) -> Any:
    """A small Llama: 8 query heads, 2 key/value heads; the same weights for a seed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=options.layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=options.prompt_tokens + options.tokens,
        # As wide as those of a trained model, or attention would hardly tell tokens apart.
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def random_prompt(options: argparse.Namespace) -> dict[str, Tensor]:
    """Random tokens, each sequence half as long as the one before it and padded on the left."""
    generator = torch.Generator().manual_seed(options.seed)
    shape = options.batch, options.prompt_tokens
    ids = torch.randint(2, VOCABULARY, shape, generator=generator)
    lengths = torch.tensor([max(options.prompt_tokens >> i, 1) for i in range(options.batch)])
    real = torch.arange(options.prompt_tokens) >= options.prompt_tokens - lengths[:, None]
    return {"input_ids": ids * real, "attention_mask": real.long()}


def real_model(implementation: str, options: argparse.Namespace) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(options.model, attn_implementation=implementation)


def real_prompt(options: argparse.Namespace) -> tuple[dict[str, Tensor], Any]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    return dict(tokenizer([options.prompt] * options.batch, return_tensors="pt")), tokenizer


@torch.no_grad()
def generate(model: Any, prompt: dict[str, Tensor], options: argparse.Namespace) -> Generated:
    """The likeliest tokens one by one; the clock runs in the second of two runs."""
    model = model.to(options.device, DTYPES[options.dtype]).eval()
    prompt = {name: tensor.to(options.device) for name, tensor in prompt.items()}
    for tokens in (min(options.tokens, 2), options.tokens):
        synchronize(options.device)
        begin = time.perf_counter()
        ids = model.generate(
            **prompt,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            cache_implementation=None if options.cache == "dynamic" else options.cache,
        )
        synchronize(options.device)
        seconds = time.perf_counter() - begin
    written = ids[:, prompt["input_ids"].shape[1] :].cpu()
    return Generated(model.config._attn_implementation, written, seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, but is {value}")
    return value


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="examples/transformers_generate.py",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--impl", nargs="+", choices=IMPLEMENTATIONS, default=[IMPLEMENTATIONS[0]], metavar="NAME")
    add("--model", metavar="NAME", help="a model of the hub or a folder, instead of a random one")
    add("--prompt", default="Attention is", help="what --model continues")
    for name, default, meaning in (
        ("tokens", 32, "tokens to write"),
        ("batch", 2, "sequences"),
        ("prompt-tokens", 64, "tokens of the longest prompt of a random model"),
        ("layers", 4, "layers of a random model"),
    ):
        add(f"--{name}", type=positive, default=default, help=meaning)
    add("--cache", choices=("dynamic", "static"), default="dynamic", help="of keys and values")
    add("--dtype", choices=DTYPES, default="fp32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", type=torch.device)
    add("--seed", type=int, default=1, help="of weights and prompts")
    options = parser.parse_args(argv)
    try:
        from online_attention.integrations import transformers
    except ImportError as error:
        parser.error(str(error))
    transformers.register()  # from here on "online_attention" is one more attn_implementation
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    tokenizer = None
    if options.model is None:
        build, prompt = random_model, random_prompt(options)
    else:
        build, (prompt, tokenizer) = real_model, real_prompt(options)
    results = [generate(build(name, options), prompt, options) for name in options.impl]
    for result in results:
        print(
            f"{result.implementation}: {result.tokens.numel()} tokens in {result.seconds:.2f} s, "
            f"{result.tokens_per_second:,.0f} tokens/s"
        )
        for row in result.tokens:
            print("  " + (tokenizer.decode(row) if tokenizer else " ".join(map(str, row.tolist()))))
    same = all(torch.equal(result.tokens, results[0].tokens) for result in results)
    if len(results) > 1:
        print("All wrote the same tokens." if same else "They wrote different tokens.")
    # In half precision a rounding may decide between two tokens that are as good as equal.
    return RIGHT if same or options.dtype != "fp32" else DIFFERENT


if __name__ == "__main__":
    sys.exit(main())
