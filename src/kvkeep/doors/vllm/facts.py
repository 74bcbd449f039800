"""Reads from vLLM 0.32's configuration what kvkeep must know of a model and its paged cache, and what it refuses.

Refuses by name what it does not know, as a kind of KV-cache group; guesses nothing.
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
    """Say why nothing can be kept of this model; empty if chunks can be kept."""
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
    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        why = _group_refusal(group)
        if why:
            return f"KV-cache group {index}: {why}"
    return _states_refusal(vllm_config, kv_cache_config)


def _states_refusal(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> str:
    """Say why nothing can be kept of a model with recurrent state."""
    chunks, states = kept_groups(kv_cache_config)
    specs = [kv_cache_config.kv_cache_groups[index].kv_cache_spec for index in states]
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
    """Say why no prefix of this model may be reused, whatever its layers are."""
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
    whole = group.kv_cache_spec
    specs = list(whole.kv_cache_specs.values()) if isinstance(whole, UniformTypeKVCacheSpecs) else [whole]
    for spec in specs:
        if type(spec) not in (*_FULL, SlidingWindowSpec, MambaSpec):
            return f"{type(spec).__name__} is a kind of cache that is not supported"
    if group.is_eagle_group:
        return "it belongs to a drafter (EAGLE, MTP), whose cache depends on later tokens"
    if group.host_resident or not group.enable_kv_transfer:
        return "it is not part of what may be transferred"
    return ""


def writes_early(vllm_config: VllmConfig) -> bool:
    """True if a step zeroes and copies blocks before `handle_preemptions`, as in vLLM's second model runner."""
    return bool(getattr(vllm_config, "use_v2_model_runner", True))


def splits_batches(vllm_config: VllmConfig) -> bool:
    """True if a layer may be computed for parts of a batch (DBO), so that the end of a part is not the layer's end.

    With a drafter too: its layers run after the model's, when the step's loads have already been reported.
    """
    parallel = vllm_config.parallel_config
    if vllm_config.speculative_config is not None:
        return True
    return bool(getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False))


def window(group: KVCacheGroupSpec) -> int:
    """Return the group's sliding window in tokens; 0 if it has none."""
    spec = group.kv_cache_spec
    if isinstance(spec, UniformTypeKVCacheSpecs):  # a worker's; the scheduler sees one layer's
        spec = spec.first_spec
    return int(spec.sliding_window + spec.extra_retained_tokens) if isinstance(spec, SlidingWindowSpec) else 0


def fails_whole(kv_cache_config: KVCacheConfig) -> bool:
    """True if the engine must compute a request from its first token when a part of its load fails.

    With several groups vLLM cannot tell which group a block id belongs to; with a sliding window the part that arrived
    may lack the tokens before it.
    """
    groups = kv_cache_config.kv_cache_groups
    return len(groups) > 1 or any(map(window, groups))


def never_in_step(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> bool:
    """True if no step may wait for a load of its own, since vLLM could not recover from its failure.

    vLLM takes the failure of a whole request only for loads beside the steps. And with asynchronous scheduling the next
    step already runs when a failure becomes known: vLLM would return the token that this step computed on garbage.
    """
    return vllm_config.max_concurrent_batches > 1 or fails_whole(kv_cache_config)


def chunk_tokens(wanted: int, kv_cache_config: KVCacheConfig) -> int:
    """Return the tokens in a chunk: `wanted`, or the next larger multiple of all groups' block sizes.

    With recurrent state it is the smallest such multiple: a chunk is only useful if a state was kept at its end.
    """
    least = 1 if kept_groups(kv_cache_config).states else wanted
    block_tokens = [group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups]
    tokens = chunk_tokens_for(least, block_tokens)
    if tokens != wanted:
        log.info("kvkeep: chunks of %d tokens, whole blocks of %s (chunk_tokens = %d)", tokens, block_tokens, wanted)
    return tokens


class KeptGroups(NamedTuple):
    """Indices of vLLM's KV-cache groups: those that chunks are made of, and those that hold recurrent state."""

    chunks: tuple[int, ...]
    states: tuple[int, ...]

    def tables(self, tables: Sequence[Sequence[int]]) -> Sequence[Sequence[int]]:
        """Put all groups' block tables in the planner's order."""
        return [tables[index] for index in (*self.chunks, *self.states)] if self.states and tables else tables

    def left_behind(self, handed: Iterable[tuple[int, int, int]]) -> list[tuple[int, tuple[int, ...]]]:
        """List the states that a step leaves behind as (tokens, each group's block), from (group, block, tokens)."""
        found: dict[int, dict[int, int]] = {}
        for group, block, tokens in handed:
            found.setdefault(tokens, {})[group] = block
        whole = [(tokens, blocks) for tokens, blocks in found.items() if blocks.keys() >= set(self.states)]
        return [(tokens, tuple(blocks[group] for group in self.states)) for tokens, blocks in whole]


def kept_groups(kv_cache_config: KVCacheConfig) -> KeptGroups:
    """Tell groups with KV from those with recurrent state."""
    recurrent = [isinstance(group.kv_cache_spec, MambaSpec) for group in kv_cache_config.kv_cache_groups]
    return KeptGroups(
        tuple(index for index, is_state in enumerate(recurrent) if not is_state),
        tuple(index for index, is_state in enumerate(recurrent) if is_state),
    )


def group_caches(
    caches: Mapping[str, torch.Tensor], kv_cache_config: KVCacheConfig, indices: Iterable[int]
) -> list[GroupCaches]:
    """Return the registered tensors of these groups; LayoutMismatch if a layer was not registered."""
    groups = []
    for index in indices:
        group = kv_cache_config.kv_cache_groups[index]
        missing = [name for name in group.layer_names if name not in caches]
        if missing:
            raise LayoutMismatch(f"group {index}: layer {missing[0]} has no registered cache")
        tensors = {name: caches[name] for name in group.layer_names}
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise LayoutMismatch(f"{name}: its cache is a {type(tensor).__name__}, not one tensor")
        groups.append(GroupCaches(tensors, kv_cache_config.num_blocks, group.kv_cache_spec.block_size, window(group)))
    return groups


def init_amx() -> None:
    """Ask the kernel for AMX before the first forward: without it a one-token first forward dies with SIGILL."""
    supported: Iterable[str] = ("_is_amx_tile_supported", "_init_amx")
    if all(hasattr(torch.cpu, name) for name in supported) and torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
