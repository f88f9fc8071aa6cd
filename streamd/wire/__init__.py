"""Bytes in, events out; events in, bytes out. No sockets, no clock, no tasks, no logging."""
