"""Estimates whether reading a prefix from a tier would be faster than computing it, from what both took so far.

Seconds, tokens and bytes go in, seconds come out. Without measurements there is no estimate, and no limit follows from
it. Knows nothing about requests or the store; its caller hands in the clock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

WEIGHT = 0.3  # of the newest sample in a running mean
LEAST_TOKENS = 64  # a step of fewer new tokens says little about prefill
TRY_EVERY = 16  # of so many lookups one waits for a slow tier all the same, to measure it again


class Estimate:
    """Running means: seconds a token by position, in ranges whose ends double, and seconds a byte of all tiers."""

    def __init__(self) -> None:
        self._token_s: dict[int, float] = {}
        self._byte_s: float | None = None
        self._refused = 0
        self._trusted = 0

    def computed(self, start: int, end: int, seconds: float) -> None:
        """Measures computing: one request's tokens [start, end) took this long. Ignores spans of few tokens."""
        if end - start < LEAST_TOKENS or seconds <= 0:
            return
        bucket = _bucket((start + end) // 2)
        self._token_s[bucket] = _mean(self._token_s.get(bucket), seconds / (end - start))

    def read(self, nbytes: int, chunk_nbytes: int, seconds: float) -> None:
        """Measures reading: a lookup brought `nbytes` from tiers. None in this time counts as one slow chunk."""
        if seconds > 0:
            self._trusted = TRY_EVERY - 1
            self._byte_s = _mean(self._byte_s, seconds / max(nbytes, chunk_nbytes))

    def reads_within(self, limit_s: float, nbytes: int) -> bool:
        """Whether `nbytes` will surely come from tiers in this time.

        Every TRY_EVERY-th answer is no, so that the caller measures it again.
        """
        if self._byte_s is None or not self._trusted or self._byte_s * nbytes > limit_s:
            return False
        self._trusted -= 1
        return True

    def doubt(self) -> None:
        """Trusts no estimate of reads until the next measurement: a read that should have come in time did not."""
        self._trusted = 0

    def compute_s(self, start: int, end: int) -> float | None:
        """How long computing tokens [start, end) would take; None if nothing has been measured.

        A bucket without a measurement counts as the nearest earlier bucket, or else the nearest later one.
        """
        if not self._token_s or end <= start:
            return None
        total, here = 0.0, start
        while here < end:
            upto = min(end, 1 << here.bit_length())
            total += (upto - here) * self._rate(_bucket(here))
            here = upto
        return total

    def worth_s(self, span: tuple[int, int], nbytes: int) -> float | None:
        """How long to wait for tiers, for these tokens of `nbytes`. None: no limit is known. 0: not at all."""
        compute_s = self.compute_s(*span)
        if compute_s is None:
            return None
        if self._byte_s is None or self._byte_s * nbytes <= compute_s:
            self._refused = 0
            return compute_s
        self._refused += 1
        return compute_s if self._refused % TRY_EVERY == 0 else 0.0

    def _rate(self, bucket: int) -> float:
        nearest = min(self._token_s, key=lambda known: (known > bucket, abs(known - bucket)))
        return self._token_s[nearest]


def _bucket(position: int) -> int:
    return position.bit_length()


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)


class Paces:
    """Measures steps for an estimate; the next step may begin before the output of the last one is in."""

    def __init__(self, estimate: Estimate, clock: Callable[[], float]) -> None:
        self._estimate = estimate
        self._clock = clock
        self._open: deque[tuple[float, Sequence[tuple[int, int]]]] = deque(maxlen=8)
        self._over_s = 0.0
        self.step_s: float | None = None
        """A running mean of the steps in which no request computed many tokens; None before the first."""

    def begin(self, spans: Sequence[tuple[int, int]]) -> None:
        """Begins a step that computes these tokens; none if its time would say nothing about computing."""
        self._open.append((self._clock(), spans))

    def end(self) -> None:
        """Ends the oldest step, whose output is in, and divides its time among its tokens."""
        now_s = self._clock()
        if self._open:
            begun_s, spans = self._open.popleft()
            seconds = now_s - max(begun_s, self._over_s)
            tokens = sum(end - start for start, end in spans)
            if spans and all(end - start < LEAST_TOKENS for start, end in spans):
                self.step_s = _mean(self.step_s, seconds)
            for start, end in spans:
                self._estimate.computed(start, end, seconds * (end - start) / max(1, tokens))
        self._over_s = now_s
