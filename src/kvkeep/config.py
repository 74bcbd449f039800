"""The settings of kvkeep: frozen, typed, with defaults that work when nothing is configured.

Knows nothing about what the settings do, about the environment and files as such (both are handed in), or
about vLLM beyond the name of the mapping that it passes through.

Sources, the stronger first: `kv_connector_extra_config`, a TOML file, KVKEEP_* variables. Every source is
checked in full, also where a stronger one overrides it: a wrong value in a weaker one is found at the start.
`Config(...)` checks its arguments in the same way.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from typing import TYPE_CHECKING, Annotated, Final, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from kvkeep.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

_OVERRIDES: Final = "kv_connector_extra_config"
_PREFIX: Final = "KVKEEP_"
_FILE_KEY: Final = "config_file"
_FILE_VARIABLE: Final = "KVKEEP_CONFIG_FILE"
_UNIX: Final = "unix:"
_MAX_SOCKET_PATH_NBYTES: Final = 107  # sockaddr_un holds 108 with the closing zero
_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)?", re.IGNORECASE | re.ASCII)
_UNITS: Final = {
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_AUTO_LARGEST_NBYTES: Final = 4 << 30
_AUTO_SMALLEST_NBYTES: Final = 64 << 20
_SIZE_RIGHT: Final = '"auto", a number of bytes > 0, or a size as "512 MiB", "4 GiB" or "4 GB"'
_DISK_RIGHT: Final = 'a number of bytes > 0, or a size as "512 MiB", "4 GiB" or "4 GB"'
_SIZES: Final = ("pool_size", "disk_size", "disk_min_free")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """All settings; each one's `description` says what is right, and is what an error quotes.

    ConfigError, naming the setting and what is right, for a wrong value. Words may be written in any case.
    """

    enabled: Annotated[bool, Meta(description="true or false")] = True
    pool_size: Annotated[int | str, Meta(description=_SIZE_RIGHT)] = "auto"
    chunk_tokens: Annotated[int, Meta(gt=0, description="a whole number of tokens > 0")] = 256
    chain: Annotated[Literal["auto", "kvkeep"], Meta(description='"auto" or "kvkeep"')] = "auto"
    policy: Annotated[Literal["lru", "lfu", "fifo", "mru"], Meta(description='"lru", "lfu", "fifo" or "mru"')] = "lru"
    store: Annotated[
        str,
        Meta(description='"private", or "unix:" and the absolute path (<= 107 bytes) of a store\'s socket'),
    ] = "private"
    store_wait_s: Annotated[float, Meta(ge=0, le=3600, description="seconds >= 0 and <= 3600")] = 0.0
    lease_time_s: Annotated[float, Meta(gt=0, le=86400, description="seconds > 0 and <= 86400")] = 60.0
    disk_path: Annotated[
        str, Meta(description='"" for no disk tier, or absolute paths of directories with ":" between them')
    ] = ""
    disk_size: Annotated[int | str, Meta(description=_DISK_RIGHT)] = "16 GiB"
    disk_min_free: Annotated[int | str, Meta(description=_DISK_RIGHT)] = "1 GiB"
    disk_durability: Annotated[Literal["none", "group", "every"], Meta(description='"none", "group" or "every"')] = (
        "none"
    )
    disk_threads: Annotated[int, Meta(ge=2, le=64, description="a whole number of threads >= 2 and <= 64")] = 5
    store_generated: Annotated[bool, Meta(description="true or false")] = False
    verify_pool: Annotated[Literal["off", "sampled", "always"], Meta(description='"off", "sampled" or "always"')] = (
        "sampled"
    )
    load_failure_policy: Annotated[Literal["recompute", "keep"], Meta(description='"recompute" or "keep"')] = (
        "recompute"
    )
    deadline_s: Annotated[float, Meta(gt=0, le=3600, description="seconds > 0 and <= 3600")] = 0.5
    patience_s: Annotated[float, Meta(ge=0, le=10, description="seconds >= 0 and <= 10")] = 0.005
    max_pinned_share: Annotated[float, Meta(gt=0, le=1, description="a share > 0 and <= 1")] = 0.5
    min_hit_tokens: Annotated[int, Meta(ge=0, description="a whole number of tokens >= 0")] = 0
    local_reset: Annotated[Literal["forget", "keep"], Meta(description='"forget" or "keep"')] = "forget"
    load: Annotated[Literal["sync", "async", "auto"], Meta(description='"sync", "async" or "auto"')] = "auto"
    transfer_mode: Annotated[
        Literal["bulk", "layerwise", "auto"], Meta(description='"bulk", "layerwise" or "auto"')
    ] = "auto"
    early_loads: Annotated[bool, Meta(description="true or false")] = False
    transfer: Annotated[Literal["auto", "kernel", "copy"], Meta(description='"auto", "kernel" or "copy"')] = "auto"
    transfer_programs: Annotated[int, Meta(gt=0, le=1024, description="a whole number > 0 and <= 1024")] = 16
    cross_layer_blocks: Annotated[bool, Meta(description="true or false")] = False
    trace_path: Annotated[str, Meta(description='"" for no trace, or the path of a file')] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description='"debug", "info", "warning" or "error"'),
    ] = "info"

    def __post_init__(self) -> None:
        """Checks every setting, and writes it as it is meant: "LRU" as "lru", 1 second as 1.0."""
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, _checked(name, getattr(self, name), name))

    @property
    def socket_path(self) -> str | None:
        """The shared store's socket; None for a private store."""
        return self.store.removeprefix(_UNIX) if self.store.startswith(_UNIX) else None

    @property
    def disk_directories(self) -> tuple[str, ...]:
        """The directories of the disk tier; empty for none."""
        return tuple(path for path in self.disk_path.split(":") if path)

    @property
    def outlived(self) -> bool:
        """Whether what is kept may be there after the engine that made it, or for another one."""
        return self.socket_path is not None or bool(self.disk_directories)

    def may_go_by_layer(self, on_cpu: bool) -> bool:
        """Whether loads may be made layer by layer: on a device only where that is set, not where it is measured."""
        return self.transfer_mode == "layerwise" or (on_cpu and self.transfer_mode == "auto")

    @property
    def early_refusal(self) -> str:
        """Why the other settings leave no room for `early_loads`; empty where they do."""
        if self.load_failure_policy != "recompute":
            return 'load_failure_policy is not "recompute": a read that fails would fail its request'
        if self.transfer_mode != "layerwise":
            return 'transfer_mode is not "layerwise": a step would wait for the last layer before its first'
        return 'load is "async": no step waits for a load' if self.load == "async" else ""

    @property
    def verify_every(self) -> int:
        """Of how many chunks that are read from the pool one is verified; 0: none."""
        return {"off": 0, "sampled": 64, "always": 1}[self.verify_pool]

    def pool_nbytes(self, available_nbytes: int) -> int:
        """Decide the pool's bytes on a machine that has `available_nbytes` of memory left."""
        if self.pool_size == "auto":
            return auto_pool_nbytes(available_nbytes)
        return parse_size(self.pool_size, "pool_size")


