"""Conformance suites: what every allocator, transfer and tier must do."""
