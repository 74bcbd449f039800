"""Translates vLLM 0.32's requests for the planner: tokens, and what the digests of their chunks are made of.

Digests chain over the tokens, or over vLLM's own block hashes where those are SHA-256 of canonical CBOR as ours are:
vLLM makes them anyway. Adapters, salts and images enter a digest as vLLM mixes them into its hashes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import (
    generate_block_hash_extra_keys,
    resolve_kv_cache_block_sizes,
    resolve_none_hash_seed,
)
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.request import Request as VllmRequest

from kvkeep.core.key import DEFAULT_SEED, BlockHashes, ExtraKeys, mixed_root, none_hash
from kvkeep.doors.vllm.loaded import Adapter, Adapters, Expected, LoadedAdapter, Resident
from kvkeep.engine.plan import Scheduled
from kvkeep.engine.scheduler.lookups import Request
from kvkeep.telemetry import Miss

LeftBehind = Callable[[Iterable[tuple[int, int, int]]], list[tuple[int, tuple[int, ...]]]]


@dataclass(frozen=True)
class ChainKind:
    """What digests are made of: block hashes of `block_tokens` tokens each (0: the tokens), chained from `seed`."""

    block_tokens: int = 0
    seed: str = DEFAULT_SEED

    @property
    def name(self) -> Literal["kvkeep", "vllm"]:
        """The chain's name in the identity."""
        return "vllm" if self.block_tokens else "kvkeep"


def chain_kind(
    wanted: Literal["auto", "kvkeep"], chunk_tokens: int, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig
) -> ChainKind:
    """Choose what digests are made of: not of vLLM's default, `sha256`: pickles may differ between Pythons."""
    if wanted != "auto" or vllm_config.cache_config.prefix_caching_hash_algo != "sha256_cbor":
        return ChainKind()
    block_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)[1]
    if chunk_tokens % block_tokens:
        return ChainKind()
    return ChainKind(block_tokens, resolve_none_hash_seed(sha256_cbor))


@dataclass
class Requests:
    """vLLM's requests from their arrival to their end, and what the digests of each begin with."""

    adapters: Adapters = field(default_factory=Adapters)
    kind: ChainKind = ChainKind()
    known: dict[str, VllmRequest] = field(default_factory=dict)
    _roots: dict[str, bytes | Miss] = field(default_factory=dict)
    _hashes: dict[str, BlockHashes] = field(default_factory=dict)
    _adapted: dict[str, tuple[Adapter, bytes | None]] = field(default_factory=dict)  # adapter, its content then

    def add(self, request: VllmRequest) -> None:
        """Remember a request."""
        self.known[request.request_id] = request

    def drop(self, name: str) -> None:
        """Forget a request."""
        for table in (self.known, self._roots, self._hashes, self._adapted):
            table.pop(name, None)

    def translated(self, request: VllmRequest) -> Request:
        """Return the request for the planner; the first call decides what its digests begin with."""
        name = request.request_id
        if name not in self.known:
            self.add(request)
        if name not in self._roots:
            self._begin(request)
        return Request(
            name,
            request.all_token_ids,
            request.num_prompt_tokens,
            self._roots[name],
            extra_keys=extra_keys(request),
            preempted=request.num_preemptions > 0,
            block_hashes=self._hashes.get(name),
            reads=not request.skip_reading_prefix_cache,  # vLLM would not take what is offered
        )

    def scheduled(self, output: SchedulerOutput, left_behind: LeftBehind) -> list[Scheduled]:
        """List what a step computes of each request; `left_behind` reads which recurrent states it leaves behind."""
        steps, handed = [], output.kv_connector_block_state.boundary_state_offloads
        for name, count in output.num_scheduled_tokens.items():
            request = self.known.get(name)
            if request is not None:
                start = request.num_computed_tokens
                final = min(start + count, request.num_tokens)
                steps.append(
                    Scheduled(name, final, request.all_token_ids, start, states=left_behind(handed.get(name, ())))
                )
        return steps

    def step_over(self, loads: Iterable[LoadedAdapter], resident: Iterable[Resident]) -> list[str]:
        """Take in what ranks had loaded by a step's end; name the requests that another adapter has computed."""
        if not self.adapters.take(loads, resident):
            return []
        doubtful = [
            name
            for name, (adapter, content) in self._adapted.items()
            if content is not None and not self.adapters.is_still(adapter, content)
        ]
        for name in doubtful:
            self._adapted[name] = (self._adapted[name][0], None)
            self._roots[name] = Miss.ADAPTER
        return doubtful

    def own_cache_emptied(self) -> None:
        """Note that the engine's own prefix cache holds no block any more."""
        self.adapters.emptied(adapter for adapter, _ in self._adapted.values())

    def expected(self, names: Iterable[str]) -> dict[str, Expected]:
        """Return what ranks must have loaded for those of these requests that have an adapter."""
        return {name: self.adapters.expected(self._adapted[name][0]) for name in names if name in self._adapted}

    def _begin(self, request: VllmRequest) -> None:
        name, block_tokens = request.request_id, self.kind.block_tokens
        content: bytes | None = b""
        if request.lora_request is not None:
            adapter = adapter_of(request.lora_request)
            content = self.adapters.begin(adapter)
            self._adapted[name] = (adapter, content)
        self._roots[name] = self._root(request, content)
        if block_tokens:
            self._hashes[name] = BlockHashes(request.block_hashes, block_tokens, content or b"")

    def _root(self, request: VllmRequest, content: bytes | None) -> bytes | Miss:
        """Return what a request's digests start from, or why nothing is kept of it; `content` b"": no adapter."""
        block_tokens = self.kind.block_tokens
        if request.resumable:
            return Miss.SESSION  # vLLM may cut its tokens, and with them what was hashed
        if content is None:
            return Miss.ADAPTER
        if block_tokens and len(request.block_hashes) != request.num_tokens // block_tokens:
            return Miss.HASHES
        return mixed_root(none_hash(), content) if content else none_hash()


def adapter_of(request: LoRARequest) -> Adapter:
    """Return the adapter that a request names."""
    return Adapter(request.lora_int_id, request.lora_name, request.lora_path, request.load_inplace)


def extra_keys(request: VllmRequest) -> ExtraKeys | None:
    """Return what vLLM mixes into the hashes of a request's token ranges; None where it mixes in nothing."""
    plain = not (request.lora_request or request.mm_features or request.cache_salt)
    if plain and request.prompt_embeds is None:
        return None
    return RangeKeys(request)


class RangeKeys:
    """What vLLM mixes into the hash of a token range: adapter, salt, the images in it.

    Takes ranges in any order; where they ascend, as a request's chunks do, it does not look at earlier images again.
    """

    def __init__(self, request: VllmRequest) -> None:
        self._request = request
        self._end = 0  # of the range that was asked for last
        self._image = 0  # the first image that may reach beyond it

    def __call__(self, start: int, end: int) -> tuple[Any, ...] | None:
        """Return the keys of tokens [start, end)."""
        image = self._image if start >= self._end else 0
        keys: tuple[Any, ...] | None
        keys, self._image = generate_block_hash_extra_keys(self._request, start, end, image)
        self._end = end
        return keys
