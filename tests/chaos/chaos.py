"""`make chaos`: kill -9 and SIGSTOP of store, engines and ranks at random moments under load, for some minutes.

Two fake engines of two ranks each (they check every byte after every step) over one shared store with a disk tier, to
whose files others do what they like. Ends with 1 if an answer was wrong, a request hung, a byte leaked, anything was
left behind, or the disk is over its limit or not in use any more.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import xxhash
from disk_trouble import LIMIT_NBYTES, DiskTrouble

from kvkeep.config import Config, Disk
from kvkeep.errors import KVKeepError
from kvkeep.testing.fake_engine.engine_process import CHUNK_NBYTES, Ask, EngineProcess, right_tokens
from kvkeep.testing.fake_engine.rank_process import RANK_DIED
from kvkeep.wire import messages as m
from kvkeep.wire.client import Client, Joining
from kvkeep.wire.start import join_shared

POOL_CHUNKS = 24
ENGINES = 2
HANG_S = 10.0  # an answer takes milliseconds; past this beyond its own stop it hangs
STOP_S = 0.8
PAUSE_S = (0.2, 1.5)
VICTIMS = ("store", "engine", "rank", "stop store", "stop engine", "stop rank", *(["disk"] * 4))
NEW_NBYTES = 4096  # a chunk of the one who asks at the end whether the disk is in use
ALIVE_S = 120.0  # a tier that failed again and again is tried after a minute at most


@dataclass
class Account:
    """What happened: `wrong` must stay empty."""

    counts: Counter[str] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def prompts(rng: random.Random) -> Iterator[tuple[int, ...]]:
    """Prompts that share stems of 8 to 24 tokens; more of them than the pool holds."""
    while True:
        stem, length = rng.randrange(12), rng.choice((8, 16, 24))
        branch = rng.randrange(6)
        tail = rng.randrange(1, 12)
        yield (*(stem * 100 + n for n in range(length)), *(10_000 + branch * 100 + n for n in range(tail)))


@dataclass
class ChaosStore:
    """The shared store: started again whenever it is killed."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        return self.folder / "run" / "store"

    @property
    def trouble(self) -> DiskTrouble:
        return DiskTrouble(self.folder)

    def start(self) -> None:
        (self.folder / "run").mkdir(mode=0o700, exist_ok=True)
        (self.folder / "disk").mkdir(mode=0o700, exist_ok=True)
        disk = Disk(path=(str(self.folder / "disk"),), size=LIMIT_NBYTES, min_free=0)
        options = Config(pool_size=POOL_CHUNKS * CHUNK_NBYTES, lease_time_s=0.5, log_level="error", tiers=[disk])
        self.process = subprocess.Popen(
            [
                *(sys.executable, str(Path(__file__).with_name("stopping_store.py")), str(self.trouble.flag)),
                f"--socket={self.path}",
                f"--options={options.json()}",
            ]
        )

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> int:
        """As an operator ends it; its status."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(30.0)

    def client(self) -> Client:
        hello = m.Hello(
            name="chaos",
            namespace=b"chaos" + bytes(11),
            identity="",
            chunk_nbytes=NEW_NBYTES,
            holders=[],
            sizes=[NEW_NBYTES],
        )
        return Joining(join_shared(str(self.path), 5.0), hello).wait(5.0)

    def figures(self) -> dict[str, int]:
        client = self.client()
        answer = client.wait(client.stats(check=True), 5.0)
        client.close()
        assert isinstance(answer, m.Stats), client.why_gone
        assert answer.problem == "", answer.problem
        return answer.figures


@dataclass
class Driver(threading.Thread):
    """Keeps one engine under load and starts it again when it is gone."""

    path: str
    temporary: str
    seed: int
    account: Account
    ending: threading.Event
    engine: EngineProcess | None = None

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        rng = random.Random(self.seed)
        asks = (
            Ask(f"r{n}", prompt, rng.randrange(1, 5), "", rng.random() < 0.8) for n, prompt in enumerate(prompts(rng))
        )
        while not self.ending.is_set():
            engine = EngineProcess(self.path, {"TMPDIR": self.temporary})
            try:
                engine.start()
                self.engine = engine
                while not self.ending.is_set():
                    self._one(engine, next(asks))
            except (EOFError, BrokenPipeError):
                status = engine.process.wait()
                self.account.counts["engine starts"] += 1
                if status not in (-signal.SIGKILL, RANK_DIED, 0):
                    self.account.wrong.append(f"an engine ended with {status}: see its output")
            except TimeoutError as error:
                self.account.wrong.append(f"hang: {error}")
                self.ending.set()
            finally:
                self.engine = None
                with suppress(BrokenPipeError):
                    engine.end()

    def _one(self, engine: EngineProcess, ask: Ask) -> None:
        engine.ask(ask)
        told = engine.answer(HANG_S)
        self.account.counts["answers"] += 1
        self.account.counts["external tokens"] += told.external
        self.account.took_s.append(told.took_s)
        if told.tokens != right_tokens(ask):
            self.account.wrong.append(f"{ask} was answered with {told.tokens}")


def strike(rng: random.Random, store: ChaosStore, drivers: list[Driver], account: Account) -> None:
    """Kills or stops one process, or does something to the disk."""
    what = rng.choice(VICTIMS)
    if what == "disk":
        account.counts[store.trouble.strike(rng)] += 1
        return
    engine = rng.choice(drivers).engine
    pid = 0
    if what.endswith("store"):
        assert store.process is not None
        pid = store.process.pid
    elif engine is not None and engine.process.poll() is None:
        pid = engine.process.pid if what.endswith("engine") else rng.choice(engine.ranks)
    if not pid:
        return
    account.counts[what if what.startswith("stop") else f"kill {what}"] += 1
    if what == "store":
        store.kill()
        time.sleep(rng.choice((0.0, 0.5)))
        store.start()
        return
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP if what.startswith("stop") else signal.SIGKILL)
        if what.startswith("stop"):
            time.sleep(rng.uniform(0.05, STOP_S))
            os.kill(pid, signal.SIGCONT)


def settled(store: ChaosStore, account: Account) -> dict[str, int]:
    """The store's figures once every engine is gone; whatever is still held then has leaked."""
    end_s, now = time.monotonic() + 20.0, {}
    while time.monotonic() < end_s:
        with suppress(KVKeepError):
            now = store.figures()
            held = [name for name in ("pinned", "writing", "dead", "quarantined") if now[f"{name}_nbytes"]]
            if not held and now["sessions"] == 1 and not now["lingering"]:
                return now
        time.sleep(0.1)
    account.wrong.append(f"still held by nobody: {now}")
    return now


