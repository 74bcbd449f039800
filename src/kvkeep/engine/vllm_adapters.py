"""A rank's half of what is known of adapters: the digest of each one that vLLM 0.32 loads, of its tensors.

A file may be replaced between the load and the moment when anybody looks at it, so none is looked at; and tensors that
are a file's own pages change when it is written to, so they are copied first.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from vllm.config import LoRAConfig
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRAFullModuleWeights, LoRALayerWeights, PackedLoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import WorkerLoRAManager

from kvkeep.engine.adapters import Expected, Loaded, Resident
from kvkeep.engine.plan import LoadOp, StepPlan

NOWHERE = b""  # the boot of no store: what is to be loaded from its pool fails
_WEIGHTS = (LoRAModel, LoRALayerWeights, PackedLoRALayerWeights, LoRAFullModuleWeights)
MAX_THREADS = 8


class RankAdapters:
    """What this rank has loaded, from the moment on when it was made: before vLLM takes any request."""

    def __init__(self, rank: int, config: LoRAConfig | None) -> None:
        self._rank = rank
        self._config = config
        self._digests: dict[int, str] = {}
        self._fresh: list[Loaded] = []
        self._told = Resident(rank, frozenset())
        self._loads: weakref.ref[WorkerLoRAManager] | None = None
        if config is not None:
            _watch(weakref.WeakMethod(self._loaded))

    def take(self) -> tuple[list[Loaded], list[Resident]]:
        """What was loaded since the last call, and what is here now if that is not what was told before."""
        fresh, self._fresh = self._fresh, []
        resident = Resident(self._rank, self._resident())
        self._digests = {number: digest for number, digest in self._digests.items() if number in resident.numbers}
        changed = resident != self._told
        self._told = resident
        return fresh, [resident] if changed else []

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
        loads = self._loads() if self._loads is not None else None
        return frozenset(loads.list_adapters()) if loads is not None else frozenset()

    def _loaded(self, loads: WorkerLoRAManager, request: LoRARequest, model: LoRAModel) -> None:
        if loads.lora_config is not self._config:
            return  # of another engine in this process
        self._loads = weakref.ref(loads)
        _own(model)
        digest = digest_of(model)
        self._digests[request.lora_int_id] = digest
        self._fresh.append(Loaded(self._rank, request.lora_int_id, digest))


def digest_of(model: LoRAModel) -> str:
    """SHA-256 (hex) of all that a loaded adapter is but its number; "" where a part of it is of no known kind."""
    try:
        parts = [part for name, value in sorted(vars(model).items()) if name != "id" for part in _parts(name, value)]
    except TypeError:
        return ""
    tensors = [tensor for _, tensor in parts if tensor is not None]
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        digests = iter(list(pool.map(_hashed, tensors)))
    said = [(name, next(digests) if tensor is not None else "") for name, tensor in parts]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


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
    return tuple(op._replace(boot=NOWHERE) if op.request in wrong else op for op in loads)


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
