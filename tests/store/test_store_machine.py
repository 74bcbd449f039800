"""Sessions on one store against a model of it, in any order that hypothesis thinks of."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvkeep.core.allocator import FreeList
from kvkeep.core.index import Index, Outcome
from kvkeep.core.policies.queue import lru
from kvkeep.store.openings import Opening
from kvkeep.store.sessions import Session
from kvkeep.store.store import Store

CHUNK = 4096
ROOM = 6
NAMESPACES = (b"a" * 16, b"b" * 16)
RUNS = st.lists(st.integers(0, 7), max_size=6).map(lambda numbers: list(dict.fromkeys(numbers)))
PICK = st.integers(0, 10**6)
Key = tuple[bytes, int]


def digests(numbers: list[int]) -> list[bytes]:
    return [number.to_bytes(32, "big") for number in numbers]


@dataclass(eq=False)
class Known:
    """A session as the model has it: read leases by id (offsets), write leases by id (place -> key and offset)."""

    session: Session
    namespace: bytes
    reads: dict[int, list[int]] = field(default_factory=dict)
    writes: dict[int, dict[int, tuple[Key, int]]] = field(default_factory=dict)

    @property
    def touching(self) -> list[int]:
        """The offsets that its processes may read or write, once for each lease."""
        reading = [offset for offsets in self.reads.values() for offset in offsets]
        return reading + [offset for places in self.writes.values() for _, offset in places.values()]


class StoreMachine(RuleBasedStateMachine):
    """The model: which keys are readable and where, which are being written and by whom, what memory is in use."""

    @initialize(share=st.sampled_from([0.4, 0.5, 1.0]))
    def start(self, share: float) -> None:
        self.store = Store(Index(FreeList(ROOM * CHUNK), lru()), ROOM * CHUNK, share)
        self.share_nbytes = int(ROOM * CHUNK * share)
        self.alive: list[Known] = []
        self.lingering: list[Known] = []
        self.readable: dict[Key, int] = {}
        self.making: dict[Key, int] = {}  # key -> lease

    def pick(self, number: int) -> Known:
        return self.alive[number % len(self.alive)]

    @precondition(lambda self: len(self.alive) < 4)
    @rule(namespace=st.sampled_from(NAMESPACES), every=st.integers(0, 3))
    def open(self, namespace: bytes, every: int) -> None:
        session = self.store.open(Opening("m", namespace, "", CHUNK, holders=(), verify_every=every))
        self.alive.append(Known(session, namespace))

    @precondition(lambda self: self.alive)
    @rule(who=PICK, numbers=RUNS)
    def fetch(self, who: int, numbers: list[int]) -> None:
        known = self.pick(who)
        held = sum(map(len, known.reads.values()))
        lease, offsets, sums = self.store.fetch(known.session, digests(numbers))
        room = max(0, self.share_nbytes // CHUNK - held)
        run = []
        for number in numbers[:room]:
            if (known.namespace, number) not in self.readable:
                break
            run.append(self.readable[known.namespace, number])
        assert offsets == run
        assert bool(lease) == bool(run)
        assert all(sums[place] == b"%d" % numbers[place] for place in sums)
        if lease:
            known.reads[lease] = offsets

    @precondition(lambda self: self.alive)
    @rule(who=PICK, numbers=RUNS)
    def reserve(self, who: int, numbers: list[int]) -> None:
        known = self.pick(who)
        before = dict(self.readable)
        lease, places = self.store.reserve(known.session, digests(numbers))
        in_use = {offset for one in self.alive + self.lingering for offset in one.touching}
        granted: dict[int, tuple[Key, int]] = {}
        for place, (number, got) in enumerate(zip(numbers, places, strict=True)):
            key = (known.namespace, number)
            if key in self.making:
                assert got is Outcome.BUSY
            elif key in before:
                assert got is Outcome.PRESENT
            elif isinstance(got, int):
                assert got not in in_use, "memory that somebody may touch is lent again"
                granted[place] = (key, got)
        taken = [offset for _, offset in granted.values()]
        assert len(set(taken)) == len(taken)
        evicted = [key for key, offset in before.items() if offset in taken]
        assert not evicted or Outcome.NO_ROOM not in places, "evicted for a reservation that did not fit"
        for key in evicted:
            assert key not in {(known.namespace, number) for number in numbers}
            del self.readable[key]
        assert bool(lease) == bool(granted)
        if lease:
            known.writes[lease] = granted
            self.making.update({key: lease for key, _ in granted.values()})

    @precondition(lambda self: any(known.writes for known in self.alive))
    @rule(who=PICK, which=PICK, count=st.integers(0, 6))
    def commit(self, who: int, which: int, count: int) -> None:
        writers = [known for known in self.alive if known.writes]
        known = writers[who % len(writers)]
        lease = sorted(known.writes)[which % len(known.writes)]
        places = sorted(known.writes[lease])[:count]
        keys = [known.writes[lease][place] for place in places]
        sums = [b"%d" % number for (_, number), _ in keys]
        done = self.store.commit(known.session, lease, [*places, 77], [*sums, b""])
        assert done == [self.making.get(key) == lease for key, _ in keys] + [False]
        for place, (key, offset), committed in zip(places, keys, done, strict=False):
            del known.writes[lease][place]
            if committed:
                del self.making[key]
                self.readable[key] = offset

    @precondition(lambda self: self.alive)
    @rule(who=PICK, which=PICK, foreign=st.booleans())
    def release(self, who: int, which: int, foreign: bool) -> None:
        known = self.pick(who)
        owner = self.pick(who + 1) if foreign else known
        leases = sorted([*owner.reads, *owner.writes]) or [which]
        lease = leases[which % len(leases)]
        self.store.release(known.session, lease)
        self.forget(known, lease)  # where the other has none the number is invented, and may be one of its own

    def forget(self, known: Known, lease: int) -> None:
        known.reads.pop(lease, None)
        for key, _ in known.writes.pop(lease, {}).values():
            if self.making.get(key) == lease:
                del self.making[key]

    @precondition(lambda self: self.alive)
    @rule(who=PICK, numbers=RUNS)
    def discard(self, who: int, numbers: list[int]) -> None:
        known = self.pick(who)
        gone = [key for key in self.readable if key[0] == known.namespace and key[1] in numbers]
        assert self.store.discard(known.session, digests(numbers)) == len(gone)
        for key in gone:
            del self.readable[key]

    @precondition(lambda self: self.alive)
    @rule(who=PICK, everything=st.booleans())
    def clear(self, who: int, everything: bool) -> None:
        known = self.pick(who)
        gone = [key for key in [*self.readable, *self.making] if everything or key[0] == known.namespace]
        assert self.store.clear(known.session, everything) == len(gone)
        for key in gone:
            self.readable.pop(key, None)
            self.making.pop(key, None)

    @precondition(lambda self: self.alive)
    @rule(who=PICK, namespace=st.sampled_from(NAMESPACES))
    def rename(self, who: int, namespace: bytes) -> None:
        known = self.pick(who)
        self.store.rename(known.session, namespace)
        known.namespace = namespace

    @precondition(lambda self: self.alive)
    @rule(who=PICK)
    def linger(self, who: int) -> None:
        known = self.alive.pop(who % len(self.alive))
        self.store.linger(known.session)
        self.lingering.append(known)
        for lease in known.writes:
            self.making = {key: owner for key, owner in self.making.items() if owner != lease}

    @precondition(lambda self: self.alive or self.lingering)
    @rule(who=PICK, died=st.booleans())
    def close(self, who: int, died: bool) -> None:
        among = self.lingering if (died and self.lingering) or not self.alive else self.alive
        known = among.pop(who % len(among))
        self.store.close(known.session)
        for lease in [*known.reads, *known.writes]:
            self.forget(known, lease)

    @invariant()
    def adds_up(self) -> None:
        assert self.store.index.check() == ""
        figures = self.store.figures()
        everyone = self.alive + self.lingering
        pinned = {offset for known in everyone for offsets in known.reads.values() for offset in offsets}
        assert figures["pinned_nbytes"] == len(pinned) * CHUNK
        assert figures["writing_nbytes"] == len(self.making) * CHUNK
        assert figures["chunks"] == len(self.readable)
        assert figures["sessions"] == len(self.alive)
        assert figures["quarantined_nbytes"] == sum(len(known.touching) for known in self.lingering) * CHUNK
        touched = {offset for known in everyone for offset in known.touching}
        assert figures["used_nbytes"] == len(touched | set(self.readable.values())) * CHUNK
        for known in everyone:
            assert known.session.pinned_nbytes <= self.share_nbytes

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        for known in self.alive + self.lingering:
            self.store.close(known.session)
        assert self.store.index.check() == ""
        figures = self.store.figures()
        assert figures["pinned_nbytes"] == figures["writing_nbytes"] == figures["dead_nbytes"] == 0
        assert figures["quarantined_nbytes"] == 0


TestStore = StoreMachine.TestCase
TestStore.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
