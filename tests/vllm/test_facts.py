"""What is refused and what is known of a model, from vLLM's own classes; no engine is started."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, get_args

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's import warns


def sliding(window: int, heads: int = 2) -> Any:
    import torch
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    return SlidingWindowSpec(
        block_size=16, num_kv_heads=heads, head_size=64, dtype=torch.float32, sliding_window=window
    )


def full() -> Any:
    import torch
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    return FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.float32)


def caches(*specs: Any) -> Any:
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

    groups = [KVCacheGroupSpec([f"layer{number}"], spec) for number, spec in enumerate(specs)]
    return KVCacheConfig(num_blocks=10, kv_cache_tensors=[], kv_cache_groups=groups)


def settings(
    reusable: bool = True, images: Any = None, prefix_caching: bool = True, diffusion: Any = None, drafter: str = ""
) -> Any:
    """As much of vLLM's configuration as decides."""
    return SimpleNamespace(
        model_config=SimpleNamespace(is_prefix_caching_supported=reusable, multimodal_config=images, use_mla=False),
        cache_config=SimpleNamespace(enable_prefix_caching=prefix_caching, calculate_kv_scales=False),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1, prefill_context_parallel_size=1, pipeline_parallel_size=1, nnodes=1
        ),
        diffusion_config=diffusion,
        speculative_config=SimpleNamespace(method=drafter) if drafter else None,
    )


def refused(**parts: Any) -> str:
    from kvkeep.doors.vllm import facts as vllm_facts

    return vllm_facts.refusal(settings(**parts), caches(full()))


def test_a_plain_model_is_kept_whether_or_not_vllm_caches_prefixes():
    assert refused() == refused(prefix_caching=False) == ""


def test_a_model_whose_output_needs_all_tokens_is_refused():
    assert "pooled" in refused(reusable=False, prefix_caching=False)


def test_images_that_are_only_numbered_are_refused():
    """The first image of one process has the name of the first of another."""
    numbered, hashed = SimpleNamespace(mm_processor_cache_gb=0.0), SimpleNamespace(mm_processor_cache_gb=4.0)
    assert "images" in refused(images=numbered, prefix_caching=False)
    assert refused(images=numbered) == refused(images=hashed, prefix_caching=False) == ""


def test_a_diffusion_model_is_refused():
    assert "diffusion" in refused(diffusion=SimpleNamespace(canvas_length=32))


def methods(literal: Any) -> set[str]:
    """The words of a Literal, and of the Literals in it."""
    parts = get_args(literal)
    return {word for part in parts for word in methods(part)} if parts else {literal}


def test_every_drafter_of_vllm_but_those_without_a_kv_cache_is_refused_by_name():
    from vllm.config.speculative import SpeculativeMethod

    known = methods(SpeculativeMethod)
    assert {"eagle", "eagle3", "mtp", "dflash", "dspark", "draft_model", "extract_hidden_states"} <= known
    why = {method: refused(drafter=method) for method in known | {"a method of a later vLLM"}}
    kept = {method for method, reason in why.items() if not reason}
    assert kept == {"ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator"}
    assert all(f'"{method}"' in reason for method, reason in why.items() if reason)


def test_no_drafter_that_vllm_says_has_a_kv_cache_is_kept():
    from vllm.config.speculative import SpeculativeConfig

    from kvkeep.doors.vllm.facts import DRAFTERS_WITHOUT_KV

    for method in DRAFTERS_WITHOUT_KV:
        spec = object.__new__(SpeculativeConfig)
        spec.method = method
        assert not spec.uses_draft_kv_cache(), method


