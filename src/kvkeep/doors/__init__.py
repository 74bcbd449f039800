"""What each engine or library calls: one folder a door. A door translates and decides nothing."""
