"""What is in the identity: every setting of vLLM but those that people have found harmless; no engine is started."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's import warns

SCRIPT = Path(__file__).parent / "engines" / "settings.py"
SEEN = Path(__file__).parent / "settings_seen.txt"
FLEET: dict[str, dict[str, Any]] = {
    "as it is": {},
    "other limits": {
        "max_model_len": 2048,
        "gpu_memory_utilization": 0.5,
        "max_num_batched_tokens": 4096,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 99,
        "kv_cache_memory_bytes": 1 << 28,
    },
    "other names": {"served_model_name": "other", "max_logprobs": 5, "seed": 3, "generation_config": "vllm"},
    "another chain": {"prefix_caching_hash_algo": "sha256_cbor"},
    "kept": {
        "kv_transfer_config": {
            "kv_connector": "KVKeepConnector",
            "kv_connector_module_path": "kvkeep.vllm",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"pool_size": "64 MiB"},
        }
    },
    "ngram": {"speculative_config": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3}},
}
OTHERS: dict[str, dict[str, Any]] = {
    "another eps": {"hf_overrides": {"rms_norm_eps": 0.3}},
    "another key": {"hf_overrides": {"what_a_later_model_reads": 1}},
    "another activation": {"hf_overrides": {"hidden_act": "gelu"}},
    "transformers' model": {"model_impl": "transformers"},
    "not compiled": {"enforce_eager": True},
    "other kernels": {"compilation_config": {"custom_ops": ["all"]}},
    "another dtype": {"dtype": "float32"},
}


def told(model: Path, seed: str, folder: Path, walk: bool = False) -> dict[str, Any]:
    """The facts of `settings.py` in a process of its own."""
    job = {"engines": {**FLEET, **OTHERS}, "walk": walk}
    env = {**os.environ, "PYTHONHASHSEED": seed, "TMPDIR": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(model), json.dumps(job)],
        env={**env, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("FACTS ")]
    assert lines, done.stderr[-4000:]
    return json.loads(lines[-1].removeprefix("FACTS "))


@pytest.fixture(scope="module")
def facts(model_folder, tmp_path_factory):
    return told(model_folder("tiny"), "1", tmp_path_factory.mktemp("settings"), walk=True)


def test_every_setting_changes_the_namespace_or_is_known_to_be_harmless(facts):
    """Reflection finds them, in a configuration whose every part is there."""
    neither = [name for name, (changes, reason) in facts["settings"].items() if not changes and not reason]
    assert neither == []
    changing = {name for name, (changes, _) in facts["settings"].items() if changes}
    assert {"model_config.hf_config.rms_norm_eps", "model_config.model_impl"} <= changing
    images = ("mm_processor_kwargs", "media_io_kwargs", "video_pruning_rate", "interleave_mm_strings")
    assert {f"model_config.multimodal_config.{name}" for name in images} <= changing


def test_somebody_has_looked_at_every_setting(facts):
    """A new one is in the identity by itself. Can it change a byte of KV? If not: `vllm_harmless.py`. Then enter it here.

    `settings_seen.txt` is made by `python tests/vllm/engines/settings.py MODEL '{"engines": {}, "walk": true}'`.
    """
    assert sorted(facts["declared"]) == SEEN.read_text().split()


def test_no_entry_excuses_a_setting_that_is_no_more(facts):
    assert facts["stale"] == []


def test_parts_of_a_model_of_several_count(facts):
    assert all(facts["nested"].values()), facts["nested"]


def test_engines_of_a_fleet_share(facts):
    assert {facts["names"][name] for name in FLEET} == {facts["names"]["as it is"]}


def test_engines_that_may_compute_other_bytes_do_not(facts):
    assert len({facts["names"][name] for name in ("as it is", *OTHERS)}) == 1 + len(OTHERS)


def test_another_process_with_the_same_settings_has_the_same_namespaces(facts, model_folder, tmp_path):
    assert told(model_folder("tiny"), "2", tmp_path)["names"] == facts["names"]


class Colour(Enum):
    RED = 1


def canonical(value: Any) -> str:
    from kvkeep.doors.vllm.settings import canonical

    return json.dumps(canonical(value), sort_keys=True)


def test_equal_values_have_one_form_whatever_their_order():
    assert canonical({"a": 1, "b": {2, 3, "x"}}) == canonical({"b": {"x", 3, 2}, "a": 1})
    assert canonical({1: "a", None: "b"}) == canonical({None: "b", 1: "a"})


def test_different_values_have_different_forms():
    import torch

    values = [None, "None", 0, False, 0.5, "0", [], {}, set(), [1], {1}, {"1": 1}, {1: 1}, b"1", Colour.RED, Colour]
    values += ["torch.float16x", torch.float16, torch.bfloat16, [[1], 2], [1, [2]]]
    assert len({canonical(value) for value in values}) == len(values)


@pytest.mark.parametrize(
    "value", [object(), lambda: 0, iter([1]), {"a": [object()]}], ids=["object", "f", "iter", "in"]
)
def test_what_has_no_form_of_its_own_is_not_guessed(value):
    from kvkeep.errors import NotCanonical

    with pytest.raises(NotCanonical):
        canonical(value)


def test_what_contains_itself_is_not_followed_for_ever():
    from kvkeep.errors import NotCanonical

    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(NotCanonical):
        canonical(endless)


def test_a_setting_that_cannot_be_named_is_of_this_start_alone(caplog):
    from dataclasses import dataclass

    from kvkeep.doors.vllm.identity import unknown
    from kvkeep.doors.vllm.settings import settings

    @dataclass
    class Config:
        hook: Any = None

    first, second = (settings(Config(lambda: 0), unknown)["hook"] for _ in range(2))
    assert first != second
    assert "hook has no stable form" in caplog.text


def test_vllms_variables_count_where_they_are_set_but_for_harmless_ones(monkeypatch):
    from kvkeep.doors.vllm.settings import environment

    before = environment()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    added = {"env.VLLM_BATCH_INVARIANT": '"1"'}
    assert environment() == {**before, **added}
    for name in (
        "VLLM_DIST_IDENT",  # drawn by chance when vLLM starts its processes
        "VLLM_OBJECT_STORAGE_SHM_BUFFER_NAME",
        "VLLM_PORT",
        "VLLM_HOST_IP",
        "VLLM_API_KEY",
        "VLLM_CACHE_ROOT",
        "CUDA_VISIBLE_DEVICES",
        "S3_ENDPOINT_URL",
    ):
        monkeypatch.setenv(name, "other")
    assert environment() == {**before, **added}


def test_ranks_that_differ_are_all_in_the_identity():
    from kvkeep.doors.vllm.identity import of_all_ranks
    from kvkeep.engine.plan import RankInfo

    def together(*sets: str) -> dict[str, str]:
        ranks = [RankInfo(rank, 1, "", None, facts={"isa": isa, "dtype": "f"}) for rank, isa in enumerate(sets)]
        return of_all_ranks(ranks)

    assert together("amx", "amx") == {"isa": "amx", "dtype": "f"}
    different = [together(*sets)["isa"] for sets in (("amx", "amx"), ("amx", "vec"), ("vec", "amx"), ("vec", "vec"))]
    assert len(set(different)) == 4


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder, old enough, and what is said of it: `said(part=changes)` as `fingerprints` gives it."""
    from kvkeep.doors.vllm import identity as vllm_identity

    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": 0.5}')
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(vllm_identity, "default_memory", lambda: None)
    monkeypatch.setattr(vllm_identity, "changed_since", lambda *_: None)

    def said(outlived: bool = True, load: dict[str, Any] | None = None, **changes: Any) -> tuple[str, str]:
        model = {
            "model": str(tmp_path),
            "model_weights": "",
            "architectures": ["LlamaForCausalLM"],
            "multimodal_config": None,
            "trust_remote_code": False,
            "hf_config": SimpleNamespace(),
        }
        loader = {"load_format": "auto", "model_loader_extra_config": {}, **(load or {})}
        parts = {"model_config": SimpleNamespace(**{**model, **changes}), "load_config": SimpleNamespace(**loader)}
        return vllm_identity.fingerprints(SimpleNamespace(**parts), outlived)

    said.path = tmp_path
    return said


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("preprocessor_config.json", True),
        ("processor_config.json", True),
        ("video_preprocessor_config.json", True),
        ("hf_quant_config.json", True),
        ("modeling_own.py", True),
        ("what_a_later_model_reads.json", True),
        ("generation_config.json", False),
        ("tokenizer.json", False),
        ("README.md", False),
    ],
)
def test_which_files_of_a_model_count(folder, name, counts):
    before = folder()
    (folder.path / name).write_text("other")
    assert (folder() != before) is counts
    assert folder()[0] == before[0]


