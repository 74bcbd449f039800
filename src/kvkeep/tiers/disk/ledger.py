"""Who is in a directory, who goes first, and how many bytes are in use: never more than the limit.

Pure: no files, no clock, no threads. It is told before bytes are written and after names are gone.

Used bytes are those of published records, of records being written (counted before the first byte is), and of
unlinked files that somebody still reads. What an earlier boot left is not known until it has been looked through; so
long its upper bound stands for it, and nothing that is deleted is counted as freed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kvkeep.core.policies.policy import UNKNOWN_COST, EvictionPolicy

UNLIMITED_NBYTES = 1 << 62


@dataclass(eq=False, slots=True)
class LedgerEntry:
    """One record: its allocated bytes, who reads it, whether the policy has it, how far its end is.

    `unreadable`: the device did not give it when it was last asked for; whoever stores its chunk again replaces it.
    """

    key: bytes
    nbytes: int
    readers: int = 0
    ranked: bool = False
    burying: bool = False  # an unlink is on its way
    unlinked: bool = False
    unreadable: bool = False


@dataclass(eq=False)
class Ledger:
    """Space and order of one directory. `bound_nbytes` is the most that an earlier boot can have left.

    `live` are the records that may be read, `dying` those whose names are still there. `spare_nbytes` is what the file
    system has left for us, as far as is known. `adrift_nbytes` were counted for files that took less when they went:
    somebody moved files about, and another name's file may take more than is counted for it, until all are `surveyed`;
    `doubted_nbytes` are those that the survey under way is about.
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
    gone: set[bytes] = field(default_factory=set)  # deleted before it was settled: what is found of them is stale
    _early: dict[bytes, None] = field(default_factory=dict)  # used before it was settled, in that order
    _held_nbytes: int = 0
    _fresh_nbytes: int = 0
    _evictable_nbytes: int = 0

    @property
    def used_nbytes(self) -> int:
        """Bytes in use, or the most that it can be."""
        held_nbytes = self._held_nbytes + self.adrift_nbytes + self.doubted_nbytes
        return held_nbytes if self.settled else self.bound_nbytes + self._fresh_nbytes

    def reserve(self, nbytes: int) -> bool:
        """Count bytes that are about to be written; False: they do not fit, and nothing has changed."""
        if self.shortage_nbytes(nbytes) > 0:
            return False
        self._hold(nbytes)
        self.spare_nbytes -= nbytes
        return True

    def shortage_nbytes(self, nbytes: int) -> int:
        """How many bytes must go before so many more fit; 0 or less: they fit."""
        return max(self.used_nbytes + nbytes - self.limit_nbytes, nbytes - self.spare_nbytes)

    def unreserve(self, nbytes: int) -> None:
        """Give back a reservation of which nothing is on the device."""
        self._hold(-nbytes)

    def publish(self, key: bytes, reserved_nbytes: int, nbytes: int) -> LedgerEntry:
        """A reserved record has its name, and takes `nbytes` on the device."""
        self._hold(nbytes - reserved_nbytes)
        return self._enter(key, nbytes, early=True)

    def learn(self, key: bytes, nbytes: int) -> LedgerEntry:
        """A record of an earlier boot was met before the directory was looked through, or appeared since."""
        self._held_nbytes += nbytes
        return self._enter(key, nbytes, early=True)

    def count(self, nbytes: int) -> None:
        """Count bytes of an earlier boot that no record stands for yet; below 0: no more."""
        self._held_nbytes += nbytes

    def adopt(self, key: bytes, nbytes: int) -> None:
        """A record was found in the directory; the older in use come first. Known and deleted ones are skipped."""
        if key not in self.live and key not in self.dying and key not in self.gone:
            self._held_nbytes += nbytes
            self._enter(key, nbytes, early=False)

    def settle(self) -> None:
        """All that an earlier boot left has been adopted: from here the count is exact."""
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
        """Somebody has its file open: it is not evicted, and its bytes are in use after it was unlinked."""
        entry.readers += 1
        if entry.readers == 1 and entry.ranked:
            self.policy.set_hidden(entry.key, True)
            self._evictable_nbytes -= entry.nbytes

    def unpin(self, entry: LedgerEntry) -> None:
        """One reader less."""
        entry.readers -= 1
        if entry.readers:
            return
        if entry.unlinked:
            self._held_nbytes -= entry.nbytes
        elif entry.ranked:
            self.policy.set_hidden(entry.key, False)
            self._evictable_nbytes += entry.nbytes

    def kill(self, entry: LedgerEntry) -> LedgerEntry:
        """A live record is not to be read any more; its bytes are in use until it is `buried`."""
        if entry.ranked:
            self.policy.remove(entry.key)
            if not entry.readers:
                self._evictable_nbytes -= entry.nbytes
        return self._die(entry)

    def kill_unknown(self, key: bytes) -> LedgerEntry:
        """The same for a key that is not known: whatever its file takes is in the bound."""
        return self._die(LedgerEntry(key, 0))

    def buried(self, entry: LedgerEntry, nbytes: int) -> None:
        """Its name is gone, and with it a file of `nbytes`."""
        if self.settled:
            self.adrift_nbytes += max(0, entry.nbytes - nbytes)
        del self.dying[entry.key]
        entry.unlinked = True
        if not entry.readers:
            self._held_nbytes -= entry.nbytes

    def survey(self) -> list[LedgerEntry] | None:
        """The live records, whose files are to be looked at until `surveyed`; None: somebody is at it."""
        if self.surveying:
            return None
        self.surveying = True
        self.doubted_nbytes, self.adrift_nbytes = self.adrift_nbytes, 0
        return list(self.live.values())

    def surveyed(self, sizes: Mapping[LedgerEntry, int] | None) -> None:
        """Those files were looked at: what they take is counted anew. None: they could not be, all stays in doubt."""
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
        """Kill what must go so that `nbytes` fit; nothing where that cannot be reached."""
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
        """The keys in the order in which they would be evicted; this ends the ledger."""
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
