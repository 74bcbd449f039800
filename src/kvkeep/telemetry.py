"""Counters with fixed names, and why each miss was one.

Knows nothing about Prometheus, logs or engines: they read `Figures.snapshot`. One owner, no lock.
"""

from __future__ import annotations

from enum import Enum


class Miss(Enum):
    """Why tokens of a request were not given back; the text is for people."""

    NOT_STORED = "no chunk of this prefix is kept"
    PARTLY_STORED = "only the beginning of this prefix is kept"
    TIER_LATE = "a tier had not read it within deadline_s"
    SLOWER = "a tier was not waited for: computing it is faster"
    TIER_FAILED = "a tier had it, but did not give it or what it gave was bad"
    TIER_OPENING = "no tier that is open keeps it, and one is still being opened"
    TIER_LEFT_ALONE = "no tier that works keeps it, and one that failed is left alone for a while"
    TIER_EVICTED = "a tier had it, but it was gone by the time it was read: evicted, cleared or removed"
    POOL_FULL = "a tier has it, but the pool has no room for it now"
    PINNED_SHARE = "waiting requests have pinned their share of the pool"
    WRITING = "it is still being written"
    SHORT = "the prompt is shorter than a chunk"
    STORE_GONE = "the store process is not there"
    DEADLINE = "the store did not answer within deadline_s, or has not caught up since"
    FAILED_BEFORE = "a load of this chunk failed before"
    UNALIGNED = "the engine's own hit ends inside a block"
    REFUSED = "this model or layout cannot be kept"
    BYPASS = "kvkeep is switched off"
    ADAPTER = "what was loaded as its adapter is not known yet, or not all that was loaded under that name and path"
    HASHES = "the engine's block hashes are not those of the request's tokens"
    SESSION = "it is a streaming session, whose text may be replaced while it is computed"
    SMALL = "the hit is smaller than min_hit_tokens"
    UNREAD = "the request wants every token computed"
    NO_STATE = "no recurrent state is kept at the end of any chunk of what is kept of this prefix"


COUNTERS = {
    "lookups": "lookups that were answered",
    "covered": "requests that needed no lookup: the engine itself had every whole chunk of the prompt",
    "lookup_tokens": "tokens of prompts that were looked up",
    "fetched_pool_chunks": "chunks that lookups found in the pool",
    "fetched_disk_chunks": "chunks that lookups brought from disk",
    "fetched_remote_chunks": "chunks that lookups brought from a remote store",
    "claimed_first_tokens": "tokens claimed for requests never preempted: vLLM's external_prefix_cache_hits",
    "claimed_after_preemption_tokens": "tokens claimed for requests that resumed",
    "failed_tokens": "claimed tokens whose load failed",
    "delivered_tokens": "claimed tokens whose bytes have arrived",
    "early_chunks": "chunks that lookups found while they were still being read from a tier",
    "early_failed_chunks": "claimed ones of those that did not come, or not in time",
    "stored_chunks": "chunks that became readable",
    "stored_tokens": "tokens of those chunks",
    "skipped_present_chunks": "chunks that were in the pool already, or being written by another request",
    "skipped_full_chunks": "chunks for which the pool had no room",
    "skipped_late_chunks": "chunks for which the store gave no room within deadline_s",
    "skipped_gone_chunks": "chunks whose blocks the engine had freed before they could be gathered",
    "dropped_chunks": "gathered chunks that were not committed: their step had failed loads, a rank skipped them, "
    "or their request was preempted before the copy was over",
    "stored_states": "recurrent states at the ends of chunks that became readable",
    "skipped_states": "recurrent states for which the pool had no room, or the store no answer in time",
    "store_losses": "times that the store process was lost",
    "resets": "times that the engine asked for an empty cache",
}
GAUGES = {
    "pool_nbytes": "size of the pool",
    "pool_used_nbytes": "bytes of the pool that hold chunks",
    "pool_pinned_nbytes": "bytes of the pool that leases hold",
}


class Figures:
    """The planner's counters, its gauges, and misses by reason."""

    def __init__(self) -> None:
        self._counts = dict.fromkeys(COUNTERS, 0)
        self._gauges = dict.fromkeys(GAUGES, 0)
        self._misses = dict.fromkeys(Miss, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Raises a counter; a name that is not in COUNTERS is a KeyError."""
        self._counts[name] += amount

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
        return {why.name.lower(): count for why, count in self._misses.items() if count}

    def snapshot(self) -> dict[str, int]:
        """All counters and gauges by name, misses as miss_REASON."""
        misses = {f"miss_{why.name.lower()}": count for why, count in self._misses.items()}
        return {**self._counts, **self._gauges, **misses}
