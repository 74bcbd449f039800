"""Host memory: the shared mapping under the pool, its page-locking, and whether the machine has room for it.

Knows nothing about chunks, keys, tensors or sockets.
"""
