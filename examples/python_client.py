"""Read a generation through streamd with nothing but Python's standard library, over connections that may be lost.

    python examples/python_client.py "Tell me about streams."
    python examples/python_client.py --server http://127.0.0.1:8080 --lose-after 20 "Tell me about streams."

The text goes to standard output as it comes, what happens to the connection to standard error. `--lose-after` drops the
connection after so many events, again and again, to show that the text is whole all the same.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import random
import sys
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

GRACE_S = 60  # how long the generation may go on while nobody reads it
SILENCE_S = 45  # streamd sends a heartbeat every 15 s: three missed ones are a lost connection
RETRY_S_MAX = 30.0
PASSING = (408, 429, 502, 503, 504)


class Lost(Exception):
    """The connection is gone, or another try is welcome: come back."""


class Failed(Exception):
    """The generation failed or was refused: coming back is of no use."""


@dataclass
class Event:
    """One server-sent event."""

    id: str
    name: str
    data: str


class Generation:
    """One generation, read over as many connections as it takes, and paid for once. Iterating gives its texts."""

    def __init__(self, server: str, body: dict[str, object], *, key: str = "", lose_after: int = 0) -> None:
        self._server = urllib.parse.urlsplit(server)
        self._body = json.dumps(body | {"stream": True}).encode()
        self._authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self._idempotency_key = uuid.uuid4().hex
        self._lose_after = lose_after
        # What is kept to come back with: the stream, the last event that came whole, and how long to wait before.
        self.stream_id = ""
        self.last_event_id = ""
        self.retry_s = 1.0

    def __iter__(self) -> Iterator[str]:
        """Raises Failed."""
        tries = 0  # since the last event that came
        while True:
            before = self.last_event_id
            try:
                with contextlib.closing(self._connect()) as connection:
                    response = self._ask(connection)
                    if response.status == 204:  # all had come
                        return
                    yield from texts_of(self._events(response))
                    return
            except (Lost, OSError, http.client.HTTPException) as lost:
                tries = tries if self.last_event_id == before else 0
                wait_s = min(RETRY_S_MAX, self.retry_s * 2**tries) * random.uniform(0.75, 1.25)
                tries += 1
                print(f"\n-- {lost or type(lost).__name__}; back in {wait_s:.1f} s", file=sys.stderr)
            time.sleep(wait_s)

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._server.scheme == "https" else http.client.HTTPConnection
        return kind(self._server.netloc, timeout=SILENCE_S)

    def _ask(self, connection: http.client.HTTPConnection) -> http.client.HTTPResponse:
        """The generation, or the rest of its stream; before an id came the same POST does both, because of its key."""
        resumes = bool(self.stream_id and self.last_event_id)
        if resumes:
            headers = self._authorization | {"Last-Event-ID": self.last_event_id}
            connection.request("GET", f"/v1/streams/{self.stream_id}", headers=headers)
        else:
            own = {"Idempotency-Key": self._idempotency_key, "X-Stream-Detach-Grace": str(GRACE_S)}
            headers = self._authorization | own | {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", self._body, headers)
        response = connection.getresponse()
        if response.status in PASSING and (resumes or response.getheader("x-should-retry") == "true"):
            self.retry_s = float(response.getheader("Retry-After") or 1)
            raise Lost(f"HTTP {response.status}")
        if response.status not in (200, 204):
            raise Failed(refusal_of(response))
        self.stream_id = response.getheader("X-Stream-Id") or self.stream_id
        return response

    def _events(self, response: http.client.HTTPResponse) -> Iterator[Event]:
        """The events of a body (WHATWG HTML 9.2.6; the lines that streamd writes end in LF)."""
        event_id, name, data, count = "", "", [], 0
        for raw in response:
            line = raw.decode().rstrip("\n")
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if not line and data:
                self.last_event_id = event_id  # only now: an event that broke off in its middle has to come again
                yield Event(event_id, name or "message", "\n".join(data))
                name, data, count = "", [], count + 1
                if count == self._lose_after:
                    raise Lost("the connection was dropped, as asked")
            elif field == "data":
                data.append(value)
            elif field == "event":
                name = value
            elif field == "id":
                event_id = value
            elif field == "retry" and value.isdigit():
                self.retry_s = int(value) / 1000


def texts_of(events: Iterator[Event]) -> Iterator[str]:
    """What a chat stream says, to its end. Raises Failed with what the stream says of its failure."""
    for event in events:
        if event.data.startswith("[DONE]"):
            return
        body = json.loads(event.data)
        error = body.get("error")
        if error and error.get("code") == "reconnect":
            raise Lost("streamd asked us to come back")
        if error:
            raise Failed(error["message"])
        if "gap" in body:
            yield f"[{body['gap']['to'] - body['gap']['from'] + 1} events missing]"
        for choice in body.get("choices", ()):
            yield choice.get("delta", {}).get("content") or ""
    # Some proxies end an answer properly whose server broke off, and some models never send [DONE]. Asking for the rest
    # tells which: 204 means that this was all.
    raise Lost("the answer ended without a terminal event")


def refusal_of(response: http.client.HTTPResponse) -> str:
    """The error's text, as streamd and OpenAI's API put it."""
    answer = response.read()
    try:
        return f"HTTP {response.status}: {json.loads(answer)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status}"


def main() -> int:
    """Ask, print, come back as often as needed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--server", default="http://127.0.0.1:8080")
    parser.add_argument("--model", default="mock-llm")
    parser.add_argument("--lose-after", type=int, default=0, metavar="EVENTS")
    asked = parser.parse_args()
    body = {"model": asked.model, "messages": [{"role": "user", "content": asked.prompt}]}
    key = os.environ.get("OPENAI_API_KEY", "")
    try:
        for text in Generation(asked.server, body, key=key, lose_after=asked.lose_after):
            print(text, end="", flush=True)
    except Failed as failed:
        print(f"\n-- {failed}", file=sys.stderr)
        return 1
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
