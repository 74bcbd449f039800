"""The store: one owner of the pool, its index and its sessions."""
