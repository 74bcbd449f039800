"""The command line: one module a command, put together in `main`.

Knows nothing that the packages below it do not know; a command reads its arguments, calls them and prints.
"""
