# SPDX-License-Identifier: BSD-3-Clause
"""Philox 4x32-10 in numpy, and which pairs dropout keeps by it: written apart from the library."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MASK = np.uint64(0xFFFFFFFF)
OUTCOMES = 1 << 16


def philox(counter: list[np.ndarray], key: int) -> list[np.ndarray]:
    """Four arrays of 32-bit words, from four of them and a 64-bit key."""
    c = [np.asarray(x, np.uint64) & MASK for x in counter]
    k = [np.uint64(key & 0xFFFFFFFF), np.uint64(key >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = np.uint64(32)
        c = [b >> high ^ c[1] ^ k[0], b & MASK, a >> high ^ c[3] ^ k[1], a & MASK]
        k = [(k[0] + np.uint64(0x9E3779B9)) & MASK, (k[1] + np.uint64(0xBB67AE85)) & MASK]
    return c


def threshold_of(p: float) -> int:
    return min(int(p * OUTCOMES + 0.5), OUTCOMES - 1)


def kept_pairs(rng: Tensor, p: float, B: int, H: int, S_q: int, S_kv: int) -> Tensor:
    """(B, H, S_q, S_kv): true where dropout keeps a pair."""
    state = [int(x) & 0xFFFFFFFFFFFFFFFF for x in rng.cpu()]
    head, q_idx, call = np.ogrid[: B * H, :S_q, : (S_kv + 31) // 32 * 4]
    counter = [np.broadcast_to(x, (B * H, S_q, call.size)) for x in (call, q_idx, head)]
    words = philox([*counter, np.full_like(counter[0], state[1] & 0xFFFFFFFF)], state[0])
    kv_idx = np.arange(S_kv)
    call_of = kv_idx // 32 * 4 + kv_idx // 2 % 4
    word_of, half_of = kv_idx % 32 // 8, kv_idx % 2
    of_keys = np.stack(words)[word_of, :, :, call_of]  # (S_kv, heads, S_q)
    bits = of_keys >> (16 * half_of[:, None, None]).astype(np.uint64) & np.uint64(0xFFFF)
    kept = np.moveaxis(bits >= threshold_of(p), 0, -1)
    return torch.from_numpy(kept.reshape(B, H, S_q, S_kv)).to(rng.device)


def factors_of(rng: Tensor, p: float, B: int, H: int, S_q: int, S_kv: int) -> Tensor:
    """What the probabilities are multiplied by, in fp64."""
    keep_scale = OUTCOMES / (OUTCOMES - threshold_of(p))
    return kept_pairs(rng, p, B, H, S_q, S_kv).double() * keep_scale
