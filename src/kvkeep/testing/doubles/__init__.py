"""Doubles of what a test must control: time, a device, files that fail, a tier, a place, a store."""
