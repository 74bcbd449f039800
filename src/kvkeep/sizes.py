"""Reads sizes as people write them ("4 GiB") into bytes."""

from __future__ import annotations

import re
from typing import Final

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", re.IGNORECASE | re.ASCII)
_UNITS: Final = {
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_END_NBYTES: Final = 1 << 63  # what a file or an address can hold


def parse_size(size: object) -> int:
    """Return the bytes of a number of bytes, or of a number with a unit (KiB ... TiB by 1024, KB ... TB by 1000).

    Raise ValueError for anything else, as for "auto".
    """
    if type(size) is int:  # True is no size
        nbytes = size
    elif isinstance(size, str) and (match := _SIZE.fullmatch(size.strip())):
        whole, _, fraction = match[1].partition(".")
        if fraction and match[2] is None:
            raise ValueError(f"{size!r} is no whole number of bytes")
        unit = 1 if match[2] is None else _UNITS[match[2].lower()]
        nbytes = int(whole + fraction) * unit // 10 ** len(fraction)  # exact, where a float would round
    else:
        raise ValueError(f"{size!r} is no size")
    if not 0 <= nbytes < _END_NBYTES:
        raise ValueError(f"{size!r} is out of range")
    return nbytes
