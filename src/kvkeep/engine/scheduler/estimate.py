"""Whether reading a prefix from a tier would be faster than computing it again, from what both took so far.

Seconds, tokens and bytes go in, seconds come out. Knows nothing about requests or the store; the clock is handed in.
What was never seen is not guessed at: then nothing is refused.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

WEIGHT = 0.3  # of the newest sample in a running mean
LEAST_TOKENS = 64  # a step of fewer new tokens says little about prefill
TRY_EVERY = 16  # one question in so many waits for a slow tier all the same, to see whether it still is


class Estimate:
    """Running means: seconds a token by position, in ranges whose ends double, and seconds a byte of all tiers."""

    def __init__(self) -> None:
        self._token_s: dict[int, float] = {}
        self._byte_s: float | None = None
        self._refused = 0
        self._trusted = 0

    def computed(self, start: int, end: int, seconds: float) -> None:
        """One request's tokens [start, end) took this long; too few to say anything are ignored."""
        if end - start < LEAST_TOKENS or seconds <= 0:
            return
        place = _place((start + end) // 2)
        self._token_s[place] = _mean(self._token_s.get(place), seconds / (end - start))

    def read(self, nbytes: int, chunk_nbytes: int, seconds: float) -> None:
        """A lookup brought `nbytes` from tiers; none at all in this time counts as one chunk that took longer."""
        if seconds > 0:
            self._trusted = TRY_EVERY - 1
            self._byte_s = _mean(self._byte_s, seconds / max(nbytes, chunk_nbytes))

    def reads_within(self, limit_s: float, nbytes: int) -> bool:
        """Whether `nbytes` will come from tiers in this time, so surely that nobody need look.

        Every so often the answer is no, whoever asks then measures it again.
        """
        if self._byte_s is None or not self._trusted or self._byte_s * nbytes > limit_s:
            return False
        self._trusted -= 1
        return True

    def doubt(self) -> None:
        """What was to come in time did not: nothing is sure before it has been measured again."""
        self._trusted = 0

    def compute_s(self, start: int, end: int) -> float | None:
        """What computing tokens [start, end) would take; None if that is not known.

        A range that was not seen takes what the nearest earlier one took, or the nearest later one.
        """
        if not self._token_s or end <= start:
            return None
        total, here = 0.0, start
        while here < end:
            upto = min(end, 1 << here.bit_length())
            total += (upto - here) * self._rate(_place(here))
            here = upto
        return total

    def worth_s(self, span: tuple[int, int], nbytes: int) -> float | None:
        """How long tiers may be waited for, for these tokens of `nbytes`. None: no limit is known. 0: not at all."""
        compute_s = self.compute_s(*span)
        if compute_s is None:
            return None
        if self._byte_s is None or self._byte_s * nbytes <= compute_s:
            self._refused = 0
            return compute_s
        self._refused += 1
        return compute_s if self._refused % TRY_EVERY == 0 else 0.0

    def _rate(self, place: int) -> float:
        nearest = min(self._token_s, key=lambda one: (one > place, abs(one - place)))
        return self._token_s[nearest]


def _place(position: int) -> int:
    return position.bit_length()


def _mean(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)


class Paces:
    """Measures steps for an estimate; a step may be planned before the output of the last one is in."""

    def __init__(self, estimate: Estimate, clock: Callable[[], float]) -> None:
        self._estimate = estimate
        self._clock = clock
        self._open: deque[tuple[float, Sequence[tuple[int, int]]]] = deque(maxlen=8)
        self._over_s = 0.0
        self.step_s: float | None = None
        """A running mean of the steps in which no request computed many tokens; None before the first."""

    def begun(self, spans: Sequence[tuple[int, int]]) -> None:
        """A step is about to compute these tokens; none if its time would say nothing."""
        self._open.append((self._clock(), spans))

    def over(self) -> None:
        """The output of the oldest step is in: its time is shared out by tokens."""
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
