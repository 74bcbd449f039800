"""What kvkeep counts, under fixed names, and why a request got less than its whole prefix.

`Figures` collects them for one engine; a store makes rows of the same kind (`Figure`) of its own. Knows nothing about
Prometheus, logs or engines, which read `Figures.rows`. One owner, no lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple, NewType

Source = NewType("Source", str)
"""Where a chunk was found: `POOL`, or the name of a tier below it, such as "disk". Tiers are open to plugins, so the
names are not a closed list; a name becomes a label of metrics, and `SOURCE_PATTERN` says what may be one."""

POOL = Source("pool")
SOURCE_PATTERN = r"^[a-z][a-z0-9_]{0,31}$"


class Miss(Enum):
    """Why tokens of a request were not given back: the value is what goes over the wire; `MISSES` has the texts."""

    NOT_STORED = "not_stored"
    PARTLY_STORED = "partly_stored"
    SHORT = "short"
    SMALL = "small"
    UNREAD = "unread"
    PINNED_SHARE = "pinned_share"
    POOL_FULL = "pool_full"
    WRITING = "writing"
    TIER_LATE = "tier_late"
    SLOWER = "slower"
    TIER_FAILED = "tier_failed"
    TIER_OPENING = "tier_opening"
    TIER_LEFT_ALONE = "tier_left_alone"
    TIER_EVICTED = "tier_evicted"
    STORE_GONE = "store_gone"
    DEADLINE = "deadline"
    FAILED_BEFORE = "failed_before"
    UNALIGNED = "unaligned"
    REFUSED = "refused"
    BYPASS = "bypass"
    HASHES = "hashes"
    NO_STATE = "no_state"
    SESSION = "session"
    ADAPTER = "adapter"

    @property
    def meaning(self) -> str:
        """What it means, in a sentence."""
        return MISSES[self].meaning

    @property
    def cure(self) -> str:
        """What its user may do about it."""
        return MISSES[self].cure


class MissTexts(NamedTuple):
    """A reason for people: what it means, and what its user may do about it (Markdown)."""

    meaning: str
    cure: str


MISSES: dict[Miss, MissTexts] = {
    Miss.NOT_STORED: MissTexts(
        "no chunk of this prefix is kept",
        "nothing, for a text that is new; else it was kept under another identity (weights, dtype, layout, version, "
        "`chunk_tokens`): the store's log names the difference when an engine joins, and so do `kvkeep stats` and "
        "`kvkeep check DIR`",
    ),
    Miss.PARTLY_STORED: MissTexts(
        "only the beginning of this prefix is kept",
        "the rest is new, or was evicted: a larger `pool_size`, a disk tier",
    ),
    Miss.SHORT: MissTexts(
        "the prompt is shorter than a chunk", "nothing; a smaller `chunk_tokens` if most prompts are short"
    ),
    Miss.SMALL: MissTexts("the hit is smaller than min_hit_tokens", "lower `min_hit_tokens`"),
    Miss.UNREAD: MissTexts(
        "the request wants every token computed", "nothing: prompt logprobs and outputs for each token need it"
    ),
    Miss.PINNED_SHARE: MissTexts(
        "waiting requests have pinned their share of the pool", "a larger `pool_size`, or `max_pinned_share`"
    ),
    Miss.POOL_FULL: MissTexts("a tier has it, but the pool has no room for it now", "a larger `pool_size`"),
    Miss.WRITING: MissTexts("it is still being written", "nothing: the next request finds it"),
    Miss.TIER_LATE: MissTexts("a tier had not read it within deadline_s", "a faster disk, a longer `deadline_s`"),
    Miss.SLOWER: MissTexts("a tier was not waited for: computing it is faster", "nothing, or a faster disk"),
    Miss.TIER_FAILED: MissTexts(
        "a tier had it, but did not give it or what it gave was bad", "the log names the error; `kvkeep check DIR`"
    ),
    Miss.TIER_OPENING: MissTexts(
        "no tier that is open keeps it, and one is still being opened",
        "nothing in the first seconds after a start; later the log says what holds it up, such as another store on "
        "the directory",
    ),
    Miss.TIER_LEFT_ALONE: MissTexts(
        "no tier that works keeps it, and one that failed is left alone for a while",
        "the log names the failure; the tier is tried again by itself",
    ),
    Miss.TIER_EVICTED: MissTexts(
        "a tier had it, but it was gone by the time it was read: evicted, cleared or removed",
        "nothing; a larger `disk_size` if it is often",
    ),
    Miss.STORE_GONE: MissTexts("the store process is not there", "the log says why; a shared store: `kvkeep serve`"),
    Miss.DEADLINE: MissTexts(
        "the store did not answer within deadline_s, or has not caught up since", "is the machine out of CPU time?"
    ),
    Miss.FAILED_BEFORE: MissTexts(
        "a load of this chunk failed before",
        "nothing: this engine computes it until its next start or reset, others find it; the log says how many chunks "
        "failed",
    ),
    Miss.UNALIGNED: MissTexts("the engine's own hit ends inside a block", "nothing"),
    Miss.REFUSED: MissTexts("this model or layout cannot be kept", "the log at start names what is not supported"),
    Miss.BYPASS: MissTexts("kvkeep is switched off", "`enabled`"),
    Miss.HASHES: MissTexts(
        "the engine's block hashes are not those of the request's tokens", '`chain = "kvkeep"`, and please report it'
    ),
    Miss.NO_STATE: MissTexts(
        "no recurrent state is kept at the end of any chunk of what is kept of this prefix",
        "nothing: the engine left none within what this prompt shares",
    ),
    Miss.SESSION: MissTexts("it is a streaming session, whose text may be replaced while it is computed", "nothing"),
    Miss.ADAPTER: MissTexts(
        "what was loaded as its adapter is not known yet, or not all that was loaded under that name and path",
        "the next request with it is kept; load changed weights under another name or path, or reset vLLM's prefix "
        "cache; for many adapters raise `max_cpu_loras` ([more](configuration.md#adapters))",
    ),
}

COUNTERS = {
    "lookups": "lookups that were answered",
    "covered": "requests that needed no lookup: the engine itself had every whole chunk of the prompt",
    "lookup_tokens": "tokens of prompts that were looked up",
    "claimed_first_tokens": "tokens claimed for requests never preempted: vLLM's external_prefix_cache_hits",
    "claimed_after_preemption_tokens": "tokens claimed for requests that resumed",
    "failed_tokens": "claimed tokens whose load failed",
    "delivered_tokens": "claimed tokens whose bytes have arrived",
    "early_chunks": "chunks that lookups found while they were still being read from a tier",
    "early_failed_chunks": "chunks promised early whose read failed or came late",
    "stored_chunks": "chunks that became readable",
    "stored_tokens": "tokens of those chunks",
    "stored_states": "recurrent states at the ends of chunks that became readable",
    "skipped_states": "recurrent states for which the pool had no room, or the store no answer in time",
    "skipped_present_chunks": "chunks that were in the pool already, or being written by another request",
    "skipped_full_chunks": "chunks for which the pool had no room",
    "skipped_late_chunks": "chunks for which the store gave no room within deadline_s",
    "skipped_gone_chunks": "chunks whose blocks the engine had freed before they could be gathered",
    "dropped_chunks": "gathered chunks that were not committed: their step had failed loads, a rank skipped them, "
    "or their request was preempted before the copy was over",
    "store_losses": "times that the store process was lost",
    "resets": "times that the engine asked for an empty cache",
}
TIER_COUNTERS = {
    "fetched_chunks": "chunks that lookups found, by where they were: `pool`, or the name of a tier such as `disk`",
}
GAUGES = {
    "pool_nbytes": "size of the pool",
    "pool_used_nbytes": "bytes of the pool that hold chunks",
    "pool_pinned_nbytes": "bytes of the pool that leases hold",
}


class Figure(NamedTuple):
    """One figure: `tier` is where it is of, "" for what is of no tier."""

    name: str
    tier: str
    value: int


def flat_name(name: str, tier: str) -> str:
    """A figure's name in one piece, as "disk_flush_stored": for people, and for mappings that have no labels."""
    return f"{tier}_{name}" if tier else name


