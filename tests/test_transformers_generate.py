# SPDX-License-Identifier: BSD-3-Clause
"""The generating example writes the same tokens with every attention, and says what it needs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from scripts import EXAMPLES, load_script

pytest.importorskip(
    "transformers", minversion="4.56", reason="needs transformers, of the extra [test]"
)
pytestmark = pytest.mark.usefixtures("one_thread")

TINY = ["--device", "cpu", "--layers", "2", "--prompt-tokens", "8", "--tokens", "4"]


@pytest.fixture(scope="module")
def example() -> ModuleType:
    return load_script(EXAMPLES / "transformers_generate.py")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_every_attention_writes_the_same_tokens(
    example: ModuleType, cache: str, capsys: pytest.CaptureFixture[str]
):
    names = ["online_attention", "sdpa", "eager"]
    assert example.main([*TINY, "--cache", cache, "--impl", *names]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "All wrote the same tokens."
    assert [line.split(": 8 tokens in ")[0] for line in lines[:-1:3]] == names
    assert lines[1:3] == lines[4:6] == lines[7:9]
    for line in lines[1:3]:
        assert len({int(token) for token in line.split()}) > 1
    assert lines[1] != lines[2]


def test_other_tokens_are_reported(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    generate = example.generate

    def other(model: object, *rest: object) -> object:
        result = generate(model, *rest)
        if result.implementation == "sdpa":
            result.tokens[0, -1] += 1
        return result

    monkeypatch.setattr(example, "generate", other)
    argv = [*TINY, "--batch", "1", "--impl", "online_attention", "sdpa"]
    assert example.main(argv) == 1
    assert "They wrote different tokens." in capsys.readouterr().out
    assert example.main([*argv, "--dtype", "bf16"]) == 0


def test_continues_a_prompt_with_a_model_of_a_folder(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    import tokenizers
    import transformers

    words = {word: index for index, word in enumerate(("?", "Attention", "is", "all", "exact"))}
    model = tokenizers.models.WordLevel(words, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    fast.save_pretrained(tmp_path)
    options = example.parse([*TINY, "--model", str(tmp_path)])
    options.tokens = 100  # places for positions
    example.random_model("eager", options).save_pretrained(tmp_path)
    argv = ["--device", "cpu", "--model", str(tmp_path), "--batch", "1", "--tokens", "3"]
    assert example.main([*argv, "--impl", "online_attention"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("online_attention: 3 tokens in ")
    assert len(first.splitlines()) == 2


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--tokens", "0"], "--tokens: must be at least 1, but is 0"),
        (["--impl", "theirs"], "invalid choice"),
        (["--cache", "paged"], "invalid choice"),
    ],
)
def test_arguments_that_cannot_be(
    example: ModuleType, capsys: pytest.CaptureFixture[str], argv: list[str], sentence: str
):
    with pytest.raises(SystemExit) as stopped:
        example.main([*TINY, *argv])
    assert stopped.value.code == 2
    assert sentence in capsys.readouterr().err


def test_a_missing_transformers_is_named(
    example: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "online_attention.integrations.transformers", raising=False)
    monkeypatch.delattr("online_attention.integrations.transformers", raising=False)
    with pytest.raises(SystemExit):
        example.main(TINY)
    assert "pip install 'transformers>=4.56'" in capsys.readouterr().err


def test_the_default_device_is_there(example: ModuleType):
    assert example.parse([]).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
