"""The demonstration: a synthetic upstream, streamd in front of it, and pages to try it out with."""
