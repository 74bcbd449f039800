from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvkeep.config import Config, Disk, Durability, describe_settings
from kvkeep.core.policies.registry import POLICIES, policy_by_name
from kvkeep.errors import ConfigError
from kvkeep.settings import parse_size, right_values
from kvkeep.sources import load_config

MIB, GIB = 1 << 20, 1 << 30
REFERENCE = Path(__file__).parents[1] / "docs/reference/configuration.md"


def load(overrides: dict[str, object] | None = None, environ: dict[str, str] | None = None, toml: str = "") -> Config:
    def read_text(path: str) -> str:
        assert path == "/etc/kvkeep.toml"
        return toml

    file = {"config_file": "/etc/kvkeep.toml"} if toml else {}
    return load_config(file | (overrides or {}), environ or {}, read_text)


def refusal(overrides: dict[str, object] | None = None, environ: dict[str, str] | None = None, toml: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        load(overrides, environ, toml)
    return str(caught.value)


def attempt(overrides: dict[str, object], environ: dict[str, str]) -> str | None:
    """What the refusal says; None where there is none."""
    try:
        load(overrides, environ)
    except ConfigError as error:
        return str(error)
    return None


def test_nothing_configured_works() -> None:
    config = load()
    assert config == Config()
    assert config.pool_nbytes(100 * GIB) == 4 * GIB
    assert config.socket_path is None


def test_loads_go_by_layer_where_it_is_set_and_where_it_is_measured() -> None:
    modes = ("bulk", "layerwise", "auto")
    assert [Config(transfer_mode=mode).may_go_by_layer(on_cpu=True) for mode in modes] == [False, True, True]
    assert [Config(transfer_mode=mode).may_go_by_layer(on_cpu=False) for mode in modes] == [False, True, False]


def test_the_defaults_are_right_values_themselves() -> None:
    assert load(msgspec.structs.asdict(Config())) == Config()


def test_sources_by_strength() -> None:
    environ = {"KVKEEP_CHUNK_TOKENS": "1", "KVKEEP_POLICY": "mru", "KVKEEP_DEADLINE_S": "3", "HOME": "/x"}
    toml = 'chunk_tokens = 2\npolicy = "lfu"\n'
    config = load({"chunk_tokens": 3}, environ, toml)
    assert (config.chunk_tokens, config.policy, config.deadline_s) == (3, "lfu", 3.0)


def test_the_mappings_file_is_stronger_than_the_environments() -> None:
    read: list[str] = []

    def read_text(path: str) -> str:
        read.append(path)
        return "min_hit_tokens = 9"

    environ = {"KVKEEP_CONFIG_FILE": "weak.toml"}
    assert load_config({"config_file": "strong.toml"}, environ, read_text).min_hit_tokens == 9
    assert load_config({}, environ, read_text).min_hit_tokens == 9
    assert read == ["strong.toml", "weak.toml"]


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("enabled", "false", False),
        ("store_generated", "1", True),
        ("chunk_tokens", "64", 64),
        ("deadline_s", "0.25", 0.25),
        ("patience_s", "0.25", 0.25),
        ("pool_size", "1048576", 1 << 20),
        ("pool_size", "512 MiB", 512 << 20),
        ("store", "unix:/run/kvkeep/socket", "unix:/run/kvkeep/socket"),
        ("log_level", "debug", "debug"),
        ("disk_size", "1 TiB", 1 << 40),
        ("tiers", '[{"kind": "disk", "path": "/a:/b", "size": "1 TiB"}]', (Disk(path=("/a", "/b"), size=1 << 40),)),
    ],
)
def test_variables_are_text_that_is_read(name: str, text: str, value: object) -> None:
    assert getattr(load(environ={f"KVKEEP_{name.upper()}": text}), name) == value


