"""A small paged engine that plays vLLM against a real Planner and real Workers, and checks every byte.

It schedules as vLLM's V1 does: a token budget, chunked prefill, decode, preemption of the youngest, a prefix cache of
its own that knows a synchronous load's blocks as soon as they are allocated, sliding windows that give blocks up, loads
beside the steps where there are several groups. Torch is needed only because `ReferenceTransfer` takes tensors. Knows
nothing about the store beyond the link that it hands to the planner.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from kvkeep.core.key import Chain, none_hash
from kvkeep.core.layout import ChunkLayout
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.copies.mode import CopyMode
from kvkeep.engine.link import Link, StoreSource, hello_of
from kvkeep.engine.plan import Report, Scheduled
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Worker
from kvkeep.engine.scheduler.lookups import Request
from kvkeep.engine.scheduler.planner import Planner, PlannerOptions
from kvkeep.telemetry import Figures
from kvkeep.testing.fake_engine.blocks import FakeBlocks
from kvkeep.testing.fake_engine.check import check_chunk, check_table
from kvkeep.testing.fake_engine.model import FakeModel, Values
from kvkeep.testing.fake_engine.rank_process import RankProcess
from kvkeep.testing.fake_engine.request import EngineShape, FakeRequest, Phase
from kvkeep.transfer.cpu import ReferenceTransfer
from kvkeep.transfer.pages import GroupCaches
from kvkeep.transfer.transfer import Transfer
from kvkeep.wire.messages import Hello, Matched
from kvkeep.wire.pool_socket import PoolDoor

START_LIMIT_S = 10.0
ANSWER_LIMIT_S = 10.0
NAMESPACE = b"fake engine's ns"

Wrap = Callable[[int, Transfer], Transfer]
MakeRank = Callable[[int, Transfer, PoolDoor, CopyMode], Worker | RankProcess]
MakeTransfer = Callable[[Sequence[GroupCaches], int], Transfer]


def rank_here(rank: int, transfer: Transfer, door: PoolDoor, choice: CopyMode) -> Worker:
    """A rank's half in this process, whose copies end at once."""
    return Worker(rank, CpuCopies(transfer, mode=choice), MappedPool(door))


