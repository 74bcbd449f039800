"""Tiers: what keeps chunks below the pool. The disk, and anything that can keep bytes by name."""
