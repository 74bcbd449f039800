"""An engine whose KV bytes prove themselves, driving the real planner and workers without vLLM."""
