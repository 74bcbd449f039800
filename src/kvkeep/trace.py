"""Writes spans as a Chrome trace: which layer was copied while which was computed (chrome://tracing, ui.perfetto.dev).

Knows nothing about what is measured. Format: the Trace Event Format's complete events ("ph": "X"), microseconds.
"""

from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path

MAX_SPANS = 20_000  # written in about 50 ms, on the engine's thread
WRITE_EVERY_S = 2.0


class Trace:
    """Keeps the last MAX_SPANS spans of this process, for a file at `path` with the pid before its suffix.

    Without a path it keeps nothing.
    """

    def __init__(self, path: str = "") -> None:
        self._path = Path(path).with_suffix(f".{os.getpid()}{Path(path).suffix}") if path else None
        self._spans: deque[tuple[str, str, float, float]] = deque(maxlen=MAX_SPANS)
        self._written_s = 0.0
        self._new = False

    def span(self, name: str, track: str, start_s: float, end_s: float) -> None:
        """Add a span from `start_s` to `end_s`; those of one track stand in one row. Any thread may call it."""
        if self._path is not None:
            self._spans.append((name, track, start_s, end_s))
            self._new = True

    def write(self, now_s: float, at_once: bool = False) -> None:
        """Writes the file if there is anything new, at most every WRITE_EVERY_S unless it is wanted `at_once`."""
        if self._path is None or not self._new or not (at_once or now_s - self._written_s >= WRITE_EVERY_S):
            return
        self._new, self._written_s = False, now_s
        tracks: dict[str, int] = {}
        events = [
            {
                "name": name,
                "ph": "X",
                "ts": start_s * 1e6,
                "dur": (end_s - start_s) * 1e6,
                "pid": os.getpid(),
                "tid": tracks.setdefault(track, len(tracks)),
            }
            for name, track, start_s, end_s in list(self._spans)
        ]
        names = [
            {"name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": number, "args": {"name": track}}
            for track, number in tracks.items()
        ]
        self._path.write_text(json.dumps({"traceEvents": names + events}))
