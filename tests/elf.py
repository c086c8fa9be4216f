# SPDX-License-Identifier: BSD-3-Clause
"""What a shared library needs and exports, read from its dynamic section."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

_NEEDED, _RPATH, _RUNPATH = 1, 15, 29
_DYNAMIC, _DYNSYM = 6, 11


@dataclass
class SharedLibrary:
    needed: list[str] = field(default_factory=list)
    rpath: list[str] = field(default_factory=list)
    undefined: dict[str, bool] = field(default_factory=dict)  # name -> weak
    exported: set[str] = field(default_factory=set)


def read(path: Path) -> SharedLibrary:
    """Reads a 64-bit little-endian ELF file."""
    data = path.read_bytes()
    assert data[:6] == b"\x7fELF\x02\x01", "not a 64-bit little-endian ELF file"
    (table,) = struct.unpack_from("<Q", data, 40)
    entry_size, count = struct.unpack_from("<HH", data, 58)
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", data, table + i * entry_size) for i in range(count)
    ]

    library = SharedLibrary()
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        strings = sections[link][4]

        def text(index: int, strings: int = strings) -> str:
            return data[strings + index : data.index(b"\0", strings + index)].decode()

        if kind == _DYNAMIC:
            for tag, value in struct.iter_unpack("<QQ", data[offset : offset + size]):
                if tag == _NEEDED:
                    library.needed.append(text(value))
                elif tag in (_RPATH, _RUNPATH):
                    library.rpath.append(text(value))
        elif kind == _DYNSYM:
            for symbol in struct.iter_unpack("<IBBHQQ", data[offset : offset + size]):
                name, info, _, section, _, _ = symbol
                if section == 0 and name:
                    library.undefined[text(name)] = info >> 4 == 2
                elif name:
                    library.exported.add(text(name))
    return library
