"""How many tokens of a match the planner promises to the engine, and whether their load is beside the steps.

Pure but for the measured time of a step. Knows nothing about the store or about requests under way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.scheduler.ops import aligned
from kvkeep.engine.scheduler.request import Match
from kvkeep.telemetry import Miss

COPIED_NBYTES_S = 5e9  # about what one core copies; only the order of magnitude matters
LATER_STEPS = 2  # a request that is loaded beside the steps starts about as many steps later


class Claim(NamedTuple):
    """The `tokens` promised beyond those that the engine has, and why they are not all of the prompt's whole chunks."""

    tokens: int
    why: Miss | None


def claim_of(layout: ChunkLayout, match: Match, computed: int, prompt: int, *, reach: int, least: int) -> Claim:
    """What to promise of a match to a request of `prompt` tokens, of which the engine has `computed`.

    `reach` is how many chunks of the request are of use; a claim of fewer than `least` tokens is none.
    """
    if not match.offsets:
        return Claim(0, match.why)
    if not aligned(layout.shards[0], computed):
        return Claim(0, Miss.UNALIGNED)
    hit = (match.first + len(match.offsets)) * layout.chunk_tokens
    # never all of them: the engine computes the last token, and its window reaches one token further back
    tokens = min(hit, prompt - 1) - computed
    if tokens < max(1, least):
        return Claim(0, Miss.SMALL)
    return Claim(tokens, (match.why or Miss.PARTLY_STORED) if hit < reach * layout.chunk_tokens else None)


def pays_beside(layout: ChunkLayout, offsets: Sequence[int], running: int, step_s: float) -> bool:
    """Whether `running` requests would together wait longer for this load than its request would for their steps."""
    load_s = len(offsets) * layout.nbytes / COPIED_NBYTES_S
    return running * load_s > LATER_STEPS * step_s
