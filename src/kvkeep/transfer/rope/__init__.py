"""K at another position: how fast each pair turns, and the turn on the way to the engine's blocks."""