def test_layers_of_several_sizes_with_one_window_have_it():
    """Workers see all of them, the scheduler one: both must know what vLLM frees."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs

    from kvkeep.doors.vllm import facts as vllm_facts

    both = UniformTypeKVCacheSpecs.from_specs({"a": sliding(64), "b": sliding(64, heads=4)})
    seen = [vllm_facts.window(one) for one in caches(both, sliding(64), full()).kv_cache_groups]
    assert seen == [64, 64, 0]


@pytest.mark.parametrize(("windows", "whole"), [((0,), False), ((64,), True), ((0, 64), True), ((0, 0), True)], ids=str)
def test_which_loads_fail_as_a_whole(windows: tuple[int, ...], whole: bool):
    from kvkeep.doors.vllm import facts as vllm_facts

    assert vllm_facts.fails_whole(caches(*(sliding(one) if one else full() for one in windows))) is whole


@pytest.mark.parametrize(("batches", "window", "never"), [(1, 0, False), (2, 0, True), (1, 64, True)])
def test_when_a_step_must_not_make_a_load_of_its_own(batches: int, window: int, never: bool):
    from kvkeep.doors.vllm import facts as vllm_facts

    one = caches(sliding(window) if window else full())
    assert vllm_facts.never_in_step(SimpleNamespace(max_concurrent_batches=batches), one) is never


def test_a_second_engine_of_a_process_takes_the_names_of_its_figures_over() -> None:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram

    from kvkeep.doors.vllm.metrics import KVKeepPromMetrics

    types = {kind: kind for kind in (Counter, Gauge, Histogram)}
    for _ in range(2):
        metrics = KVKeepPromMetrics(SimpleNamespace(kv_transfer_config=None), types, ["engine"], {0: ["0"]})
        metrics.observe({"lookups": 3, "pool_nbytes": 4096, "fetched_chunks:disk": 2, "fetched_chunks:any_tier": 1})
        metrics.observe({"another": 3, "another:disk": 3, "fetched_chunks:disk": 5}, engine_idx=7)  # nobody's
    assert REGISTRY.get_sample_value("kvkeep_lookups_total", {"engine": "0"}) == 3
    assert REGISTRY.get_sample_value("kvkeep_pool_nbytes", {"engine": "0"}) == 4096
    for tier, count in (("disk", 2), ("any_tier", 1)):
        assert REGISTRY.get_sample_value("kvkeep_fetched_chunks_total", {"engine": "0", "tier": tier}) == count


def test_figures_of_tiers_are_differences_and_add_up_as_vllm_adds_them() -> None:
    from kvkeep.doors.vllm.metrics import Differences
    from kvkeep.telemetry import Figure

    differences = Differences()
    first = differences.since_last([Figure("lookups", "", 1), Figure("fetched_chunks", "disk", 2)])
    assert differences.since_last([Figure("lookups", "", 1), Figure("fetched_chunks", "disk", 2)]) is None
    second = differences.since_last(
        [Figure("lookups", "", 2), Figure("fetched_chunks", "disk", 5), Figure("pool_nbytes", "", 7)]
    )
    assert first is not None and second is not None  # noqa: PT018
    assert second.data == {"lookups": 1, "fetched_chunks:disk": 3, "pool_nbytes": 7}
    assert first.aggregate(second).aggregate(second).data == {
        "lookups": 3,
        "fetched_chunks:disk": 8,
        "pool_nbytes": 7,
    }


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """The name of the weights of a folder, to an engine that began so many seconds after their file was written."""
    from kvkeep.doors.vllm import identity as vllm_identity

    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    config = SimpleNamespace(
        model_config=SimpleNamespace(
            model=str(tmp_path),
            model_weights="",
            architectures=[],
            multimodal_config=None,
            trust_remote_code=False,
            hf_config=None,
        ),
        load_config=SimpleNamespace(load_format="auto", model_loader_extra_config={}),
    )
    monkeypatch.setattr(vllm_identity, "default_memory", lambda: None)

    def name(after_s: int, outlived: bool = True) -> str:
        began_ns = max(path.stat().st_ctime_ns for path in (file, tmp_path)) + after_s * 10**9
        monkeypatch.setattr(vllm_identity, "process_start_ns", lambda: began_ns)
        return vllm_identity.fingerprints(config, outlived)[0]

    return name


def test_weights_older_than_the_engine_have_their_contents_name(weights, caplog):
    assert weights(10) == weights(20)
    assert not caplog.records


def test_weights_younger_than_the_engine_have_one_for_this_start_and_the_log_says_why(weights, caplog):
    assert weights(-1).startswith("this start only: ")
    assert weights(-1) != weights(-1)
    assert "changed after this engine had begun to start" in caplog.text
    caplog.clear()
    assert weights(-1, outlived=False).startswith("this start only: ")  # nobody could find it: no file is read
    assert not caplog.records


def test_the_former_path_still_names_the_connector():
    import kvkeep.engine.vllm
    import kvkeep.vllm

    assert kvkeep.engine.vllm.KVKeepConnector is kvkeep.vllm.KVKeepConnector
