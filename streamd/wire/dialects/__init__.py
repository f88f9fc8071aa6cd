"""One module for each API that streamd knows, and no knowledge of an API anywhere else (streamd/wire/dialect.py)."""
