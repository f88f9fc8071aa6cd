"""The names in a server's list of models, whatever the shape of the list: to know, not to show."""

from __future__ import annotations

from typing import Any, Final

import orjson

# OpenRouter lists 340 models; ten times that, and half as many again.
NAMES_MAX: Final = 5_000
NAME_CHARS_MAX: Final = 256
# Ollama lists `llama3:latest`, and takes `llama3` for it.
_DEFAULT_TAG: Final = ":latest"


def names_listed(body: bytes) -> frozenset[str]:
    """The models that a list names, at most NAMES_MAX; empty for anything else.

    OpenAI's and Anthropic's `data`, Google's and Ollama's `models`, or an array alone; of objects or of names.
    """
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return frozenset()
    if isinstance(found, dict):
        lists = [found.get(member) for member in ("data", "models")]
        found = next((each for each in lists if isinstance(each, list)), None)
    if not isinstance(found, list):
        return frozenset()
    names = [name for entry in found[:NAMES_MAX] if (name := _name_of(entry))]
    return frozenset([*names, *(name.removesuffix(_DEFAULT_TAG) for name in names)])


def _name_of(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = next((entry[member] for member in ("id", "name", "model") if isinstance(entry.get(member), str)), None)
    return entry[:NAME_CHARS_MAX].removeprefix("models/") if isinstance(entry, str) else ""