WRONG: list[tuple[str, object]] = [
    ("enabled", 1),
    ("enabled", "true"),
    ("chunk_tokens", 0),
    ("chunk_tokens", -256),
    ("chunk_tokens", True),
    ("chunk_tokens", 256.0),
    ("chunk_tokens", "256"),
    ("chunk_tokens", None),
    ("policy", "arc"),
    ("policy", "lru "),
    ("verify_pool", "everything"),
    ("transfer_mode", "layer"),
    ("store", "tcp:1.2.3.4"),
    ("store", "unix:"),
    ("store", "unix:relative"),
    ("store", "unix:/"),
    ("store", "unix:/" + "x" * 107),
    ("store", "unix:/" + "é" * 54),
    ("store", "unix:/a\0b"),
    ("store", "private\n"),
    ("verify_pool", "never"),
    ("load_failure_policy", "fail"),
    ("deadline_s", 0),
    ("deadline_s", -0.1),
    ("deadline_s", float("nan")),
    ("deadline_s", float("inf")),
    ("patience_s", "60"),
    ("max_pinned_share", 0),
    ("max_pinned_share", 1.01),
    ("min_hit_tokens", -1),
    ("log_level", "loud"),
    ("pool_size", 0),
    ("disk_size", "auto"),
    ("disk_size", 0),
    ("disk_min_free", "some"),
    ("disk_path", "relative"),
    ("disk_path", "/a:b"),
    ("disk_path", "/a\0b"),
    ("disk_path", None),
    ("disk_durability", "all"),
    ("disk_policy", "arc"),
    ("disk_threads", 1),
    ("tiers", "disk"),
    ("tiers", None),
    ("tiers", {"kind": "disk", "path": "/a"}),
    ("pool_size", -1),
    ("pool_size", 1.5),
    ("pool_size", True),
    ("pool_size", "4G"),
    ("pool_size", "1.5"),
    ("pool_size", "-4 GiB"),
    ("pool_size", "٤ GiB"),
    ("pool_size", "lots"),
    ("pool_size", "9999999999 TiB"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_wrong_value_names_its_path_and_what_is_right(name: str, value: object) -> None:
    text = refusal({name: value})
    assert text.startswith(f"kv_connector_extra_config.{name} is {value!r}; right is ")
    assert describe_settings()[name] in text


@pytest.mark.parametrize(("name", "value"), [*WRONG, ("max_pinned_share", 7), ("disk_path", "rel"), ("deadline_s", -1)])
def test_a_wrong_argument_is_refused_like_a_wrong_setting(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{name: value})
    assert str(caught.value) == refusal({name: value}).removeprefix("kv_connector_extra_config.")
    with pytest.raises(ConfigError):
        msgspec.structs.replace(Config(), **{name: value})


def test_words_may_be_in_any_case_and_numbers_are_what_they_are_meant_to_be() -> None:
    said = {"policy": "LRU", "verify_pool": "Always", "deadline_s": 1}
    config = Config(policy="LRU", verify_pool="Always", deadline_s=1)
    assert load(said) == config == load(environ={f"KVKEEP_{name.upper()}": str(value) for name, value in said.items()})
    assert (config.policy, config.verify_every, config.deadline_s) == ("lru", 1, 1.0)
    assert isinstance(config.deadline_s, float)


def test_a_word_that_is_nearly_right_gets_a_suggestion() -> None:
    assert refusal({"transfer_mode": "layer"}).endswith('; did you mean "layerwise"?')
    assert "did you mean" not in refusal({"policy": "arc"})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("KVKEEP_ENABLED", "yes"),
        ("KVKEEP_CHUNK_TOKENS", "1.0"),
        ("KVKEEP_CHUNK_TOKENS", " 1"),
        ("KVKEEP_CHUNK_TOKENS", ""),
        ("KVKEEP_CHUNK_TOKENS", "true"),
        ("KVKEEP_DEADLINE_S", "soon"),
        ("KVKEEP_DEADLINE_S", "inf"),
        ("KVKEEP_POOL_SIZE", ""),
    ],
)
def test_a_wrong_variable_names_itself(variable: str, text: str) -> None:
    assert refusal(environ={variable: text}).startswith(f"{variable} is {text!r}; right is ")


