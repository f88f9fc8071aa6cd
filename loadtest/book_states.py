"""The states in which streamd holds memory for somebody, and the way into each from outside, for books.py.

The numbers bring each state to 64 MiB of counted bytes, or to its bound; then at least MANY of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import ssl
import time
from collections.abc import Callable
from pathlib import Path

from books import Bed, State, read_until

MIB = 1024 * 1024

PLACES = 3_300  # connections at a price of 21 KB of user space
TLS_PLACES = 1_500  # at 45 KB
MANY = 1_000
BODIES = 70  # bodies of 1 MiB each, less a byte
SMALL_RCVBUF_BYTES = 4_096
HEAD_BYTES = 16_000  # beneath head_bytes_max
KEYS_MAX = 10_000

HEAD_ENDS = b"\r\n\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
JSON_TYPE = "application/json"
EVENTS_TYPE = "text/event-stream"


# -- bytes


def chunk(payload: bytes) -> bytes:
    """An HTTP chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def token(text: str) -> bytes:
    """A chat chunk with that text."""
    delta = {"id": "c", "object": "chat.completion.chunk", "created": 1_700_000_000, "model": "m"}
    return b"data: %b\n\n" % json.dumps({**delta, "choices": [{"index": 0, "delta": {"content": text}}]}).encode()


def whole(length: int, number: int) -> bytes:
    """An event that fits no template."""
    return b"data: %b\n\n" % (b"%d " % number).ljust(length, b"x")


def first_event(member: str) -> bytes:
    """A chat chunk with an id and a model of that length."""
    return b"data: %b\n\n" % json.dumps({"id": member, "created": 1, "model": member, "choices": []}).encode()


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
STREAM_BEGUN = STREAM_HEAD + chunk(token("a")) + chunk(token("b"))
STREAM_DONE = STREAM_BEGUN + chunk(b"data: [DONE]\n\n") + chunk(b"")[:-2] + b"\r\n"


def chat(filler: int = 0, *, stream: bool = True, fields: str = "") -> bytes:
    """A request of about `filler` bytes of body."""
    message = {"role": "user", "content": "x" * filler}
    body = json.dumps({"model": "m", "stream": stream, "messages": [message]}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON_TYPE}\r\n{fields}"
    return head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body


