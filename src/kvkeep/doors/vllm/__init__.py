"""vLLM's door: its connector, and what vLLM's settings, adapters and messages are in kvkeep's words."""
