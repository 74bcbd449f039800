"""Notices when vLLM 0.32 empties its own prefix cache: vLLM calls a connector for that only where it is asked to."""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_manager import KVCacheManager


class OwnCache:
    """vLLM's prefix cache. Only emptying it as a whole replaces its map of block hashes by another object."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._maps = self._maps_now()

    def was_emptied(self) -> bool:
        """True if it was emptied since the last call."""
        before, self._maps = self._maps, self._maps_now()
        return any(old is not new for old, new in zip(before, self._maps, strict=True))

    def _maps_now(self) -> list[BlockHashToBlockMap]:
        # the maps themselves, not their ids: an id may be used again once its map is gone
        return [
            manager.block_pool.cached_block_hash_to_block for manager in self._manager.coordinator.single_type_managers
        ]
