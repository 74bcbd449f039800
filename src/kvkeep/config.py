"""The settings of kvkeep, parsed once: frozen data with defaults that work when nothing is configured.

Sizes are ints (bytes), durations floats (seconds), words one of a few; whoever reads a `Config` parses nothing. It is
made by `Config(...)` in a program or by `kvkeep.sources.load_config` from files and variables, with the same checks,
and goes to the store process as JSON. Knows nothing about what the settings do.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from kvkeep.core.policies.registry import POLICIES
from kvkeep.errors import ConfigError
from kvkeep.settings import checked, parse_size, right_values, unknown, wrong

_UNIX: Final = "unix:"
_MAX_SOCKET_PATH_NBYTES: Final = 107  # sockaddr_un holds 108 with the closing zero
_AUTO_LARGEST_NBYTES: Final = 4 << 30
_AUTO_SMALLEST_NBYTES: Final = 64 << 20


class Durability(Enum):
    """What is on the device when a write returns: whatever the kernel wrote, each batch, each record."""

    NONE = "none"
    GROUP = "group"
    EVERY = "every"


def _read_size(value: object, _written: str) -> int:
    return parse_size(value)


def _read_pool_size(value: object, _written: str) -> int | str:
    return "auto" if value == "auto" else parse_size(value)


def _read_store(value: object, _written: str) -> object:
    if not isinstance(value, str) or value == "private":
        return value
    path = value.removeprefix(_UNIX)
    absolute = path != value and path.startswith("/") and "\0" not in path
    if not absolute or not 1 < len(os.fsencode(path)) <= _MAX_SOCKET_PATH_NBYTES:
        raise ValueError("no socket's path")
    return value


def _read_directories(value: object, _written: str) -> object:
    paths = [path for path in value.split(":") if path] if isinstance(value, str) else value
    if not isinstance(paths, list | tuple) or not paths:
        raise ValueError("no directories")
    if not all(isinstance(path, str) and path.startswith("/") and "\0" not in path for path in paths):
        raise ValueError("not absolute")
    for path in paths:
        path.encode()  # UnicodeEncodeError, a ValueError: one that is no UTF-8 does not reach the store, as JSON
    return paths


def _read_tiers(value: object, written: str) -> tuple[Tier, ...]:
    items = msgspec.json.decode(value) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise ValueError("no list")
    tiers = tuple(_tier(item, f"{written}[{index}]") for index, item in enumerate(items))
    kinds = [type(tier) for tier in tiers]
    if len(set(kinds)) < len(kinds):
        raise ConfigError(f'{written} has two tiers of kind "disk"; give all directories to one: path = "/a:/b"')
    return tiers


_Flag = Annotated[bool, Meta(description="true or false")]
_Size = Annotated[
    int, Meta(gt=0, description='a number of bytes > 0, or a size as "512 MiB", "4 GiB" or "4 GB"'), _read_size
]
_SizeOrNone = Annotated[
    int, Meta(ge=0, description='a number of bytes >= 0, or a size as "512 MiB", "4 GiB" or "4 GB"'), _read_size
]
_Policy = Annotated[
    str,
    Meta(
        description=" or ".join(f'"{name}"' for name in POLICIES),
        pattern=rf"^({'|'.join(POLICIES)})\Z",
        extra={"words": tuple(POLICIES)},
    ),
]
_Limit = Annotated[float, Meta(gt=0, le=3600, description="seconds > 0 and <= 3600")]


class Disk(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="disk"):
    """A tier of files in directories, one a device; their chunks survive a restart.

    `size` is what all files together may take, shared evenly by the directories; `min_free` stays free on each file
    system, whoever else fills it. `threads` are each directory's, one of them never writes. A thread takes
    `read_batch` or `write_batch` bytes at once. ConfigError for a wrong value.
    """

    path: Annotated[
        tuple[str, ...], Meta(description='absolute paths of directories, with ":" between them'), _read_directories
    ]
    size: _Size = 16 << 30
    min_free: _SizeOrNone = 1 << 30
    policy: _Policy = "lru"
    durability: Annotated[Durability, Meta(description='"none", "group" or "every"')] = Durability.NONE
    threads: Annotated[int, Meta(ge=2, le=64, description="a whole number of threads >= 2 and <= 64")] = 5
    direct: _Flag = True
    queue_jobs: Annotated[int, Meta(gt=0, description="a whole number of jobs > 0")] = 4096
    read_batch: _Size = 2 << 20
    write_batch: _Size = 8 << 20
    open_s: _Limit = 10.0
    close_s: _Limit = 2.0
    room_s: _Limit = 5.0

    @property
    def kind(self) -> str:
        """The tag of this kind of tier, which is its name in logs and figures."""
        return "disk"

    def __post_init__(self) -> None:
        """Check every setting, and write it as it is meant."""
        for name in self.__struct_fields__:
            msgspec.structs.force_setattr(self, name, checked(Disk, name, getattr(self, name), f"Disk.{name}"))


Tier = Disk  # of several kinds: a union, told apart by their tags
_KINDS: Final[dict[str, type[Tier]]] = {"disk": Disk}
_SHORT: Final = {f"disk_{name}": name for name in ("path", "size", "min_free", "policy", "durability", "threads")}
STORE_SETTINGS: Final = frozenset(  # what a store process reads: the options of `kvkeep serve`
    {"pool_size", "policy", "max_pinned_share", "lease_time_s", "log_level", "tiers", *_SHORT}
)


class Config(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All settings. `disk_...` are the short form of one `Disk` tier: they are in `tiers` afterwards, and UNSET.

    A program may write a size as text or bytes, directories with ":" between them or as a list, a tier as `Disk` or as
    a mapping with its kind, words in any case. ConfigError, naming the setting and what is right, for a wrong value.
    """

    enabled: _Flag = True
    pool_size: Annotated[
        Annotated[int, Meta(gt=0)] | Literal["auto"],
        Meta(description='"auto", a number of bytes > 0, or a size as "512 MiB", "4 GiB" or "4 GB"'),
        _read_pool_size,
    ] = "auto"
    chunk_tokens: Annotated[int, Meta(gt=0, description="a whole number of tokens > 0")] = 256
    chain: Annotated[Literal["auto", "kvkeep"], Meta(description='"auto" or "kvkeep"')] = "auto"
    policy: _Policy = "lru"
    store: Annotated[
        str,
        Meta(description='"private", or "unix:" and the absolute path (<= 107 bytes) of a store\'s socket'),
        _read_store,
    ] = "private"
    store_wait_s: Annotated[float, Meta(ge=0, le=3600, description="seconds >= 0 and <= 3600")] = 0.0
    lease_time_s: Annotated[float, Meta(gt=0, le=86400, description="seconds > 0 and <= 86400")] = 60.0
    tiers: Annotated[
        tuple[Tier, ...],
        Meta(description='a list of tiers, each with its kind: [{"kind": "disk", "path": "/nvme", "size": "100 GiB"}]'),
        _read_tiers,
    ] = ()
    disk_path: tuple[str, ...] | UnsetType = UNSET
    disk_size: int | UnsetType = UNSET
    disk_min_free: int | UnsetType = UNSET
    disk_policy: str | UnsetType = UNSET
    disk_durability: Durability | UnsetType = UNSET
    disk_threads: int | UnsetType = UNSET
    store_generated: _Flag = False
    verify_pool: Annotated[Literal["off", "sampled", "always"], Meta(description='"off", "sampled" or "always"')] = (
        "sampled"
    )
    load_failure_policy: Annotated[Literal["recompute", "keep"], Meta(description='"recompute" or "keep"')] = (
        "recompute"
    )
    deadline_s: _Limit = 0.5
    patience_s: Annotated[float, Meta(ge=0, le=10, description="seconds >= 0 and <= 10")] = 0.005
    max_pinned_share: Annotated[float, Meta(gt=0, le=1, description="a share > 0 and <= 1")] = 0.5
    min_hit_tokens: Annotated[int, Meta(ge=0, description="a whole number of tokens >= 0")] = 0
    local_reset: Annotated[Literal["forget", "keep"], Meta(description='"forget" or "keep"')] = "forget"
    load: Annotated[Literal["sync", "async", "auto"], Meta(description='"sync", "async" or "auto"')] = "auto"
    transfer_mode: Annotated[
        Literal["bulk", "layerwise", "auto"], Meta(description='"bulk", "layerwise" or "auto"')
    ] = "auto"
    early_loads: _Flag = False
    transfer: Annotated[Literal["auto", "kernel", "copy"], Meta(description='"auto", "kernel" or "copy"')] = "auto"
    transfer_programs: Annotated[int, Meta(gt=0, le=1024, description="a whole number > 0 and <= 1024")] = 16
    cross_layer_blocks: _Flag = False
    trace_path: Annotated[str, Meta(description='"" for no trace, or the path of a file')] = ""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description='"debug", "info", "warning" or "error"'),
    ] = "info"

    def __post_init__(self) -> None:
        """Check every setting, write it as it is meant, and make the short form's `Disk`."""
        settings = {name: check_setting(name, getattr(self, name), name) for name in self.__struct_fields__}
        said = {name: value for name, value in settings.items() if value not in (UNSET, ())}
        check_tiers_once(said, lambda name: name)
        if "disk_path" in said:
            disk = Disk(**{field: said[name] for name, field in _SHORT.items() if name in said})
            settings |= {"tiers": (disk,), **dict.fromkeys(_SHORT, UNSET)}
        for name, value in settings.items():
            msgspec.structs.force_setattr(self, name, value)

    @property
    def socket_path(self) -> str | None:
        """The shared store's socket; None for a private store."""
        return self.store.removeprefix(_UNIX) if self.store.startswith(_UNIX) else None

    @property
    def outlived(self) -> bool:
        """True if chunks can outlive this engine or be read by another."""
        return self.socket_path is not None or bool(self.tiers)

    def may_go_by_layer(self, on_cpu: bool) -> bool:
        """True if loads may be made layer by layer: on a device only where that is set, not where it is measured."""
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
        """N: verify every N-th chunk that is read from the pool; 0: none."""
        return {"off": 0, "sampled": 64, "always": 1}[self.verify_pool]

    def pool_nbytes(self, available_nbytes: int) -> int:
        """The pool's bytes on a machine that has `available_nbytes` of memory left.

        "auto" is a quarter of that, between 64 MiB and 4 GiB, in whole MiB, so that a message can name it exactly.
        """
        if self.pool_size != "auto":
            return self.pool_size
        quarter = (available_nbytes // 4) >> 20 << 20
        return max(_AUTO_SMALLEST_NBYTES, min(_AUTO_LARGEST_NBYTES, quarter))

    def json(self) -> str:
        """All settings of a store that are not the default, as its process reads them; paths of the engine's stay."""
        return msgspec.json.encode(msgspec.structs.replace(self, store="private", trace_path="")).decode()


def check_setting(name: str, value: object, written: str, *, from_text: bool = False) -> Any:
    """Return one setting's value as `Config` keeps it; ConfigError, naming it as it is `written`, for a wrong one."""
    if name not in _SHORT:
        return checked(Config, name, value, written, from_text=from_text)
    if value is UNSET or (name == "disk_path" and value in ("", ())):
        return () if value == "" else value  # no disk, also where a weaker source names one
    return checked(Disk, _SHORT[name], value, written, from_text=from_text)


def check_tiers_once(settings: Mapping[str, object], written: Callable[[str], str]) -> None:
    """Refuse `tiers` beside their short form: one of the two would be dropped."""
    for name, field in _SHORT.items():
        if "tiers" in settings and settings.get(name, UNSET) is not UNSET:
            raise ConfigError(
                f"{written(name)} cannot stand beside {written('tiers')}; "
                f'leave it out, and write it there as {field} of a tier of kind "disk"'
            )


def describe_settings() -> dict[str, str]:
    """Say for every setting, by name, which values are right."""
    disk = right_values(Disk)
    return right_values(Config) | {name: disk[field] for name, field in _SHORT.items()}


def _tier(item: object, written: str) -> Tier:
    """The tier that a mapping describes, or that is one already."""
    if isinstance(item, Tier):
        return item
    if not isinstance(item, Mapping):
        raise wrong(written, item, 'a mapping with a kind, as {"kind": "disk", "path": "/nvme"}')
    settings = dict(item)
    tag = settings.pop("kind", None)
    kind = _KINDS.get(tag) if isinstance(tag, str) else None
    if kind is None:
        raise wrong(f"{written}.kind", tag, " or ".join(f'"{known}"' for known in _KINDS))
    for name in settings:
        if name not in kind.__struct_fields__:
            raise unknown(f"{written}.{name}", str(name), kind.__struct_fields__)
    for name in kind.__struct_fields__[: len(kind.__struct_fields__) - len(kind.__struct_defaults__)]:
        if name not in settings:
            raise ConfigError(f"{written}.{name} is not set; right is {right_values(kind)[name]}")
    return kind(**{name: checked(kind, name, value, f"{written}.{name}") for name, value in settings.items()})