def fields_of(size: int) -> bytes:
    """Header fields of that size, as many as are allowed."""
    count = 90
    return b"".join(b"X-%02d: %b\r\n" % (k, b"v" * (size // count - 8)) for k in range(count))


# -- states of connections


def fresh(bed: Bed) -> int:
    """Accepted, and no byte was sent."""
    for _ in range(PLACES):
        bed.connect()
    bed.wait_for("connections", lambda s: s["admission"]["in_use"]["connections"] >= PLACES)
    return PLACES


def kept_alive(bed: Bed) -> int:
    """Between two requests."""
    for _ in range(PLACES):
        bed.send(HEALTH, until=HEAD_ENDS)
    return PLACES


def half_heads(bed: Bed) -> int:
    """A head that lacks its end."""
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + fields_of(HEAD_BYTES)
    for _ in range(PLACES):
        bed.send(head)
    return PLACES


def half_bodies(path: str, *, chunked: bool, method: str = "POST") -> Callable[[Bed], int]:
    """Bodies that lack their last byte."""

    def load(bed: Bed) -> int:
        framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % MIB
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {JSON_TYPE}\r\n".encode()
            + framing
            + HEAD_ENDS
        )
        payload = b"x" * (MIB - 1)
        for _ in range(BODIES):
            bed.send(head + (chunk(payload) if chunked else payload))
        return BODIES

    return load


def unanswered(*, stream: bool, number: int = BODIES, filler: int = MIB) -> Callable[[Bed], int]:
    """Requests whose upstream hasn't answered."""

    def load(bed: Bed) -> int:
        for _ in range(number):
            bed.send(chat(filler, stream=stream))
        return number

    return load


def committed(bed: Bed) -> int:
    """Requests with their 200, whose upstream hasn't answered."""
    for _ in range(BODIES):
        bed.send(chat(MIB), until=HEAD_ENDS)
    return BODIES


def large_heads(bed: Bed) -> int:
    """Requests with a large head, whose upstream has sent nearly all of a large head."""
    request = chat(10, stream=False, fields=fields_of(HEAD_BYTES).decode())
    for _ in range(PLACES):
        bed.send(request)
    return PLACES


def pipelined(bed: Bed) -> int:
    """Streams under way with bytes of the next request behind them."""
    for _ in range(3 * MANY):
        bed.send(chat(), until=b"retry:").sendall(b"x" * 16_000)
    return 3 * MANY


# -- TLS


def tls_hellos(bed: Bed) -> int:
    """Handshakes of which the client has sent a part of its hello."""
    hello = _hello()
    for _ in range(TLS_PLACES):
        bed.send(hello[: len(hello) // 2])
    return TLS_PLACES


def tls_unfinished(bed: Bed) -> int:
    """Handshakes that the server has answered, and the client doesn't go on."""
    hello = _hello()
    for _ in range(TLS_PLACES):
        bed.send(hello, until=b"\x16\x03\x03")
    return TLS_PLACES


def _hello() -> bytes:
    """The first flight of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname="localhost")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def tls_idle(bed: Bed) -> int:
    """Between two requests."""
    for _ in range(TLS_PLACES):
        bed.send(HEALTH, until=HEAD_ENDS, tls=True)
    return TLS_PLACES


# -- streams


def publish(bed: Bed, name: str, body: bytes) -> None:
    """Publish events."""
    bed.call("POST", f"/v1/streams/{name}/events", body, content_type=EVENTS_TYPE)


def opened(bed: Bed, name: str = "") -> str:
    """Open a published stream."""
    if name:
        return str(bed.call("PUT", f"/v1/streams/{name}", b"{}")["id"])
    return str(bed.call("POST", "/v1/streams", b"{}")["id"])


def readers(bed: Bed, stream: str, number: int, *, rcvbuf: int = 0) -> list[socket.socket]:
    """Readers of a stream that have taken their head."""
    request = f"GET /v1/streams/{stream} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    return [bed.send(request, until=HEAD_ENDS, rcvbuf=rcvbuf) for _ in range(number)]


def paused(*, events: int, event_bytes: int, number: int = MANY) -> Callable[[Bed], int]:
    """Readers of a stream that take nothing, after so many events."""

    def load(bed: Bed) -> int:
        stream = opened(bed)
        readers(bed, stream, number, rcvbuf=SMALL_RCVBUF_BYTES)
        for k in range(events):
            publish(bed, stream, whole(event_bytes, k))
            time.sleep(0.02)
        return number

    return load


def catching_up(bed: Bed) -> int:
    """Readers that stopped, came to lag, took some bytes and stopped again in a piece of their catch-up."""
    stream = opened(bed)
    standing = readers(bed, stream, MANY, rcvbuf=SMALL_RCVBUF_BYTES)
    for _ in range(40):
        publish(bed, stream, b"".join(token("x" * 700) for _ in range(10)))
    for connection in standing:
        taken = 0
        while taken < 40_000:
            taken += len(connection.recv(8192))
    return MANY


def fan_out(bed: Bed) -> int:
    """Readers of a single stream that take all."""
    stream = opened(bed)
    taking = readers(bed, stream, PLACES)
    for k in range(20):
        publish(bed, stream, whole(200, k) + (b": end\n\n" if k == 19 else b""))
    for connection in taking:
        read_until(connection, b"19 xxx")
    return PLACES


def live_logs(bed: Bed) -> int:
    """Logs of live streams, all of their texts in a template."""
    for _ in range(BODIES):
        stream = opened(bed)
        for _ in range(8):
            publish(bed, stream, b"".join(token("x" * 100) for _ in range(1_250)))
    return BODIES


def whole_logs(bed: Bed) -> int:
    """Logs of live streams, no event of which fits a template."""
    for _ in range(BODIES):
        stream = opened(bed)
        for _ in range(8):
            publish(bed, stream, b"".join(whole(1_000, n) for n in range(120)))
    return BODIES


def live_relays(bed: Bed) -> int:
    """Relayed streams with a reader and a short log."""
    for _ in range(2_600):
        bed.send(chat(), until=b'"b"')
    return 2_600


def in_grace(bed: Bed) -> int:
    """Generations that run without a reader."""
    return _async(bed, 8_000, "")


def _async(bed: Bed, number: int, fields: str) -> int:
    """Generations of which no reader ever came. `fields` may name {k}."""
    connection = bed.connect()
    for k in range(number):
        connection.sendall(chat(fields=f"Prefer: respond-async\r\n{fields.format(k=k)}"))
        answer = read_until(connection, b"in_progress")
        assert b" 202 " in answer, answer
    return number


def finished(bed: Bed) -> int:
    """Streams that are over and may still be read, with next to nothing in their logs."""
    return _sealed(bed, 10 * MANY, "")


def finished_named(bed: Bed) -> int:
    """The same under names of 128 characters."""
    return _sealed(bed, 10 * MANY, "n" * 120 + "-{k}")


def _sealed(bed: Bed, number: int, name: str) -> int:
    for k in range(number):
        stream = opened(bed, name.format(k=k))
        bed.call("POST", f"/v1/streams/{stream}/events?seal=finished", token("a"), content_type=EVENTS_TYPE)
    return number


def named(bed: Bed) -> int:
    """Published streams under names of 128 characters that nobody has written to."""
    for k in range(9 * MANY):
        opened(bed, "n" * 120 + f"-{k}")
    return 9 * MANY


def finished_with_keys(bed: Bed) -> int:
    """Generations that are over, each with an idempotency key of 255 characters."""
    return _async(bed, 10 * MANY, f"Idempotency-Key: {'k' * 248}-{{k}}\r\n")


def finished_conversations(bed: Bed) -> int:
    """Generations that are over, each with a conversation of 512 characters."""
    return _async(bed, 10 * MANY, f"X-Conversation-Id: {'c' * 500}-{{k}}\r\n")


def keys_under_way(bed: Bed) -> int:
    """Requests that aren't streams, with an idempotency key, whose upstream hasn't answered."""
    for k in range(2_600):
        bed.send(chat(stream=False, fields=f"Idempotency-Key: {'k' * 248}-{k}\r\n"))
    return 2_600


def waiting(bed: Bed) -> int:
    """Readers that wait for a name, with a large head."""
    for k in range(2 * MANY):
        path = f"/v1/streams/{'n' * 120}-{k}?wait=60"
        bed.send(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n".encode() + fields_of(HEAD_BYTES - 200) + b"\r\n")
    return 2 * MANY


def half_events_published(content_type: str, *, chunked: bool) -> Callable[[Bed], int]:
    """Events of publishers that lack their end."""

    def load(bed: Bed) -> int:
        half = (b"data: " if content_type == EVENTS_TYPE else b'"') + b"x" * (MIB - 100)
        for _ in range(BODIES):
            head = (
                f"POST /v1/streams/{opened(bed)}/events HTTP/1.1\r\nHost: localhost\r\nContent-Type: {content_type}\r\n"
            )
            framing = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % (2 * MIB)
            bed.send(head.encode() + framing + HEAD_ENDS + (chunk(half) if chunked else half))
        return BODIES

    return load


def streams_begun(until: bytes) -> Callable[[Bed], int]:
    """Relayed streams that have come so far."""

    def load(bed: Bed) -> int:
        for _ in range(BODIES):
            bed.send(chat(), until=until)
        return BODIES

    return load


def slow_proxied(bed: Bed) -> int:
    """Answers that aren't streams, of which the reader takes nothing."""
    for _ in range(MANY):
        bed.send(chat(stream=False), until=b"HTTP/1.1 200", rcvbuf=SMALL_RCVBUF_BYTES)
    return MANY


def lists_of_models(bed: Bed) -> int:
    """Lists of models that lack their end."""
    for _ in range(BODIES):
        bed.send(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
    return BODIES


def pooled(bed: Bed) -> int:
    """Idle connections to an upstream."""
    asking = [bed.send(chat(stream=False)) for _ in range(MANY)]
    for connection in asking:
        read_until(connection, b"{}")
        connection.close()
    bed.open.clear()
    return MANY


def write_keys(folder: Path) -> None:
    """A file of as many keys as there may be, in the form of `streamd keys`."""
    salt = bytes(16)
    lines = []
    for k in range(KEYS_MAX):
        digest = hashlib.sha256(salt + f"sk-k{k}-{k:032d}".encode()).hexdigest()
        lines.append(json.dumps({"id": f"k{k}", "name": "x" * 100, "hash": f"sha256:{salt.hex()}:{digest}"}) + "\n")
    file = folder / "keys"
    file.touch(mode=0o600)
    file.write_text("".join(lines))


def accounts(bed: Bed) -> int:
    """Accounts of keys."""
    connection = bed.connect()
    for k in range(KEYS_MAX):
        fields = f"Authorization: Bearer sk-k{k}-{k:032d}\r\n"
        connection.sendall(chat(stream=False, fields=fields))
        read_until(connection, b"{}")
    return KEYS_MAX


def late_readers(bed: Bed) -> int:
    """Readers that came late to a large event and take nothing of it."""
    stream = opened(bed)
    publish(bed, stream, whole(900_000, 1))
    readers(bed, stream, 10 * BODIES, rcvbuf=SMALL_RCVBUF_BYTES)
    return 10 * BODIES


def lists_unread(bed: Bed) -> int:
    """Long answers of streamd's own of which the client takes nothing."""
    for k in range(MANY):
        opened(bed, "n" * 120 + f"-{k}")
    for _ in range(4 * BODIES):
        bed.send(
            b"GET /v1/streams?limit=1000 HTTP/1.1\r\nHost: localhost\r\n\r\n", until=b" 200 ", rcvbuf=SMALL_RCVBUF_BYTES
        )
    return 4 * BODIES


def tunnels(bed: Bed) -> int:
    """TLS readers of streams, half of which another worker owns."""
    names = [f"t{k}" for k in range(8)]
    bed.context, context = None, bed.context
    opener = bed_caller(bed, context)
    for name in names:
        opener(name)
    bed.context = context
    before = bed.status()["admission"]["in_use"]["connections"]
    for k in range(MANY):
        request = f"GET /v1/streams/{names[k % 8]} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        bed.send(request.encode(), until=HEAD_ENDS, tls=True)
    bed.unix_ends = bed.status()["admission"]["in_use"]["connections"] - before - MANY
    return bed.unix_ends // 2


def bed_caller(bed: Bed, context: ssl.SSLContext | None) -> Callable[[str], None]:
    """Opens streams over TLS."""
    bed.context = context

    def call(name: str) -> None:
        request = f"PUT /v1/streams/{name} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{{}}"
        bed.send(request.encode(), until=b"last_seq", tls=True)

    return call


def restored(bed: Bed) -> int:
    """Streams of an earlier process."""
    number = whole_logs(bed) + _sealed(bed, 3 * MANY, "")
    bed.stop()
    bed.start()
    return number


SMALL_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
BIG_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: 4000000\r\n\r\n"
HALF_EVENT = STREAM_HEAD + chunk(b"data: " + b"x" * (MIB - 100))
HALF_LIST = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2000000\r\n\r\n"

STATES: tuple[State, ...] = (
    State("connections, fresh", fresh),
    State("connections, kept alive", kept_alive),
    State("heads, half", half_heads),
    State("bodies, half, of strangers", half_bodies("/healthz", chunked=False, method="GET")),
    State("bodies, half, length", half_bodies("/v1/chat/completions", chunked=False), answer=b""),
    State("bodies, half, chunked", half_bodies("/v1/chat/completions", chunked=True), answer=b""),
    State("bodies, upstream silent", unanswered(stream=True), answer=b""),
    State("bodies, upstream deaf", unanswered(stream=True), answer=b"", upstream_reads=False),
    State("bodies, committed", committed, {"commit-after": "0s"}, answer=b""),
    State("heads of both sides", large_heads, answer=b"HTTP/1.1 200 OK\r\n" + fields_of(HEAD_BYTES)),
    State("pipelined behind a stream", pipelined, answer=STREAM_BEGUN),
    State("tls, half a hello", tls_hellos, tls=True),
    State("tls, handshake unfinished", tls_unfinished, tls=True),
    State("tls, kept alive", tls_idle, tls=True),
    State("readers, paused", paused(events=60, event_bytes=1_000)),
    State("readers, behind", paused(events=300, event_bytes=1_000)),
    State("readers, behind, catching up", catching_up),
    State("readers, large event unsent", paused(events=1, event_bytes=900_000)),
    State("readers, large event, late", late_readers),
    State("readers, fan-out", fan_out),
    State("answers, proxied, unread", slow_proxied, answer=BIG_ANSWER + b"x" * 1_000_000),
    State("answers, own, unread", lists_unread),
    State("streams, relayed, with reader", live_relays, answer=STREAM_BEGUN),
    State("streams, relayed, in grace", in_grace, answer=STREAM_BEGUN),
    State("streams, published, named", named),
    State("logs, templated", live_logs),
    State("logs, whole events", whole_logs),
    State("finished", finished),
    State("finished, named", finished_named),
    State("finished, idempotency keys", finished_with_keys, answer=STREAM_DONE),
    State("finished, conversations", finished_conversations, answer=STREAM_DONE),
    State("keys of requests under way", keys_under_way, answer=b""),
    State("waiting for a name", waiting),
    State("half events, upstream", streams_begun(HEAD_ENDS), answer=HALF_EVENT),
    State("half events, publisher", half_events_published(EVENTS_TYPE, chunked=True)),
    State("half lines, publisher", half_events_published("application/x-ndjson", chunked=True)),
    State("half events, publisher, length", half_events_published(EVENTS_TYPE, chunked=False)),
    State(
        "streams, large first members",
        streams_begun(b'"choices"'),
        answer=STREAM_HEAD + chunk(first_event("i" * 500_000)),
    ),
    State(
        "readers, large event of their own", streams_begun(HEAD_ENDS), answer=STREAM_HEAD + chunk(whole(1_000_000, 1))
    ),
    State("lists of models, half", lists_of_models, answer=HALF_LIST + b"[" + b" " * 1_900_000),
    State(
        "upstreams, pooled",
        pooled,
        {"pool-idle-max": "1000", "pool-idle-timeout": "10m"},
        answer=SMALL_ANSWER,
        together=MANY,
        is_fixed=True,
    ),
    State("accounts of keys", accounts, {"keys-file": "{folder}/keys"}, write_keys, answer=SMALL_ANSWER, is_fixed=True),
    State("tunnels", tunnels, {"workers": "2"}, tls=True),
    State("restored", restored, {"state-dir": "{folder}"}),
)
