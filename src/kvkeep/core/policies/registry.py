"""The eviction policies by name: the only place that lists them.

The pool (`core/index`) and each disk directory (`tiers/disk/ledger`) take their policy from here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from kvkeep.core.policies.policy import EvictionPolicy
from kvkeep.core.policies.queue import fifo, lru
from kvkeep.core.policies.ranked import lfu, mru

POLICIES: Mapping[str, Callable[[], EvictionPolicy]] = MappingProxyType(
    {"fifo": fifo, "lfu": lfu, "lru": lru, "mru": mru}
)


def policy_by_name(name: str) -> EvictionPolicy:
    """Make the policy of that name, upper or lower case; ValueError names the known ones."""
    make = POLICIES.get(name.lower())
    if make is None:
        raise ValueError(f"no eviction policy {name!r}: choose one of {', '.join(POLICIES)}")
    return make()
