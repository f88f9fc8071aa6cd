"""A script: everything that one generation will send, event by event, in the dialect of its route.

Taken in this order: `preamble`, each of `tokens`, then `finish` and `terminal`; or `whole`, where no stream was asked
for. Every part is a run of whole SSE events with LF line ends. What a dialect repeats in each token event is put
together once, in `tokens`, and a token costs two concatenations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, Protocol

import orjson

from streamd.mockllm.ask import Ask

MARK: Final = "\x7fmark"  # stands for the text in a pattern; JSON leaves it as it is, and nothing else of ours has it


class Script(Protocol):
    """One generation in one dialect."""

    def preamble(self) -> bytes:
        """What comes before the first token: the role, the opening events."""

    def tokens(self) -> Iterator[bytes]:
        """The events of each token; with several choices one event of each choice at a time."""

    def finish(self) -> bytes:
        """What says that the text is complete: finish_reason, usage, the `done` events."""

    def terminal(self) -> bytes:
        """What says that the stream is complete: `[DONE]`, `response.completed`, `message_stop`."""

    def whole(self) -> bytes:
        """The same answer as one JSON object."""


def data(payload: Any) -> bytes:
    """An event without a name."""
    return b"data: %b\n\n" % orjson.dumps(payload)


def named(payload: dict[str, Any]) -> bytes:
    """An event that is named like its `type`."""
    return b"event: %b\ndata: %b\n\n" % (str(payload["type"]).encode(), orjson.dumps(payload))


def around(event: bytes, mark: bytes) -> tuple[bytes, bytes]:
    """What stands before and after `mark`, which stands for the text in a pattern of an event."""
    before, found, after = event.partition(mark)
    assert found and mark not in after
    return before, after


def usage(ask: Ask) -> dict[str, int]:
    """OpenAI's usage object."""
    return {
        "prompt_tokens": ask.prompt_tokens,
        "completion_tokens": ask.completion_tokens,
        "total_tokens": ask.prompt_tokens + ask.completion_tokens,
    }
