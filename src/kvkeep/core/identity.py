"""The identity: everything that must be equal before one engine may read KV bytes that another computed.

Every key begins with the namespace, a digest of the identity, so two engines share chunks only if their identities are
equal. Knows nothing about how the fields are found out: the doors fill them in.
"""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Literal

import msgspec

from kvkeep.core import cbor
from kvkeep.core.units import NAMESPACE_NBYTES

SCHEMA: Literal[2] = 2
"""The version of the record: a new one whenever a field is added, dropped or changes its meaning."""

MAX_SHOWN_CHARS = 32
"""How many characters of a setting people see: there are hundreds of settings, and their text has a bound."""


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

    schema: Literal[2]
    layout: int  # the version of the rules by which a chunk's bytes are arranged
    model: str
    revision: str | None
    weights: str  # fingerprint of the weight files' content
    files: str  # fingerprint of the model's other files that shape what it computes or how images become input
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
    platform: str  # and its variant of FP8
    settings: dict[str, str]  # all the engine's settings but those that cannot matter: name to canonical JSON
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


def namespace(identity: Identity) -> bytes:
    """Return the first 16 bytes of the SHA-256 of the canonical CBOR map of field names to values."""
    return sha256(cbor.encode(msgspec.to_builtins(identity))).digest()[:NAMESPACE_NBYTES]


def described(identity: Identity) -> str:
    """Return the identity for people, a field a line; never to be parsed back."""
    return "\n".join(f"{name}  {value}" for name, value in _shown_fields(identity).items())


def told_apart(here: str, there: str) -> list[str]:
    """Name the fields in which two texts differ, with both values, as in "kv_dtype: 'bfloat16' here, 'float16' there".

    Both texts are what `described` returned, perhaps in other processes or versions; a line that is no field is
    ignored. A field of a group is called "groups[1].window", a setting what the engine calls it.
    """
    ours, theirs = _fields_said(here), _fields_said(there)
    return [
        f"{name}: {ours.get(name, 'nothing')} here, {theirs.get(name, 'nothing')} there"
        for name in dict.fromkeys([*ours, *theirs])
        if ours.get(name) != theirs.get(name)
    ]


def _fields_said(text: str) -> dict[str, str]:
    """Read a field a line; a line that is not a name and a value is no field."""
    parts = (line.split(None, 1) for line in text.splitlines())
    return {part[0]: part[1] for part in parts if len(part) == 2}


def _shown_fields(identity: Identity) -> dict[str, str]:
    """Every field for people; the settings last, for a text that is too long is cut at its end."""
    shown = {name: _shown(value) for name, value in _fields(identity).items()}
    return shown | {name: _shown_setting(text) for name, text in sorted(identity.settings.items())}


def _fields(identity: Identity) -> dict[str, Any]:
    """Flatten an identity but for its settings; "groups" becomes their count."""
    fields: dict[str, Any] = {}
    for name, value in msgspec.structs.asdict(identity).items():
        if name == "settings":
            continue
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


def _shown_setting(text: str) -> str:
    """Write a setting for people: of a long one its beginning and a digest, in one line."""
    plain = " ".join(text.split())
    if plain and plain == text and len(plain) <= MAX_SHOWN_CHARS:
        return plain
    return f"{plain[:MAX_SHOWN_CHARS]}... ({sha256(text.encode()).hexdigest()[:8]})"
