"""Whether a tier may be asked: a tier that failed is left alone for a while, then tried with one probe.

Pure: the caller says what time it is and what happened. Knows nothing about tiers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


class Gate(Enum):
    """What may pass."""

    CLOSED = "working"  # the circuit is closed: everything passes
    HALF_OPEN = "on trial"  # one probe passes, and nobody waits for it
    OPEN = "left alone"


@dataclass
class Breaker:
    """Opens at a failure and closes at a success; each failed probe doubles the pause (seconds)."""

    failures: int = 0
    _pause_s: float = FIRST_PAUSE_S
    _probe_at_s: float | None = None

    def gate(self, now_s: float) -> Gate:
        """What may pass now; a probe that passes is announced with `probing`."""
        if self._probe_at_s is None:
            return Gate.CLOSED
        return Gate.HALF_OPEN if now_s >= self._probe_at_s else Gate.OPEN

    def probing(self, now_s: float) -> None:
        """A probe is on its way: no second one before the next pause is over."""
        self._probe_at_s = now_s + self._pause_s

    def failed(self, now_s: float) -> None:
        """Something failed or was too late."""
        self.failures += 1
        if self._probe_at_s is not None:
            self._pause_s = min(LONGEST_PAUSE_S, self._pause_s * 2)
        self._probe_at_s = now_s + self._pause_s

    def succeeded(self) -> None:
        """Something came back, however late: the tier works."""
        self._probe_at_s, self._pause_s = None, FIRST_PAUSE_S
