"""(method, path) to function, one file per family of routes."""
