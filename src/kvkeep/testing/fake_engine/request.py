"""The fake engine's sizes, and its requests as its scheduler sees them.

Data only. Knows nothing about blocks' content, tensors or kvkeep.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kvkeep.testing.fake_engine.model import GroupShape


@dataclass(frozen=True)
class EngineShape:
    """Its sizes: `budget_tokens` a step, `num_blocks` of all groups together, sampled tokens below `vocabulary`."""

    groups: tuple[GroupShape, ...] = (GroupShape(4),)
    ranks: int = 1
    num_blocks: int = 64
    chunk_tokens: int = 8
    budget_tokens: int = 32
    vocabulary: int = 8
    verify_every: int = 0
    layerwise: bool = False

    @property
    def fails_whole(self) -> bool:
        """Whether what arrived of a load is worth nothing if some of it failed: with several groups or a window."""
        return len(self.groups) > 1 or any(group.window for group in self.groups)


class Phase(Enum):
    """Where the engine has a request."""

    WAITING = "waiting"
    LOADING = "loading"  # its blocks are being loaded beside the steps
    GIVEN_UP = "given up"  # the user went away while they were
    LOADED = "loaded"  # they are, and it waits for its turn
    RUNNING = "running"
    DONE = "done"


@dataclass(eq=False)
class FakeRequest:
    """A request: its prompt, how many tokens it shall generate, and what the scheduler knows of it."""

    name: str
    prompt: tuple[int, ...]
    generate: int
    tokens: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    computed: int = 0
    phase: Phase = Phase.WAITING
    preemptions: int = 0

    @property
    def finished(self) -> bool:
        """Whether all its tokens are generated."""
        return len(self.tokens) >= len(self.prompt) + self.generate
