"""Watches which adapters (LoRA) vLLM 0.32 loads in this rank's process, and hashes the tensors of each.

Reads no file: a file may have been replaced since vLLM loaded it. Copies tensors that are mapped from a file before it
hashes them: they change when the file is written to.
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

NOWHERE = b""  # the boot of no store: a load from its pool fails
MAX_WAITING = 64
_WEIGHTS = (LoRAModel, LoRALayerWeights, PackedLoRALayerWeights, LoRAFullModuleWeights)
Parts = list[tuple[str, torch.Tensor | None]]
HashJob = Callable[[], None]


class RankAdapters:
    """The adapters that this rank has loaded since this object was made, which is before vLLM takes any request.

    `later` queues a job for another thread; False if its queue is full.
    """

    def __init__(self, rank: int, config: LoRAConfig | None, later: Callable[[HashJob], bool]) -> None:
        self._rank = rank
        self._config = config
        self._later = later
        self._last = 0
        self._loads: dict[int, int] = {}  # by adapter: which of all loads was its last one
        self._fresh: list[tuple[int, int, LoRAModel]] = []
        self._made: deque[tuple[int, int, str]] = deque()
        self._digests: dict[int, str] = {}
        self._reported = Resident(rank, frozenset())
        self._loader: weakref.ref[WorkerLoRAManager] | None = None
        if config is not None:
            _watch(weakref.WeakMethod(self._loaded))

    def take(self) -> tuple[list[LoadedAdapter], list[Resident]]:
        """Return, at the end of a step, what was loaded or hashed since the last one, and what is resident if new."""
        news = []
        for number, load, model in self._fresh:  # vLLM has merged its layers by now and leaves them alone
            news.append(LoadedAdapter(self._rank, number, ""))
            self._later(partial(self._make, number, load, _named(model)))
        self._fresh = []
        for _ in range(len(self._made)):
            number, load, digest = self._made.popleft()
            if self._loads.get(number) == load:
                self._digests[number] = digest
                news.append(LoadedAdapter(self._rank, number, digest))
        resident = Resident(self._rank, self._resident())
        for known in (self._digests, self._loads):
            for number in known.keys() - resident.numbers:
                del known[number]
        changed = resident != self._reported
        self._reported = resident
        return news, [resident] if changed else []

    def checked(self, plan: StepPlan, expected: Mapping[str, Expected]) -> StepPlan:
        """Return the plan; in it those loads fail whose request's adapter is not the one their KV was computed with."""
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
        """Hash an adapter; runs on another thread."""
        digest = digest_of(parts) if parts is not None else ""
        if digest:
            self._made.append((number, load, digest))


class Background:
    """Runs jobs in their order on a thread of its own; at most MAX_WAITING wait."""

    def __init__(self) -> None:
        self._jobs: queue.Queue[HashJob | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None

    def later(self, job: HashJob) -> bool:
        """Queue a job; False if too many wait."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True, name="kvkeep-adapters")
            self._thread.start()
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            return False
        return True

    def close(self) -> None:
        """Start no further job; do not wait for the one that runs."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put_nowait(None)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def digest_of(parts: Parts) -> str:
    """Return the SHA-256 (hex) of an adapter's parts; "" for tensors whose bytes cannot be read."""
    whole = hashlib.sha256()
    try:
        for name, tensor in parts:
            content = _hashed(tensor) if tensor is not None else ""
            whole.update(json.dumps([name, content]).encode())
    except (RuntimeError, TypeError):
        return ""
    return whole.hexdigest()


def _named(model: LoRAModel) -> Parts | None:
    """List all that an adapter consists of, without its id; None if the type of a part is unknown."""
    try:
        return [part for name, value in sorted(vars(model).items()) if name != "id" for part in _parts(name, value)]
    except TypeError:
        return None


def _own(value: Any) -> Any:
    """Copy every tensor at and below `value` that may be mapped from a file."""
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
    """Yield every tensor at and below `value` with its name, type and shape, every plain value as text.

    TypeError for a value of another type.
    """
    if isinstance(value, torch.Tensor):
        yield f"{name} {value.dtype} {tuple(value.shape)}", value
    elif value is None or isinstance(value, (bool, int, float, str)):
        yield f"{name} {value!r}", None
    elif isinstance(value, (list, tuple)):
        yield f"{name} {len(value)}", None
        for index, item in enumerate(value):
            yield from _parts(f"{name}.{index}", item)
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


def _watch(loaded: weakref.WeakMethod[Any]) -> None:
    """Have `loaded` called with each adapter that vLLM loads in this process, before its first use.

    Wraps a private method of vLLM, which has no hook for this.
    """
    load = WorkerLoRAManager._load_adapter

    def load_and_tell(loads: WorkerLoRAManager, request: LoRARequest) -> LoRAModel:
        model = load(loads, request)
        call = loaded()
        if call is not None:
            call(loads, request, model)
        return model

    WorkerLoRAManager._load_adapter = load_and_tell
