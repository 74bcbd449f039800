"""Faults below a real engine, one after another, for each way of copying: `faults.py MODEL kvkeep 1`; facts as JSON.

One process for a model: first an engine without kvkeep (the right answers), then one for each way. The store is a
process of its own (`faulty_store.py`), on a disk of its own. Knows nothing about what the facts ought to be.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from hazards import Run, prompt
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

from kvkeep.core.identity import namespace
from kvkeep.core.key import Chain, none_hash
from kvkeep.engine.copies.copies import Kind
from kvkeep.engine.scheduler.estimate import Estimate
from kvkeep.telemetry import by_flat_name
from kvkeep.testing.doubles.faulty_files import flip_bit
from kvkeep.testing.doubles.transfers import FaultyTransfer

QUARTER = 256  # tokens; a chunk, or two of them
LONG = prompt(11, 4 * QUARTER + 90)
WHOLE = LONG[: 4 * QUARTER]  # its last block has room for the token that is always computed
SMALL = prompt(12, 100)  # never kept: what becomes of the others must not touch it
NEW = [prompt(20 + number, 2 * QUARTER + 40) for number in range(2)]
POOL_NBYTES = 64 << 20
LIMIT_S = 30.0
LATE_S = 3.0
ONE_GROUP = {
    "bulk": {"load": "sync", "transfer_mode": "bulk"},
    "layerwise": {"load": "sync", "transfer_mode": "layerwise"},
    "async": {"load": "async", "transfer_mode": "bulk"},
}
SEVERAL = {
    "async": {"load": "async", "transfer_mode": "bulk"},
    "layerwise": {"load": "async", "transfer_mode": "layerwise"},
}
WAYS = {"tiny": ONE_GROUP, "hybrid": SEVERAL, "lfm2": SEVERAL}
OPTIONS = {
    "lfm2": {"max_num_batched_tokens": 2 * QUARTER, "block_size": 128}
}  # where a step ends it leaves a state: two in LONG


class StoreProcess:
    """The store of one engine, killed and started again as the cases want it."""

    def __init__(self, folder: Path) -> None:
        self.socket, self.disk = folder / "store", folder / "disk"
        self.disk.mkdir()
        self.start()

    def start(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("faulty_store.py"))]
        command += [str(self.socket), str(self.disk), str(POOL_NBYTES)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout.readline() == "ready\n"

    def tell(self, **command: object) -> object:
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def kill(self) -> None:
        """kill -9 of the process that we started; returns when it is gone."""
        self.process.kill()
        self.process.wait(LIMIT_S)


class Faulted(Run):
    """An engine over a store of our own."""

    def __init__(self, model: str, folder: Path, way: dict[str, str]) -> None:
        self.store = StoreProcess(folder)
        super().__init__(model, True, 1, OPTIONS.get(Path(model).name), store=f"unix:{self.store.socket}", **way)
        self.half = get_kv_transfer_group().worker
        transfers = self.half.copies.transfers
        self.inner, self.of_states = transfers[Kind.CHUNK], transfers.get(Kind.STATE)
        self.chunks = len(WHOLE) // self.inner.shard.chunk_tokens
        # what was never measured refuses nothing: these models compute faster than anything can be read
        self.connector.planner._lookups._estimate = Estimate()

    # ---- what is asked

    def finish(self) -> None:
        """Steps until every request has ended, for a bounded time."""
        end_s = time.monotonic() + LIMIT_S
        while self.engine.has_unfinished_requests():
            assert time.monotonic() < end_s, "a request does not end"
            self.step()

    def measured(self, *prompts: list[int]) -> dict[str, object]:
        """The answers to prompts that come at the same time, and what rose meanwhile.

        With recurrent states one comes after the other: vLLM's own answers of LFM2 on a CPU depend on who else runs.
        """
        before, names = self.accounts(), []
        for one in prompts:
            names.append(self.add(one))
            if self.of_states is not None:
                self.finish()
        self.finish()
        after = self.accounts()  # a tier is counted from its first chunk on
        rise = {name: count - before.get(name, 0) for name, count in after.items() if count != before.get(name, 0)}
        ends = [self.reasons[name] for name in names]
        return {"tokens": [self.answers[name] for name in names], "ends": ends, "rise": rise}

    def accounts(self) -> dict[str, int]:
        """kvkeep's figures and what vLLM counts as its hits."""
        external = [one.value for one in self.llm.get_metrics() if one.name == "vllm:external_prefix_cache_hits"]
        return {**by_flat_name(self.connector.figures.rows()), "external": int(sum(external))}

    def held(self) -> dict[str, object]:
        """What is still in use when nothing should be, after whatever was under way."""
        stats = self.settled()
        names = ("pinned_nbytes", "writing_nbytes", "dead_nbytes", "quarantined_nbytes", "problem")
        pool = self.scheduler.kv_cache_manager.block_pool
        left = {"blocks": pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()}
        return {name: value for name, value in {**{one: stats[one] for one in names}, **left}.items() if value}

    # ---- the store

    def settled(self) -> dict[str, object]:
        """The store's figures once it writes and reads nothing any more."""
        end_s = time.monotonic() + LIMIT_S
        while True:
            stats = self.stats()
            if not any(stats[f"disk_{one}"] for one in ("flush_waiting", "under_way_nbytes", "quarantined_nbytes")):
                return stats
            assert time.monotonic() < end_s, stats
            time.sleep(0.01)

    def reconnect(self) -> None:
        """The store is there again and the engine has found it."""
        link, end_s = self.connector.planner._link, time.monotonic() + LIMIT_S
        while link.client is None or link.client.welcome.pid != self.store.process.pid:
            if link.client is not None:
                link.client.pump()  # the end of the last one is only seen by who looks
            link.live(idle=True)
            assert time.monotonic() < end_s, "the store was not found again"
            time.sleep(0.01)

    def revive(self) -> None:
        """A new store over the same disk."""
        self.store.kill()
        self.store.start()
        self.reconnect()

    def awaits_pools(self, count: int) -> None:
        """Returns when the engine's process, which has the worker in it, maps so many stores' pools."""
        end_s = time.monotonic() + LIMIT_S
        while Path("/proc/self/maps").read_text().count("kvkeep-pool") != count:
            assert time.monotonic() < end_s, f"{count} pools should be mapped"
            time.sleep(0.01)

    def only_on_disk(self) -> None:
        """Nothing is in the pool, nor in vLLM's own cache."""
        self.settled()
        self.store.tell(drop=1)
        self.forget()

    def kept(self, tokens: list[int]) -> None:
        """Nothing is kept but this prompt, on disk and in the pool; no failure is remembered."""
        self.forget()
        self.store.tell(clear=1)
        self.connector.planner._lookups._failed.clear()
        self.ask(tokens)
        self.settled()
        assert all(self.record(number).exists() for number in range(4))
        self.forget()

    def record(self, quarter: int) -> Path:
        """The file of the first chunk of this quarter of LONG."""
        return self._file(self.place(quarter))

    def state_record(self) -> Path:
        """The file of the last state."""
        chunk = self._file(self.chunks - 1)
        (found,) = [one for one in self.store.disk.glob(f"*/{chunk.parent.name}/{chunk.name}") if one != chunk]
        return found

    def place(self, quarter: int) -> int:
        """The number of a quarter's first chunk."""
        return quarter * self.chunks // 4

    def _file(self, number: int) -> Path:
        digest = Chain(self.inner.shard.chunk_tokens, none_hash()).extend(LONG)[number].hex()
        return self.store.disk / namespace(self.connector.identity).hex() / digest[:2] / digest

    # ---- hooks that take themselves away

    def once(self, owner: object, name: str, number: int, act: Callable[[], None]) -> None:
        """Before call `number` (from 0) of a method `act` runs."""
        real, calls = getattr(owner, name), 0

        def hooked(*arguments: object, **named: object) -> object:
            nonlocal calls
            if calls == number:
                act()
            calls += 1
            return real(*arguments, **named)

        setattr(owner, name, hooked)

    def use(self, transfer: object, of_states: object = None) -> None:
        """The rank copies with these."""
        self.half.copies.transfers[Kind.CHUNK] = transfer
        if self.of_states is not None:
            self.half.copies.transfers[Kind.STATE] = of_states or self.of_states

    def unhook(self) -> None:
        """Everything is as it was."""
        for owner, name in ((self.connector, "build_connector_meta"), (self.half, "start_loads")):
            owner.__dict__.pop(name, None)
        self.use(self.inner)
        self.scheduler.recompute_kv_load_failures = True
        self.connector.planner._lookups._deadline_s = 20.0


