"""Doubles for what a test must hold in its hands: time, a device, files that fail, a tier, a store."""
