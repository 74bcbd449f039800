"""Every exception of kvkeep, the tree at the top, each with a stable code.

A miss, a full pool and "ask again" are values, not exceptions. What a caller or another process passes in is checked
with one of these, or with a ValueError where it is a plain argument. A broken invariant of our own is an
AssertionError, which nobody catches.

    KVKeepError
      ConfigError       a setting is wrong: the message names its path and what would be right
      LayoutMismatch    an engine's cache is not arranged as kvkeep needs it, or not as it was registered
      LeaseExpired      memory was used after its lease had ended
      BlockError        a block that does not exist, is the null block, or would be written twice (a ValueError)
      CopyFailed        a copy between the engine's cache and the pool did not run to its end
      WireError         a peer broke the protocol, or is gone
        StoreGone       the store process ended, or does not answer within its limit
      TierError         a place below the pool does not do what it was asked
        TierUnavailable   it as a whole does not work: closed, gone, read-only
          TierOwned         its directory belongs to another process
        TierBusy          it works, and more is asked of it than may wait
        CorruptChunk      bytes that are no record, or not the record that they should be
"""

from __future__ import annotations

from typing import ClassVar


class KVKeepError(Exception):
    """The root of all failures that kvkeep raises on purpose."""

    code: ClassVar[str] = "kvkeep"


class ConfigError(KVKeepError):
    """A setting, or what the machine offers, does not allow a start."""

    code = "config"


class LayoutMismatch(KVKeepError):
    """A cache's arrangement is unknown, or differs from the registered one."""

    code = "layout"


class NotCanonical(KVKeepError, TypeError):
    """A setting's value has no form that is the same in another process."""

    code = "not-canonical"


class LeaseExpired(KVKeepError):
    """Lent memory was touched after its lease had been closed."""

    code = "lease"


class BlockError(KVKeepError, ValueError):
    """A block of an engine's cache that does not exist, is the null block, or is named where it may not be."""

    code = "block"


class WireError(KVKeepError):
    """A frame breaks the protocol: its size, its version, its content."""

    code = "wire"


class CopyFailed(KVKeepError):
    """A copy between the engine's cache and the pool did not run to its end."""

    code = "copy-failed"


class StoreGone(WireError):
    """The store process is not there, or did not answer within the limit."""

    code = "store-gone"


class TierError(KVKeepError):
    """A tier failed; whoever walks the tiers goes on without it.

    `tier` is its name and `operation` the verb that failed, "" where that is not known. `retryable`: the same call may
    succeed later although nobody repairs anything.
    """

    code = "tier"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, tier: str = "", operation: str = "") -> None:
        super().__init__(message)
        self.tier = tier
        self.operation = operation


class TierUnavailable(TierError):
    """A tier does not work as a whole, now or any more."""

    code = "tier-unavailable"


class TierBusy(TierError):
    """A tier works and has too much to do: kvkeep asks more of it than it lets wait."""

    code = "tier-busy"
    retryable = True


class TierOwned(TierUnavailable):
    """A tier's directory is locked by another process."""

    code = "tier-owned"
    retryable = True


class CorruptChunk(TierError):
    """Bytes are not the record that they should be: torn, foreign or changed."""

    code = "corrupt-chunk"
