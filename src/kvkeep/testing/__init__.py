"""Test kit that ships: conformance suites and doubles for those who extend kvkeep. Nothing in kvkeep imports it."""
