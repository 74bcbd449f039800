"""The test kit that ships: conformance suites and doubles for those who extend kvkeep. Only `kvkeep.bench` imports
it.
"""