_HINTS: Final = get_type_hints(Config, include_extras=True)


def auto_pool_nbytes(available_nbytes: int) -> int:
    """Decide the pool's size where none is set: a quarter of what is available, between 64 MiB and 4 GiB.

    The rest is the engine's. Whole MiB, so that a message can name the size exactly.
    """
    quarter = (available_nbytes // 4) >> 20 << 20
    return max(_AUTO_SMALLEST_NBYTES, min(_AUTO_LARGEST_NBYTES, quarter))


def parse_size(size: int | str, path: str, right: str = _SIZE_RIGHT) -> int:
    """Read a number of bytes, or a number with a unit (KiB ... TiB by 1024, KB ... TB by 1000).

    Raises ConfigError that names `path` and what is `right`; "auto" is not a size.
    """
    if isinstance(size, int):
        nbytes = size
    else:
        match = _SIZE.fullmatch(size.strip())
        if match is None or (match[2] is None and "." in match[1]):
            raise _wrong(path, size, right)
        whole, _, fraction = match[1].partition(".")
        unit = 1 if match[2] is None else _UNITS[match[2].lower()]
        nbytes = int(whole + fraction) * unit // 10 ** len(fraction)  # exact, where a float would round
    if not 0 < nbytes < 1 << 63:
        raise _wrong(path, size, right)
    return nbytes


def load_config(
    overrides: Mapping[str, object],
    environ: Mapping[str, str],
    read_text: Callable[[str], str],
    named: Callable[[str], str] = lambda name: f"{_OVERRIDES}.{name}",
) -> Config:
    """Merge the three sources into one Config.

    `overrides` is the engine's mapping, `environ` the whole environment, `read_text` reads the file that
    `overrides["config_file"]` or KVKEEP_CONFIG_FILE names. Raises ConfigError for an unknown name, a wrong
    value or an unreadable file, naming the full path of the setting (as `named` writes an override's) and what would
    be right.
    """
    settings = _from_environ(environ)
    file = overrides.get(_FILE_KEY, environ.get(_FILE_VARIABLE))
    if file is not None:
        if not isinstance(file, str) or not file:
            raise _wrong(named(_FILE_KEY), file, "the path of a TOML file")
        settings |= _from_file(file, read_text)
    settings |= _from_overrides(overrides, named)
    return msgspec.convert(settings, Config)


def describe_settings() -> dict[str, str]:
    """Say for every setting, by name, which values are right."""
    return {name: _HINTS[name].__metadata__[0].description for name in Config.__struct_fields__}


def _from_environ(environ: Mapping[str, str]) -> dict[str, object]:
    names = {_PREFIX + name.upper(): name for name in Config.__struct_fields__}
    settings: dict[str, object] = {}
    for variable, text in environ.items():
        if not variable.startswith(_PREFIX) or variable == _FILE_VARIABLE:
            continue
        if variable not in names:
            raise _unknown(variable, variable, (*names, _FILE_VARIABLE))
        settings[names[variable]] = _checked(names[variable], text, variable, from_text=True)
    return settings


def _from_file(file: str, read_text: Callable[[str], str]) -> dict[str, object]:
    try:
        found = tomllib.loads(read_text(file))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: the configuration file cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not TOML: {error}") from error
    for name, value in found.items():
        if isinstance(value, dict):
            right = "there are no tables, every setting stands alone: chunk_tokens = 256"
            raise ConfigError(f"{file}: [{name}] is a table; {right}")
    return {name: _checked(_known(name, f"{file}: {name}"), value, f"{file}: {name}") for name, value in found.items()}


def _from_overrides(overrides: Mapping[str, object], named: Callable[[str], str]) -> dict[str, object]:
    return {
        name: _checked(_known(name, named(name)), value, named(name))
        for name, value in overrides.items()
        if name != _FILE_KEY
    }


def _known(name: str, path: str) -> str:
    if name not in Config.__struct_fields__:
        raise _unknown(path, name, Config.__struct_fields__)
    return name


def _checked(name: str, value: object, path: str, *, from_text: bool = False) -> object:
    """Give the value as the setting's type; text is read only where the source has nothing but text."""
    hint = _HINTS[name]
    right = hint.__metadata__[0].description
    words = get_args(hint.__origin__) if get_origin(hint.__origin__) is Literal else ()
    if words and isinstance(value, str):
        right += _like(value, words)
        value = value.lower() if value.lower() in words else value
    try:
        checked = msgspec.convert(value, hint, strict=not from_text)
    except msgspec.ValidationError as error:
        raise _wrong(path, value, right) from error
    if from_text and type(checked) is int and not str(value).isdecimal():
        raise _wrong(path, value, right)  # msgspec reads "1.0" as an int
    if name in _SIZES and (name, checked) != ("pool_size", "auto"):
        parse_size(checked, path, right)
    if name == "disk_path" and not all(one.startswith("/") and "\0" not in one for one in checked.split(":") if one):
        raise _wrong(path, value, right)
    if name == "store" and not _is_store(checked):
        raise _wrong(path, value, right)
    return checked


def _is_store(store: str) -> bool:
    path = store.removeprefix(_UNIX)
    named = store != path and path.startswith("/") and "\0" not in path
    return store == "private" or (named and 1 < len(os.fsencode(path)) <= _MAX_SOCKET_PATH_NBYTES)


def _like(word: str, words: tuple[str, ...]) -> str:
    """A question after the one of `words` that is most like `word`; nothing where none is."""
    close = difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.6)
    return f'; did you mean "{close[0]}"?' if close else ""


def _wrong(path: str, value: object, right: str) -> ConfigError:
    return ConfigError(f"{path} is {value!r}; right is {right}")


def _unknown(path: str, name: str, names: Iterable[str]) -> ConfigError:
    known = {known.lower(): known for known in names}
    close = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.7)
    hint = f"did you mean {known[close[0]]}?" if close else f"the names are {', '.join(sorted(known.values()))}"
    return ConfigError(f"{path} is no setting of kvkeep; {hint}")
