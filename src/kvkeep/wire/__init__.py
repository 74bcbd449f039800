"""The channel between an engine's planner and the store: frames, messages, both ends, starting the process."""
