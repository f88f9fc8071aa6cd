"""Facts of an answer: its id, the model that made it, and why each choice ended, by the names that the APIs give them.

They are read from parsed JSON at known places alone, so that no text of a model or a client passes as a fact.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

from streamd.wire.dialects.chat import is_finish
from streamd.wire.dialects.members import Json, object_of, objects_of, string_of

# Longest fact: servers' ids have 20 to 60 characters, paths of models 100.
FACT_CHARS_MAX: Final = 256
# Choices whose ends are told; OpenAI makes up to 128.
REASONS_MAX: Final = 16

_IDS: Final = ("id", "responseId")
_MODELS: Final = ("model", "modelVersion")


class AnswerFacts(NamedTuple):
    """Each is empty if no event, or no part of a whole answer that was read, says it."""

    id: str = ""
    model: str = ""
    finish_reasons: tuple[str, ...] = ()


def facts_in(bodies: Iterable[Json]) -> AnswerFacts:
    """The facts in an answer's events, in their order, or in a whole answer. The first id and the first model count."""
    own_id = model = ""
    reasons: list[str] = []
    for body in bodies:
        inner = object_of(body, "response") or object_of(body, "message") or body  # Responses, Messages
        own_id = own_id or _first_of(inner, _IDS)
        model = model or _first_of(inner, _MODELS)
        reasons += _reasons_in(body, inner)
    return AnswerFacts(own_id, model, tuple(reasons[:REASONS_MAX]))


def _first_of(body: Json, names: tuple[str, ...]) -> str:
    found = next((value for name in names if (value := string_of(body, name))), "")
    return found if len(found) <= FACT_CHARS_MAX else ""


def _reasons_in(body: Json, inner: Json) -> list[str]:
    ends = [choice.get("finish_reason") for choice in objects_of(body, "choices")]
    ends += [candidate.get("finishReason") for candidate in objects_of(body, "candidates")]
    ends.append(body.get("stop_reason") or object_of(body, "delta").get("stop_reason"))
    if inner.get("object") == "response" and inner.get("status") != "in_progress":
        ends.append(object_of(inner, "incomplete_details").get("reason") or inner.get("status"))
    return [end for end in ends if isinstance(end, str) and is_finish(end) and len(end) <= FACT_CHARS_MAX]