def test_a_wrong_value_in_a_file_names_the_file_and_the_setting() -> None:
    assert refusal(toml="chunk_tokens = '1'").startswith("/etc/kvkeep.toml: chunk_tokens is '1'; right is ")
    assert refusal(toml="deadline_s = 2024-01-01").startswith("/etc/kvkeep.toml: deadline_s is ")


def test_a_wrong_value_stops_the_start_even_where_it_is_overridden() -> None:
    assert "KVKEEP_CHUNK_TOKENS" in refusal({"chunk_tokens": 1}, {"KVKEEP_CHUNK_TOKENS": "x"})
    assert "kvkeep.toml: chunk_tokens" in refusal({"chunk_tokens": 1}, toml="chunk_tokens = 0")


def test_an_unknown_name_gets_a_suggestion() -> None:
    assert refusal({"chunk_token": 1}) == (
        "kv_connector_extra_config.chunk_token is no setting of kvkeep; did you mean chunk_tokens?"
    )
    assert "did you mean max_pinned_share?" in refusal({"MaxPinnedShare": 1})
    assert refusal(toml="poolsize = 1").endswith("did you mean pool_size?")
    assert refusal(environ={"KVKEEP_CHUNKTOKENS": "1"}).endswith("did you mean KVKEEP_CHUNK_TOKENS?")
    assert refusal(environ={"KVKEEP_CONFIG": "x"}).endswith("did you mean KVKEEP_CONFIG_FILE?")


def test_an_unknown_name_like_no_other_gets_the_names() -> None:
    text = refusal({"zzz": 1})
    assert "kv_connector_extra_config.zzz" in text
    assert all(name in text for name in Config.__struct_fields__)


def test_config_file_is_no_setting_of_a_file() -> None:
    assert "no setting" in refusal(toml="config_file = 'other.toml'")


def test_a_table_is_refused_with_what_is_right() -> None:
    assert refusal(toml="[pool]\nsize = 1").startswith("/etc/kvkeep.toml: [pool] is a table; only [[tiers]] are")
    assert "[[tiers]]" in refusal(toml="[tiers]\nkind = 'disk'\npath = '/a'")


def test_a_file_that_cannot_be_read_is_named() -> None:
    def read_text(path: str) -> str:
        return Path(path).read_text(encoding="utf-8")

    with pytest.raises(ConfigError, match=r"/nonexistent/k\.toml: .*cannot be read"):
        load_config({"config_file": "/nonexistent/k.toml"}, {}, read_text)
    assert "not TOML" in refusal(toml="chunk_tokens = = 1")
    with pytest.raises(ConfigError, match="path of a TOML file"):
        load_config({"config_file": 7}, {}, read_text)
    with pytest.raises(ConfigError, match="path of a TOML file"):
        load_config({}, {"KVKEEP_CONFIG_FILE": ""}, read_text)


def test_undecodable_files_are_named() -> None:
    def read_text(path: str) -> str:
        return b"\xff".decode("utf-8")

    with pytest.raises(ConfigError, match=r"k\.toml: .*cannot be read"):
        load_config({"config_file": "k.toml"}, {}, read_text)


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [
        (1, 1),
        ("4096", 4096),
        ("512 MiB", 512 * MIB),
        ("4 GiB", 4 * GIB),
        ("4GB", 4 * 10**9),
        ("4gib", 4 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("0.1 KiB", 102),
        ("2TiB", 2 << 40),
        (" 7 kb ", 7000),
    ],
)
def test_sizes(size: int | str, nbytes: int) -> None:
    assert parse_size(size) == nbytes
    assert load({"pool_size": size}).pool_nbytes(1) == nbytes


