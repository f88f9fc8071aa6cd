"""watched_upstream.py PORT: an upstream that notes the times of its requests and of the ends of its connections.

A request's JSON body chooses its answer: {"n": 7, "answer": A}, where A is

    silence      no byte, ever
    stream       the head of an event stream and an event, then no further byte
    half         the head of a JSON answer and half of its body, then no further byte

Its standard output has a line for each: `asked <n> <ns>` and `ended <n> <ns>`, in CLOCK_MONOTONIC. `ended` is the time
of a FIN or an RST, the only sign of a reader's leaving that a model server can see. It runs a single epoll loop.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time

EVENT = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":[{"index":0,"delta":%b}]}\n\n'
)
FIRST = EVENT % b'{"content":"one "}'
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ANSWERS = {
    "silence": b"",
    "stream": STREAM_HEAD + b"%x\r\n%b\r\n" % (len(FIRST), FIRST),
    "half": b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 40\r\n\r\n{"choices": [{"te',
}


class Asked:
    """A connection and its request."""

    __slots__ = ("connection", "number", "request")

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.number: int | None = None
        self.request = b""

    def take(self) -> list[str]:
        """Read, and return the notes about it."""
        try:
            data = self.connection.recv(65536)
        except OSError:
            data = b""
        now_ns = time.monotonic_ns()
        if not data:
            return [f"ended {self.number} {now_ns}"]
        self.request += data
        _, blank, body = self.request.partition(b"\r\n\r\n")
        if not blank or not body.endswith(b"}"):
            return []
        fields = json.loads(body)
        self.number = fields["n"]
        self.request = b""
        self.connection.send(ANSWERS[fields["answer"]])
        return [f"asked {self.number} {now_ns}"]


def serve(port: int) -> None:
    """Serve until the process is ended."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(4096)
    listener.setblocking(False)
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    open_: dict[int, Asked] = {}
    while True:
        notes: list[str] = []
        for fd, _ in epoll.poll():
            if fd == listener.fileno():
                connection, _ = listener.accept()
                open_[connection.fileno()] = Asked(connection)
                epoll.register(connection.fileno(), select.EPOLLIN)
                continue
            notes += open_[fd].take()
            if notes and notes[-1].startswith("ended"):
                open_.pop(fd).connection.close()
        if notes:
            print("\n".join(notes), flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