class FakeEngine:
    """An engine of `shape` over the store of `source`; `wrap` may put a double around a rank's transfer.

    `rank` makes a rank's half, in this process or in one of its own, `transfer` what copies for it.
    """

    def __init__(
        self,
        shape: EngineShape,
        source: StoreSource,
        options: PlannerOptions | None = None,
        wrap: Wrap = lambda _, transfer: transfer,
        rank: MakeRank = rank_here,
        transfer: MakeTransfer = ReferenceTransfer,
    ) -> None:
        self.shape = shape
        self.model = FakeModel(shape.groups, shape.ranks, shape.num_blocks)
        self.blocks = FakeBlocks(shape.num_blocks)
        self.requests: dict[str, FakeRequest] = {}
        self.waiting: list[FakeRequest] = []
        self.running: list[FakeRequest] = []
        self.failed_loads = 0
        self.external_tokens = 0
        self._arrived: dict[str, list[bool]] = {}
        transfers = [wrap(n, transfer(self._groups(n), shape.chunk_tokens)) for n in range(shape.ranks)]
        doors = [PoolDoor() for _ in transfers]
        mode = CopyMode("layerwise" if shape.layerwise else "bulk", possible=True)
        self.workers = [rank(n, *pair, mode) for n, pair in enumerate(zip(transfers, doors, strict=True))]
        self.pids = [os.getpid(), *(worker.pid for worker in self.workers if isinstance(worker, RankProcess))]
        self.layers = list(transfers[0].shard.range_indexes)  # the same names on every rank
        self.layout = ChunkLayout(tuple(transfer.shard for transfer in transfers))
        self.link = Link(source, self._hello, [door.path for door in doors])
        self.link.start(START_LIMIT_S)
        options = options or PlannerOptions(beside_steps=shape.fails_whole)
        self.planner = Planner(self.link, self.layout, options, Figures())

    # ---- what a test does ----------------------------------------------------------------------------------

    def add(self, name: str, prompt: Sequence[int], generate: int = 1) -> FakeRequest:
        """A new request, waiting."""
        request = FakeRequest(name, tuple(prompt), generate, list(prompt))
        self.requests[name] = request
        self.waiting.append(request)
        self.planner.expect(self._asked(request))
        return request

    def abort(self, name: str) -> None:
        """The user went away: the request ends between two steps. One that is done already is left alone."""
        request = self.requests[name]
        if request.phase is Phase.LOADING:  # the engine keeps its blocks until the load has ended
            request.phase = Phase.GIVEN_UP
            self.planner.end(name)
        elif request.phase not in (Phase.GIVEN_UP, Phase.DONE):
            self._end(request)

    def preempt(self) -> None:
        """Takes the youngest running request's blocks away, as if there were no room."""
        if self.running:
            self._preempt(self.running[-1])

    def step(self) -> None:
        """Schedules, plans, loads, computes, stores, takes in what came of it, and checks every block."""
        counts: dict[FakeRequest, int] = {}
        if self._schedule_running(counts):
            self._schedule_waiting(counts)
        scheduled = [
            Scheduled(asked.name, min(asked.computed + count, len(asked.tokens)), asked.tokens, asked.computed)
            for asked, count in counts.items()
        ]
        plan = self.planner.plan_step(scheduled, lambda name: self.requests[name].tables)
        for worker in self.workers:
            worker.before_writes()
            worker.start_loads(plan)
        self._wait_for_layers(counts)
        for request, count in counts.items():
            self.model.forward(request.tokens, (request.computed, request.computed + count), request.tables)
            request.computed += count
        for worker in self.workers:
            for name in self.layers:
                worker.save_layer(plan, name)
            worker.start_stores(plan)
            worker.poll(plan)
        self._take_in(counts)
        self.check()

    def run(self, max_steps: int = 1000) -> None:
        """Steps until every request is done."""
        for _ in range(max_steps):
            if not self.waiting and not self.running:
                return
            self.step()
        left = [request.name for request in self.waiting + self.running]
        raise AssertionError(f"not done after {max_steps} steps: {left}")

    def close(self) -> None:
        """Ends the session and the workers."""
        self.planner.close()
        for worker in self.workers:
            worker.close()

    def _wait_for_layers(self, counts: dict[FakeRequest, int]) -> None:
        """Every layer is waited for; no load may come so late that it would overwrite what this step has written."""
        before = self._open_blocks(counts)
        for worker in self.workers:
            for name in self.layers:
                worker.wait_layer(name)
        for old, new in zip(before, self._open_blocks(counts), strict=True):
            assert (old == new).all(), "a block that the step writes was loaded late"

    def _open_blocks(self, ran: Iterable[FakeRequest]) -> list[Values]:
        return [block for request in ran for block in self.model.open_blocks(request.computed, request.tables)]

    # ---- what it checks ------------------------------------------------------------------------------------

    def check(self) -> None:
        """AssertionError unless every block that is believed to be computed equals recomputation, as integers."""
        for (group, prefix), block_id in self.blocks.cached.items():
            held = self.model.caches[group][..., block_id, :]
            right = self.model.expected_block(group, prefix)
            assert (held == right).all(), f"cached block {block_id} of group {group} ends {prefix} and is wrong"
        for request in self.running:
            for group in range(len(self.shape.groups)):
                check_table(self.model, request, group)

    def check_pool(self, pool: npt.NDArray[np.uint8]) -> int:
        """Reads every chunk of its requests that the store gives out; how many of them were checked byte for byte."""
        client = self.link.client
        assert client is not None, "the store is lost"
        checked = 0
        for request in self.requests.values():
            digests = Chain(self.layout.chunk_tokens, none_hash()).extend(request.tokens)
            answer = client.wait(client.fetch(digests), ANSWER_LIMIT_S)
            assert isinstance(answer, Matched), "the store does not answer"
            for number, offset in enumerate(answer.offsets):
                prefix = tuple(request.tokens[: (number + 1) * self.layout.chunk_tokens])
                check_chunk(self.model, self.layout, pool[offset:], prefix)
            checked += len(answer.offsets)
            client.release(answer.lease)
        return checked

    # ---- scheduling ----------------------------------------------------------------------------------------

    def _schedule_running(self, counts: dict[FakeRequest, int]) -> bool:
        """Gives running requests their tokens; False if one had to be preempted: then nothing is admitted."""
        nobody_lost = True
        for request in list(self.running):
            if request not in self.running:
                continue
            count = min(self._budget(counts), len(request.tokens) - request.computed)
            while count and not self._allocate(request, request.computed, request.computed + count):
                nobody_lost = False
                victim = self.running[-1]
                self._preempt(victim)
                if victim is request:
                    break
            if count and request in self.running:
                self._name_blocks(request, request.computed + count)
                counts[request] = count
        return nobody_lost

    def _schedule_waiting(self, counts: dict[FakeRequest, int]) -> None:
        for request in list(self.waiting):
            if request.phase in (Phase.LOADING, Phase.GIVEN_UP) or not self._budget(counts):
                continue
            computed, external = request.computed, 0
            if request.phase is Phase.WAITING:
                computed, tables = self._local_hit(request.tokens)
                found = self.planner.match(self._asked(request), computed)
                if found is None:
                    continue  # ask again in the next step
                external, request.tables = found, tables
                self.blocks.share(block_id for table in tables for block_id in table)
            if not self._admit(request, computed, external, counts):
                return

    def _admit(self, request: FakeRequest, computed: int, external: int, counts: dict[FakeRequest, int]) -> bool:
        """Allocates and tells the planner; False: there is no room and the request goes on waiting."""
        start = computed + external
        beside = bool(external) and self.planner.loads_beside(request.name)
        count = 0 if beside else min(self._budget(counts), len(request.tokens) - start)
        if not self._allocate(request, start, start + count):
            if request.phase is Phase.WAITING:
                self._free(request)
            return False
        self.planner.admit(self._asked(request), external, lambda: request.tables)
        self.external_tokens += external
        request.computed = start
        if beside:
            request.phase = Phase.LOADING
            return True
        self.waiting.remove(request)
        self.running.append(request)
        request.phase = Phase.RUNNING
        counts[request] = count
        self._name_blocks(request, start + count)
        return True

    def _allocate(self, request: FakeRequest, computed: int, upto: int) -> bool:
        """Gives up what has left the windows and adds blocks for tokens up to `upto`; False: there is no room."""
        wanted: list[tuple[int, bool]] = []
        request.tables = request.tables or [[] for _ in self.shape.groups]
        for number, group in enumerate(self.shape.groups):
            table = request.tables[number]
            gone = self.model.first_seen(number, computed) // group.block_tokens
            self.blocks.give_back(table[:gone])
            table[:gone] = [0] * len(table[:gone])
            wanted += [(number, place >= gone) for place in range(len(table), -(-upto // group.block_tokens))]
        need = sum(kept for _, kept in wanted)
        if need > self.blocks.free_count:
            return False
        fresh = iter(self.blocks.take(need))
        for number, kept in wanted:
            request.tables[number].append(next(fresh) if kept else 0)
        return True

    def _local_hit(self, tokens: Sequence[int]) -> tuple[int, list[list[int]]]:
        """The longest prefix, at most N - 1 tokens, whose blocks every group has, and its block tables."""
        step = math.lcm(*(group.block_tokens for group in self.shape.groups))
        for hit in range((len(tokens) - 1) // step * step, 0, -step):
            tables = [
                self.blocks.table(number, tuple(tokens[:hit]), self.model.first_seen(number, hit), group.block_tokens)
                for number, group in enumerate(self.shape.groups)
            ]
            found = [table for table in tables if table is not None]
            if len(found) == len(tables):
                return hit, found
        return 0, []

    def _name_blocks(self, request: FakeRequest, upto: int) -> None:
        """Enters full blocks into the prefix cache, also those that this very step is going to fill."""
        tokens = tuple(request.tokens[:upto])
        for number, group in enumerate(self.shape.groups):
            for place, block_id in enumerate(request.tables[number][: upto // group.block_tokens]):
                if block_id:
                    self.blocks.name(block_id, (number, tokens[: (place + 1) * group.block_tokens]))

    def _budget(self, counts: dict[FakeRequest, int]) -> int:
        return self.shape.budget_tokens - sum(counts.values())

    def _preempt(self, request: FakeRequest) -> None:
        self.running.remove(request)
        self.waiting.insert(0, request)
        request.preemptions += 1
        self._restart(request)

    def _restart(self, request: FakeRequest) -> None:
        self._free(request)
        request.computed, request.phase = 0, Phase.WAITING

    def _end(self, request: FakeRequest) -> None:
        self._leave(request)
        self.planner.end(request.name)

    def _leave(self, request: FakeRequest) -> None:
        (self.running if request in self.running else self.waiting).remove(request)
        self._free(request)
        request.phase = Phase.DONE

    def _free(self, request: FakeRequest) -> None:
        for table in request.tables:
            self.blocks.give_back(table)
        request.tables = []

    # ---- what a step brought -------------------------------------------------------------------------------

    def _take_in(self, counts: dict[FakeRequest, int]) -> None:
        """Failed loads first, then new tokens and ends, then the planner's word on what is to be forgotten."""
        failed: set[int] = set().union(*(worker.results.take_failed_blocks() for worker in self.workers))
        loaded = [worker.results.take_loaded() for worker in self.workers]
        report = Report()
        for worker in self.workers:
            report = report.merged(worker.results.take_report())
        hurt = set() if self.shape.fails_whole else self._cut_back(failed, counts)
        self._loads_done(loaded)
        for request in counts:
            if request not in hurt:
                self._sample(request)
        forget = self.planner.step_done(report, lambda name: self.requests[name].tables)
        left = set() if self.shape.fails_whole else failed & set(self.blocks.cached.values()) - forget
        assert not left, f"blocks {left} failed and stay in the prefix cache"
        self.blocks.forget(forget)

    def _cut_back(self, failed: set[int], counts: dict[FakeRequest, int]) -> set[FakeRequest]:
        """Sends requests that read a failed block back, as vLLM does: the first reader of a block computes it again.

        A later reader of that block goes back to where its step began, and reads the block as if it were right.
        """
        hurt, marked = set(), set[int]()
        loading = [request for request in self.waiting if request.phase is Phase.LOADING]
        for request in loading + self.running if failed else ():
            table, size = request.tables[0], self.shape.groups[0].block_tokens
            before = request.computed - counts.get(request, 0)
            read = [place for place, block_id in enumerate(table[: -(-before // size)]) if block_id in failed]
            own = [place for place in read if table[place] not in marked]
            marked.update(table[place] for place in read)
            if read:
                hurt.add(request)
                request.computed = own[0] * size if own else before
                self.failed_loads += bool(own)
        return hurt

    def _loads_done(self, loaded: list[dict[str, bool]]) -> None:
        """A load beside the steps has ended when every rank has said so, once."""
        for words in loaded:
            for name, arrived in words.items():
                self._arrived.setdefault(name, []).append(arrived)
        for name in [name for name, ranks in self._arrived.items() if len(ranks) == self.shape.ranks]:
            request, arrived = self.requests[name], all(self._arrived.pop(name))
            if request.phase is Phase.GIVEN_UP:
                self._leave(request)
                continue
            if not arrived and (self.shape.fails_whole or not request.computed):
                self.failed_loads += self.shape.fails_whole
                self._restart(request)
                continue
            request.phase = Phase.LOADED
            self._name_blocks(request, request.computed)
            if request.computed == len(request.tokens):
                request.computed -= 1  # the last token is computed for its logits

    def _sample(self, request: FakeRequest) -> None:
        if request.computed < len(request.tokens):
            return
        request.tokens.append(self.model.sample(request.computed, request.tables, self.shape.vocabulary))
        if request.finished:
            self._end(request)

    # ---- what kvkeep is told -------------------------------------------------------------------------------

    def _groups(self, rank: int) -> list[GroupCaches]:
        """A rank's part of the model's caches; the tensors share their memory."""
        groups = []
        for number, group in enumerate(self.shape.groups):
            arrays = self.model.caches[number][rank].view(np.int64)
            caches = {f"group{number}.layer{n}": torch.from_numpy(array) for n, array in enumerate(arrays)}
            groups.append(GroupCaches(caches, self.shape.num_blocks, group.block_tokens, group.window))
        return groups

    def _hello(self, resumes: int) -> Hello:
        every, layouts = self.shape.verify_every, (self.layout, None)
        return hello_of("fake engine", (NAMESPACE, ""), layouts, self.pids, verify_every=every, resumes=resumes)

    def _asked(self, request: FakeRequest) -> Request:
        return Request(
            request.name, request.tokens, len(request.prompt), none_hash(), preempted=request.preemptions > 0
        )