def test_auto_is_no_size() -> None:
    with pytest.raises(ValueError, match="auto"):
        parse_size("auto")


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 45))
def test_auto_is_a_quarter_between_its_bounds(available: int) -> None:
    nbytes = Config().pool_nbytes(available)
    assert nbytes % MIB == 0
    assert 64 * MIB <= nbytes <= 4 * GIB
    if 256 * MIB <= available <= 16 * GIB:
        assert available // 4 - MIB < nbytes <= available // 4
    if available >= 16 * GIB:
        assert nbytes == 4 * GIB


def test_the_socket_of_a_shared_store() -> None:
    assert load({"store": "unix:/run/k"}).socket_path == "/run/k"
    longest = "/" + "x" * 106
    assert load({"store": f"unix:{longest}"}).socket_path == longest


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(Config.__struct_fields__),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
        max_leaves=4,
    ),
)
def test_any_value_is_taken_or_is_a_config_error(name: str, value: object) -> None:
    said = attempt({name: value}, {})
    assert said is None or re.match(rf"kv_connector_extra_config\.{name}(\[\d\](\.\w+)?)? is ", said)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(Config.__struct_fields__), st.text(max_size=12))
def test_any_text_is_taken_or_is_a_config_error(name: str, text: str) -> None:
    variable = f"KVKEEP_{name.upper()}"
    said = attempt({}, {variable: text})
    assert said is None or re.match(rf"{variable}(\[\d\](\.\w+)?)? is ", said)


