"""Extras: the optional packages of streamd's installation, by the feature that needs them (setup.cfg)."""

from __future__ import annotations

import importlib.util
from typing import Final

_MODULES: Final = {
    "cluster": ("hiredis",),
    "otel": ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http"),
    "top": ("textual",),
}


def missing_extra(extra: str) -> str:
    """What the feature needs and how to install it, behind the name of a setting or a command; "" if it is installed.

    None of the packages is imported, only those around them. The words name a checkout: at an index the name `streamd`
    may be somebody else's.
    """
    try:
        if all(importlib.util.find_spec(name) for name in _MODULES[extra]):
            return ""
    except ModuleNotFoundError:  # a package around it
        pass
    ways = f"make install EXTRAS={extra}, or pip install '.[{extra}]' in streamd's source"
    return f"needs the packages of the extra {extra}: {ways}"