# ---- faults of the tier: what it does to a run whose prompt is only on disk


def reads_fail(*quarters: int) -> Callable[[Faulted], None]:
    return lambda run: run.store.tell(fail=[str(run.record(one)) for one in quarters])


def flipped(quarter: int, place: float) -> Callable[[Faulted], None]:
    return lambda run: flip(run.record(quarter), place)


def flip(path: Path, place: float) -> None:
    """One bit of a record; `place` is a share of its length."""
    flip_bit(str(path), int(path.stat().st_size * 8 * place))


def cut_short(run: Faulted) -> None:
    os.truncate(run.record(3), run.record(3).stat().st_size // 2)


def another_s(run: Faulted) -> None:
    """A whole record, but of another chunk."""
    octets = run.record(0).read_bytes()
    run.record(2).write_bytes(octets)


def removed(run: Faulted) -> None:
    run.record(1).unlink()


def late(run: Faulted) -> None:
    run.connector.planner._lookups._deadline_s = LATE_S
    run.store.tell(hang=True)


TIER = {
    "the first read fails": reads_fail(0),
    "a middle read fails": reads_fail(2),
    "the last read fails": reads_fail(3),
    "every read fails": reads_fail(0, 1, 2, 3),
    "a bit of a range": flipped(2, 0.6),
    "a bit of the last range's end": flipped(3, 0.999),
    "a bit of the header": flipped(0, 0.0005),
    "torn": cut_short,
    "another chunk's record": another_s,
    "gone": removed,
    "late": late,
}
TIER_OF_STATES = {
    "the state's read fails": lambda run: run.store.tell(fail=[str(run.state_record())]),
    "a bit of the state": lambda run: flip(run.state_record(), 0.6),
    "the state is gone": lambda run: run.state_record().unlink(),
}


def of_the_tier(run: Faulted, name: str) -> dict[str, object]:
    """With the fault, then without it, then all from disk again."""
    run.only_on_disk()
    {**TIER, **TIER_OF_STATES}[name](run)
    facts: dict[str, object] = {"with it": run.measured(LONG, SMALL)}
    run.unhook()
    run.store.tell(fail=[])
    run.store.tell(hang=False)
    run.settled()
    run.forget()
    facts["after it"] = run.measured(LONG)
    run.only_on_disk()
    return facts | {"from disk": run.measured(LONG), "held": run.held()}


# ---- a read that hangs while others go on


def of_a_hang(run: Faulted, name: str) -> dict[str, object]:
    """The first chunk's read hangs; its prompt is asked for again and again, then another one, then all of it goes on."""
    run.ask(NEW[0])
    run.only_on_disk()
    run.connector.planner._lookups._deadline_s = LATE_S
    run.store.tell(hang=[str(run.record(0))])
    facts: dict[str, object] = {"first": run.measured(LONG)}
    for part in ("second", "third"):
        run.store.tell(drop=1)  # what was computed meanwhile has come into the pool
        run.forget()
        facts[part] = run.measured(LONG)
    run.forget()
    facts["kept"] = run.measured(LONG)
    end_s = time.monotonic() + LIMIT_S
    while "another" not in facts or facts["another"]["rise"].get("external", 0) == 0:
        assert time.monotonic() < end_s, "the tier is left alone for good"
        time.sleep(0.2)  # it is tried again after a pause
        run.store.tell(drop=1)
        run.forget()
        facts["another"] = run.measured(NEW[0])
    facts["hung"] = run.stats()["disk_quarantined_nbytes"]
    run.unhook()
    run.store.tell(hang=False)
    run.only_on_disk()
    return facts | {"from disk": run.measured(LONG), "held": run.held()}


# ---- a store that is lost


def before_the_lookup(run: Faulted) -> None:
    run.store.kill()


def in_the_lookup(run: Faulted) -> None:
    run.store.tell(die=str(run.record(2)))


def after_the_promise(run: Faulted) -> None:
    run.once(run.connector, "build_connector_meta", 0, run.store.kill)


def replaced(run: Faulted) -> None:
    """Between promise and load it is gone and another one is there, with a pool of its own."""

    def act() -> None:
        run.store.kill()
        run.store.start()
        run.reconnect()

    run.once(run.connector, "build_connector_meta", 0, act)


def in_mid_load(run: Faulted) -> None:
    transfer = FaultyTransfer(run.inner)
    run.once(transfer, "scatter", 2, run.store.kill)
    run.use(transfer)


def in_mid_store(run: Faulted) -> None:
    transfer = FaultyTransfer(run.inner)
    run.once(transfer, "gather", 1, run.store.kill)
    run.use(transfer)


LOST = {
    "before the lookup": before_the_lookup,
    "in the lookup": in_the_lookup,
    "after the promise": after_the_promise,
    "replaced after the promise": replaced,
    "in mid-load": in_mid_load,
    "in mid-store": in_mid_store,
}


def of_the_store(run: Faulted, name: str) -> dict[str, object]:
    """The store is lost, the engine goes on without it, then with a new one, all of it from disk."""
    run.only_on_disk()
    LOST[name](run)
    asked = NEW[0] if name == "in mid-store" else LONG
    facts: dict[str, object] = {"with it": run.measured(asked, SMALL)}
    run.unhook()
    run.forget()
    if name != "replaced after the promise":
        facts["without"] = run.measured(NEW[1])
        run.awaits_pools(0)  # of a store that has ended, though no step runs
        run.revive()
        run.forget()
    facts["after it"] = run.measured(asked)
    run.awaits_pools(1)
    run.only_on_disk()
    return facts | {"from disk": run.measured(LONG), "held": run.held()}


# ---- loads that fail after the promise: of the first chunks of these quarters, or None: one layer of one chunk

LOADS = {
    "first": (LONG, [0]),
    "middle": (LONG, [2]),
    "last": (LONG, [3]),
    "all": (LONG, [0, 1, 2, 3]),
    "last, written": (WHOLE, [3]),
    "one layer": (LONG, None),
    "fail": (LONG, [1]),
}
LOADS_OF_STATES = {"the state": (LONG, [])}


def of_a_load(run: Faulted, name: str) -> dict[str, object]:
    """What was promised does not arrive; then it is asked for again."""
    tokens, quarters = {**LOADS, **LOADS_OF_STATES}[name]
    run.kept(tokens)
    faulty = FaultyTransfer(run.inner)
    of_states = FaultyTransfer(run.of_states) if run.of_states is not None else None
    if quarters is None:  # the calls go layer by layer, in each of them chunk by chunk
        faulty.failing_calls = {run.chunks * (len(run.inner.shard.ranges) - 1) + 1}
    if name == "the state":
        of_states.failing_calls = {0}
    run.use(faulty, of_states)
    start, due = run.half.start_loads, [[run.place(one) for one in quarters or []]]

    def start_loads(plan: object) -> None:
        """The first loads that come fail, those of the request that starts over do not."""
        ops = [*plan.loads, *(op for trip in plan.trips for op in trip.loads)]
        if ops:
            blocks = [one for place in (due.pop() if due else []) for one in ops[place].blocks]
            faulty.failing_blocks = {block for one in blocks for block in one.block_ids}
        start(plan)

    run.half.start_loads = start_loads
    run.scheduler.recompute_kv_load_failures = name != "fail"
    facts: dict[str, object] = {
        "with it": run.measured(tokens, SMALL),
        "failures": faulty.failures + (of_states.failures if of_states is not None else 0),
    }
    run.unhook()
    run.forget()
    return facts | {"after it": run.measured(tokens), "held": run.held()}


CASES = {
    "tier": (of_the_tier, TIER, TIER_OF_STATES),
    "hang": (of_a_hang, {"a read": None}, {}),
    "store": (of_the_store, LOST, {}),
    "load": (of_a_load, LOADS, LOADS_OF_STATES),
}
"""By kind: what runs a case, the cases, those of a model with recurrent states."""


def one_way(model: str, way: str, folder: Path) -> dict[str, object]:
    """Every case on one engine."""
    options = WAYS[Path(model).name][way]
    by_layer = options["load"] == "sync" and options["transfer_mode"] == "layerwise"
    run = Faulted(model, folder, options)
    facts: dict[str, object] = {}
    before = run.accounts()
    for kind, (case, names, of_states) in CASES.items():
        run.kept(LONG)
        for name in [*names, *(of_states if run.of_states is not None else ())]:
            if name != "one layer" or by_layer:
                facts[f"{kind}: {name}"] = case(run, name)
    totals = {name: count - before.get(name, 0) for name, count in run.accounts().items()}
    run.engine.engine_core.shutdown()
    run.store.kill()
    return {"cases": facts, "totals": totals}


def right_answers(model: str) -> dict[str, object]:
    """Of an engine without kvkeep."""
    run = Run(model, False, 1, OPTIONS.get(Path(model).name))
    names = {"long": LONG, "whole": WHOLE, "small": SMALL, "new 0": NEW[0], "new 1": NEW[1]}
    found = {name: (run.ask(tokens), run.forget())[0] for name, tokens in names.items()}
    run.engine.engine_core.shutdown()
    return found


def main() -> None:
    model = sys.argv[1]
    facts: dict[str, object] = {"right": right_answers(model)}
    for way in WAYS[Path(model).name]:
        cleanup_dist_env_and_memory()
        with tempfile.TemporaryDirectory() as folder:
            facts[way] = one_way(model, way, Path(folder))
    print("FACTS " + json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
