"""A script: everything that a generation will send, event by event, in the dialect of its route.

A stream takes the parts in this order: `preamble`, each of `tokens`, `finish`, `terminal`. An answer that is not
streamed takes `whole` alone. Every part is a run of whole SSE events with LF line ends. The text around the tokens is
the same in each event, so `tokens` makes it once, and a token costs two concatenations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

import orjson

from streamd.mockllm.ask import MockAsk

# Stands for the text in a pattern. JSON doesn't escape it, and the mock writes it nowhere else.
MARK: Final = "\x7fmark"


class Script(Protocol):
    """A generation in a dialect."""

    def preamble(self) -> bytes:
        """The events before the first token: the role, the opening events."""

    def tokens(self) -> Iterator[bytes]:
        """The events of each token in turn; with several choices, an event of each choice together."""

    def finish(self) -> bytes:
        """The events that complete the text: finish_reason, usage, the `done` events."""

    def terminal(self) -> bytes:
        """The event that completes the stream: `[DONE]`, `response.completed`, `message_stop`."""

    def whole(self) -> bytes:
        """The same answer as a single JSON object."""


def data(payload: Any) -> bytes:
    """An event without a name."""
    return b"data: %b\n\n" % orjson.dumps(payload)


def named(payload: dict[str, Any]) -> bytes:
    """An event that is named like its `type`."""
    return b"event: %b\ndata: %b\n\n" % (str(payload["type"]).encode(), orjson.dumps(payload))


def around(event: bytes, mark: bytes) -> tuple[bytes, bytes]:
    """The bytes before and after `mark`, which stands for the text in a pattern of an event."""
    before, found, after = event.partition(mark)
    assert found and mark not in after
    return before, after


def usage(ask: MockAsk) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": ask.completion_tokens,
        "total_tokens": ask.prompt_tokens + ask.completion_tokens,
    }
