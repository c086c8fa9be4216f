# SPDX-License-Identifier: BSD-3-Clause
"""What the tests of benchmarks/ share."""

import math

import torch

TINY = ["--device", "cpu", "--shapes", "2,4,2,24,24,16,16", "--rounds", "2", "--min-time", "0"]


def naive_attention(q, k, v, causal):
    """(out, scores), the bottom-right mask, and heads in groups of 2."""
    s_q, s_kv = q.shape[2], k.shape[2]
    visible = torch.ones(s_q, s_kv, dtype=torch.bool)
    if causal:
        visible = visible.tril(s_kv - s_q)
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) / math.sqrt(q.shape[3])
    scores = scores.masked_fill(~visible, -math.inf)
    # A row that sees no key has neither weights nor gradients, as softmax itself would have it.
    weights = scores.masked_fill(~visible.any(-1, keepdim=True), 0.0).softmax(-1)
    weights = weights * visible.any(-1, keepdim=True)
    return weights @ v.repeat_interleave(2, dim=1), scores


def assert_ours_within_limits(row, tensors):
    check = row["check"]
    assert set(check["errors"]["ours"]) == set(check["limits"]) == tensors
    for name, limit in check["limits"].items():
        assert 0 < limit < 1
        assert check["errors"]["ours"][name] <= limit
