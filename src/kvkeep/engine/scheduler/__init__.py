"""The scheduler's half: what to look up, load and store for which request, and when."""
