"""kvkeep: keeps the KV cache that a model computed for a text and gives it back instead of computing it again.

A program with an engine of its own opens a cache with `open_cache`; vLLM loads `kvkeep.vllm`. The public names are
those of `__all__` (docs/reference/python.md); all but the errors are imported when they are first used, so that
`import kvkeep` costs nothing and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Final

from kvkeep.errors import (
    BlockError,
    ConfigError,
    CopyFailed,
    CorruptChunk,
    KVKeepError,
    LayoutMismatch,
    LeaseExpired,
    NotCanonical,
    StoreGone,
    TierBusy,
    TierError,
    TierOwned,
    TierUnavailable,
    WireError,
)

if TYPE_CHECKING:
    from kvkeep.config import Config, Disk
    from kvkeep.doors.library.cache_engine import CacheEngine
    from kvkeep.doors.library.open import Model, open_cache
    from kvkeep.transfer.pages import GroupCaches

__version__ = "0.1.0"
__all__ = [
    "BlockError",
    "CacheEngine",
    "Config",
    "ConfigError",
    "CopyFailed",
    "CorruptChunk",
    "Disk",
    "GroupCaches",
    "KVKeepError",
    "LayoutMismatch",
    "LeaseExpired",
    "Model",
    "NotCanonical",
    "StoreGone",
    "TierBusy",
    "TierError",
    "TierOwned",
    "TierUnavailable",
    "WireError",
    "open_cache",
]
_HOMES: Final = {
    "CacheEngine": "kvkeep.doors.library.cache_engine",
    "Config": "kvkeep.config",
    "Disk": "kvkeep.config",
    "GroupCaches": "kvkeep.transfer.pages",
    "Model": "kvkeep.doors.library.open",
    "open_cache": "kvkeep.doors.library.open",
}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    """List the public names also before they are imported."""
    return sorted({*globals(), *__all__})
