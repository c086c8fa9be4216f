# SPDX-License-Identifier: BSD-3-Clause
"""The soak of random calls: that it runs, what it draws, and that it finds what is wrong."""

from __future__ import annotations

import threading

import pytest
import torch

import gradients
import soak
from layouts import LAYOUTS
from oracle import Attention

# Patient: a busy machine is no finding, and a late call would end pytest with it.
CPU = ["--device", "cpu", "--seed", "5", "--patience", "600"]
FEW = [*CPU, "--calls", "12"]
ONE = [*CPU, "--calls", "1", "--first", "0"]  # with gradients; the tests below make it wrong

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_few_calls_are_right(capsys):
    assert soak.main(FEW) == soak.RIGHT
    printed = capsys.readouterr().out
    assert "soak on cpu, seed 5: 12 calls" in printed
    assert "all right" in printed


def test_it_ends_after_its_seconds(capsys):
    assert soak.main([*CPU, "--seconds", "0"]) == soak.RIGHT
    assert "all right" in capsys.readouterr().out


@pytest.mark.parametrize("device", soak.SIZES)
def test_what_is_drawn(device: str):
    sizes = soak.SIZES[device]
    problems = [soak.drawn(1, index, device) for index in range(1000)]
    assert problems == [soak.drawn(1, index, device) for index in range(1000)]
    assert len(set(problems)) == 1000
    for problem in problems:
        case = problem.case
        assert case.B * case.H * case.S_q * case.S_kv <= sizes.pairs
        assert case.H % case.H_kv == 0
        assert case.mask.is_full or case.mask.is_causal or problem.bias is None
        assert 1 <= min(case.S_q, case.S_kv, case.D, case.D_v)
    assert {name for p in problems for name in p.layouts} == set(LAYOUTS)
    assert {p.bias for p in problems} == {None, *soak.BIASES}
    assert {p.dtype for p in problems} == set(soak.DTYPES)
    assert max(p.case.S_kv for p in problems) > sizes.length


def test_another_seed_draws_other_calls():
    assert soak.drawn(1, 0, "cpu") != soak.drawn(2, 0, "cpu")


def wrong_forward(monkeypatch: pytest.MonkeyPatch, change) -> None:
    right = gradients.attend

    def wrong(*inputs, **settings):
        found = right(*inputs, **settings)
        return Attention(*change(found.out, found.lse))

    monkeypatch.setattr(gradients, "attend", wrong)


def test_a_wrong_element_is_found(monkeypatch: pytest.MonkeyPatch, capsys):
    def one_element(out, lse):
        offset = torch.zeros_like(out)
        offset[0, -1, -1, -1] = 0.1
        return out + offset, lse

    wrong_forward(monkeypatch, one_element)
    assert soak.main(ONE) == soak.WRONG
    printed = capsys.readouterr().out
    assert "WRONG: AssertionError: out: error" in printed
    assert "again: python tests/soak.py --seed 5 --first 0 --calls 1 --device cpu" in printed
    assert "1 WRONG" in printed


def test_a_wrong_lse_is_found(monkeypatch: pytest.MonkeyPatch, capsys):
    wrong_forward(monkeypatch, lambda out, lse: (out, lse + 1e-4))
    assert soak.main(ONE) == soak.WRONG
    assert "lse: error in ulp" in capsys.readouterr().out


def test_other_bits_are_found(monkeypatch: pytest.MonkeyPatch, capsys):
    factors = iter([1.0, 1.0, 1.01])
    wrong_forward(monkeypatch, lambda out, lse: (out * next(factors), lse))
    assert soak.main(ONE) == soak.WRONG
    assert "out of the same call" in capsys.readouterr().out


@pytest.mark.parametrize("name", gradients.Gradients._fields)
def test_a_wrong_gradient_is_found(monkeypatch: pytest.MonkeyPatch, capsys, name: str):
    right = soak.differentiate

    def wrong(*arguments):
        results, found = right(*arguments)
        return results, [one._replace(**{name: getattr(one, name) * 1.03}) for one in found]

    monkeypatch.setattr(soak, "differentiate", wrong)
    assert soak.main(ONE) == soak.WRONG
    assert f"WRONG: AssertionError: {name}: error" in capsys.readouterr().out


def test_a_call_that_fails_is_a_finding_and_many_end_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys
):
    def fail(*_):
        raise RuntimeError("it would not run")

    monkeypatch.setattr(soak, "check", fail)
    assert soak.main(FEW) == soak.WRONG
    printed = capsys.readouterr().out
    assert printed.count("WRONG: RuntimeError: it would not run") == soak.WRONG_MAX
    assert f"{soak.WRONG_MAX} calls" in printed


def test_a_call_that_does_not_come_back_is_reported():
    told: list[str] = []
    late = threading.Event()

    def on_late(what: str) -> None:
        told.append(what)
        late.set()

    with soak.Watchdog(0.01, on_late).over("this call"):
        assert late.wait(60)
    assert told == ["this call"]


def test_a_late_call_ends_the_process(monkeypatch: pytest.MonkeyPatch, capsys):
    statuses: list[int] = []
    monkeypatch.setattr(soak.os, "_exit", statuses.append)
    soak.end_process("this call")
    assert statuses == [soak.LATE]
    assert capsys.readouterr().out == "LATE: this call\n"


def test_cuda_without_a_device(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert soak.main(["--device", "cuda"]) == soak.USAGE
    assert "torch sees no CUDA device here" in capsys.readouterr().err
