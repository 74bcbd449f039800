"""The engine's side: a planner that talks to the store, workers that copy, and the classes that engines load."""
