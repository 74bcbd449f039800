"""A reset of vLLM's own prefix cache is seen, whoever asks for it, and nothing else is taken for one."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]  # vLLM's import warns

BLOCK = 16


@pytest.fixture(params=[(True, 1), (False, 1), (True, 2)], ids=["cached", "not cached", "two groups"])
def manager(request: pytest.FixtureRequest):
    """vLLM's own: with prefix caching or without; a model with full attention, or with windows beside it."""
    import torch
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec

    kv_cache_utils.init_none_hash(sha256_cbor)
    caching, groups = request.param
    sizes = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 8, "dtype": torch.float32}
    specs = [FullAttentionSpec(**sizes), SlidingWindowSpec(**sizes, sliding_window=64)][:groups]
    config = KVCacheConfig(
        num_blocks=32,
        kv_cache_tensors=[],
        kv_cache_groups=[KVCacheGroupSpec([f"layer {number}"], spec) for number, spec in enumerate(specs)],
    )
    return KVCacheManager(config, 512, BLOCK, BLOCK, enable_caching=caching)


def asked(manager, name: str):
    """A request of four blocks, which it has."""
    from vllm import SamplingParams
    from vllm.utils.hashing import sha256_cbor
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    hasher = get_request_block_hasher(BLOCK, sha256_cbor)
    made = Request(name, list(range(4 * BLOCK)), SamplingParams(), None, block_hasher=hasher)
    assert manager.allocate_slots(made, 4 * BLOCK) is not None
    return made


def test_a_reset_is_seen_once(manager):
    from kvkeep.doors.vllm.connector import OwnCache

    cache = OwnCache(manager)
    for _ in range(3):
        assert not cache.was_emptied()
        assert manager.reset_prefix_cache()
        assert cache.was_emptied()
    assert not cache.was_emptied()


def test_what_requests_do_and_what_is_evicted_is_no_reset(manager):
    from kvkeep.doors.vllm.connector import OwnCache

    cache = OwnCache(manager)
    one, other = asked(manager, "one"), asked(manager, "other")
    assert not manager.reset_prefix_cache()  # it has blocks in use: vLLM refuses
    manager.evict_blocks(set(manager.get_block_ids("one")[0]))
    manager.free(one)
    manager.free(other)
    assert not cache.was_emptied()
    assert manager.reset_prefix_cache()
    assert cache.was_emptied()
