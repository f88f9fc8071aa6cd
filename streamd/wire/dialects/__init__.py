"""A module for each API that streamd knows; no other module knows an API (streamd/wire/dialect.py)."""
