from __future__ import annotations

from hashlib import sha256
from typing import Any

import cbor2
import msgspec
import pytest

from kvkeep.core.identity import (
    SCHEMA,
    GroupIdentity,
    Identity,
    described,
    namespace,
    told_apart,
)

FULL = GroupIdentity(
    kind="full", layers=("model.0", "model.2"), kv_heads=8, head_size=128, block_tokens=16, window=None
)
SLIDING = GroupIdentity(
    kind="sliding_window",
    layers=("model.1", "model.3"),
    kv_heads=8,
    head_size=128,
    block_tokens=16,
    window=4096,
)
IDENTITY = Identity(
    schema=SCHEMA,
    layout=1,
    model="org/model",
    revision="main",
    weights="sha256:00",
    files="sha256:01",
    load_format="auto",
    load_seed=None,
    epoch=0,
    quantization=None,
    compute_dtype="bfloat16",
    kv_dtype="bfloat16",
    kv_scales=None,
    groups=(FULL, SLIDING),
    rope='{"theta":10000}',
    max_model_len=None,
    engine="vllm",
    engine_version="0.32.0",
    platform="cpu float8_e4m3fn",
    settings={"model_config.hf_config.rms_norm_eps": "1e-05", "optimization_level": "2"},
    attention_backend="CPU_ATTN",
    kv_layout="NHD",
    instruction_set=None,
    tp=1,
    pp=1,
    dcp=1,
    chunk_tokens=256,
    chain="kvkeep",
    hash_name="sha256_cbor",
    hash_seed="vllm-none-hash",
    codec=None,
)
PLAIN_FIELDS = [name for name in Identity.__struct_fields__ if name not in ("groups", "settings")]


def replaced(**changes: Any) -> Identity:
    return msgspec.structs.replace(IDENTITY, **changes)


def other(value: Any) -> Any:
    if value is None:
        return "other"
    if isinstance(value, tuple):
        return (*value, "other")
    return value + (1 if isinstance(value, int) else "other")


def test_namespace_is_the_digest_of_the_canonical_map():
    fields = msgspec.json.decode(msgspec.json.encode(IDENTITY))
    expected = sha256(cbor2.dumps(fields, canonical=True)).digest()[:16]
    assert namespace(IDENTITY) == expected
    assert namespace(replaced()) == expected


def differing(here: Identity, there: Identity) -> list[str]:
    return told_apart(described(here), described(there))


def shown_fields(group: GroupIdentity) -> dict[str, str]:
    return {name: repr(value) for name, value in msgspec.structs.asdict(group).items()}


def test_namespace_stays_what_it_was():
    # A change here makes every stored chunk unreachable: then SCHEMA must change too.
    assert namespace(IDENTITY).hex() == "c5c2332cd03ea454c77a7484154b73ff"


@pytest.mark.parametrize("name", PLAIN_FIELDS)
def test_every_field_changes_the_namespace_and_is_named(name):
    before = getattr(IDENTITY, name)
    changed = replaced(**{name: other(before)})
    assert namespace(changed) != namespace(IDENTITY)
    assert differing(IDENTITY, changed) == [f"{name}: {before!r} here, {other(before)!r} there"]
    assert differing(changed, IDENTITY) == [f"{name}: {other(before)!r} here, {before!r} there"]


@pytest.mark.parametrize("name", GroupIdentity.__struct_fields__)
def test_every_field_of_a_group_changes_the_namespace_and_is_named(name):
    before = getattr(SLIDING, name)
    changed = replaced(groups=(FULL, msgspec.structs.replace(SLIDING, **{name: other(before)})))
    assert namespace(changed) != namespace(IDENTITY)
    assert differing(IDENTITY, changed) == [f"groups[1].{name}: {before!r} here, {other(before)!r} there"]


def with_settings(**changes: str) -> Identity:
    return replaced(settings={**IDENTITY.settings, **changes})


def test_every_setting_changes_the_namespace_and_is_named():
    other, more = with_settings(optimization_level="3"), with_settings(new="true")
    assert len({namespace(one) for one in (IDENTITY, other, more)}) == 3
    assert differing(IDENTITY, other) == ["optimization_level: 2 here, 3 there"]
    assert differing(IDENTITY, more) == ["new: nothing here, true there"]


@pytest.mark.parametrize("text", ["", "two\nlines", "[" + "1, " * 400 + "2]"])
def test_a_setting_of_any_text_is_one_short_line_and_is_told_from_others(text):
    longer = with_settings(new=text + " "), with_settings(new=text)
    assert len(described(longer[0])) < len(described(IDENTITY)) + 60
    (line,) = differing(*longer)
    assert line.startswith("new: ")


def test_a_field_that_only_one_text_has_is_named():
    assert told_apart("a  1\nb  2", "a  1\nc  3") == ["b: 2 here, nothing there", "c: nothing here, 3 there"]


def test_equal_identities_do_not_differ():
    assert differing(IDENTITY, replaced()) == []


def test_none_is_not_its_text():
    assert namespace(replaced(codec="None")) != namespace(IDENTITY)


def test_the_number_and_the_order_of_groups_count():
    assert differing(IDENTITY, replaced(groups=(FULL,))) == [
        "groups: 2 here, 1 there",
        *(f"groups[1].{name}: {shown} here, nothing there" for name, shown in shown_fields(SLIDING).items()),
    ]
    swapped = replaced(groups=(SLIDING, FULL))
    assert namespace(swapped) != namespace(IDENTITY)
    assert [line.split(":")[0] for line in differing(IDENTITY, swapped)] == [
        f"groups[{i}].{name}" for i in (0, 1) for name in ("kind", "layers", "window")
    ]


@pytest.mark.parametrize("text", ["x ", " ", "x", "\n\n", "x \n y\n"])
def test_what_is_no_field_is_nothing(text: str):
    assert told_apart(text, "a  1") == ["a: nothing here, 1 there"]
    assert told_apart("a  1", text) == ["a: 1 here, nothing there"]


def test_long_tuples_with_the_same_ends_are_told_apart():
    def with_layers(*names: str) -> Identity:
        return replaced(groups=(msgspec.structs.replace(FULL, layers=names),))

    (line,) = differing(with_layers("a", "b", "c", "d"), with_layers("a", "x", "c", "d"))
    here, there = line.removeprefix("groups[0].layers: ").removesuffix(" there").split(" here, ")
    assert here.startswith("4 from 'a' to 'd'")
    assert here != there


def test_described_has_a_line_for_every_field():
    lines = described(IDENTITY).splitlines()
    names = [line.split()[0] for line in lines]
    expected = {*Identity.__struct_fields__, *IDENTITY.settings} - {"settings"} | {
        f"groups[{i}].{x}" for i in (0, 1) for x in GroupIdentity.__struct_fields__
    }
    assert set(names) == expected
    assert len(names) == len(expected)
    assert [line.split()[1] for line in lines if line.startswith("groups[1].window")] == ["4096"]
