# SPDX-License-Identifier: BSD-3-Clause
"""Which pairs dropout keeps, as csrc/core/dropout.h says it, in torch operations.

For what is composed of torch operations over blocks of rows; the kernels have their own. Words of
32 bits are held in int64, whose products keep the low 64 bits.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

OUTCOMES = 1 << 16
_GROUP = 32  # keys whose bits are mixed: four calls of eight
_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> tuple[Tensor, ...]:
    """Philox 4x32 with 10 rounds: the four words of each counter, of broadcastable shapes."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (b >> 32 & _WORD) ^ c1 ^ k0,
            b & _WORD,
            (a >> 32 & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3


def threshold_of(dropout_p: float) -> int:
    """Of 2^16 outcomes of a pair, those that drop it."""
    return min(int(dropout_p * OUTCOMES + 0.5), OUTCOMES - 1)


def keep_scale(dropout_p: float, dtype: torch.dtype) -> float:
    """What the pairs that are kept are multiplied by, rounded to the dtype as in the kernels."""
    exact = OUTCOMES / (OUTCOMES - threshold_of(dropout_p))
    if dtype == torch.float64:
        return exact
    rounded: float = struct.unpack("f", struct.pack("f", exact))[0]
    return rounded


def kept(rng: Tensor, dropout_p: float, heads: range, rows: range, keys: range) -> Tensor:
    """Whether each pair is kept, (heads, rows, keys); heads count among the B * H.

    The memory is that of a few float32 tensors of this shape.
    """
    first = keys.start // _GROUP
    groups = -(-keys.stop // _GROUP) - first

    def indices(values: range) -> Tensor:
        return torch.arange(values.start, values.stop, device=rng.device)

    calls = indices(range(4 * first, 4 * (first + groups)))
    counter = (
        calls,
        indices(rows)[:, None],
        indices(heads)[:, None, None] & _WORD,
        (rng[1] & _WORD)[None, None, None],
    )
    words = torch.stack(torch.broadcast_tensors(*philox(counter, rng[0])), -1)
    bits = torch.stack((words & 0xFFFF, words >> 16), -1)  # (heads, rows, calls, words, halves)
    # Key 32 g + 8 w + 2 c + h of a row has half h of word w of call 4 g + c.
    bits = bits.unflatten(2, (groups, 4)).transpose(3, 4).flatten(2)
    begin = keys.start - _GROUP * first
    result: Tensor = bits[..., begin : begin + len(keys)] >= threshold_of(dropout_p)
    return result
