"""Checks one setting: reads its value as the type that its field declares, or says what would be right.

A setting is a field of a msgspec struct, annotated with `Meta(description=what is right)` and, where people write it
in another form than the field's type, with a reader: a function of (value, where it is written) that returns what the
type takes and raises ValueError otherwise. `Meta(extra={"words": ...})` names the words of a `str` field that takes
words which are known only at run time. Knows nothing about which settings there are, nor where they are written.
"""

from __future__ import annotations

import difflib
import re
from enum import Enum
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable


def checked(kind: type[msgspec.Struct], name: str, value: object, written: str, *, from_text: bool = False) -> Any:
    """Return `value` as the type of the field `name` of `kind`: "4 GiB" as bytes, "LRU" as "lru", 1 second as 1.0.

    `from_text`: the source has nothing but text, so that "64" is a number and "true" a flag. Raise ConfigError, which
    names the setting as it is `written`, and what is right.
    """
    hint = _hints(kind)[name]
    meta, *readers = hint.__metadata__
    right, found = str(meta.description), value
    words = _words(hint.__origin__) or (meta.extra or {}).get("words", ())
    if words and isinstance(value, str):
        right += _like(value, words)
        found = next((word for word in words if word == value.lower()), value)
    try:
        for read in readers:
            found = read(found, written)
        result = msgspec.convert(found, hint, strict=not from_text)
    except ValueError as error:  # msgspec's ValidationError is one
        raise wrong(written, value, right) from error
    if from_text and type(result) is int and not str(found).isdecimal():
        raise wrong(written, value, right)  # msgspec reads "1.0" as an int
    return result


def right_values(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Say for every field of `kind`, by name, which values are right."""
    return {name: hint.__metadata__[0].description for name, hint in _hints(kind).items()}


def wrong(written: str, value: object, right: str) -> ConfigError:
    """The error for a value that a setting does not take."""
    return ConfigError(f"{written} is {value!r}; right is {right}")


def unknown(written: str, name: str, names: Iterable[str]) -> ConfigError:
    """The error for a name that is none of `names`: the nearest of them, or all."""
    known = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    hint = f"did you mean {known[close[0]]}?" if close else f"the names are {', '.join(sorted(known.values()))}"
    return ConfigError(f"{written} is no setting of kvkeep; {hint}")


@cache
def _hints(kind: type[msgspec.Struct]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {name: hints[name] for name in kind.__struct_fields__ if hasattr(hints[name], "__metadata__")}


def _words(kind: Any) -> tuple[str, ...]:
    """The words that a setting of this type takes; none where it does not take words."""
    if get_origin(kind) is Literal:
        return get_args(kind)
    return tuple(item.value for item in kind) if isinstance(kind, type) and issubclass(kind, Enum) else ()


def _like(word: str, words: tuple[str, ...]) -> str:
    """A question after the word that is most like `word`; nothing where none is."""
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


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
