"""What the store is asked about a request, and its answer: one question a request, and a limit on the wait for it.

Knows nothing about claims, block tables or what the engine is promised. A chunk whose load failed is not asked for
again; where computing it would be faster than reading it from a tier, the tier is not waited for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple

from kvkeep.core.key import BlockHashes, ExtraKeys
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.link import Link
from kvkeep.engine.scheduler.estimate import Estimate
from kvkeep.engine.scheduler.request import Match, Record, State
from kvkeep.telemetry import Figures, Miss
from kvkeep.wire.client import Client
from kvkeep.wire.messages import Matched

MAX_FAILED_KEYS = 65536
STORE_SHARE = 0.9  # of a request's deadline is the store's; the rest is for its answer to come
EARLY_SHARE = 0.5  # a step waits only for what should take no more than this of what a lookup might wait
REASONS = {
    "deadline": Miss.TIER_LATE,
    "not loaded": Miss.TIER_FAILED,
    "opening": Miss.TIER_OPENING,
    "left alone": Miss.TIER_LEFT_ALONE,
    "evicted": Miss.TIER_EVICTED,
    "no room": Miss.POOL_FULL,
    "share": Miss.PINNED_SHARE,
    "busy": Miss.WRITING,
    "no state": Miss.NO_STATE,
}
POOL = "pool"


class Request(NamedTuple):
    """What the planner needs to know of an engine's request.

    `root` starts its chain of digests, or says why it must not be kept; `tokens` are all its tokens
    so far, drafts left out. With `block_hashes` its digests are taken from them. `reads`: it may be given anything.
    """

    name: str
    tokens: Sequence[int]
    prompt_tokens: int
    root: bytes | Miss
    extra_keys: ExtraKeys | None = None
    preempted: bool = False
    block_hashes: BlockHashes | None = None
    reads: bool = True


class LookupLimits(NamedTuple):
    """How long a request's lookup is waited for, and all lookups between two steps; `to_states`: prefixes end there.

    `early`: an answer may cover what is still being read.
    """

    deadline_s: float
    patience_s: float
    to_states: bool = False
    early: bool = False


class Lookups:
    """The questions of one engine; between two steps all of them together wait at most `patience_s`."""

    def __init__(
        self,
        link: Link,
        layout: ChunkLayout,
        limits: LookupLimits,
        estimate: Estimate,
        figures: Figures,
        clock: Callable[[], float],
    ) -> None:
        self._link = link
        self._layout = layout
        self._deadline_s, self._patience_s, self._to_states, self._early = limits
        self._early_left = 0
        self._estimate = estimate
        self._figures = figures
        self._clock = clock
        self._left_s = self._patience_s
        self._failed: OrderedDict[bytes, None] = OrderedDict()

    def next_step(self) -> None:
        """A step begins: there is patience again, and one request may be promised what is still being read."""
        self._left_s = self._patience_s
        self._early_left = int(self._early)

    def failed(self, digests: Sequence[bytes]) -> None:
        """The loads of these chunks failed."""
        for digest in digests:
            self._failed[digest] = None
            if len(self._failed) > MAX_FAILED_KEYS:
                self._failed.popitem(last=False)

    def early_failed(self, chunks: int) -> None:
        """So many chunks that were promised while they were read did not come: what is read next is waited for."""
        self._figures.add("early_failed_chunks", chunks)
        self._estimate.doubt()

    def forget_failures(self) -> None:
        """What failed belongs to an epoch that is over."""
        self._failed.clear()

    def drop(self, record: Record, client: Client | None) -> None:
        """The answer to a request's question is not wanted any more."""
        question, record.question = record.question, None
        if question is not None and client is not None:
            client.abandon(question)

    def answer(self, record: Record, request: Request, client: Client, first: int, alone: bool = False) -> Match | None:
        """The store's answer for the chunks from `first` on; None while it has not come.

        `alone`: no other request runs, so that a step that waits for a tier holds nobody up.
        """
        boot = client.welcome.boot
        if record.question is None or record.asked_first != first:
            digests, short = self._askable(record, request, first)
            if not digests:
                self._figures.add("covered", short is None)
                return Match(boot, first, 0, (), {}, 0, short)
            self.drop(record, client)
            # the answer cannot reach beyond a chunk that was not asked for
            record.short = short if short is Miss.FAILED_BEFORE else None
            self._ask(record, client, digests, first, alone)
        assert record.question is not None
        waited_from_s = self._clock()
        answer = client.wait(record.question, self._left_s)
        self._left_s = max(0.0, self._left_s - (self._clock() - waited_from_s))
        if isinstance(answer, Matched):
            record.question = None
            self._figures.add("lookup_tokens", len(request.tokens))
            return self._matched(record, answer, boot)
        if record.question.failed:
            record.question = None
            return Match(boot, first, 0, (), {}, 0, Miss.STORE_GONE)
        if self._clock() - record.asked_at_s < self._deadline_s:
            return None
        # one deadline is what a slow store may cost: until it has caught up every other request misses at once
        self.drop(record, client)
        self._link.suspend()
        return Match(boot, first, 0, (), {}, 0, Miss.DEADLINE)

    def _ask(self, record: Record, client: Client, digests: Sequence[bytes], first: int, alone: bool) -> None:
        tokens = self._layout.chunk_tokens
        span = (first * tokens, (first + len(digests)) * tokens)
        wait_s = self._estimate.worth_s(span, len(digests) * self._layout.nbytes)
        record.asked_chunks = len(digests)
        record.hasty = wait_s is not None and wait_s < self._deadline_s
        limit_s = self._deadline_s if wait_s is None else min(wait_s, self._deadline_s)
        record.move(State.ASKED)
        record.limit_s = limit_s
        early = alone and self._may_be_early(limit_s, len(digests))
        record.question = client.fetch(digests, limit_s * STORE_SHARE, self._deadline_s, early)
        record.asked_first, record.asked_at_s = first, self._clock()

    def _may_be_early(self, limit_s: float, chunks: int) -> bool:
        """Whether a step may wait for the tiers in the place of this lookup; it counts as used."""
        if not self._early_left or not self._estimate.reads_within(limit_s * EARLY_SHARE, chunks * self._layout.nbytes):
            return False
        self._early_left -= 1
        return True

    def _matched(self, record: Record, answer: Matched, boot: bytes) -> Match:
        self._figures.add("lookups")
        self._figures.gauge("pool_used_nbytes", answer.used_nbytes)
        self._figures.gauge("pool_pinned_nbytes", answer.pinned_nbytes)
        for source, count in answer.sources.items():
            self._figures.add(f"fetched_{source}_chunks", count)
        hits = len(answer.offsets)
        why = record.short if hits == record.asked_chunks else REASONS.get(answer.why)
        read = sum(count for source, count in answer.sources.items() if source != POOL)
        self._figures.add("early_chunks", len(answer.words))
        if (read and not answer.words) or why is Miss.TIER_LATE:
            # as the store saw it: the engine may have looked for the answer only after a long step
            self._estimate.read(read * self._layout.nbytes, self._layout.nbytes, answer.took_s)
        if why is Miss.NO_STATE and record.short is not None:
            why = record.short  # the state is behind what was not asked for
        if why is Miss.TIER_LATE and record.hasty:
            why = Miss.SLOWER
        if why is None and hits < record.asked_chunks and not record.limit_s:
            why = Miss.SLOWER  # without time to wait the tiers were not asked at all
        elif why is None and not hits:
            why = Miss.NOT_STORED
        offsets = tuple(answer.offsets)
        lease, sources = answer.lease, answer.sources
        found = Match(boot, record.asked_first, lease, offsets, answer.sums, hits, why, sources, answer.state)
        return found._replace(words=answer.words)

    def reach(self, request: Request) -> int:
        """How many of the request's chunks may be of use: a state serves only a prompt that goes on after it."""
        tokens = len(request.tokens) - 1 if self._to_states else len(request.tokens)
        return max(0, tokens) // self._layout.chunk_tokens

    def _askable(self, record: Record, request: Request, first: int) -> tuple[list[bytes], Miss | None]:
        """The digests to look up, up to the first one whose load failed before; and why there are no more.

        Without any and without a reason the engine has every whole chunk itself.
        """
        record.chain.extend(request.tokens)
        digests = record.chain.digests[first : self.reach(request)]
        for place, digest in enumerate(digests if self._failed else ()):
            if digest in self._failed:
                return digests[:place], Miss.FAILED_BEFORE
        return digests, None if self.reach(request) else Miss.SHORT
