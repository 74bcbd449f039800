"""Asks the store which chunks of a request it has: one question a request, with a limit on the wait for its answer.

Does not ask again for a chunk whose load failed, and does not wait for a tier where computing would be faster. Knows
nothing about claims, block tables or what the planner promises the engine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import NamedTuple

from kvkeep.core.key import BlockHashes, ExtraKeys
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.link import Link
from kvkeep.engine.scheduler.estimate import Estimate
from kvkeep.engine.scheduler.request import Match, RequestRecord
from kvkeep.telemetry import POOL, Figures, Miss, Source
from kvkeep.wire.client import Call, Client
from kvkeep.wire.messages import Matched, StoreLease

MAX_FAILED_KEYS = 65536
STORE_SHARE = 0.9  # of a request's deadline; the rest is for the store's answer to arrive
EARLY_SHARE = 0.5  # of a lookup's limit: a step waits for a tier only if the reads should take no longer


@dataclass(frozen=True)
class Request:
    """What the planner needs to know of an engine's request.

    `root` starts its chain of digests, or says why it must not be kept. `tokens` are all its tokens so far, without
    drafts. With `block_hashes` its digests are made from them. `reads`: kvkeep may give it anything.
    """

    name: str
    tokens: Sequence[int]
    prompt_tokens: int
    root: bytes | Miss
    _: KW_ONLY
    extra_keys: ExtraKeys | None = None
    preempted: bool = False
    block_hashes: BlockHashes | None = None
    reads: bool = True


class LookupLimits(NamedTuple):
    """How long a request waits for its lookup, and the engine for all lookups between two steps.

    `to_states`: a prefix ends at a state. `early`: an answer may cover chunks that are still being read.
    """

    deadline_s: float
    patience_s: float
    to_states: bool = False
    early: bool = False


class Lookups:
    """The lookups of one engine; between two steps all of them together wait at most `patience_s`."""

    def __init__(
        self,
        link: Link,
        layout: ChunkLayout,
        limits: LookupLimits,
        estimate: Estimate,
        *,
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
        """Begins a step: lookups may wait again, and one request may get chunks that are still being read."""
        self._left_s = self._patience_s
        self._early_left = int(self._early)

    def add_failures(self, digests: Sequence[bytes]) -> None:
        """Remembers chunks whose loads failed: no request asks for them again."""
        for digest in digests:
            self._failed[digest] = None
            if len(self._failed) > MAX_FAILED_KEYS:
                self._failed.popitem(last=False)

    def add_early_failures(self, chunks: int) -> None:
        """Counts chunks that were promised early and did not come: the next reads are waited for."""
        self._figures.add("early_failed_chunks", chunks)
        self._estimate.doubt()

    def forget_failures(self) -> None:
        """Forgets which chunks failed: they were of an epoch that is over."""
        self._failed.clear()

    def drop(self, record: RequestRecord, client: Client | None) -> None:
        """Gives up a request's question: nobody wants its answer any more."""
        question, record.question = record.question, None
        if question is not None and client is not None:
            client.abandon(question)

    def answer(
        self, record: RequestRecord, request: Request, client: Client, first: int, *, alone: bool = False
    ) -> Match | None:
        """The store's answer for the chunks from `first` on; None while it has not come.

        `alone`: no other request runs, so that a step that waits for a tier holds nobody up.
        """
        nothing = Match(first, StoreLease(client.welcome.boot, 0))
        question = record.question
        if question is None or record.asked_first != first:
            digests, short = self._askable(record, request, first)
            if not digests:
                self._figures.add("covered", short is None)
                return replace(nothing, why=short)
            self.drop(record, client)
            # the answer cannot reach beyond a chunk that was not asked for
            record.short = short if short is Miss.FAILED_BEFORE else None
            question = record.question = self._ask(record, client, digests, first, alone=alone)
        waited_from_s = self._clock()
        answer = client.wait(question, self._left_s)
        self._left_s = max(0.0, self._left_s - (self._clock() - waited_from_s))
        if isinstance(answer, Matched):
            record.question = None
            self._figures.add("lookup_tokens", len(request.tokens))
            self._count(answer)
            return self._match_of(record, answer)
        if question.failed:
            record.question = None
            return replace(nothing, why=Miss.STORE_GONE)
        if self._clock() - record.asked_at_s < self._deadline_s:
            return None
        # a slow store costs one deadline: until it has caught up every other request misses at once
        self.drop(record, client)
        self._link.suspend()
        return replace(nothing, why=Miss.DEADLINE)

    def _ask(self, record: RequestRecord, client: Client, digests: Sequence[bytes], first: int, *, alone: bool) -> Call:
        tokens = self._layout.chunk_tokens
        span = (first * tokens, (first + len(digests)) * tokens)
        wait_s = self._estimate.worth_s(span, len(digests) * self._layout.nbytes)
        record.asked_chunks = len(digests)
        record.hasty = wait_s is not None and wait_s < self._deadline_s
        limit_s = self._deadline_s if wait_s is None else min(wait_s, self._deadline_s)
        record.limit_s = limit_s
        early = alone and self._may_be_early(limit_s, len(digests))
        record.asked_first, record.asked_at_s = first, self._clock()
        return client.fetch(digests, limit_s * STORE_SHARE, self._deadline_s, early)

    def _may_be_early(self, limit_s: float, chunks: int) -> bool:
        """Whether the step may wait for the tiers instead of this lookup; at most one lookup a step gets a yes."""
        if not self._early_left or not self._estimate.reads_within(limit_s * EARLY_SHARE, chunks * self._layout.nbytes):
            return False
        self._early_left -= 1
        return True

    def _count(self, answer: Matched) -> None:
        self._figures.add("lookups")
        self._figures.gauge("pool_used_nbytes", answer.used_nbytes)
        self._figures.gauge("pool_pinned_nbytes", answer.pinned_nbytes)
        self._figures.add("early_chunks", len(answer.progress))
        for source, count in answer.sources.items():
            self._figures.add_of("fetched_chunks", Source(source), count)

    def _match_of(self, record: RequestRecord, answer: Matched) -> Match:
        read = sum(count for source, count in answer.sources.items() if source != POOL)
        if (read and not answer.progress) or answer.why is Miss.TIER_LATE:
            # as the store saw it: the engine may have looked for the answer only after a long step
            self._estimate.read(read * self._layout.nbytes, self._layout.nbytes, answer.took_s)
        return Match(
            record.asked_first,
            answer.lease,
            offsets=answer.offsets,
            hits=len(answer.offsets),
            sums=answer.sums,
            why=_why(record, answer),
            sources={Source(source): count for source, count in answer.sources.items()},
            state=answer.state,
            progress=answer.progress,
        )

    def reach(self, request: Request) -> int:
        """How many of the request's chunks are of use: a state serves only a prompt that goes on after it."""
        tokens = len(request.tokens) - 1 if self._to_states else len(request.tokens)
        return max(0, tokens) // self._layout.chunk_tokens

    def _askable(self, record: RequestRecord, request: Request, first: int) -> tuple[list[bytes], Miss | None]:
        """The digests to look up, up to the first whose load failed before, and why there are no more.

        No digests and no reason: the engine itself has every whole chunk.
        """
        record.chain.extend(request.tokens)
        digests = record.chain.digests[first : self.reach(request)]
        for index, digest in enumerate(digests if self._failed else ()):
            if digest in self._failed:
                return digests[:index], Miss.FAILED_BEFORE
        return digests, None if self.reach(request) else Miss.SHORT


def _why(record: RequestRecord, answer: Matched) -> Miss | None:
    """Why a request gets no more than this answer; None if it gets all whole chunks, or the rest was never stored."""
    hits, why = len(answer.offsets), answer.why
    if hits == record.asked_chunks:
        return record.short
    if why is Miss.NO_STATE and record.short is not None:
        return record.short  # the state is behind what was not asked for
    if why is Miss.TIER_LATE and record.hasty:
        return Miss.SLOWER
    if why not in (None, Miss.NOT_STORED):
        return why
    if not record.limit_s:
        return Miss.SLOWER  # without time to wait the store did not ask its tiers
    return None if hits else Miss.NOT_STORED
