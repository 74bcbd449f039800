"""Between the pool and its tiers: promotion, flush, what waits for them, and who is left alone."""
