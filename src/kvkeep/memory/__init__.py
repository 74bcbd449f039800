"""Host memory: the shared mapping that the pool lives in, and whether the machine has room for it.

Knows nothing about chunks, keys, tensors or sockets.
"""
