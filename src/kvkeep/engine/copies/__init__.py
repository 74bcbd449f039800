"""How a rank's copies are made: in bulk or layer by layer, on a thread of a CPU or a device's streams."""
