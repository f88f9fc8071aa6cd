"""Attacks of machines on the network that have no key: all they can do is connect, and send or not send.

Each docstring says who may do it, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

import asyncio
import json
import struct
from pathlib import Path

import pytest
from counting import instructions
from fakes import DONE, LAST, SSE_HEAD, Client, chunk, event, get, post, rig
from loopback import run, serving
from tlspeer import make_certificate

from streamd.api import streams
from streamd.core.stream import Subscriber
from streamd.counters import Counters
from streamd.net.outlet import LINGER_S_MAX

HIDDEN = get("/v1/streams/hidden", method="DELETE")  # bytes that must never be taken for a request
OPEN_ROOM = post({"public": True}, path="/v1/streams/room").replace(b"POST", b"PUT", 1)


def bodiless(path: str, *fields: str, method: str = "GET", body: bytes = HIDDEN, chunked: bool = False) -> bytes:
    """A request with a body on a route that has no use for it."""
    if chunked:
        return get(path, *fields, "Transfer-Encoding: chunked", method=method) + chunk(body) + LAST
    return get(path, *fields, f"Content-Length: {len(body)}", method=method) + body


PREFLIGHT = ("Origin: https://a.test", "Access-Control-Request-Method: POST")
ROUTES = [
    ("/healthz", "GET", ()),
    ("/readyz", "HEAD", ()),
    ("/metrics", "GET", ()),
    ("/status", "GET", ()),
    ("/status", "POST", ()),
    ("/v1/streams", "GET", ()),
    ("/v1/streams/none", "GET", ()),
    ("/v1/streams/none", "DELETE", ()),
    ("/v1/stream?conv_id=x", "DELETE", ()),
    ("/v1/streams/lookup", "GET", ()),
    ("/v1/chat/completions", "OPTIONS", PREFLIGHT),
    ("/nowhere", "GET", ()),
    ("/drain", "POST", ()),
    ("/v1/../x", "GET", ()),
    ("/v1/chat/completions", "GET", ("Upgrade: websocket", "Connection: upgrade")),
]


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(("path", "method", "fields"), ROUTES)
def test_a_body_that_no_route_wants_is_never_a_request(
    path: str, method: str, fields: tuple[str, ...], chunked: bool
) -> None:
    """A server that answers from the head and forgets the body takes it for the next request ("CL.0").

    Attacker: any client. Expected: an answer, and then the genuine next request's answer or the connection's end; the
    request inside the body is never answered. Source: James Kettle, Browser-Powered Desync Attacks (2022);
    CVE-2022-22720.
    """
    with rig() as r:
        client = r.client()
        client.methods = (method, "GET")
        client.send(bodiless(path, *fields, method=method, chunked=chunked) + get("/healthz"))
        r.pass_time(5)
        asked = [name for name, _, _ in r.ended]
        assert not [name for name in asked if "hidden" in name]
        assert len(client.statuses) == 1 or client.statuses[1] == 200, client.statuses
        assert r.dialled == []


@pytest.mark.parametrize("expectation", ["", "Expect: 100-continue", "Expect: 100-Continue, 100-continue"])
@pytest.mark.parametrize(("path", "method", "fields"), ROUTES)
def test_a_body_that_comes_after_its_answer_is_never_a_request(
    path: str, method: str, fields: tuple[str, ...], expectation: str
) -> None:
    """The same, with the body a while after the answer to its head, and with Expect, which reverses the order of
    waiting.

    Attacker: any client. Expected: the late body is read to its end or thrown away with the connection, never answered.
    Source: James Kettle, HTTP/1.1 must die (2025): early responses and Expect-based desync.
    """
    with rig() as r:
        client = r.client()
        client.methods = (method, "GET")
        more = (expectation,) if expectation else ()
        client.send(bodiless(path, *fields, *more, method=method, body=b"x" * len(HIDDEN))[: -len(HIDDEN)])
        r.pass_time(0.5)
        if not client.gone:
            client.send(HIDDEN)
        if not client.gone:
            client.send(get("/healthz"))
        r.pass_time(5)
        assert not [name for name, _, _ in r.ended if "hidden" in name]
        assert len(client.statuses) <= 2 and client.statuses[1:] in ([], [200])


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/v1/chat/completions", "POST"),
        ("/v1/streams", "POST"),
        ("/v1/streams/room", "PUT"),
        ("/v1/streams/room/events", "POST"),
    ],
)
def test_no_stranger_is_invited_to_send_a_body(path: str, method: str, tmp_path: Path) -> None:
    """`Expect: 100-continue` asks before it sends; a server that says yes first and looks at the key later reads it.

    Attacker: any client without a key. Expected: 401 or 404 as the only answer, no 100, the connection not kept for the
    body.
    """
    keys = tmp_path / "keys"
    keys.touch(0o600)
    with rig(keys_file=str(keys)) as r:
        head = get(path, "Expect: 100-continue", "Content-Length: 1000", method=method)
        client = r.client(head)
        assert b" 100 " not in client.raw.partition(b"\r\n")[0]
        assert client.answer.status in (401, 404)
        assert r.runtime.bodies_bytes == 0
        r.pass_time(10)
        assert client.gone


SPELLINGS = ["/status/", "/Status", "/%73tatus", "/status%2f", "/status;x=y", "//status", "/./status", "/x/../status"]


@pytest.mark.parametrize("page", ["status", "metrics"])
@pytest.mark.parametrize("spelling", [*SPELLINGS, "/status", "/status?x=/healthz", "http://127.0.0.1/status"])
def test_no_spelling_of_the_operators_paths_opens_them(spelling: str, page: str) -> None:
    """Gates in front of a path are walked around by another spelling of it (`/%73tatus`, `//status`, `/status;x`).

    Attacker: any client, on a listener that isn't loopback's. Expected: none of the spellings gets the figures.
    Source: the bypasses of nginx `location` and Spring matchers, such as CVE-2022-22978.
    """
    with rig() as r:
        wire = get(spelling.replace("%73tatus", f"%{ord(page[0]):x}{page[1:]}").replace("status", page))
        client = r.client(wire, listener="public")
        assert 400 <= client.answer.status < 500
        assert b"streamd_" not in client.answer.body and b'"connections"' not in client.answer.body


PREFIXES = [
    "127.0.0.1",
    "::1",
    "[::1]:80",
    "::ffff:127.0.0.1",
    "0.0.0.0",
    "127.1",
    "2130706433",
    "0x7f.0.0.1",
    "localhost",
    "fe80::1%lo",
    "127.0.0.1:99999",
    '"127.0.0.1"',
    ",",
    "127.0.0.1, ",
    "198.51.100.7" + ", 127.0.0.1" * 40,
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_no_prefix_of_a_clients_makes_it_local_behind_a_proxy(prefix: str) -> None:
    """A client writes X-Forwarded-For itself, in every spelling of loopback; the proxy appends the true address.

    Attacker: any client behind a trusted proxy. Expected: the true address counts, and sees no figures of the
    operator's. Source: IP spoofing in Rack, Express and Go middleware that take the leftmost address (CVE-2011-3187 and
    others).
    """
    with rig(trusted_proxies=("192.0.2.1",)) as r:
        for path in ("/status", "/metrics"):
            client = r.client(get(path, f"X-Forwarded-For: {prefix}, 198.51.100.9"))
            assert 400 <= client.answer.status < 500, client.answer.body
            lines = r.client(get(path, f"X-Forwarded-For: {prefix}", "X-Forwarded-For: 198.51.100.9"))
            assert 400 <= lines.answer.status < 500, lines.answer.body


@pytest.mark.parametrize(
    "opening",
    [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0",
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"\x80\x2e\x01\x03\x01\x00\x15",  # an SSLv2 hello
        b"*1\r\n$4\r\nPING\r\n",  # Redis
        b"GET\t/healthz\tHTTP/1.1\r\nHost: a\r\n\r\n",
        b"\x16\x03\x01\x00\xa5\x01" + bytes(160),
        b"EHLO mail.test\r\n",
    ],
)
def test_other_protocols_end_at_once(opening: bytes) -> None:
    """Scanners and misled browsers speak other protocols to any port; bytes that are taken for HTTP can be made to act.

    Attacker: any client; a page too (cross-protocol requests). Expected: a 4xx or 505 at most, closed, no request
    begun. Source: the ALPACA attack (2021), and Redis reached by pages over HTTP the other way round.
    """
    with rig() as r:
        client = r.client(opening)
        r.pass_time(15)
        assert client.gone
        assert all(400 <= status <= 505 for status in client.statuses) and len(client.statuses) <= 1
        assert r.dialled == []


def test_a_heartbeat_record_of_tls_gets_no_memory_back(tmp_path: Path) -> None:
    """A TLS heartbeat that claims 16 KiB and holds 1 byte, before and in place of a handshake.

    Attacker: any client of a TLS listener. Expected: an alert at most, and the end. Source: CVE-2014-0160.
    """
    cert, key = make_certificate(tmp_path)

    async def main() -> None:
        async with serving(tls_cert=str(cert), tls_key=str(key)) as daemon:
            for version in (b"\3\1", b"\3\3"):
                record = b"\x18" + version + struct.pack("!HBH", 3, 1, 0x4000)
                reader, writer = await asyncio.open_connection("127.0.0.1", daemon.port)
                writer.write(record)
                answer = await asyncio.wait_for(reader.read(), 30)
                assert len(answer) <= 7, "an alert is 7 bytes"
                writer.close()
            await daemon.until(lambda: not daemon.runtime.clients)

    run(main)


def test_strange_words_make_no_new_figures() -> None:
    """Each new method, path, model, status or user agent becomes a time series of its own, and memory for ever.

    Attacker: any client. Expected: after 400 such requests /metrics has as many lines as after the first of each kind.
    Source: CVE-2022-21698 (Prometheus' client for Go).
    """

    def ask(k: int, client: Client) -> None:
        client.send(get(f"/none-{k}", f"User-Agent: a{k}", method=f"M{k}"))
        client.send(get(f"/v1/streams/none-{k}", f"X-Request-Id: r{k}"))
        client.send(get("/healthz", f"Origin: https://o{k}.test"))

    with rig() as r:
        client = r.client()
        ask(0, client)
        before = len(r.client(get("/metrics")).answer.body.splitlines())
        counts = [len(value) for value in counted(r.runtime.counters)]
        for k in range(1, 400):
            ask(k, client)
        assert len(r.client(get("/metrics")).answer.body.splitlines()) == before
        assert [len(value) for value in counted(r.runtime.counters)] == counts


def counted(counters: Counters) -> list[dict[object, int]]:
    """The tables of the counters."""
    found = (getattr(counters, name) for name in Counters.__slots__)
    return [value for value in found if isinstance(value, dict)]


@pytest.mark.parametrize(
    "field",
    [
        "Range: bytes=" + ",".join(f"{k}-" for k in range(1300)),
        "Range: bytes=0-0",
        "If-Range: *",
        "If-None-Match: *",
        "If-Modified-Since: Thu, 01 Jan 2099 00:00:00 GMT",
        "TE: " + "gzip, " * 500,
        "Accept: " + "text/event-stream;q=0.1," * 400,
        "Accept-Encoding: " + "gzip;q=0.001, " * 400,
    ],
)
def test_conditions_and_ranges_change_nothing(field: str) -> None:
    """1,300 overlapping ranges made a server build as many parts of an answer; conditions make it answer nothing.

    Attacker: any client, on a public stream and on streamd's own pages. Expected: the same bytes as without the field.
    Source: CVE-2011-3192 ("Apache killer").
    """
    with rig() as r:
        r.client(OPEN_ROOM)
        r.client(post(b'{"a":1}\n[DONE]\n', "Content-Type: application/x-ndjson", path="/v1/streams/room/events"))
        for path in ("/v1/streams/room", "/healthz"):
            plain, odd = r.client(get(path)).answer, r.client(get(path, field)).answer
            assert odd.status == plain.status == 200
            assert events_of(odd.body) == events_of(plain.body)


def events_of(body: bytes) -> list[bytes]:
    """An SSE body's lines without `retry:`, which is drawn for each reader."""
    return [line for line in body.split(b"\n") if not line.startswith(b"retry:")]


@pytest.mark.parametrize(
    "field",
    [
        "X-HTTP-Method-Override: DELETE",
        "X-Method-Override: DELETE",
        "X-HTTP-Method: DELETE",
        "X-Original-URL: /drain",
        "X-Rewrite-URL: /v1/streams/room/events?seal=finished",
    ],
)
def test_no_field_overrides_method_or_path(field: str) -> None:
    """Fields that frameworks take for the true method or path turn an allowed request into another.

    Attacker: any reader. Expected: a read stays a read, the stream goes on. Source: CVE-2018-14773 (Symfony).
    """
    with rig() as r:
        r.client(OPEN_ROOM)
        for path in ("/v1/streams/room", "/v1/streams/room?_method=DELETE&method=DELETE"):
            reader = r.client(get(path, field))
            assert reader.answer.status == 200 and not reader.gone
        (stream,) = r.runtime.hub
        assert stream.reason is None and len(stream.readers) == 2
        r.client(get("/v1/streams/room", method="DELETE"))


def work_of_leaving(count: int) -> int:
    """`count` readers wait for a name and leave in the same turn: the instructions that api/streams.py took for it."""
    with rig() as r:
        readers = [r.client(get("/v1/streams/later?wait=60")) for _ in range(count)]

        def leave() -> None:
            for reader in readers:
                reader.transport.reset()
            r.turn()

        return instructions(streams.__file__, leave)


def test_readers_that_wait_for_a_name_cost_each_other_nothing_as_they_leave() -> None:
    """Thousands wait for a name that never opens (`?wait=60`) and leave in the same moment; each looks at all others.

    Attacker: any client, before any key is asked for. Expected: the work as they leave grows with their number and not
    with its square (10,000 of them would be 50 million steps in a few turns of the loop).
    """
    assert work_of_leaving(200) <= 3 * work_of_leaving(100)


def test_the_state_of_a_crowded_stream_doesnt_cost_by_its_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Accept: application/json` at a public stream computes a median over all readers' lags, for every request.

    Attacker: any client, where a public stream has thousands of readers: a few hundred bytes cost milliseconds of all
    users. Expected: 40 requests in a row look at each of 300 readers a few times, not 40 times.
    """
    looked = 0
    position = Subscriber.position.fget
    assert position is not None

    def counting(self: Subscriber) -> int:
        nonlocal looked
        looked += 1
        return position(self)

    with rig() as r:
        r.client(OPEN_ROOM)
        for _ in range(300):
            r.client(get("/v1/streams/room"))
        asker = r.client()
        monkeypatch.setattr(Subscriber, "position", property(counting))
        for _ in range(40):
            asker.send(get("/v1/streams/room", "Accept: application/json"))
        monkeypatch.undo()
        assert set(asker.statuses) == {200} and json.loads(asker.answers[-1].body)["subscribers"] == 300
        r.client(get("/v1/streams/room", method="DELETE"))
    assert looked <= 300 * 4


@pytest.mark.parametrize("path", ["/%3Cscript%3Ealert(1)%3C/script%3E", "/v1/streams/%3Cimg%20src=x%3E", "/'onload='x"])
def test_an_error_never_holds_markup(path: str) -> None:
    """The words of a link come back in an error, and a browser runs them.

    Attacker: the author of a link. Expected: JSON by its type, the path as it was encoded.
    """
    with rig() as r:
        for fields in ((), ("Accept: text/html",)):
            answer = r.client(get(path, *fields)).answer
            assert 400 <= answer.status < 500
            assert answer.get("content-type") == "application/json" and b"<" not in answer.body


@pytest.mark.parametrize("every_s", [0.25, 1.0])
def test_a_refused_client_that_goes_on_sending_is_cut_in_time(every_s: float) -> None:
    """After a refusal the rest of a body is thrown away for a while, so that the client sees the answer; each byte may
    not renew that while.

    Attacker: any client. Expected: closed within a bounded time, for any bytes.
    """
    with rig() as r:
        client = r.client(get("/nowhere", "Content-Length: 100000000", method="POST"))
        waited_s = 0.0
        while not client.gone and waited_s < 2 * LINGER_S_MAX:
            client.send(b"x" * 1000)
            r.pass_time(every_s)
            waited_s += every_s
        assert waited_s <= LINGER_S_MAX + r.runtime.settings.close_timeout_s + 1 + every_s


@pytest.mark.parametrize(
    ("body", "drip"),
    [
        (b"3\r\nabc\r\n0\r\n", b"X-Trailer: x\r\n"),
        (b"3\r\nabc\r\n", b""),
        (b"3;", b"a=b;"),
        (b"", b"0"),
        (b"1\r\na\r\n", b"\r"),
    ],
)
def test_framing_that_never_ends_is_no_progress(body: bytes, drip: bytes) -> None:
    """Trailers, extensions and zeros in front of a chunk's size can be sent for ever without a byte of a body.

    Attacker: any client that may send a body (here: all). Expected: refused (408, or 400 at a bound) within a minute.
    """
    with rig() as r:
        client = r.client(get("/v1/embeddings", "Transfer-Encoding: chunked", method="POST") + body)
        for _ in range(60):
            if drip and not client.gone:
                client.send(drip)
            r.pass_time(1)
        assert client.gone and set(client.statuses) <= {400, 408} and client.statuses
        assert r.dialled == []


def test_a_stream_that_a_stranger_reads_slowly_is_no_reason_to_keep_what_it_has_read() -> None:
    """A reader takes a byte at a time of a sealed stream: it is paused for hours, and its replay log is kept for it.

    Attacker: any reader. Expected: in user space no more than a catch-up piece waits for it at any time.
    """
    with rig() as r:
        publisher = r.client(post({"model": "m", "stream": True}))
        r.reply(SSE_HEAD + chunk(*[event("x" * 900)] * 200, DONE) + LAST)
        stream_id = publisher.answer.get("x-stream-id")
        slow = r.client(get(f"/v1/streams/{stream_id}"), capacity=300)
        most = 0
        for _ in range(300):
            most = max(most, len(slow.transport.held))
            slow.take(7)
        assert most <= 3 * r.runtime.settings.catchup_bytes_max
