"""Routes: from (method, path) to a function, with a file for each family of routes."""
