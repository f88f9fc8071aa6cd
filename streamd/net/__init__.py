"""uvloop protocols: the only code that touches transports."""
