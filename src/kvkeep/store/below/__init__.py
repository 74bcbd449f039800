"""Between the pool and its tiers: fetches that promote chunks into the pool, flushes that write them to the tiers."""
