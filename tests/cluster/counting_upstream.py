"""CountingSource: an upstream that counts in its answers, so that each event shows a reader what is lost or doubled.

The events of a generation are `<tag>.1 `, `<tag>.2 ` and so on until the test ends it, then a finish and [DONE]. So the
text of an event with seq n ends with n, and begins behind the event before it.
"""

from __future__ import annotations

import contextlib
import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

from fakes import LAST, chunk
from served import WAIT_S

DONE = "[DONE]"


def data_of(tag: str, number: int) -> str:
    """The data of an event, byte for byte as every reader gets it."""
    delta = {"content": f"{tag}.{number} "}
    return _chunk(tag, delta, None)


def finish_of(tag: str) -> str:
    """The data of the event in front of [DONE]."""
    return _chunk(tag, {}, "stop")


def _chunk(tag: str, delta: dict[str, str], finish: str | None) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    body = {"id": tag, "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return json.dumps(body, separators=(",", ":"))


class Generation:
    """An answer under way."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.made = 0  # events with a number
        self.may_end = threading.Event()
        self.is_cut = False  # by streamd, or its death

    def end(self) -> None:
        self.may_end.set()


class CountingSource(http.server.ThreadingHTTPServer):
    """The upstream. A request's first message is the tag of its generation."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Counted)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.interval_s = 0.01
        self.generations: dict[str, Generation] = {}

    def generation(self, tag: str) -> Generation:
        return self.generations.setdefault(tag, Generation(tag))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that streamd or its death broke off."""


class _Counted(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: CountingSource

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        generation = self.server.generation(body["messages"][0]["content"])
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            while not generation.may_end.wait(self.server.interval_s):
                generation.made += 1
                self._send(data_of(generation.tag, generation.made))
            self._send(finish_of(generation.tag))
            self._send(DONE)
            self.wfile.write(LAST)
        except OSError:
            generation.is_cut = True

    def _send(self, data: str) -> None:
        self.wfile.write(chunk(b"data: %b\n\n" % data.encode()))

    def log_message(self, *words: object) -> None:
        """Log nothing."""


@contextlib.contextmanager
def counting() -> Iterator[CountingSource]:
    """A CountingSource that serves."""
    with CountingSource() as source:
        thread = threading.Thread(target=source.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield source
        finally:
            for generation in source.generations.values():
                generation.end()
            source.shutdown()
            thread.join(WAIT_S)
