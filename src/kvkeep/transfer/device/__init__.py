"""Copies on a CUDA device: by a kernel or its copy engine, ordered by events."""
