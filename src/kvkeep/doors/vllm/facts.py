"""What vLLM 0.32 says of a model and its cache, in kvkeep's words.

Translates and decides nothing but what is refused: a kind of group that is not known here is named, not guessed at.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from kvkeep.core.layout import chunk_tokens_for
from kvkeep.errors import LayoutMismatch
from kvkeep.transfer.pages import GroupCaches

log = logging.getLogger("kvkeep")

_FULL = (FullAttentionSpec, MLAAttentionSpec)
DRAFTERS_WITHOUT_KV = frozenset({"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"})


def refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Why this model cannot be kept; empty if it can."""
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        return "context parallelism is not supported"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism is not supported: with several steps under way a failed load may leave garbage"
    if getattr(parallel, "nnodes", 1) > 1:
        return "an engine that spans several hosts is not supported"
    if getattr(vllm_config.cache_config, "calculate_kv_scales", False):
        return "KV scales that are calculated while serving (calculate_kv_scales) are not part of any identity"
    why = _reuse_refusal(vllm_config)
    if why:
        return why
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        why = _group_refusal(group)
        if why:
            return f"KV-cache group {number}: {why}"
    return _states_refusal(vllm_config, kv_cache_config)


def _states_refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Why a model with recurrent state cannot be kept."""
    chunks, states = kept_groups(kv_cache_config)
    specs = [kv_cache_config.kv_cache_groups[number].kv_cache_spec for number in states]
    if not specs:
        return ""
    if not chunks:
        return "all its layers are recurrent: there is nothing to keep but states"
    if vllm_config.cache_config.mamba_cache_mode != "align":
        mode = vllm_config.cache_config.mamba_cache_mode
        return (
            f'its recurrent state is kept at no boundary (mamba_cache_mode "{mode}"; prefix caching makes it "align")'
        )
    if vllm_config.speculative_config is not None:
        return "recurrent state beside speculative decoding is not supported"
    if len({spec.block_size for spec in specs}) > 1:
        return "its groups of recurrent layers have blocks of different sizes"
    return ""


def _reuse_refusal(vllm_config: VllmConfig) -> str:
    """Why no prefix may be given back whatever it is made of."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if not model.is_prefix_caching_supported:
        return "this model, or how its output is pooled, needs all tokens computed: vLLM reuses no prefix of it"
    if vllm_config.diffusion_config is not None:
        return "a diffusion model computes its tokens anew until they are final"
    latent = getattr(model, "use_mla", False)
    if latent and current_platform.is_cpu() and not cache.enable_prefix_caching:
        # without AMX a token's rotated part depends on the batch that it was computed in: layer 0 shows it
        return "vLLM reuses no prefix of latent attention (MLA) on this CPU, and so does kvkeep"
    drafter = vllm_config.speculative_config
    if drafter is not None and drafter.method not in DRAFTERS_WITHOUT_KV:
        method = f'speculative decoding by "{drafter.method}"'
        return f"{method}: the drafter's KV depends on later tokens and on its weights, which are in no key"
    images = model.multimodal_config
    if images is not None and not images.mm_processor_cache_gb and not cache.enable_prefix_caching:
        return "with mm_processor_cache_gb 0 and prefix caching off vLLM numbers images, and does not tell them apart"
    return ""


def _group_refusal(group: KVCacheGroupSpec) -> str:
    spec = group.kv_cache_spec
    specs = list(spec.kv_cache_specs.values()) if isinstance(spec, UniformTypeKVCacheSpecs) else [spec]
    for one in specs:
        if type(one) not in (*_FULL, SlidingWindowSpec, MambaSpec):
            return f"{type(one).__name__} is a kind of cache that is not supported"
    if group.is_eagle_group:
        return "it belongs to a drafter (EAGLE, MTP), whose cache depends on later tokens"
    if group.host_resident or not group.enable_kv_transfer:
        return "it is not part of what may be transferred"
    return ""


def writes_early(vllm_config: VllmConfig) -> bool:
    """Whether a step zeroes and copies blocks before it calls `handle_preemptions`: vLLM's second model runner does."""
    return bool(getattr(vllm_config, "use_v2_model_runner", True))


