"""What can be seen of vLLM 0.32's own prefix cache: that it was emptied.

Knows nothing about what follows from that. vLLM tells a connector of it only where it is asked to.
"""

from __future__ import annotations

from vllm.v1.core.block_pool import BlockHashToBlockMap
from vllm.v1.core.kv_cache_manager import KVCacheManager


class OwnCache:
    """vLLM's prefix cache. Emptying it as a whole replaces its map of hashes by another object; nothing else does."""

    def __init__(self, manager: KVCacheManager) -> None:
        self._manager = manager
        self._maps = self._maps_now()

    def was_emptied(self) -> bool:
        """Whether it was emptied since this was last asked."""
        before, self._maps = self._maps, self._maps_now()
        return any(old is not new for old, new in zip(before, self._maps, strict=True))

    def _maps_now(self) -> list[BlockHashToBlockMap]:
        # held, not compared by id: the map of before lives as long as it is compared with
        return [
            manager.block_pool.cached_block_hash_to_block for manager in self._manager.coordinator.single_type_managers
        ]
