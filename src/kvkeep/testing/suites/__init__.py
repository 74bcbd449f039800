"""Conformance suites: what every allocator, transfer, place and tier must do."""
