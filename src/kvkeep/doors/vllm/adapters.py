"""A rank's half of what is known of adapters: the digest of each one that vLLM 0.32 loads, of its tensors.

A file may be replaced between the load and the moment when anybody looks at it, so none is looked at; and tensors that
are a file's own pages change when it is written to, so they are copied first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import queue
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from vllm.config import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRAFullModuleWeights, LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager

from kvkeep.doors.vllm.loaded import Expected, LoadedAdapter, Resident
from kvkeep.engine.plan import LoadOp, StepPlan

NOWHERE = b""  # the boot of no store: what is to be loaded from its pool fails
MAX_WAITING = 64
_WEIGHTS = (LoRAModel, LoRALayerWeights, PackedLoRALayerWeights, LoRAFullModuleWeights)
Parts = list[tuple[str, torch.Tensor | None]]
HashJob = Callable[[], None]


class RankAdapters:
    """What this rank has loaded, from the moment on when it was made: before vLLM takes any request.

    `later` runs a job on another thread and says whether it will.
    """

    def __init__(self, rank: int, config: LoRAConfig | None, later: Callable[[HashJob], bool]) -> None:
        self._rank = rank
        self._config = config
        self._later = later
        self._last = 0
        self._loads: dict[int, int] = {}  # the number of each adapter's last load
        self._fresh: list[tuple[int, int, LoRAModel]] = []
        self._made: deque[tuple[int, int, str]] = deque()
        self._digests: dict[int, str] = {}
        self._told = Resident(rank, frozenset())
        self._loader: weakref.ref[WorkerLoRAManager] | None = None
        if config is not None:
            _watch(weakref.WeakMethod(self._loaded))

    def take(self) -> tuple[list[LoadedAdapter], list[Resident]]:
        """At the end of a step: what was loaded since the last one, which digests are there, what is here now."""
        told = []
        for number, load, model in self._fresh:  # vLLM has merged its layers by now and leaves them alone
            told.append(LoadedAdapter(self._rank, number, ""))
            self._later(partial(self._make, number, load, _named(model)))
        self._fresh = []
        for _ in range(len(self._made)):
            number, load, digest = self._made.popleft()
            if self._loads.get(number) == load:
                self._digests[number] = digest
                told.append(LoadedAdapter(self._rank, number, digest))
        resident = Resident(self._rank, self._resident())
        for known in (self._digests, self._loads):
            for number in known.keys() - resident.numbers:
                del known[number]
        changed = resident != self._told
        self._told = resident
        return told, [resident] if changed else []

    def checked(self, plan: StepPlan, expected: Mapping[str, Expected]) -> StepPlan:
        """The plan with those loads failing whose request's adapter is not the one that their KV was computed with."""
        if not expected:
            return plan
        resident = self._resident()
        held = {number: digest for number, digest in self._digests.items() if number in resident and digest}
        wrong = {name for name, (number, digests) in expected.items() if held.get(number) != digests[self._rank]}
        return replace(
            plan,
            loads=_failing(plan.loads, wrong),
            trips=tuple(trip._replace(loads=_failing(trip.loads, wrong)) for trip in plan.trips),
        )

    def _resident(self) -> frozenset[int]:
        loader = self._loader() if self._loader is not None else None
        return frozenset(loader.list_adapters()) if loader is not None else frozenset()

    def _loaded(self, loader: WorkerLoRAManager, request: LoRARequest, model: LoRAModel) -> None:
        if loader.lora_config is not self._config:
            return  # of another engine in this process
        self._loader = weakref.ref(loader)
        self._last += 1
        number = request.lora_int_id
        self._loads[number] = self._last
        self._digests.pop(number, None)
        _own(model)
        self._fresh.append((number, self._last, model))

    def _make(self, number: int, load: int, parts: Parts | None) -> None:
        """On another thread."""
        digest = digest_of(parts) if parts is not None else ""
        if digest:
            self._made.append((number, load, digest))


class Background:
    """Runs jobs one after the other on a thread of its own; no more than MAX_WAITING wait."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[HashJob | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def later(self, job: HashJob) -> bool:
        """Whether the job will run."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="kvkeep-adapters")
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """No job begins any more, and nobody waits for the one that runs."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put_nowait(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def digest_of(parts: Parts) -> str:
    """SHA-256 (hex) of an adapter's parts; "" for tensors whose bytes cannot be had."""
    whole = hashlib.sha256()
    try:
        for name, tensor in parts:
            content = _hashed(tensor) if tensor is not None else ""
            whole.update(json.dumps([name, content]).encode())
    except (RuntimeError, TypeError):
        return ""
    return whole.hexdigest()


def _named(model: LoRAModel) -> Parts | None:
    """All that an adapter is but its number; None where a part of it is of no known kind."""
    try:
        return [part for name, value in sorted(vars(model).items()) if name != "id" for part in _parts(name, value)]
    except TypeError:
        return None


def _own(value: Any) -> Any:
    """Below `value`, every tensor that may be pages of a file is put in memory of its own."""
    if isinstance(value, torch.Tensor):
        return value if value.is_pinned() else value.clone()
    if isinstance(value, list):
        value[:] = map(_own, value)
    elif isinstance(value, dict):
        value.update({key: _own(item) for key, item in value.items()})
    elif type(value) in _WEIGHTS:
        vars(value).update({key: _own(item) for key, item in vars(value).items()})
    return value


def _parts(name: str, value: object) -> Iterator[tuple[str, torch.Tensor | None]]:
    """Every tensor below `value` with its name, type and shape; every plain value in words. TypeError for others."""
    if isinstance(value, torch.Tensor):
        yield f"{name} {value.dtype} {tuple(value.shape)}", value
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield f"{name} {value!r}", None
    elif isinstance(value, (list, tuple)):
        yield f"{name} {len(value)}", None
        for place, item in enumerate(value):
            yield from _parts(f"{name}.{place}", item)
    elif isinstance(value, dict) or type(value) in _WEIGHTS:
        inner: Mapping[str, Any] = value if isinstance(value, dict) else vars(value)
        for key, item in sorted(inner.items()):
            yield from _parts(f"{name}.{key}", item)
    else:
        raise TypeError(f"{name} is a {type(value).__name__}")


def _hashed(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()).hexdigest()


def _failing(loads: tuple[LoadOp, ...], wrong: set[str]) -> tuple[LoadOp, ...]:
    return tuple(replace(op, boot=NOWHERE) if op.request in wrong else op for op in loads)


def _watch(told: weakref.WeakMethod[Any]) -> None:
    """Has `told` called with each adapter that vLLM loads in this process, before it is used: no hook of vLLM's is."""
    load = WorkerLoRAManager._load_adapter

    def load_and_tell(loads: WorkerLoRAManager, request: LoRARequest) -> LoRAModel:
        model = load(loads, request)
        tell = told()
        if tell is not None:
            tell(loads, request, model)
        return model

    WorkerLoRAManager._load_adapter = load_and_tell
