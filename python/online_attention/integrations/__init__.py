# SPDX-License-Identifier: BSD-3-Clause
"""Other libraries' models on this attention; each module imports the library it is for."""
