"""Fills the identity (`core/identity.py`) of what a vLLM engine stores: all that must match for chunks to be reused.

Takes what vLLM resolved, not what a user asked for. Where something cannot be known for certain, the identity is one
of this start alone, and the log says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
import vllm
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, MambaSpec, UniformTypeKVCacheSpecs

from kvkeep.core.identity import SCHEMA, GroupIdentity, Identity
from kvkeep.core.layout import VERSION as LAYOUT_VERSION
from kvkeep.core.layout import ShardLayout
from kvkeep.doors.fingerprint import WEIGHT_SUFFIXES, changed_since, default_memory, fingerprint, process_start_ns
from kvkeep.doors.vllm.chain import ChainKind
from kvkeep.doors.vllm.facts import window
from kvkeep.doors.vllm.settings import settings
from kvkeep.engine.plan import RankInfo

log = logging.getLogger("kvkeep")

FILE_SUFFIXES = (".json", ".yaml", ".yml", ".py")
"""A model's other files: for its image processor, quantization, its own code. A file too many costs a miss."""
FROM_THE_FOLDER = frozenset(
    {
        "dummy",
        "auto",
        "hf",
        "safetensors",
        "pt",
        "mistral",
        "npcache",
        "fastsafetensors",
        "instanttensor",
        "sharded_state",
        "runai_streamer",
        "runai_streamer_sharded",
        "gguf",
        "bitsandbytes",
    }
)
"""The load formats that read the folder's weight files."""
HARMLESS_FILES = frozenset(
    {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "chat_template.json",
    }
)
"""The resolved configuration is in the identity; the others are about text and tokens, which are in the key."""
ONLY_HOW = frozenset({"enable_multithread_load", "num_threads", "distributed", "concurrency", "memory_limit"})
"""The loader's settings that say how a folder is read."""
WITH_MORE_WEIGHTS = frozenset({"UltravoxModel", "MoonshotKimiaForCausalLM"})
"""The architectures that load weights of another folder as well."""


def worker_facts(vllm_config: VllmConfig, caches: Mapping[str, torch.Tensor], shard: ShardLayout) -> dict[str, str]:
    """Return the parts of the identity that only a process with the loaded model knows; `shard`: its chunks' layout."""
    layers = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    backends, sets, scales = set(), set(), []
    for name, layer in sorted(layers.items()):
        backends.add(layer.get_attn_backend().get_name())
        sets.add(str(getattr(layer, "isa", None) or getattr(getattr(layer, "impl", None), "isa", None) or ""))
        scales.append((name, getattr(layer, "_k_scale_float", None), getattr(layer, "_v_scale_float", None)))
    shapes = [(name, str(tensor.dtype), list(tensor.shape[1:])) for name, tensor in sorted(caches.items())]
    shapes += [(name, "across layers", []) for name in sorted(shard.range_indexes.keys() - caches.keys())]
    return {
        "attention_backend": ",".join(sorted(backends)),
        "instruction_set": ",".join(sorted(sets - {""})),
        "kv_scales": hashlib.sha256(json.dumps(scales).encode()).hexdigest(),
        "kv_dtype": ",".join(sorted({str(tensor.dtype) for tensor in caches.values()})),
        "page_shapes": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
    }


def of_all_ranks(ranks: Sequence[RankInfo]) -> dict[str, str]:
    """Merge the facts of all ranks: one text where they agree, else every rank's in their order."""
    names = dict.fromkeys(name for rank in ranks for name in rank.facts)
    said = {name: [rank.facts.get(name, "") for rank in ranks] for name in names}
    return {name: texts[0] if len(set(texts)) == 1 else json.dumps(texts) for name, texts in said.items()}


def identity(
    vllm_config: VllmConfig,
    kv_cache_config: KVCacheConfig,
    ranks: Sequence[RankInfo],
    tokens: int,
    contents: tuple[str, str],
    chain: ChainKind,
) -> Identity:
    """Make the identity of everything that this engine stores; `contents` comes from `fingerprints`."""
    model, parallel, facts = vllm_config.model_config, vllm_config.parallel_config, of_all_ranks(ranks)
    rope = _rope(model.hf_text_config)
    layout = kv_cache_config.kv_cache_layout or ""
    return Identity(
        schema=SCHEMA,
        layout=LAYOUT_VERSION,
        model=str(model.model),
        revision=model.revision,
        weights=contents[0],
        files=contents[1],
        load_format=str(vllm_config.load_config.load_format),
        load_seed=model.seed if str(vllm_config.load_config.load_format) == "dummy" else None,
        epoch=0,
        quantization=str(model.quantization) if model.quantization else None,
        compute_dtype=str(model.dtype),
        kv_dtype=f"{vllm_config.cache_config.cache_dtype} {facts['kv_dtype']}",
        kv_scales=facts["kv_scales"],
        groups=tuple(_group_identity(group) for group in kv_cache_config.kv_cache_groups),
        rope=rope,
        max_model_len=model.max_model_len if _depends_on_length(rope) else None,
        engine="vllm",
        engine_version=vllm.__version__,
        platform=f"{current_platform.device_name} {current_platform.fp8_dtype()}",
        settings=settings(vllm_config, unknown),
        attention_backend=facts["attention_backend"],
        kv_layout=f"{layout} {facts['page_shapes']}",
        instruction_set=facts["instruction_set"] or None,
        tp=parallel.tensor_parallel_size,
        pp=parallel.pipeline_parallel_size,
        dcp=parallel.decode_context_parallel_size,
        chunk_tokens=tokens,
        chain=chain.name,
        hash_name="sha256_cbor",
        hash_seed=chain.seed,
        codec=None,
    )


