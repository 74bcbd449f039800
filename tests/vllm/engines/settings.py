"""What changes the namespace of vLLM's configuration; no engine is started: `python settings.py MODEL JOB`.

A job: {"engines": {name: options of vLLM}} gives the namespace of each; {"walk": true} changes every setting that
reflection finds, one at a time. Prints `FACTS` and JSON.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import typing
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cached_property
from typing import Any

import torch
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from transformers import LlavaConfig
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec

from kvkeep.core.identity import namespace
from kvkeep.doors.vllm.chain import ChainKind
from kvkeep.doors.vllm.harmless import NAMES
from kvkeep.doors.vllm.identity import identity
from kvkeep.doors.vllm.settings import harmless
from kvkeep.engine.plan import RankInfo

FACTS = ("attention_backend", "instruction_set", "kv_scales", "kv_dtype", "page_shapes")


def name_of(config: VllmConfig) -> str:
    """The namespace of an engine with this configuration; what its workers would say is the same for all."""
    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)
    caches = KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])
    ranks = [RankInfo(0, 1, "", None, facts=dict.fromkeys(FACTS, "same"))]
    return namespace(identity(config, caches, ranks, 256, ("weights", "files"), ChainKind())).hex()


def made(kind: type) -> Any:
    """An instance with the defaults, also of a class that wants more than it has."""
    made = object.__new__(kind)
    for field in fields(kind):
        value = field.default_factory() if field.default_factory is not MISSING else field.default
        if isinstance(value, FieldInfo):
            value = value.get_default(call_default_factory=True)
        object.__setattr__(made, field.name, None if value in (MISSING, PydanticUndefined) else value)
    return made


def filled(config: Any) -> Any:
    """The configuration with every part there that vLLM may leave out."""
    kinds = typing.get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name, None)
        kind = next((one for one in every_type(kinds[field.name]) if is_dataclass(one)), None)
        if value is None and kind is not None and field.name not in ("target_model_config", "draft_model_config"):
            object.__setattr__(config, field.name, made(kind))
    for field in fields(config):
        value = getattr(config, field.name, None)
        if is_dataclass(value) and not hasattr(value, "to_dict"):
            filled(value)
    return config


def every_type(hint: Any) -> Iterator[type]:
    """The classes that an annotation names."""
    parts = typing.get_args(hint)
    if isinstance(hint, type):
        yield hint
    for part in parts:
        yield from every_type(part)


def places(config: Any, name: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every setting: its name, the object that holds it, its attribute."""
    if hasattr(config, "to_dict"):
        names = [one for one in config.to_dict() if one != "model_type"]  # its class decides it, not the object
    else:
        names = list(dict.fromkeys([*(field.name for field in fields(config)), *vars(config)]))
        names = [one for one in names if not isinstance(getattr(type(config), one, None), cached_property)]
    for one in names:
        value, full = getattr(config, one, None), f"{name}.{one}" if name else one
        if is_dataclass(value) and not isinstance(value, type):
            yield from places(value, full)
        else:
            yield full, config, one


def other(value: Any) -> Any:
    """Another value of the same type."""
    match value:
        case bool():
            return not value
        case Enum():
            return next((one for one in type(value) if one is not value), "other")
        case int() | float():
            return value + 1
        case list() | tuple():
            return type(value)([*value, "other"])
        case dict():
            return {**value, "other": 1}
        case set():
            return {*value, "other"}
    return "another" if value == "other" else "other"


def excused(name: str) -> str:
    """The reason why this setting, or what it is part of, is harmless."""
    parts = name.split(".")
    return next(filter(None, (harmless(".".join(parts[:end])) for end in range(1, len(parts) + 1))), "")


def walked(config: VllmConfig) -> dict[str, Any]:
    """For each setting whether it changes the namespace, and why it need not; and the entries that excuse nothing."""
    config.model_config.hf_text_config = copy.deepcopy(config.model_config.hf_text_config)
    filled(config)
    before, found = name_of(config), {}
    for name, holder, attribute in list(places(config)):
        value = getattr(holder, attribute, None)
        object.__setattr__(holder, attribute, other(value))
        found[name] = [name_of(config) != before, excused(name)]
        object.__setattr__(holder, attribute, value)
    assert name_of(config) == before, "a setting was not put back"
    parents = {".".join(name.split(".")[:end]) for name in found for end in range(1, name.count(".") + 2)}
    stale = [name for name in NAMES if not name.startswith("env.") and name not in parents]
    declared = [name for name in found if not name.startswith("model_config.hf_")]
    return {"settings": found, "stale": stale, "declared": declared}


def nested(config: VllmConfig) -> dict[str, bool]:
    """Whether settings of the parts of a model of several change the namespace."""
    whole = LlavaConfig()
    config.model_config.hf_config, config.model_config.hf_text_config = whole, whole.text_config
    before, found = name_of(config), {}
    for part, name in (("text_config", "rms_norm_eps"), ("vision_config", "layer_norm_eps"), ("", "image_seq_length")):
        holder = getattr(whole, part) if part else whole
        value = getattr(holder, name)
        setattr(holder, name, other(value))
        found[f"{part}.{name}"] = name_of(config) != before
        setattr(holder, name, value)
    return found


def main(model: str, job: dict[str, Any]) -> None:
    """Does the job."""
    logging.disable(logging.INFO)
    facts: dict[str, Any] = {"names": {}}
    for name, options in job["engines"].items():
        facts["names"][name] = name_of(EngineArgs(**{"model": model, **options}).create_engine_config())
    if job["walk"]:
        facts |= walked(EngineArgs(model=model).create_engine_config())
        facts["nested"] = nested(EngineArgs(model=model).create_engine_config())
    print("FACTS", json.dumps(facts))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
