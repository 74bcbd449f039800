"""The identity: all that must agree before KV bytes computed by one engine may be read by another.

Two engines share chunks only if their identities are equal, for every key begins with the namespace, which is
a digest of the identity. Knows nothing about how the fields are found out: engines fill them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal

import msgspec

from kvkeep.core import cbor
from kvkeep.core.key import NAMESPACE_NBYTES

SCHEMA: Literal[1] = 1
"""The version of the record: a new one whenever a field is added, dropped or changes its meaning."""


class GroupIdentity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One group: layers whose KV has one geometry and one block table."""

    kind: str  # how its layers keep the past: "full", "sliding_window", "mla", "mamba" and so on
    layers: tuple[str, ...]  # the engine's names, in the layout's order
    kv_heads: int  # on this shard
    head_size: int
    block_tokens: int
    window: int | None  # tokens a sliding window sees, None where there is none


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bytes of a chunk depend on besides its tokens. No field has a default: none is forgotten."""

    schema: Literal[1]
    model: str
    revision: str | None
    weights: str  # fingerprint of the weight files' content
    load_format: str
    load_seed: int | None  # where weights are drawn, not loaded
    epoch: int  # of the weights, counted up when they change at run time
    quantization: str | None
    compute_dtype: str
    kv_dtype: str
    kv_scales: str | None  # digest of static KV scales
    groups: tuple[GroupIdentity, ...]
    rope: str  # canonical JSON of its parameters
    max_model_len: int | None  # only where it changes RoPE
    engine: str
    engine_version: str
    attention_backend: str
    kv_layout: str
    instruction_set: str | None  # only where bytes are packed by it
    tp: int
    pp: int
    dcp: int
    chunk_tokens: int
    chain: Literal["kvkeep", "vllm"]
    hash_name: Literal["sha256_cbor"]
    hash_seed: str
    codec: str | None  # only a lossy one


def of_mapping(mapping: Mapping[str, object]) -> Identity:
    """Read an identity from its fields as they come off a wire or a file.

    Raises msgspec.ValidationError, naming the field, for one that is unknown, missing or of a wrong type, and
    for another schema: what this version does not understand it must not take for equal.
    """
    return msgspec.convert(dict(mapping), Identity)


def namespace(identity: Identity) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the canonical CBOR map of field names to values."""
    return sha256(cbor.encode(msgspec.to_builtins(identity))).digest()[:NAMESPACE_NBYTES]


def differing(here: Identity, there: Identity) -> list[str]:
    """Name the fields that differ, with both values, as in "kv_dtype: 'bfloat16' here, 'float16' there".

    Fields of a group are named "groups[1].window". Empty exactly if the identities are equal.
    """
    ours, theirs = _fields(here), _fields(there)
    return [
        f"{name}: {_shown(value)} here, {_shown(theirs[name])} there"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]


def described(identity: Identity) -> str:
    """Return the identity for people, a field a line; never to be parsed back."""
    fields = _fields(identity)
    width = max(map(len, fields))
    return "\n".join(f"{name:<{width}}  {_shown(value)}" for name, value in fields.items())


def told_apart(here: str, there: str) -> list[str]:
    """Do as `differing` for two texts that `described` made, perhaps in other processes or versions; else for any."""
    ours, theirs = _said(here), _said(there)
    return [
        f"{name}: {ours.get(name, 'nothing')} here, {theirs.get(name, 'nothing')} there"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def _said(text: str) -> dict[str, str]:
    """Read a field a line; what is no name and a value is nothing."""
    parts = (line.split(None, 1) for line in text.splitlines())
    return {part[0]: part[1] for part in parts if len(part) == 2}


def _fields(identity: Identity) -> dict[str, Any]:
    """Flatten an identity; "groups" becomes their number, so that a missing group differs by that alone."""
    fields: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(identity).items():
        if name != "groups":
            fields[name] = value
            continue
        fields[name] = len(value)
        for i, group in enumerate(value):
            fields.update((f"groups[{i}].{part}", item) for part, item in msgspec.structs.asdict(group).items())
    return fields


def _shown(value: Any) -> str:
    """Write a value for people: of a long tuple its ends, and a digest for what lies between them."""
    if not isinstance(value, tuple) or len(value) <= 3:
        return repr(value)
    return f"{len(value)} from {value[0]!r} to {value[-1]!r} ({sha256(cbor.encode(value)).hexdigest()[:8]})"
