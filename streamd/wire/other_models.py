"""The members of a body in which routers behind streamd look for models, beside `model`: OpenRouter's `models`,
LiteLLM's fallbacks, its `model_list` and its settings for a single request.

A key that is limited to some models is held to them there too. A list of names, or of objects with a `model`, can be
compared; any other value may name a model in a way that isn't known here, and counts as a model that no key has.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from streamd.wire.json_scan import READ_BYTES_MAX, JsonScan, Watched

MEMBERS: Final = (
    "models",
    "fallbacks",
    "default_fallbacks",
    "context_window_fallbacks",
    "content_policy_fallbacks",
    "model_list",
    "router_settings_override",
)


def watched_with(own: Watched) -> Watched:
    """What an API watches, and these members."""
    return Watched({**dict.fromkeys(MEMBERS), **own.members}, elements=own.elements)


def models_beside(scan: JsonScan, body: bytes) -> list[tuple[str, str | None]]:
    """(member, model) for each model that such a member of the scanned body names; None: no name that can be read."""
    named: list[tuple[str, str | None]] = []
    for found in scan.places(body):
        if found.depth == 1 and found.name in MEMBERS:
            named += [(found.name, model) for model in _names_in(body[found.start : found.end])]
    return named


def _names_in(raw: bytes) -> list[str | None]:
    if len(raw) > READ_BYTES_MAX:
        return [None]
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return [None]
    if value is None:
        return []
    return [_name_of(entry) for entry in value] if isinstance(value, list) else [None]


def _name_of(entry: Any) -> str | None:
    if isinstance(entry, dict) and entry.keys() == {"model"}:
        entry = entry["model"]
    return entry if isinstance(entry, str) else None
