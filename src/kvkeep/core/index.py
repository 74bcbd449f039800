"""The pool's index: reserves, commits, pins and evicts the entries of chunks.

Knows nothing about sockets, sessions, tiers, clocks, or the bytes behind an extent. Not thread-safe: one thread owns
it. A call for many keys is one step: nothing else sees it half done.

    absent --reserve--> being written --commit--> committed --evict, discard, clear--> absent
                             |    |                   (while pinned: dead, memory held until the last unpin)
                             |    +--abandon--> absent
                             +--revoke, clear--> dead, memory held until commit or abandon
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from enum import Enum
from itertools import pairwise, takewhile
from typing import Final, NamedTuple

from kvkeep.core.allocator import Allocator, Extent
from kvkeep.core.policies.policy import UNKNOWN_COST, EvictionPolicy


class Outcome(Enum):
    """Why a key of a reserve got no entry."""

    PRESENT = "present"  # committed already
    BUSY = "busy"  # being written under another reserve, or named earlier in this one
    NO_ROOM = "no room"


PRESENT: Final = Outcome.PRESENT
BUSY: Final = Outcome.BUSY
NO_ROOM: Final = Outcome.NO_ROOM


class IndexEntry:
    """One chunk in memory. Others read it; only the Index changes it.

    sums is None while it is being written; owner is the lease's id until then, else 0.
    """

    # Not the extent but its two numbers: 48 bytes less a chunk. Six slots: a seventh takes another 16.
    __slots__ = ("key", "nbytes", "offset", "owner", "pins", "sums")

    def __init__(self, key: bytes, extent: Extent, owner: int) -> None:
        self.offset, self.nbytes = extent
        self.key = key
        self.sums: bytes | None = None
        self.owner = owner
        self.pins = 0

    @property
    def extent(self) -> Extent:
        """Where its bytes are."""
        return Extent(self.offset, self.nbytes)

    def __repr__(self) -> str:
        state = "writing" if self.sums is None else "committed"
        return f"Entry({self.key.hex()[:16]}.., {state}, {self.extent}, owner={self.owner}, pins={self.pins})"


class IndexStats(NamedTuple):
    """The counters at one moment; committed, writing and dead bytes are all the memory that is lent."""

    committed_entries: int
    writing_entries: int
    dead_entries: int
    committed_nbytes: int
    writing_nbytes: int
    dead_nbytes: int  # lost their key while pinned or being written; memory still held
    pinned_nbytes: int  # each entry once, dead ones included
    evictions: int  # since the start


class Index:
    """Entries by key over one allocator, evicted in the order of one policy."""

    def __init__(self, allocator: Allocator, policy: EvictionPolicy) -> None:
        self._allocator = allocator
        self._policy = policy
        self._entries: dict[bytes, IndexEntry] = {}
        self._dead: set[IndexEntry] = set()
        self._spared: dict[bytes, int] = {}  # how often; hidden from the policy, but not held
        self._writing_entries = 0
        self._committed_nbytes = self._writing_nbytes = self._dead_nbytes = 0
        self._pinned_nbytes = self._evictable_nbytes = 0
        self._evictions = 0

    def contains(self, keys: Iterable[bytes]) -> list[bool]:
        """Say which keys are committed; this promises nothing and counts as no use."""
        return [(entry := self._entries.get(key)) is not None and entry.sums is not None for key in keys]

    def committed(self) -> list[IndexEntry]:
        """Get all entries that can be read, in the order in which they were reserved."""
        return [entry for entry in self._entries.values() if entry.sums is not None]

    def prefixes(self, nbytes: int) -> Counter[bytes]:
        """Count the keys by their first nbytes; those being written are among them."""
        return Counter(key[:nbytes] for key in self._entries)

    def pin_prefix(self, keys: Iterable[bytes]) -> list[IndexEntry]:
        """Pin each of the longest run of committed entries from the first key on; they stay until unpinned.

        They are touched from the last to the first, so that a prompt's tail is evicted before its head.
        """
        run, policy = [], self._policy
        for key in keys:
            entry = self._entries.get(key)
            if entry is None:
                policy.missed(key)
                break
            if entry.sums is None:
                break
            run.append(entry)
        set_hidden, touch, spared = policy.set_hidden, policy.touch, self._spared
        pinned_nbytes = 0
        for entry in reversed(run):
            if not entry.pins:
                if entry.key not in spared:
                    set_hidden(entry.key, True)
                pinned_nbytes += entry.nbytes
            entry.pins += 1
            touch(entry.key)
        self._pinned_nbytes += pinned_nbytes
        self._evictable_nbytes -= pinned_nbytes
        return run

    def touch(self, run: Iterable[IndexEntry]) -> int:
        """Count a use of the first entries of a run that still have their key, from the last to the first; how many."""
        alive = list(takewhile(lambda entry: self._entries.get(entry.key) is entry, run))
        for entry in reversed(alive):
            self._policy.touch(entry.key)
        return len(alive)

    def writing(self, keys: Iterable[bytes]) -> list[IndexEntry]:
        """Get the entries of keys that are being written."""
        return [entry for key in keys if (entry := self._entries.get(key)) is not None and entry.sums is None]

    def hold(self, key: bytes) -> IndexEntry | None:
        """Pin one committed entry without counting it as used: its place in the order of eviction stays."""
        entry = self._entries.get(key)
        if entry is None or entry.sums is None:
            return None
        if not entry.pins:
            if key not in self._spared:
                self._policy.set_hidden(key, True)
            self._pinned_nbytes += entry.nbytes
            self._evictable_nbytes -= entry.nbytes
        entry.pins += 1
        return entry

    def spare(self, key: bytes) -> bool:
        """Evict a committed entry only where nothing else is left, until `unspare`; False: there is none."""
        entry = self._entries.get(key)
        if entry is None or entry.sums is None:
            return False
        if key not in self._spared and not entry.pins:
            self._policy.set_hidden(key, True)
        self._spared[key] = self._spared.get(key, 0) + 1
        return True

    def unspare(self, key: bytes) -> None:
        """Take one `spare` back; nothing where the entry has gone meanwhile, or its room was needed."""
        count = self._spared.pop(key, 0)
        if count > 1:
            self._spared[key] = count - 1
        elif count and not self._entries[key].pins:
            self._policy.set_hidden(key, False)

    def unpin(self, entries: Iterable[IndexEntry]) -> None:
        """Give back one pin of each entry; a dead one's memory is freed with its last pin."""
        for entry in entries:
            if entry.pins <= 0:
                raise AssertionError(f"{entry} is not pinned")
            entry.pins -= 1
            if entry.pins:
                continue
            self._pinned_nbytes -= entry.nbytes
            if entry in self._dead:
                self._bury(entry)
            else:
                self._evictable_nbytes += entry.nbytes
                if entry.key not in self._spared:
                    self._policy.set_hidden(entry.key, False)

    def reserve(
        self, keys: Sequence[bytes], nbytes: int, owner: int, most: int | None = None
    ) -> list[IndexEntry | Outcome]:
        """Get an entry of nbytes to write for each absent key, or for the first `most`; owner is the lease's id.

        If all absent keys fit into free and evictable bytes, evicts as few entries as needed, none of them named in
        keys. Otherwise evicts nothing and lends the first keys what is free. Where all extents have one size this is
        exact. With mixed sizes, pinned entries between the holes may keep an extent from fitting although the bytes
        would do: then it evicts on while there are candidates, and answers NO_ROOM only after the last one.
        """
        if not owner:
            raise ValueError("an owner is a lease's id, which is never 0")
        entries, policy, unique = self._entries, self._policy, dict.fromkeys(keys)
        absent = [key for key in unique if key not in entries][:most]
        extents = self._lend(len(absent), nbytes, unique)
        fresh = {key: IndexEntry(key, extent, owner) for key, extent in zip(absent, extents, strict=False)}
        # The place is given now, tail first, and not at commit: steps commit a prompt's head first.
        for key in reversed(fresh):
            policy.insert(key, fresh[key].nbytes, UNKNOWN_COST)
            policy.set_hidden(key, True)
        self._writing_entries += len(fresh)
        self._writing_nbytes += sum([entry.nbytes for entry in fresh.values()])
        outcomes: list[IndexEntry | Outcome] = []
        for key in keys:
            entry = fresh.pop(key, None)
            if entry is not None:
                entries[key] = entry
                outcomes.append(entry)
            else:
                held = entries.get(key)
                outcomes.append(NO_ROOM if held is None else BUSY if held.sums is None else PRESENT)
        return outcomes

    def commit(self, entry: IndexEntry, sums: bytes) -> bool:
        """Make a written entry readable; False: it had lost its key, and its memory is free now."""
        if not entry.owner:
            raise AssertionError(f"{entry} is not being written")
        entry.owner = 0
        if entry in self._dead:
            self._bury(entry)
            return False
        entry.sums = sums
        self._writing_entries -= 1
        self._writing_nbytes -= entry.nbytes
        self._committed_nbytes += entry.nbytes
        self._evictable_nbytes += entry.nbytes
        self._policy.set_hidden(entry.key, False)
        return True

    def abandon(self, entry: IndexEntry) -> None:
        """Give an uncommitted entry up: its memory is free now, so nobody may still be writing to it."""
        self.revoke(entry)
        entry.owner = 0
        self._bury(entry)

    def revoke(self, entry: IndexEntry) -> None:
        """Take the key from an uncommitted entry; its memory stays lent until commit or abandon."""
        if not entry.owner:
            raise AssertionError(f"{entry} is not being written")
        if entry in self._dead:
            return
        del self._entries[entry.key]
        self._policy.remove(entry.key)
        self._writing_entries -= 1
        self._writing_nbytes -= entry.nbytes
        self._hold_dead(entry)

    def discard(self, keys: Iterable[bytes]) -> int:
        """Take the key from each committed entry of keys, return how many; pinned memory is freed at unpin."""
        count = 0
        for key in keys:
            entry = self._entries.get(key)
            if entry is None or entry.sums is None:
                continue
            count += 1
            self._policy.remove(key)
            self._forget_committed(entry)
            if entry.pins:
                self._hold_dead(entry)
            else:
                self._allocator.free(entry.extent)
        return count

    def clear(self, namespace: bytes | None = None) -> int:
        """Discard all committed and revoke all other entries whose key starts with namespace (None: all)."""
        found = [entry for key, entry in self._entries.items() if namespace is None or key.startswith(namespace)]
        for entry in self.writing([entry.key for entry in found]):
            self.revoke(entry)
        self.discard([entry.key for entry in found])
        return len(found)

    def stats(self) -> IndexStats:
        """Read the counters; they are kept up to date, so this is cheap."""
        return IndexStats(
            committed_entries=len(self._entries) - self._writing_entries,
            writing_entries=self._writing_entries,
            dead_entries=len(self._dead),
            committed_nbytes=self._committed_nbytes,
            writing_nbytes=self._writing_nbytes,
            dead_nbytes=self._dead_nbytes,
            pinned_nbytes=self._pinned_nbytes,
            evictions=self._evictions,
        )

    def check(self) -> str:
        """Say where states, counters and the allocator disagree; empty where they agree. O(entries log entries)."""
        return next((problem for side in (self._states, self._sums, self._overlaps) for problem in side()), "")

    def _states(self) -> Iterator[str]:
        """Yield what is wrong with single entries."""
        for key, entry in self._entries.items():
            if entry.key != key or entry in self._dead:
                yield f"{entry} is filed under a key that it has lost"
            if (entry.sums is None) != bool(entry.owner):
                yield f"{entry} is both written and readable, or neither"
            if entry.owner and entry.pins:
                yield f"{entry} is pinned before it is readable"
            if entry.owner and key in self._spared:
                yield f"{entry} is spared before it is readable"
        for entry in self._dead:
            if bool(entry.owner) == bool(entry.pins):
                yield f"{entry} is dead, but not held by one side"

    def _sums(self) -> Iterator[str]:
        """Yield which counters are not what the entries add up to."""
        live = list(self._entries.values())
        committed = [entry for entry in live if entry.sums is not None]
        pinned = [entry for entry in [*committed, *self._dead] if entry.pins]
        nbytes = {
            "committed": (sum(entry.nbytes for entry in committed), self._committed_nbytes),
            "writing": (sum(entry.nbytes for entry in live if entry.owner), self._writing_nbytes),
            "dead": (sum(entry.nbytes for entry in self._dead), self._dead_nbytes),
            "pinned": (sum(entry.nbytes for entry in pinned), self._pinned_nbytes),
            "evictable": (sum(entry.nbytes for entry in committed if not entry.pins), self._evictable_nbytes),
            "used": (sum(entry.nbytes for entry in [*live, *self._dead]), self._allocator.used_nbytes),
        }
        for name, (counted, kept) in nbytes.items():
            if counted != kept:
                yield f"{name}: entries have {counted} bytes, the counter says {kept}"
        if self._writing_entries != len(live) - len(committed):
            yield "the count of entries being written is wrong"

    def _overlaps(self) -> Iterator[str]:
        """Yield which entries share bytes."""
        extents = sorted(entry.extent for entry in [*self._entries.values(), *self._dead])
        for below, above in pairwise(extents):
            if below.offset + below.nbytes > above.offset:
                yield f"{below} and {above} overlap"

    def _lend(self, count: int, nbytes: int, keys: Iterable[bytes]) -> list[Extent]:
        """Allocate count extents, evicting what keys does not name; fewer if they cannot all fit."""
        each_nbytes = self._allocator.extent_nbytes(nbytes)
        extents = self._take(count, each_nbytes)
        if len(extents) == count:
            return extents
        named = [entry for key in keys if (entry := self._entries.get(key)) is not None]
        kept = {entry.key: entry for entry in named if entry.sums is not None and not entry.pins}
        evictable_nbytes = self._evictable_nbytes - sum([entry.nbytes for entry in kept.values()])
        if (count - len(extents)) * each_nbytes > self._allocator.free_nbytes + evictable_nbytes:
            return extents
        for key in kept:
            self.spare(key)
        while len(extents) < count and (victim := self._victim(kept)) is not None:
            extent = self._forget_committed(self._entries[victim]).extent
            self._evictions += 1
            if extent.nbytes == each_nbytes:
                extents.append(extent)  # fits as it is: no way round through the allocator
            else:
                self._allocator.free(extent)
                extents += self._take(count - len(extents), each_nbytes)
        for key in kept:
            self.unspare(key)
        return extents

    def _victim(self, kept: Collection[bytes]) -> bytes | None:
        """Which entry the policy evicts; spared ones, but for those that are `kept`, where nothing else is left."""
        if (victim := self._policy.evict()) is not None:
            return victim
        for key in [key for key in self._spared if key not in kept]:
            del self._spared[key]
            if not self._entries[key].pins:
                self._policy.set_hidden(key, False)
        return self._policy.evict()

    def _take(self, count: int, nbytes: int) -> list[Extent]:
        """Allocate up to count extents from free memory."""
        extents: list[Extent] = []
        while len(extents) < count and (extent := self._allocator.allocate(nbytes)) is not None:
            extents.append(extent)
        return extents

    def _forget_committed(self, entry: IndexEntry) -> IndexEntry:
        """Take the key from a committed entry that its policy has forgotten."""
        del self._entries[entry.key]
        self._spared.pop(entry.key, None)
        self._committed_nbytes -= entry.nbytes
        if not entry.pins:
            self._evictable_nbytes -= entry.nbytes
        return entry

    def _bury(self, entry: IndexEntry) -> None:
        """Free the memory of an entry that died while it was held."""
        self._dead.remove(entry)
        self._dead_nbytes -= entry.nbytes
        self._allocator.free(entry.extent)

    def _hold_dead(self, entry: IndexEntry) -> None:
        """Keep the memory of a dead entry until its holder gives it up."""
        self._dead.add(entry)
        self._dead_nbytes += entry.nbytes
