"""Time to first token after engine and store were ended and started again, page cache dropped; beside LMCache 0.5.6.

Each side computes and stores its prompts, ends, starts, and answers each once from disk and then from memory. The two
sides take turns, each engine on the same core. Takes about 6 minutes; dropping the page cache needs root.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from ttft import BUILD, KVKEEP, ROOT, Asked, Engine, engine, lmcache_server, times

from kvkeep.bench.disk_yardsticks import READERS
from kvkeep.bench.rows import Case, Row, say, seconds, show, write
from kvkeep.memory.region import Region

DISK = BUILD / "bench" / "disk"
DROP = Path("/proc/sys/vm/drop_caches")
DISK_GIB = 4
CHUNK_TOKENS = 256
Side = Callable[[], AbstractContextManager[Engine]]


def sides(options: argparse.Namespace) -> dict[str, Side]:
    """How each side is started, engine and store, over its own folder."""
    ours = {**KVKEEP["kv_connector_extra_config"], "disk_path": str(DISK / "kvkeep"), "disk_size": f"{DISK_GIB} GiB"}
    ours["deadline_s"] = 10.0  # what the disk takes is measured, not cut off

    def kvkeep() -> AbstractContextManager[Engine]:
        return engine("kvkeep", Path(sys.executable), options, {**KVKEEP, "kv_connector_extra_config": ours})

    @contextmanager
    def lmcache() -> Iterator[Engine]:
        adapter = json.dumps({"type": "fs", "base_path": str(DISK / "lmcache")})
        with lmcache_server(options.peer_venv, ("--l2-adapter", adapter)) as transfer:
            python = options.peer_venv / "bin" / "python"
            with engine("lmcache", python, options, transfer) as one:
                yield one

    if not (options.peer_venv / "bin" / "python").exists():
        say(f"no LMCache at {options.peer_venv}: its rows are left out (bash scripts/peers.sh makes it)")
        return {"kvkeep": kvkeep}
    return {"kvkeep": kvkeep, "lmcache": lmcache}


def stored(side: Side, tokens: int, prompts: int) -> None:
    """Computes and stores the prompts; returns when engine and store have ended."""
    with side() as one:
        one.answer()
        for seed in range(prompts):
            say(f"  {one.name} cold {seed + 1}/{prompts}: {one.ask(tokens, seed, range(1)).ttft_s:.2f} s")
        settle()


def settle() -> None:
    """Until nothing has been written for two seconds, at most a minute: what is stored beside the steps is there."""
    size, since = -1, time.monotonic()
    end = since + 60
    while time.monotonic() < min(end, since + 2):
        now = sum(file.stat().st_size for file in DISK.rglob("*") if file.is_file())
        if now != size:
            size, since = now, time.monotonic()
        time.sleep(0.2)


def answered(side: Side, tokens: int, prompts: int) -> tuple[list[Asked], list[Asked]]:
    """Each prompt of an engine that was just started: from disk with a cold page cache, then from memory."""
    disk, pool = [], []
    with side() as one:
        one.answer()
        for seed in range(prompts):
            drop_page_cache()
            disk.append(one.ask(tokens, seed, range(tokens - 1, tokens + 1)))
            pool.append(one.ask_again(tokens, seed))
            say(f"  {one.name} {seed + 1}/{prompts}: disk {disk[-1].ttft_s:.3f} s, memory {pool[-1].ttft_s:.3f} s")
    return disk, pool


def raw_read(tokens: int) -> float:
    """Seconds that bare preadv takes for the records of one prompt, as the tier reads them: the device's own share."""
    found = [path for path in sorted((DISK / "kvkeep").rglob("*")) if len(path.name) == 64]
    files = found[: tokens // CHUNK_TOKENS]
    nbytes = files[0].stat().st_size
    with Region.create(nbytes * len(files)) as region, ThreadPoolExecutor(READERS) as threads:
        region.populate(0, region.nbytes)

        def read(number: int) -> None:
            fd = os.open(files[number], os.O_RDONLY | os.O_DIRECT)
            got = os.preadv(fd, [region.array[number * nbytes : (number + 1) * nbytes].data], 0)
            os.close(fd)
            assert got == nbytes

        drop_page_cache()
        return seconds(lambda: list(threads.map(read, range(len(files)))))


def drop_page_cache() -> None:
    """Forgets clean pages of all files; says so where that is not allowed."""
    os.sync()
    try:
        DROP.write_text("1")
    except OSError as error:
        say(f"  the page cache stays: {error}")


def rows(options: argparse.Namespace) -> list[Row]:
    """One row for each comparison."""
    both = sides(options)
    shutil.rmtree(DISK, ignore_errors=True)
    DISK.mkdir(parents=True)
    for name, side in both.items():
        say(f"{name}: storing")
        stored(side, options.tokens, options.prompts)
    found: dict[str, tuple[list[Asked], list[Asked]]] = {name: ([], []) for name in both}
    raw: list[float] = []
    for turn in range(options.restarts):
        for name, side in both.items():
            say(f"{name}: restart {turn + 1}/{options.restarts}")
            disk, pool = answered(side, options.tokens, options.prompts)
            found[name][0].extend(disk)
            found[name][1].extend(pool)
        raw += [raw_read(options.tokens) for _ in range(options.prompts)]
    case = f"ttft-{options.tokens // 1024}k-restart"
    made = [times(Case(f"{case}-vs-pool", "s", "kvkeep, warm from the pool", goal="<= 1.3"), *found["kvkeep"])]
    device = Case(f"{case}-raw-read", "s", "kvkeep, warm from the pool")
    made.append(device.row(raw, [one.ttft_s for one in found["kvkeep"][1]]))
    if "lmcache" in found:
        versus = Case(f"{case}-vs-lmcache", "s", "LMCache 0.5.6, from its fs adapter", goal="<= 0.6")
        made.insert(0, times(versus, found["kvkeep"][0], found["lmcache"][0]))
    shutil.rmtree(DISK, ignore_errors=True)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=BUILD / "models" / "bench")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--peer-venv", type=Path, default=BUILD / "peer-venv")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options: Any = parser.parse_args()
    if not options.model.exists():
        subprocess.run([sys.executable, str(ROOT / "scripts" / "models.py"), "bench"], check=True)
    made = rows(options)
    write(made, options.json)
    show(made, f"time to first token after a restart, {options.dtype}")


if __name__ == "__main__":
    main()
