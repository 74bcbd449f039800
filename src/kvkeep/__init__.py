"""kvkeep: keeps the KV cache that a model computed for a text and gives it back instead of computing it again."""

__version__ = "0.1.0"
