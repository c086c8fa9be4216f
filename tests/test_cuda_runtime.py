# SPDX-License-Identifier: BSD-3-Clause
"""Streams, graphs and devices: nothing is synchronised, nothing runs on another stream."""

from __future__ import annotations

import pytest
import torch

from attend import attend
from cases import SMALL, Case
from oracle import CAUSAL
from rows import Target
from tolerance import assert_bitwise_equal

pytestmark = pytest.mark.targets(device="cuda")
SPLIT = Case("decode", 2, 5003, H=2, mask=CAUSAL)


@pytest.mark.cases([*SMALL[1:6], SPLIT])
def test_graph_replays_with_new_inputs(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    other = case.inputs(target.dtype, target.device, target.head_dim, seed=1)
    attend(*inputs, case.mask)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend(*inputs, case.mask)
    for values in (inputs, other, inputs):
        due = attend(*values, case.mask)
        values = [x.clone() for x in values]
        for mine, new in zip(inputs, values, strict=True):
            mine.copy_(new)
        captured.out.fill_(float("nan"))
        graph.replay()
        assert_bitwise_equal(captured.out, due.out)
        assert_bitwise_equal(captured.lse, due.lse, "lse")


@pytest.mark.cases([SMALL[2], SPLIT])
def test_side_stream_is_the_one_that_is_used(target: Target, case: Case):
    """The inputs arrive late on a side stream: a launch on any other would read the old ones."""
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, case.mask)
    late = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for mine, new in zip(late, inputs, strict=True):
            mine.copy_(new)
        ours = attend(*late, case.mask)
    stream.synchronize()
    assert_bitwise_equal(ours.out, due.out)


@pytest.mark.cases([SMALL[2], SPLIT])
def test_call_returns_before_the_stream_is_done(target: Target, case: Case):
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    attend(*inputs, case.mask)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    attend(*inputs, case.mask)
    is_done = torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert not is_done


@pytest.mark.cases([SMALL[2], SPLIT])
def test_launches_in_a_row_do_not_share_a_workspace(target: Target, case: Case):
    problems = [
        case.inputs(target.dtype, target.device, target.head_dim, seed) for seed in range(6)
    ]
    due = []
    for inputs in problems:
        due.append(attend(*inputs, case.mask))
        torch.cuda.synchronize()
    ours = [attend(*inputs, case.mask) for inputs in problems]
    streams = [torch.cuda.Stream() for _ in problems]
    torch.cuda.synchronize()
    aside = []
    for stream, inputs in zip(streams, problems, strict=True):
        with torch.cuda.stream(stream):
            aside.append(attend(*inputs, case.mask))
    torch.cuda.synchronize()
    for results in (ours, aside):
        for mine, wanted in zip(results, due, strict=True):
            assert_bitwise_equal(mine.out, wanted.out)
            assert_bitwise_equal(mine.lse, wanted.lse, "lse")


@pytest.mark.cases([SMALL[2], SPLIT])
def test_device_that_is_not_the_current_one(target: Target, case: Case):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    inputs = case.inputs(target.dtype, target.device, target.head_dim)
    due = attend(*inputs, case.mask)
    ours = attend(*(x.to("cuda:1") for x in inputs), case.mask)
    assert ours.out.device == torch.device("cuda:1")
    assert torch.cuda.current_device() == 0
    assert_bitwise_equal(ours.out.to("cuda:0"), due.out)


def test_no_memory_but_outputs_is_kept(target: Target):
    inputs = SPLIT.inputs(target.dtype, target.device, target.head_dim)
    attend(*inputs, CAUSAL)
    before = torch.cuda.memory_allocated()
    ours = attend(*inputs, CAUSAL)
    assert torch.cuda.memory_allocated() > before
    del ours
    assert torch.cuda.memory_allocated() == before
