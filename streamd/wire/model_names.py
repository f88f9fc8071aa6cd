"""The names in a server's list of models, whatever the shape of the list: to know, not to show.

A list is parsed in a single step, so it is bounded by the number of its values and models, not by its bytes alone: two
MiB of the smallest entries would hold the loop for seconds.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

# OpenRouter lists 340 models, LiteLLM knows 2,400. An entry takes up to 6 us to be read, and as much to be written.
MODELS_MAX: Final = 2_500
# Commas and opening brackets in a list. OpenRouter's entries have 60, so that its list has 20,000. Values of several
# kinds take up to 0.2 us each: 8 ms.
MARKS_MAX: Final = 40_000
_MARKS: Final = (b",", b"[", b"{")
NAME_CHARS_MAX: Final = 256
# Ollama lists `llama3:latest`, and takes `llama3` for it.
_DEFAULT_TAG: Final = ":latest"


class ListTooLarge(ValueError):
    """A list with more models or values than are read. The text says the bound."""


def parsed_list(body: bytes) -> Any:
    """The JSON of an answer with a list; None for any other body. Raises ListTooLarge."""
    if sum(map(body.count, _MARKS)) > MARKS_MAX:
        raise ListTooLarge(f"it has more than {MARKS_MAX} values")
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError:
        return None


def names_listed(body: bytes) -> frozenset[str]:
    """The models that a list names, at most MODELS_MAX; empty for anything else, and for a list that is too large."""
    try:
        return names_in(parsed_list(body))
    except ListTooLarge:
        return frozenset()


def names_in(found: Any) -> frozenset[str]:
    """The models that a parsed list names, at most MODELS_MAX.

    OpenAI's and Anthropic's `data`, Google's and Ollama's `models`, or an array alone; of objects or of names.
    """
    if isinstance(found, dict):
        lists = [found.get(member) for member in ("data", "models")]
        found = next((each for each in lists if isinstance(each, list)), None)
    if not isinstance(found, list):
        return frozenset()
    names = [name for entry in found[:MODELS_MAX] if (name := _name_of(entry))]
    return frozenset([*names, *(name.removesuffix(_DEFAULT_TAG) for name in names)])


def _name_of(entry: Any) -> str:
    if isinstance(entry, dict):
        entry = next((entry[member] for member in ("id", "name", "model") if isinstance(entry.get(member), str)), None)
    return entry[:NAME_CHARS_MAX].removeprefix("models/") if isinstance(entry, str) else ""
