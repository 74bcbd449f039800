"""In the making by the first test helper (06:31): planner against a real store in a thread; link over real processes."""
