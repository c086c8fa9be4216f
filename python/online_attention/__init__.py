# SPDX-License-Identifier: BSD-3-Clause
"""Exact attention by online softmax, with the log-sum-exp of every row as a second output."""

from importlib.metadata import version as _version

from . import compat, nn, reference
from .flash_registry import register
from .merge import merge
from .ops import attention
from .routing import FallbackWarning, disable, enable, enabled
from .sdpa import scaled_dot_product_attention
from .support import explain, supported

__version__ = _version("online-attention")

__all__ = [
    "FallbackWarning",
    "attention",
    "compat",
    "disable",
    "enable",
    "enabled",
    "explain",
    "merge",
    "nn",
    "reference",
    "register",
    "scaled_dot_product_attention",
    "supported",
]
