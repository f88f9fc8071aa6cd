"""OpenAI's completions, the older API: chunks like those of chat, with the text in the choice and not in a delta."""

from __future__ import annotations

from typing import ClassVar

from streamd.wire.dialects.api import NamedEvent, Progress
from streamd.wire.dialects.chat import Chat
from streamd.wire.dialects.members import Json, objects_of, string_of


class Completions(Chat):
    """`/v1/completions`."""

    paths: ClassVar = ("/v1/completions",)
    chunk: ClassVar[str] = "text_completion"

    def see_usual(self, progress: Progress, body: Json) -> bool:
        return False  # its text stands elsewhere

    def texts(self, body: Json) -> list[str | None]:
        return [string_of(choice, "text") for choice in objects_of(body, "choices")]

    def as_events(self, body: Json) -> list[NamedEvent] | None:
        """A whole answer has the form of a chunk."""
        return [(None, body)] if objects_of(body, "choices") else None
