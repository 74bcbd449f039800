"""Copies between an engine's blocks and chunks in the pool."""
