"""A circuit breaker: a tier that failed is asked nothing for a while, then tried with one probe.

Pure: the caller says what time it is and what happened. Knows nothing about tiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Gate(Enum):
    """What a tier may be asked."""

    CLOSED = "working"  # everything
    HALF_OPEN = "on trial"  # one probe, for which nobody waits
    OPEN = "left alone"  # nothing


@dataclass
class Breaker:
    """Open from a failure to the next success; each failed probe doubles the pause before the next one (seconds)."""

    failures: int = 0
    _pause_s: float = FIRST_PAUSE_S
    _probe_at_s: float | None = None

    def gate(self, now_s: float) -> Gate:
        """What may be asked now; whoever sends a probe calls `probing`."""
        if self._probe_at_s is None:
            return Gate.CLOSED
        return Gate.HALF_OPEN if now_s >= self._probe_at_s else Gate.OPEN

    def probing(self, now_s: float) -> None:
        """Note that a probe was sent: the next one may go after another pause."""
        self._probe_at_s = now_s + self._pause_s

    def failed(self, now_s: float) -> None:
        """Note a failure, or an answer that is too late."""
        self.failures += 1
        if self._probe_at_s is not None:
            self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)
        self._probe_at_s = now_s + self._pause_s

    def succeeded(self) -> None:
        """Note an answer, however late: the tier works."""
        self._probe_at_s, self._pause_s = None, FIRST_PAUSE_S