def fingerprints(vllm_config: VllmConfig, outlived: bool) -> tuple[str, str]:
    """Return digests of the weights and of the model's other files; if uncertain, a name of this start alone.

    `outlived`: chunks can outlive this engine or be read by another; if not, no file is read.
    """
    folder, dummy = Path(vllm_config.model_config.model), str(vllm_config.load_config.load_format) == "dummy"
    this_start = f"this start only: {secrets.token_hex(16)}"
    if not outlived:
        return "dummy" if dummy else this_start, ""
    why = _unnamed(vllm_config, folder)
    weights = "dummy" if dummy else "" if why else fingerprint(folder, WEIGHT_SUFFIXES, default_memory())
    names = other_files(folder)
    files = "" if why or not names else fingerprint(folder, names, default_memory())
    why = why or _changed(folder, names if dummy else (*WEIGHT_SUFFIXES, *names))  # after they were hashed
    if weights is None or files is None:
        why = f"{folder} is not a folder of weight files"
    if why:
        log.warning("kvkeep: chunks of this start cannot be reused by another: %s", why)
    return (this_start if why else weights or ""), files or ""


def other_files(folder: Path) -> tuple[str, ...]:
    """List a model's files, without its weights, that may shape what it computes or how images become input."""
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return ()
    return tuple(name for name in names if name.endswith(FILE_SUFFIXES) and name not in HARMLESS_FILES)


def _unnamed(vllm_config: VllmConfig, folder: Path) -> str:
    """Say why the folder's files may not be all that was loaded; empty if they are."""
    model, load = vllm_config.model_config, vllm_config.load_config
    load_format, loader = str(load.load_format), load.model_loader_extra_config or {}
    if not folder.is_dir():
        return f"{folder} is not a folder of weight files"
    if load_format not in FROM_THE_FOLDER:
        return f'load_format "{load_format}" may read weights from elsewhere'
    if not isinstance(loader, Mapping) or not loader.keys() <= ONLY_HOW:
        return "model_loader_extra_config may name weights elsewhere"
    if model.model_weights and model.model_weights != model.model:
        return f"its weights are those of {model.model_weights}"
    if WITH_MORE_WEIGHTS.intersection(model.architectures or ()):
        return "this architecture loads weights of another folder as well"
    if getattr(model.multimodal_config, "mm_encoder_fp8_scale_path", None):
        return "the scales of its image encoder are read from elsewhere (mm_encoder_fp8_scale_path)"
    code = getattr(model.hf_config, "auto_map", None) or {}
    if model.trust_remote_code and any("--" in str(where) for where in code.values()):
        return "its code is that of another repository"
    return ""


def _changed(folder: Path, suffixes: Iterable[str]) -> str:
    """Say why the files may not be those that were loaded; empty if they are."""
    late = changed_since(folder, suffixes, process_start_ns())
    if late is None:
        return ""
    return f"{late} changed after this engine had begun to start, so it may have loaded the former content: restart it"


def unknown(name: str) -> str:
    """Return a text of this start alone for a setting whose value has no form that is equal in another process."""
    log.warning("kvkeep: chunks of this start cannot be reused by another: %s has no stable form", name)
    return f"this start only: {secrets.token_hex(16)}"


def _group_identity(group: KVCacheGroupSpec) -> GroupIdentity:
    spec = group.kv_cache_spec
    layer = next(iter(spec.kv_cache_specs.values())) if isinstance(spec, UniformTypeKVCacheSpecs) else spec
    if isinstance(layer, MambaSpec):
        kind = f"{type(layer).__name__}/{layer.mamba_type}/{layer.shapes}/{layer.dtypes}"
        heads, size = 0, 0
    else:
        kind, heads, size = f"{type(spec).__name__}/{type(layer).__name__}", layer.num_kv_heads, layer.head_size
    return GroupIdentity(
        kind=kind,
        layers=tuple(group.layer_names),
        kv_heads=heads,
        head_size=size,
        block_tokens=spec.block_size,
        window=window(group) or None,
    )


def _rope(config: object) -> str:
    """Return every parameter of the model's configuration that has to do with positions, as canonical JSON."""
    words = ("rope", "rotary", "position", "sliding_window", "layer_types")
    fields = {name: value for name, value in vars(config).items() if any(word in name for word in words)}
    return json.dumps(fields, sort_keys=True, default=str)


def _depends_on_length(rope: str) -> bool:
    return any(kind in rope for kind in ("dynamic", "longrope", "su"))
