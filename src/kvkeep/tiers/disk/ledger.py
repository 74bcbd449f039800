"""Which records a directory has, which goes first, and how many bytes are in use: never more than the limit.

Pure: no files, no clock, no threads. The caller counts bytes here before it writes them, and takes them off after the
file's name is gone.

Used bytes are those of finished records, of records being written (counted before the first byte), and of unlinked
files that a reader still has open. Until the start-up scan ends we do not know what the last run left: its upper bound
is used, and a deleted record frees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvkeep.core.policies.policy import UNKNOWN_COST, EvictionPolicy

UNLIMITED_NBYTES = 1 << 62


@dataclass(eq=False, slots=True)
class LedgerEntry:
    """One record: its allocated bytes, open readers, whether it can be evicted, how far its deletion has got.

    `unreadable`: the device failed to give it the last time; the next write of its chunk replaces it.
    """

    key: bytes
    nbytes: int
    readers: int = 0
    ranked: bool = False
    unlinking: bool = False  # a thread is about to unlink its file
    unlinked: bool = False
    unreadable: bool = False


@dataclass(eq=False)
class Ledger:
    """Space and order of use of one directory. `bound_nbytes` is the most that the last run can have left.

    `live` records may be read; `dying` ones may not, but their files still have names. `spare_nbytes` is what the file
    system had left for us when we last looked. `adrift_nbytes` were counted for files that turned out smaller when they
    were deleted: a user moved files about, so other files may be larger than we count, until a survey looks at each.
    `doubted_nbytes` are the adrift bytes that a running survey settles.
    """

    limit_nbytes: int
    policy: EvictionPolicy
    bound_nbytes: int
    spare_nbytes: int = UNLIMITED_NBYTES
    settled: bool = False
    adrift_nbytes: int = 0
    doubted_nbytes: int = 0
    surveying: bool = False
    live: dict[bytes, LedgerEntry] = field(default_factory=dict)
    dying: dict[bytes, LedgerEntry] = field(default_factory=dict)
    gone: set[bytes] = field(default_factory=set)  # deleted before the scan ended, which may still find them
    _early: dict[bytes, None] = field(default_factory=dict)  # used before the scan ended, in that order
    _held_nbytes: int = 0
    _fresh_nbytes: int = 0
    _evictable_nbytes: int = 0

    @property
    def used_nbytes(self) -> int:
        """Bytes in use; before the scan ends, the most that can be in use."""
        held_nbytes = self._held_nbytes + self.adrift_nbytes + self.doubted_nbytes
        return held_nbytes if self.settled else self.bound_nbytes + self._fresh_nbytes

    def reserve(self, nbytes: int) -> bool:
        """Count bytes that are about to be written; False, and no change, where they do not fit."""
        if self.shortage_nbytes(nbytes) > 0:
            return False
        self._hold(nbytes)
        self.spare_nbytes -= nbytes
        return True

    def shortage_nbytes(self, nbytes: int) -> int:
        """How many bytes must be freed before `nbytes` fit; 0 or less: they fit now."""
        return max(self.used_nbytes + nbytes - self.limit_nbytes, nbytes - self.spare_nbytes)

    def unreserve(self, nbytes: int) -> None:
        """Give back a reservation; nothing of it is on the device."""
        self._hold(-nbytes)

    def publish(self, key: bytes, reserved_nbytes: int, nbytes: int) -> LedgerEntry:
        """A reserved record has been written; its file takes `nbytes`."""
        self._hold(nbytes - reserved_nbytes)
        return self._enter(key, nbytes, early=True)

    def learn(self, key: bytes, nbytes: int) -> LedgerEntry:
        """Add a record that a read or a write met before the scan found it, or that appeared since."""
        self._held_nbytes += nbytes
        return self._enter(key, nbytes, early=True)

    def count(self, nbytes: int) -> None:
        """Count bytes of an earlier run that belong to no entry yet; a negative number takes them off again."""
        self._held_nbytes += nbytes

    def adopt(self, key: bytes, nbytes: int) -> None:
        """Add a record that the scan found, the first to be evicted first; skips known and deleted keys."""
        if key not in self.live and key not in self.dying and key not in self.gone:
            self._held_nbytes += nbytes
            self._enter(key, nbytes, early=False)

    def settle(self) -> None:
        """End the scan: all records are adopted, and from here on the count is exact."""
        self.settled = True
        self.gone.clear()
        for key in self._early:
            self._rank(self.live[key])
        self._early.clear()

    def touch(self, entry: LedgerEntry) -> None:
        """Count one use of a live record."""
        if entry.ranked:
            self.policy.touch(entry.key)
        else:
            self._early.pop(entry.key, None)
            self._early[entry.key] = None

    def missed(self, key: bytes) -> None:
        """Count a lookup that ended at this key, which no record has."""
        self.policy.missed(key)

    def pin(self, entry: LedgerEntry) -> None:
        """Count a reader: the record is not evicted, and its bytes stay in use after an unlink."""
        entry.readers += 1
        if entry.readers == 1 and entry.ranked:
            self.policy.set_hidden(entry.key, True)
            self._evictable_nbytes -= entry.nbytes

    def unpin(self, entry: LedgerEntry) -> None:
        """Count one reader less."""
        entry.readers -= 1
        if entry.readers:
            return
        if entry.unlinked:
            self._held_nbytes -= entry.nbytes
        elif entry.ranked:
            self.policy.set_hidden(entry.key, False)
            self._evictable_nbytes += entry.nbytes

    def kill(self, entry: LedgerEntry) -> LedgerEntry:
        """Stop giving a record to readers; its bytes stay in use until `forget`."""
        if entry.ranked:
            self.policy.remove(entry.key)
            if not entry.readers:
                self._evictable_nbytes -= entry.nbytes
        return self._die(entry)

    def kill_unknown(self, key: bytes) -> LedgerEntry:
        """The same for a key that the scan has not met: the bytes of its file are in the bound."""
        return self._die(LedgerEntry(key, 0))

    def forget(self, entry: LedgerEntry, nbytes: int) -> None:
        """Remove a dying record: the file's name is gone, and the file took `nbytes`."""
        if self.settled:
            self.adrift_nbytes += max(0, entry.nbytes - nbytes)
        del self.dying[entry.key]
        entry.unlinked = True
        if not entry.readers:
            self._held_nbytes -= entry.nbytes

    def begin_survey(self) -> list[LedgerEntry] | None:
        """The live records, whose files the caller measures and passes to `end_survey`; None: a survey is running."""
        if self.surveying:
            return None
        self.surveying = True
        self.doubted_nbytes, self.adrift_nbytes = self.adrift_nbytes, 0
        return list(self.live.values())

    def end_survey(self, sizes: Mapping[LedgerEntry, int] | None) -> None:
        """Count anew what the measured files take. None: they could not be measured, and the doubt stays."""
        self.surveying = False
        if sizes is None:
            self.adrift_nbytes += self.doubted_nbytes
        self.doubted_nbytes = 0
        for entry, nbytes in (sizes or {}).items():
            if self.live.get(entry.key) is entry:
                self._held_nbytes += nbytes - entry.nbytes
                if entry.ranked and not entry.readers:
                    self._evictable_nbytes += nbytes - entry.nbytes
                entry.nbytes = nbytes

    def evict(self, nbytes: int) -> list[LedgerEntry]:
        """Kill the records that must go so that `nbytes` fit; none where even all would not do."""
        shortage = self.shortage_nbytes(nbytes)
        if not self.settled or shortage > self._evictable_nbytes:
            return []
        victims: list[LedgerEntry] = []
        while shortage > 0 and (key := self.policy.evict()) is not None:
            entry = self.live[key]
            self._evictable_nbytes -= entry.nbytes
            shortage -= entry.nbytes
            victims.append(self._die(entry))
        return victims

    def order(self) -> Iterable[bytes]:
        """The keys in eviction order; the ledger is of no use afterwards."""
        while (key := self.policy.evict()) is not None:
            yield key

    def _hold(self, nbytes: int) -> None:
        self._held_nbytes += nbytes
        self._fresh_nbytes += nbytes

    def _enter(self, key: bytes, nbytes: int, early: bool) -> LedgerEntry:
        if key in self.live:
            raise AssertionError(f"{key.hex()} is there twice")
        entry = self.live[key] = LedgerEntry(key, nbytes)
        if early and not self.settled:
            self._early[key] = None
        else:
            self._rank(entry)
        return entry

    def _rank(self, entry: LedgerEntry) -> None:
        self.policy.insert(entry.key, entry.nbytes, UNKNOWN_COST)
        entry.ranked = True
        if entry.readers:
            self.policy.set_hidden(entry.key, True)
        else:
            self._evictable_nbytes += entry.nbytes

    def _die(self, entry: LedgerEntry) -> LedgerEntry:
        entry.ranked = False
        self.live.pop(entry.key, None)
        self._early.pop(entry.key, None)
        if entry.key in self.dying:
            raise AssertionError(f"{entry.key.hex()} dies twice")
        self.dying[entry.key] = entry
        if not self.settled:
            self.gone.add(entry.key)
        return entry