def splits_batches(vllm_config: VllmConfig) -> bool:
    """Whether a layer may be computed in several parts of a batch (DBO), so that its end is not the layer's.

    With a drafter a step is in two parts, too: its layers run when the model's loads have been taken in.
    """
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        return True
    return bool(getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False))


def window(group: KVCacheGroupSpec) -> int:
    """The group's sliding window in tokens, 0 if it has none."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):  # a worker's; the scheduler sees one layer's
        spec = spec.first_spec
    return int(spec.sliding_window + spec.extra_retained_tokens) if isinstance(spec, SlidingWindowSpec) else 0


def fails_whole(kv_cache_config: KVCacheConfig) -> bool:
    """Whether a load that fails in part must be made up for from the first token on.

    With several groups vLLM cannot tell whose a block is; with a window the part that arrived lacks what was before it.
    """
    groups = kv_cache_config.kv_cache_groups
    return len(groups) > 1 or any(map(window, groups))


def never_in_step(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> bool:
    """Whether a step must not make a load of its own, since vLLM could not make up for its failure.

    It knows the failure of a whole request only of loads beside the steps; and where the next step is under way when a
    failure is known (asynchronous scheduling), it gives out the token which that one computes on garbage.
    """
    return vllm_config.max_concurrent_batches > 1 or fails_whole(kv_cache_config)


def chunk_tokens(wanted: int, kv_cache_config: KVCacheConfig) -> int:
    """The chunk's size: `wanted`, or the smallest larger multiple of all groups' block sizes.

    With recurrent state it is the smallest, for a chunk is of use where it ends at a boundary that has a state.
    """
    least = 1 if kept_groups(kv_cache_config).states else wanted
    block_tokens = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    tokens = chunk_tokens_for(least, block_tokens)
    if tokens != wanted:
        log.info("kvkeep: chunks of %d tokens, whole blocks of %s (chunk_tokens = %d)", tokens, block_tokens, wanted)
    return tokens


class KeptGroups(NamedTuple):
    """The numbers of the groups that chunks are made of, and of those that hold recurrent state."""

    chunks: tuple[int, ...]
    states: tuple[int, ...]

    def tables(self, tables: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """All groups' block tables in the planner's order."""
        return [tables[number] for number in (*self.chunks, *self.states)] if self.states and tables else tables

    def left_behind(self, handed: Iterable[tuple[int, int, int]]) -> list[tuple[int, tuple[int, ...]]]:
        """The states that a step leaves behind, from vLLM's (group, block, tokens): tokens, then each group's block."""
        found: dict[int, dict[int, int]] = {}
        for group, block, tokens in handed:
            found.setdefault(tokens, {})[group] = block
        whole = [(tokens, blocks) for tokens, blocks in found.items() if blocks.keys() >= set(self.states)]
        return [(tokens, tuple(blocks[group] for group in self.states)) for tokens, blocks in whole]


def kept_groups(kv_cache_config: KVCacheConfig) -> KeptGroups:
    """Which group is of which kind."""
    kinds = [isinstance(group.kv_cache_spec, MambaSpec) for group in kv_cache_config.kv_cache_groups]
    chunks, states = ([number for number, one in enumerate(kinds) if one is kind] for kind in (False, True))
    return KeptGroups(tuple(chunks), tuple(states))


def group_caches(
    caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig, numbers: Iterable[int]
) -> list[GroupCaches]:
    """The registered tensors of these groups; LayoutMismatch if a layer of one was not registered."""
    groups = []
    for number in numbers:
        group = kv_cache_config.kv_cache_groups[number]
        missing = [name for name in group.layer_names if name not in caches]
        if missing:
            raise LayoutMismatch(f"group {number}: layer {missing[0]} has no registered cache")
        tensors = {name: caches[name] for name in group.layer_names}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise LayoutMismatch(f"{name}: its cache is a {type(tensor).__name__}, not one tensor")
        groups.append(GroupCaches(tensors, kv_cache_config.num_blocks, group.kv_cache_spec.block_size, window(group)))
    return groups


def init_amx() -> None:
    """Asks the kernel for AMX before the first forward: without it a one-token first forward dies with SIGILL."""
    supported: Iterable[str] = ("_is_amx_tile_supported", "_init_amx")
    if all(hasattr(torch.cpu, name) for name in supported) and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
