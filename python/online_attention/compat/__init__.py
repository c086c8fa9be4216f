# SPDX-License-Identifier: BSD-3-Clause
"""The names and signatures of other attention packages, computed here.

A program changes the line that imports the package, e.g.
``import online_attention.compat.flash_attn as flash_attn``.
"""