def test_a_folder_without_other_files_has_a_name(folder):
    (folder.path / "preprocessor_config.json").unlink()
    assert folder() == folder()


def test_a_file_that_changed_while_the_engine_started_is_of_this_start_alone(folder, monkeypatch, caplog):
    from kvkeep.doors.vllm import identity as vllm_identity

    late = folder.path / "preprocessor_config.json"
    monkeypatch.setattr(vllm_identity, "changed_since", lambda _, names, __: late if late.name in names else None)
    assert folder()[0].startswith("this start only: ")
    assert "preprocessor_config.json changed after" in caplog.text


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"load": {"load_format": "tensorizer"}}, "tensorizer"),
        ({"load": {"load_format": "of a plugin"}}, "of a plugin"),
        ({"load": {"model_loader_extra_config": {"tensorizer_config": {}}}}, "model_loader_extra_config"),
        ({"load": {"model_loader_extra_config": "text"}}, "model_loader_extra_config"),
        ({"model_weights": "s3://bucket/model"}, "s3://bucket/model"),
        ({"model": "org/model"}, "not a folder"),
        ({"architectures": ["UltravoxModel"]}, "another folder"),
        ({"multimodal_config": SimpleNamespace(mm_encoder_fp8_scale_path="/x")}, "mm_encoder_fp8_scale_path"),
        (
            {"trust_remote_code": True, "hf_config": SimpleNamespace(auto_map={"AutoModel": "org/other--modeling.M"})},
            "another repository",
        ),
    ],
    ids=lambda part: part if isinstance(part, str) else "",
)
def test_what_was_loaded_from_elsewhere_is_of_this_start_alone(folder, caplog, changes, why):
    first, second = folder(**changes), folder(**changes)
    assert first[0].startswith("this start only: ")
    assert first[0] != second[0]
    assert why in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"load": {"model_loader_extra_config": {"enable_multithread_load": True, "num_threads": 8}}},
        {"load": {"load_format": "runai_streamer"}},
        {"trust_remote_code": True, "hf_config": SimpleNamespace(auto_map={"AutoModel": "modeling.M"})},
    ],
    ids=["threads", "streamer", "own code"],
)
def test_how_the_folder_was_read_is_no_matter(folder, caplog, changes):
    assert folder(**changes) == folder()
    assert not caplog.records


def test_where_nobody_could_find_it_no_file_is_read_and_nothing_is_said(folder, caplog):
    caplog.set_level(logging.DEBUG)
    assert folder(outlived=False, model="/nothing/there")[0].startswith("this start only: ")
    assert not caplog.records