def by_flat_name(figures: Iterable[Figure]) -> dict[str, int]:
    """Figures as a mapping from their flat names."""
    return {flat_name(name, tier): value for name, tier, value in figures}


class Figures:
    """An engine's counters, those by tier, its gauges, and misses by reason."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._by_tier: dict[str, dict[str, int]] = {name: {POOL: 0} for name in TIER_COUNTERS}
        self._gauges = dict.fromkeys(GAUGES, 0)
        self._misses = dict.fromkeys(Miss, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Raises a counter; a name that is not in COUNTERS is a KeyError."""
        self._counts[name] += amount

    def add_of(self, name: str, tier: Source, amount: int) -> None:
        """Raises one tier's counter; a name that is not in TIER_COUNTERS is a KeyError, a tier may be any."""
        counts = self._by_tier[name]
        counts[tier] = counts.get(tier, 0) + amount

    def gauge(self, name: str, value: int) -> None:
        """Sets a gauge; a name that is not in GAUGES is a KeyError."""
        self._gauges[name]
        self._gauges[name] = value

    def miss(self, why: Miss) -> None:
        """Counts one request that got less than its whole prefix, by reason."""
        self._misses[why] += 1

    def count(self, name: str) -> int:
        """A counter's value."""
        return self._counts[name]

    def misses(self) -> dict[str, int]:
        """Requests by reason, those reasons that occurred."""
        return {why.value: count for why, count in self._misses.items() if count}

    def rows(self) -> list[Figure]:
        """All counters and gauges, misses as miss_REASON."""
        plain = {**self._counts, **self._gauges, **{f"miss_{why.value}": n for why, n in self._misses.items()}}
        by_tier = [Figure(name, tier, n) for name, counts in self._by_tier.items() for tier, n in counts.items()]
        return [*(Figure(name, "", value) for name, value in plain.items()), *by_tier]
