"""Places below the pool: what a tier is, and each tier in a file of its own."""
