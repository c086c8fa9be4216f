# SPDX-License-Identifier: BSD-3-Clause
"""The gradient of a bias, composed of torch's matrix products.

Scores have the bias as a term of their own, so its gradient is that of the scores, dS of (E29),
summed over the dimensions in which it is broadcast (E42). Over `blocks` of query rows: the memory
beside inputs and result is bounded. The sums are of float32, float64 for float64, and the same in
every run.

An operator of its own, so that compilers need not look into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Inputs, Settings, SumOverPairs, blocks, scale_of, score_gradient

_library = torch.library.Library("online_attention", "FRAGMENT")
_library.define(
    "bias_gradient(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor bias, "
    "Tensor? rng, float? scale, int alignment, SymInt window_left, SymInt window_right, "
    "float dropout_p) -> Tensor dbias"
)
bias_gradient = torch.ops.online_attention.bias_gradient.default


@torch.no_grad()
def _bias_gradient(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor,
    rng: Tensor | None,
    scale: float | None,
    alignment: int,
    left: int,
    right: int,
    dropout_p: float,
) -> Tensor:
    inputs = Inputs(q, k, v, bias, rng)
    settings = Settings(scale, alignment, left, right, dropout_p)
    total = SumOverPairs(bias, inputs)
    with torch.autocast(q.device.type, enabled=False):
        for block in blocks(inputs, settings):
            p, absent = block.probabilities(
                block.of_queries(q), block.of_keys(k), scale_of(q, settings)
            )
            dout_rows, values = block.of_queries(dout), block.of_keys(v)
            total.add(block, score_gradient(block, p, absent, dout_rows, values, dlse).ds)
    return total.result()


_library.impl("bias_gradient", _bias_gradient, "CompositeExplicitAutograd")


@torch.library.register_fake("online_attention::bias_gradient", lib=_library)
def _bias_gradient_fake(*arguments: Tensor) -> Tensor:
    bias = arguments[5]
    return bias.new_empty(bias.shape)
