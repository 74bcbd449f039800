"""A rank of the fake engine in a process of its own, so that it can be stopped and killed by itself.

The process is forked, for it works on the fake model's caches, which are shared memory. Knows nothing about stores.
"""

from __future__ import annotations

import os
import signal
import socket
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import starmap
from typing import Any

import msgspec

from kvkeep.core.layout import ShardLayout
from kvkeep.engine.copies.cpu import CpuCopies
from kvkeep.engine.plan import LoadOp, StepPlan, StoreOp, Trip
from kvkeep.engine.pool import MappedPool
from kvkeep.engine.rank.worker import Results, Worker
from kvkeep.memory.pool import Lease
from kvkeep.transfer.transfer import Blocks, Transfer
from kvkeep.wire.frames import FrameReader, framed
from kvkeep.wire.pool_socket import PoolDoor

LOADS, STORES, CLOSE = b"L", b"S", b"C"
RANK_DIED = 3  # the exit status of an engine whose rank has ended
FAULT = 1  # of one whose rank has failed


class RankProcess:
    """Plays a `Worker` that copies in bulk: each call comes back when it is done there, however long that takes."""

    def __init__(self, rank: int, transfer: Transfer, door: PoolDoor) -> None:
        self._sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self._frames = FrameReader()
        self.results = Results()
        self.pid = os.fork()
        if not self.pid:
            self._sock.close()
            status = FAULT
            try:
                status = _served(Worker(rank, CpuCopies(transfer), MappedPool(door)), theirs)
            finally:
                if status == FAULT:
                    traceback.print_exc()
                    theirs.sendall(framed(b""))  # so that it is not taken for a rank that was killed
                os._exit(status)
        theirs.close()

    def before_writes(self) -> None:
        """As `Worker.before_writes`: in bulk nothing is under way."""

    def start_loads(self, plan: StepPlan) -> None:
        """As `Worker.start_loads`."""
        if plan.loads or plan.trips:
            self._call(LOADS, plan)

    def wait_layer(self, name: str) -> None:
        """As `Worker.wait_layer`: in bulk everything is there already."""

    def save_layer(self, plan: StepPlan, name: str) -> None:
        """As `Worker.save_layer`: in bulk nothing leaves before the step has run."""

    def start_stores(self, plan: StepPlan) -> None:
        """As `Worker.start_stores`."""
        if plan.loads or plan.stores:
            self._call(STORES, plan)

    def poll(self, plan: StepPlan) -> None:
        """As `Worker.poll`: the process tells with each answer what has ended."""

    def close(self) -> None:
        """Ends the process and waits for it."""
        self._sock.sendall(framed(CLOSE))
        self._sock.close()
        os.waitpid(self.pid, 0)

    def _call(self, verb: bytes, plan: StepPlan) -> None:
        try:
            self._sock.sendall(framed(verb + msgspec.msgpack.encode(plan)))
            answers: list[bytes] = []
            while not answers:
                data = self._sock.recv(1 << 16)
                if not data:
                    os._exit(RANK_DIED)
                answers = self._frames.feed(data)
        except ConnectionError:
            os._exit(RANK_DIED)  # what vLLM does: an engine does not outlive its ranks
        if not all(answers):
            os._exit(FAULT)
        for answer in answers:
            self.results.add(msgspec.msgpack.decode(answer, type=Results))


def _served(worker: Worker, sock: socket.socket) -> int:
    """The life of a rank's process: its exit status."""
    frames = FrameReader()
    while data := _received(sock):
        for payload in frames.feed(data):
            verb, rest = payload[:1], payload[1:]
            if verb == CLOSE:
                worker.close()
                return 0
            plan = _plan_of(msgspec.msgpack.decode(rest))
            if verb == LOADS:
                worker.start_loads(plan)
            else:
                worker.start_stores(plan)
            worker.poll(plan)
            results, worker.results = worker.results, Results()
            with suppress(ConnectionError):
                sock.sendall(framed(msgspec.msgpack.encode(results)))
    worker.close()
    return RANK_DIED


def _plan_of(sent: Mapping[str, Any]) -> StepPlan:
    """The plan out of its MessagePack form, whose types msgspec cannot tell: block ids may be an array."""
    trips = [Trip(number, _loads_of(loads)) for number, loads in sent["trips"]]
    stores = [op._replace(blocks=_blocks_of(op.blocks)) for op in starmap(StoreOp, sent["stores"])]
    offsets = {name: tuple(sent[name]) for name in ("shard_offsets", "state_offsets")}
    return StepPlan(
        **{**sent, **offsets, "loads": _loads_of(sent["loads"]), "stores": tuple(stores), "trips": tuple(trips)}
    )


def _loads_of(sent: Sequence[Mapping[str, Any]]) -> tuple[LoadOp, ...]:
    return tuple(LoadOp(**{**op, "blocks": _blocks_of(op["blocks"]), "sums": tuple(op["sums"])}) for op in sent)


def _blocks_of(sent: Sequence[Sequence[Any]]) -> tuple[Blocks, ...]:
    return tuple(Blocks(*run) for run in sent)


def _received(sock: socket.socket) -> bytes:
    try:
        return sock.recv(1 << 16)
    except ConnectionError:
        return b""  # the planner was killed


@dataclass
class StoppingTransfer:
    """`inner`, but it stops its own process (SIGSTOP) right before it copies, once, when `flags[place]` is set.

    `flags` are shared with whoever sets them: "gather" is at `place`, "scatter" behind it.
    """

    inner: Transfer
    flags: memoryview
    place: int

    @property
    def shard(self) -> ShardLayout:
        """As `Transfer.shard`."""
        return self.inner.shard

    def gather(self, blocks: Sequence[Blocks], lease: Lease, seal: bool, layers: range | None = None) -> bytes:
        """As `Transfer.gather`."""
        lease.views()
        stop_here(self.flags, self.place)
        return self.inner.gather(blocks, lease, seal, layers)

    def scatter(self, lease: Lease, blocks: Sequence[Blocks], sums: bytes, layers: range | None = None) -> bool:
        """As `Transfer.scatter`."""
        stop_here(self.flags, self.place + 1)
        return self.inner.scatter(lease, blocks, sums, layers)

    def check(self, blocks: Sequence[Blocks], unique: bool) -> None:
        """As `Transfer.check`."""
        self.inner.check(blocks, unique)


def stop_here(flags: memoryview, place: int) -> None:
    """Stops this process if the flag is set, and clears it."""
    if flags[place]:
        flags[place] = 0
        os.kill(os.getpid(), signal.SIGSTOP)
