"""Lists all settings of a vLLM engine that may change a byte of KV, each as text that is equal in every process.

Leaves out only what `harmless` names with a reason. A setting that nobody has reviewed is in: at worst two engines do
not share that could.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import fields, is_dataclass
from enum import Enum
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from vllm import envs

from kvkeep.doors.vllm.harmless import GLOBS, NAMES
from kvkeep.errors import NotCanonical

MOST_LEVELS = 20
_OF_TEXT = "model_config.hf_text_config."
_PLAIN_NAME = re.compile(r"[\w.\-]+")


def harmless(name: str) -> str:
    """Say why this setting cannot change a byte of KV; empty if it may."""
    return NAMES.get(name) or next((reason for glob, reason in GLOBS.items() if fnmatchcase(name, glob)), "")


def settings(config: Any, unknown: Callable[[str], str]) -> dict[str, str]:
    """Return, by name, the canonical JSON of every setting in `config` and the environment that may change a byte.

    `unknown` makes the text of a setting, from its name, whose value has no canonical form.
    """
    found = {}
    for name, value in _leaves("", config, 0):
        try:
            found[name] = json.dumps(canonical(value), sort_keys=True, ensure_ascii=True)
        except NotCanonical:
            found[name] = unknown(name)
    return _once(found) | environment()


def _once(found: dict[str, str]) -> dict[str, str]:
    """Drop a second copy of the same model's configuration: most models are all text."""
    text = {name: value for name, value in found.items() if name.startswith(_OF_TEXT)}
    for whole in ("model_config.hf_config.", "model_config.hf_config.text_config."):
        same = {name.replace(whole, _OF_TEXT, 1): value for name, value in found.items() if name.startswith(whole)}
        if text and same == text:
            return {name: value for name, value in found.items() if name not in text} | {
                _OF_TEXT[:-1]: f"as {whole[:-1]}"
            }
    return found


def environment() -> dict[str, str]:
    """Return the variables of vLLM that are set and may change a byte, as settings."""
    names = sorted(os.environ.keys() & envs.environment_variables.keys())  # others are between its processes
    return {f"env.{name}": json.dumps(os.environ[name]) for name in names if not harmless(f"env.{name}")}


def _leaves(name: str, value: Any, level: int) -> Iterator[tuple[str, Any]]:
    """Yield the settings at and below this one, without those that are harmless."""
    if name and harmless(name):
        return
    parts = _parts(value) if level < MOST_LEVELS else None
    if not parts:
        yield name, value
        return
    for part, inner in parts.items():
        yield from _leaves(f"{name}.{part}" if name else part, inner, level + 1)


def _parts(value: Any) -> Mapping[str, Any] | None:
    """Return a value's named parts: of a model's configuration, of one of vLLM's, of a mapping; None for others."""
    if _is_of_a_model(value):
        value = value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        names = dict.fromkeys([*(field.name for field in fields(value)), *vars(value)])
        lazy = {name for kind in type(value).__mro__ for name, what in vars(kind).items() if _is_lazy(what)}
        return {name: getattr(value, name, None) for name in names if name not in lazy}
    if isinstance(value, Mapping) and all(isinstance(key, str) and _PLAIN_NAME.fullmatch(key) for key in value):
        return value
    return None


def _is_of_a_model(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "to_json_string") and not isinstance(value, type)


def _is_lazy(what: object) -> bool:
    return isinstance(what, cached_property)  # there only once somebody has asked for it


def canonical(value: Any, level: int = 0) -> Any:
    """Return a value as JSON has it, equal in every process for equal values; NotCanonical for an unknown type."""
    if value is None or (isinstance(value, (bool, int, float, str)) and not isinstance(value, Enum)):
        return value
    if level >= MOST_LEVELS:
        raise NotCanonical("it is nested too deeply")
    if isinstance(value, Enum):
        return {"enum": [type(value).__qualname__, value.name]}
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, type):
        return {"type": f"{value.__module__}.{value.__qualname__}"}
    return _canonical_parts(value, level + 1)


def _canonical_parts(value: Any, level: int) -> Any:
    """Return the canonical form of a value with parts."""
    parts = _parts(value)
    if parts is None and isinstance(value, Mapping):
        return {"pairs": sorted((_text(key, level), _text(inner, level)) for key, inner in value.items())}
    if parts is not None:
        return {name: canonical(inner, level) for name, inner in parts.items()}
    if isinstance(value, AbstractSet):
        return {"set": sorted(_text(inner, level) for inner in value)}
    if isinstance(value, (list, tuple)):
        return [canonical(inner, level) for inner in value]
    raise NotCanonical(f"{type(value).__name__} has no form that is known to be stable")


def _text(value: Any, level: int) -> str:
    return json.dumps(canonical(value, level), sort_keys=True)