def is_written(store: ChaosStore, digest: bytes, limit_s: float) -> bool:
    """Stores a new chunk; whether the disk has it within the limit."""
    before, client = store.figures(), store.client()
    granted = client.wait(client.reserve([digest]), 5.0)
    assert isinstance(granted, m.Granted), client.why_gone
    if granted.lease:
        os.pwrite(client.pool_fd, digest * (NEW_NBYTES // 32), granted.offsets[0])
    sums = xxhash.xxh3_128_digest(digest * (NEW_NBYTES // 32))
    client.wait(client.commit(granted.lease, [0], [sums]), 5.0)
    client.close()
    end_s = time.monotonic() + limit_s
    while time.monotonic() < end_s:
        if store.figures().get("disk_flush_stored", 0) > before.get("disk_flush_stored", 0):
            return True
        time.sleep(0.05)
    return False


def check_disk(store: ChaosStore, account: Account) -> None:
    """The disk is within its limit and in use: what is stored now is written, and found after a restart."""
    digests = (random.randbytes(32) for _ in iter(int, 1))
    end_s, digest = time.monotonic() + ALIVE_S, next(digests)
    while not is_written(store, digest, 1.0):  # a tier that is left alone drops what it gets
        if time.monotonic() > end_s:
            account.wrong.append(f"nothing is written to the disk any more: {store.figures()}")
            return
        digest = next(digests)
    if (status := store.end()) != 0:
        account.wrong.append(f"the store ended with {status}")
    if (nbytes := store.trouble.nbytes()) > LIMIT_NBYTES:
        account.wrong.append(f"{nbytes} bytes are on a disk limited to {LIMIT_NBYTES}")
    store.start()
    end_s = time.monotonic() + 20.0
    while time.monotonic() < end_s:
        with suppress(KVKeepError):
            client = store.client()
            found = client.wait(client.fetch([digest], 5.0), 10.0)
            client.close()
            if isinstance(found, m.Matched) and found.sources == {"disk": 1}:
                return
        time.sleep(0.1)
    account.wrong.append("what was written last is not found after a restart")


def pools_left() -> list[str]:
    """Processes of ours that still map a pool."""
    left = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            environ = (maps.parent / "environ").read_bytes()
            if b"KVKEEP_CHAOS=" + str(os.getpid()).encode() in environ and "kvkeep-pool" in maps.read_text():
                left.append(maps.parent.name)
    return [pid for pid in left if pid != str(os.getpid())]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    print(f"seed {asked.seed}", flush=True)
    os.environ["KVKEEP_CHAOS"] = str(os.getpid())
    folder = Path(tempfile.mkdtemp(prefix="kvkeep-chaos-"))
    (folder / "tmp").mkdir()
    rng, account, ending = random.Random(asked.seed), Account(), threading.Event()
    store = ChaosStore(folder)
    store.start()
    drivers = [
        Driver(str(store.path), str(folder / "tmp"), asked.seed + n + 1, account, ending) for n in range(ENGINES)
    ]
    for driver in drivers:
        driver.start()
    end_s = time.monotonic() + 60 * asked.minutes
    while time.monotonic() < end_s and not account.wrong and not ending.is_set():
        time.sleep(rng.uniform(*PAUSE_S))
        strike(rng, store, drivers, account)
    ending.set()
    for driver in drivers:
        driver.join(60.0)
        if driver.is_alive():
            account.wrong.append("an engine did not come to its end")
    store.trouble.end()
    now = settled(store, account)
    check_disk(store, account)
    if (status := store.end()) != 0:
        account.wrong.append(f"the store ended with {status}")
    if left := pools_left():
        account.wrong.append(f"processes {left} still map a pool")
    took_s = sorted(account.took_s) or [0.0]
    report = {
        "seed": asked.seed,
        "minutes": asked.minutes,
        **account.counts,
        "slowest answer (s)": round(took_s[-1], 3),
        "median answer (s)": round(took_s[len(took_s) // 2], 4),
        "chunks in the last pool": now.get("chunks", 0),
        "disk stored since the last start": now.get("disk_stored", 0),
        "wrong": account.wrong,
    }
    print(json.dumps(report, indent=1))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    return 1 if account.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
