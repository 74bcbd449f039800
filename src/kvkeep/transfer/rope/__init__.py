"""K at another position: how fast each pair rotates, and the rotation on the way to the engine's blocks."""