def test_the_reference_names_every_setting_and_its_default() -> None:
    rows = {
        cells[1].strip().strip("`"): cells[2].strip().strip("`")
        for line in REFERENCE.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `") and len(cells := line.split("|")) > 3
    }
    disk = Disk(path="/a")
    of_disk = {name: getattr(disk, name) for name in Disk.__struct_fields__}
    short = {
        f"disk_{name}": of_disk.pop(name) for name in ("path", "size", "min_free", "policy", "durability", "threads")
    }
    short["disk_path"] = ""
    assert rows == {name: tidy(value) for name, value in (msgspec.structs.asdict(Config()) | short | of_disk).items()}


def tidy(value: object) -> str:
    """A default as the reference writes it: sizes with a unit, the rest as JSON."""
    if isinstance(value, int) and value >= MIB:
        return f'"{value >> 30} GiB"' if value >= GIB else f'"{value >> 20} MiB"'
    return msgspec.json.encode(value).decode()


def test_the_flat_settings_are_one_disk_tier() -> None:
    flat = {
        "disk_path": "/a:/b",
        "disk_size": "3 MiB",
        "disk_min_free": "1 KiB",
        "disk_policy": "lfu",
        "disk_durability": "group",
        "disk_threads": 9,
    }
    disk = Disk(path=("/a", "/b"), size=3 << 20, min_free=1024, policy="lfu", durability=Durability.GROUP, threads=9)
    variables = {f"KVKEEP_{name.upper()}": str(value) for name, value in flat.items()}
    toml = "\n".join(f"{name} = {value!r}" for name, value in flat.items())
    tagged = {name.removeprefix("disk_"): value for name, value in flat.items()} | {"kind": "disk"}
    for config in (
        Config(**flat),
        load(flat),
        load(environ=variables),
        load(toml=toml),
        load({"tiers": [tagged]}),
        Config(tiers=[Disk(path="/a:/b", size="3 MiB", min_free=1024, policy="LFU", durability="group", threads=9)]),
        load(toml="[[tiers]]\n" + "\n".join(f"{name} = {value!r}" for name, value in tagged.items())),
        load_config(variables_as_options(flat), {}, command_line=True),
    ):
        assert config == Config(tiers=(disk,))
        assert config.outlived


def variables_as_options(flat: dict[str, object]) -> dict[str, object]:
    return {name: str(value) for name, value in flat.items()}


def test_without_a_directory_there_is_no_tier() -> None:
    assert Config(disk_size="1 GiB").tiers == Config(disk_path="").tiers == ()
    assert load({"disk_path": ""}, {"KVKEEP_DISK_PATH": "/a"}).tiers == ()
    assert not Config().outlived


def test_tiers_beside_the_flat_settings_are_refused() -> None:
    tiers = [{"kind": "disk", "path": "/a"}]
    for name, value in (("disk_path", "/b"), ("disk_size", 1), ("disk_path", "")):
        said = refusal({"tiers": tiers}, {f"KVKEEP_{name.upper()}": str(value)})
        assert said.startswith(
            f"KVKEEP_{name.upper()} cannot stand beside kv_connector_extra_config.tiers; leave it out"
        )
        assert name.removeprefix("disk_") in said
    with pytest.raises(ConfigError, match=r"^disk_size cannot stand beside tiers"):
        Config(tiers=tiers, disk_size=1)


@pytest.mark.parametrize(
    ("tier", "says"),
    [
        ({"kind": "disk"}, ".path is not set; right is absolute paths"),
        ({"path": "/a"}, '.kind is None; right is "disk"'),
        ({"kind": "dsk", "path": "/a"}, ".kind is 'dsk'; right is \"disk\""),
        ({"kind": ["disk"], "path": "/a"}, ".kind is ['disk']; right is"),
        ({"kind": "disk", "path": "/a", "sizes": 1}, ".sizes is no setting of kvkeep; did you mean size?"),
        ({"kind": "disk", "path": "/a", "size": "much"}, ".size is 'much'; right is a number of bytes > 0"),
        ({"kind": "disk", "path": "a"}, ".path is 'a'; right is absolute paths"),
        ({"kind": "disk", "path": []}, ".path is []; right is absolute paths"),
        (7, " is 7; right is a mapping with a kind"),
    ],
)
def test_what_is_wrong_in_a_tier_is_named_where_it_is(tier: object, says: str) -> None:
    written = msgspec.json.encode([{"kind": "disk", "path": "/z"}, tier]).decode()
    assert refusal({"tiers": [tier]}).startswith(f"kv_connector_extra_config.tiers[0]{says}")
    assert refusal(environ={"KVKEEP_TIERS": written}).startswith(f"KVKEEP_TIERS[1]{says}")


def test_two_tiers_of_a_kind_are_refused_with_the_cure() -> None:
    assert "give all directories to one" in refusal({"tiers": [{"kind": "disk", "path": "/a"}, Disk(path="/b")]})


def test_an_option_is_named_as_it_is_written_on_a_command_line() -> None:
    for options, says in (({"disk_threads": "1"}, "--disk-threads is '1'"), ({"config_file": ""}, "--config is ''")):
        with pytest.raises(ConfigError, match=f"^{says}; right is "):
            load_config(options, {}, command_line=True)
    assert load_config({"chunk_tokens": "64"}, {}, command_line=True).chunk_tokens == 64


def test_a_store_process_reads_what_was_parsed() -> None:
    config = Config(pool_size="1.5 GiB", tiers=[Disk(path="/a", size="5 GB")], deadline_s=2, log_level="error")
    assert msgspec.json.decode(config.json(), type=Config) == config
    assert Config().json() == "{}"


def test_a_path_that_is_no_utf_8_stays_with_the_engine_and_is_refused_where_the_store_needs_it() -> None:
    odd = "/tmp/\udcff"
    config = Config(trace_path=odd, store=f"unix:{odd}", policy="fifo")
    assert msgspec.json.decode(config.json(), type=Config) == Config(policy="fifo")
    for wrong in ({"disk_path": odd}, {"tiers": [{"kind": "disk", "path": odd}]}):
        with pytest.raises(ConfigError, match="path is"):
            Config(**wrong)  # type: ignore[arg-type]


def test_every_policy_that_may_be_set_is_there() -> None:
    for name in POLICIES:
        assert f'"{name}"' in right_values(Config)["policy"]
        policy_by_name(Config(policy=name).policy)
