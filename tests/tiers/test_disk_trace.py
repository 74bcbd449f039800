"""A real trace over a disk tier that has room for a quarter of it: how many hits a restart in the middle costs."""

from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from kvkeep.core.key import key_of
from kvkeep.testing.doubles.faulty_files import FaultyDisk
from kvkeep.tiers.aligned import aligned_bytes
from kvkeep.tiers.disk.disk import DiskTier
from kvkeep.tiers.record import record_nbytes
from kvkeep.tiers.tier import Read, Write

TRACE = Path(__file__).parents[1] / "data" / "mooncake_conversation_500.txt.gz"
LONG_TRACE = Path("/work/shared/traces/mooncake_conversation.jsonl.gz")  # its first 500 requests are TRACE
SIZES = (4096,)
PAYLOAD = aligned_bytes(4096)
PAYLOAD[:] = np.arange(4096, dtype=np.uint16).view(np.uint8)[:4096]
SUMS = xxhash.xxh3_128_digest(PAYLOAD.data)
SHARE = 0.25  # of the chunks that the trace names have room


def prompts(requests: int) -> list[list[bytes]]:
    """The keys of each request's chunks."""
    if requests <= 500:
        with gzip.open(TRACE, "rt") as lines:
            blocks = [line.split() for line in islice(lines, requests)]
    else:
        with gzip.open(LONG_TRACE, "rt") as lines:
            blocks = [json.loads(line)["hash_ids"] for line in islice(lines, requests)]
    return [[key_of(b"t" * 16, int(one).to_bytes(4, "big") * 8) for one in line] for line in blocks]


async def hits(tier: DiskTier, requests: list[list[bytes]]) -> int:
    """How many chunks of all prompts were there from the beginning; what was not is stored afterwards."""
    total = 0
    into = aligned_bytes(4096)
    for keys in requests:
        found = await tier.load([Read(key, SIZES, into) for key in keys])
        total += next((place for place, one in enumerate(found) if one is None), len(found))
        await tier.store(
            [Write(key, SIZES, PAYLOAD, SUMS) for key, one in zip(keys, found, strict=True) if one is None]
        )
    return total


async def replayed(opened: Any, root: Path, end: str, trace: list[list[bytes]]) -> int:
    """Hits of the second half of a trace, the tier ended in the middle of it: not at all, kindly, or killed."""
    room = int(SHARE * len({key for keys in trace for key in keys}))
    settings = {"size": room * record_nbytes(SIZES), "path": (str(root),), "direct": False}
    first, second = trace[: len(trace) // 2], trace[len(trace) // 2 :]
    disk = FaultyDisk()
    async with opened(disk.files, **settings) as tier:
        await hits(tier, first)
        if end == "not":
            return await hits(tier, second)
        if end == "killed":
            disk.kill_at = 0
    async with opened(**settings) as tier:
        assert tier.figures().records > 0.95 * room
        return await hits(tier, second)


@pytest.mark.long
@pytest.mark.parametrize("requests", [250, *(pytest.param(one, marks=pytest.mark.slow) for one in (500, 2000))])
def test_a_restart_costs_at_most_a_hundredth_of_the_hits(run: Any, opened: Any, tmp_path: Path, requests: int) -> None:
    """The order of use survives a clean end to the last place; after a kill the order of writing stands for it."""
    if requests > 500 and not LONG_TRACE.exists():
        pytest.skip(f"{LONG_TRACE} is not here")
    trace = prompts(requests)
    found: dict[str, int] = {}

    for end in ("not", "clean", "killed"):

        async def test(end: str = end) -> None:
            found[end] = await replayed(opened, tmp_path / end, end, trace)

        run(test)
    assert found["not"] >= requests // 2
    assert found["clean"] == found["not"]
    assert abs(found["killed"] - found["not"]) <= found["not"] / 100, found
