"""Eviction policies: which key goes first when a pool or a disk directory needs room."""
