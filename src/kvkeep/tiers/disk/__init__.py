"""The disk tier: one directory or several, a record a file."""
