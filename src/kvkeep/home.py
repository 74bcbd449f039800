"""Names the files in which kvkeep caches what it found out for this user: digests of files, measured rates.

Losing them costs time only. Knows nothing about what is in them.
"""

from __future__ import annotations

import os
from pathlib import Path


def cache_file(name: str) -> Path | None:
    """Return the file of this name in the user's cache folder; None for a user without a home directory."""
    folder = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(folder):  # as its specification wants it
        folder = os.path.expanduser("~/.cache")  # unlike Path.home() it does not raise
    return Path(folder, "kvkeep", name) if os.path.isabs(folder) else None
