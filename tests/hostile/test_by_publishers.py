"""Attacks of publishers: clients that may open a stream and write to it, against its readers and all other users.

Each docstring says what is tried, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

import json

import pytest
from fakes import LAST, Client, Rig, chunk, events_in, get, post, rig

EVENTS = "/v1/streams/room/events"
SSE = "Content-Type: text/event-stream"
NDJSON = "Content-Type: application/x-ndjson"


def opened(r: Rig, name: str = "room", **options: object) -> None:
    """Open a stream to publish to."""
    answer = r.client(post(options, path=f"/v1/streams/{name}").replace(b"POST", b"PUT", 1)).answer
    assert answer.status == 201, answer.body


def chunked(*fields: str) -> bytes:
    """The head of a publication that goes on for as long as it is sent."""
    return get(EVENTS, *fields, "Transfer-Encoding: chunked", method="POST")


def closed(r: Rig, name: str = "room") -> None:
    """Stop the stream."""
    r.client(get(f"/v1/streams/{name}", method="DELETE"))


def by_the_standard(body: bytes) -> list[tuple[str, str, bytes]]:
    """(last event id, type, data) of each event, as WHATWG HTML 9.2.6 dispatches them, by the letter."""
    found, last_id, name, data = [], "", "", []
    for line in body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            if data:
                found.append((last_id, name, b"\n".join(data)))
            name, data = "", []
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
        elif field == b"id" and b"\0" not in value:
            last_id = value.decode("utf-8", "replace")
    return found


# -- events that are more than an event


SEPARATORS = ["\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=[f"U+{ord(each):04X}" for each in SEPARATORS])
@pytest.mark.parametrize("media_type", [SSE, NDJSON, "Content-Type: text/plain"])
def test_only_cr_and_lf_end_a_line(media_type: str, separator: str) -> None:
    """A line end of Python's splitlines() is none in a stream: behind it stand `[DONE]`, an id, or another event.

    Attacker: any publisher, or the author of a prompt. Expected: a single event with that character in its data, no
    end. Source: https://github.com/florimondmanca/httpx-sse/issues/34, https://github.com/mpetazzoni/sseclient/issues/9
    """
    text = json.dumps(f"a{separator}data: [DONE]{separator}id: room:aaaaaa:9{separator}", ensure_ascii=False)
    if media_type == NDJSON and separator < " ":
        text = text.replace(separator, "")  # no JSON
    body = f"data: {text}\n\n" if media_type == SSE else f"{text}\n"
    with rig() as r:
        opened(r)
        reader = r.client(get("/v1/streams/room"))
        assert r.client(post(body.encode(), media_type, path=EVENTS)).answer.status == 200
        (read,) = events_in(reader.answer.body)
        assert read.seq == 1 and not reader.gone
        said = read.json["delta"].rstrip("\n") if "plain" in media_type else read.data.decode()
        assert said == text
        closed(r)


IDS = [
    "id: x",
    "id:x",
    "id",
    "id:",
    "id: room:aaaaaa:99",
    "data: a\rid: x",
    "data: a\r\nid: x\r",
    "event: e\nid: x",
    "id: x\nid: y",
    ": c\nid: x",
    "\ufeffid: x",
    "id : x",
    " id: x",
    "ID: x",
    "id: \u2028",
]


@pytest.mark.parametrize("lines", IDS)
def test_no_publisher_writes_a_readers_position(lines: str) -> None:
    """A publisher's own `id:` lines, in every place and spelling: a reader would resume there, or nowhere.

    Attacker: any publisher. Expected: the last event id of each event is streamd's, by the standard's parser, in a
    live reader's stream, a late and a slow reader's.
    """
    body = f"{lines}\ndata: 1\n\n{lines}\n\ndata: 2\n{lines}\n\n".encode()
    with rig() as r:
        opened(r)
        live, slow = r.client(get("/v1/streams/room")), r.client(get("/v1/streams/room"), capacity=400)
        assert r.client(post(body, SSE, path=EVENTS)).answer.status == 200
        slow.take()
        late = r.client(get("/v1/streams/room"))
        (stream,) = r.runtime.hub
        for reader in (live, slow, late):
            ids = [last_id for last_id, _, _ in by_the_standard(reader.answer.body)]
            assert [int(each.rpartition(":")[2]) for each in ids] == list(range(1, stream.events + 1))
            assert {each.rpartition(":")[0] for each in ids} == {f"room:{stream.epoch}"}
        closed(r)


@pytest.mark.parametrize(
    ("media_type", "body", "status"),
    [
        (NDJSON, b"1\n2\n[DONE]\n3\n", 400),
        (NDJSON, b"1\n2\n{oops\n", 400),
        (NDJSON, b"1\n\xff\n", 400),
        (SSE, b"data: 1\n\ndata: [DONE]\n\ndata: 2\n\n", 400),
        (SSE, b"data: 1\n\ndata: \0\n\n", 400),
        ("Content-Type: text/plain", b"abc\xff", 400),
        (NDJSON, b"1\n" + b'"' + b"x" * 8_500_000 + b'"\n', 413),
        ("Content-Type: text/html", b"<p>", 415),
    ],
)
def test_a_refused_publication_leaves_nothing(media_type: str, body: bytes, status: int) -> None:
    """A body with a length is all or nothing, so a mistake at its very end has to undo all events in front.

    Attacker: any publisher. Expected: refused, no event, the stream open and good for the next publication.
    """
    with rig() as r:
        opened(r)
        reader = r.client(get("/v1/streams/room"))
        assert r.client(post(body, media_type, path=EVENTS)).answer.status == status
        assert events_in(reader.answer.body) == [] and not reader.gone
        assert r.client(post(b"1\n", NDJSON, path=EVENTS)).answer.status == 200
        assert [read.seq for read in events_in(reader.answer.body)] == [1]
        assert r.runtime.bodies_bytes == 0
        closed(r)


# -- memory


def flood(r: Rig, reads: int, lines: bytes) -> Client:
    """Publish nothing but these lines, in so many reads."""
    publisher = r.client(chunked(SSE))
    for _ in range(reads):
        publisher.send(chunk(lines))
    return publisher


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("lines", [b": " + b"c" * 8000 + b"\n\n", b"event: " + b"e" * 8000 + b"\n\n", b"x: y\n\n" * 60])
def test_lines_that_are_no_events_pile_up_for_nobody(lines: bytes, version: str) -> None:
    """Comments have no seq and are in no log, so no ring counts them: a reader that takes nothing may keep them all.

    Attacker: any publisher, with a reader that stalls. Expected: 500 reads of them leave less than 64 KiB in user
    space.
    """
    with rig() as r:
        opened(r)
        stalled = r.client(get("/v1/streams/room", version=version), capacity=300)
        healthy = r.client(get("/v1/streams/room"))
        flood(r, 500, lines).send(chunk(b"data: 1\n\n"))
        assert len(stalled.transport.held) < 64 * 1024
        assert events_in(healthy.answer.body)[-1].data == b"1"
        closed(r)


@pytest.mark.parametrize("readers", [1, 70])
def test_comments_of_a_collected_stream_are_bounded(readers: int) -> None:
    """With a write interval a stream collects its events for up to a second; comments are collected outside the log.

    Attacker: any publisher. Expected: of 16 MiB of comments in that second at most 1 MiB is held at a time.
    """
    with rig() as r:
        opened(r, write_interval="1s")
        for _ in range(readers):
            r.client(get("/v1/streams/room"), capacity=2000)
        publisher = r.client(chunked(SSE))
        for _ in range(250):
            publisher.send(chunk(b": " + b"c" * 65_000 + b"\n\n"))
        (stream,) = r.runtime.hub
        held = sum(len(part) for part in parts_of(stream.fanout))
        assert held <= 1024 * 1024
        closed(r)


def parts_of(fanout: object) -> list[bytes]:
    """All bytes that a dispatcher refers to, directly or in its collections."""
    found: list[bytes] = []
    for name in getattr(type(fanout), "__slots__", ()):
        value = getattr(fanout, name, None)
        values = [value] if isinstance(value, bytes | bytearray) else value
        if isinstance(values, list | tuple) or type(values).__name__ == "deque":
            found += [each for each in values if isinstance(each, bytes | bytearray)]
    return found


@pytest.mark.parametrize("sent", [0, 1, 500_000])
def test_a_publication_with_a_length_that_stops_is_let_go(sent: int) -> None:
    """A publication has no time limit, so that it may last for hours; a body with a length is held all that time.

    Attacker: a key that may publish. Expected: refused (408) within a minute, its bytes given back.
    """
    with rig() as r:
        opened(r)
        publisher = r.client(
            get(EVENTS, NDJSON, "Content-Length: 1000000", method="POST") + (b'"' + b"1" * sent)[:sent]
        )
        r.pass_time(30)  # the stream itself waits publisher_grace, another 30 s
        assert r.runtime.bodies_bytes == 0
        assert publisher.gone and publisher.statuses == [408]
        assert r.client(post(b"1\n", NDJSON, path=EVENTS)).answer.status == 200
        closed(r)


def test_an_event_of_many_lines_costs_its_readers_its_size() -> None:
    """An event of 30,000 empty data lines, read by clients of every form and by a late reader.

    Attacker: any publisher. Expected: each reader gets the event; no copy is more than twice its size.
    """
    body = b"data\n" * 30_000 + b"\n"
    with rig() as r:
        opened(r)
        readers = [r.client(get("/v1/streams/room")), r.client(get("/v1/streams/room", version="1.0"))]
        assert r.client(post(body, SSE, path=EVENTS)).answer.status == 200
        readers.append(r.client(get("/v1/streams/room")))
        for reader in readers:
            (read,) = events_in(reader.answer.body)
            assert read.data.count(b"\n") == 29_999 and len(reader.raw) < 2 * len(body)
        closed(r)


# -- places


def test_a_name_that_is_opened_and_ended_again_and_again_holds_one_place() -> None:
    """200 times: open a name, publish, end it, with a reader that resumes from an earlier life.

    Attacker: any publisher. Expected: as many places in use at the end as after the first time; each life is known
    from the others by its epoch, and an id of an earlier life never reads a later life as its own.
    """
    with rig() as r:
        epochs, in_use = set(), None
        for _ in range(200):
            opened(r)
            (stream,) = r.runtime.hub
            epochs.add(stream.epoch)
            reader = r.client(get("/v1/streams/room", "Last-Event-ID: room:aaaaaa:1"))
            answer = r.client(post(b"1\n[DONE]\n", NDJSON, path=EVENTS)).answer
            assert answer.status == 200 and reader.answer.whole
            first = events_in(reader.answer.body)[0]
            assert first.name == "gap" and first.json["gap"]["reset"] is True
            reader.fin()
            in_use = in_use or r.runtime.admission.status()["in_use"]
            assert {**r.runtime.admission.status()["in_use"], "connections": 0} == {**in_use, "connections": 0}
        assert len(epochs) == 200 and len(tuple(r.runtime.hub)) == 1


def test_publishers_that_vanish_leave_their_streams_for_a_grace_only() -> None:
    """100 publishers, each in the middle of a chunk of a stream of its own, are reset in the same moment.

    Attacker: any publisher, or a network that fails. Expected: all places are free after the grace and the retention.
    """
    with rig() as r:
        publishers = []
        for k in range(100):
            opened(r, f"room-{k}")
            head = chunked(NDJSON).replace(b"/room/", b"/room-%d/" % k)
            publishers.append(r.client(head + b"ff\r\n1\n2"))
        for publisher in publishers:
            publisher.transport.reset()
        r.turn()
        r.pass_quietly(r.runtime.settings.publisher_grace_s + r.runtime.settings.retention_s)
        assert tuple(r.runtime.hub) == () and r.runtime.admission.status()["in_use"]["streams"] == 0


@pytest.mark.parametrize("winners", [1, 2, 30])
def test_of_publishers_who_fight_for_a_position_each_event_stands_once(winners: int) -> None:
    """Many requests know the stream's position and take over from each other, all of them half sent.

    Attacker: a publisher with overlapping retries. Expected: each of them is refused or counted, and no seq is used
    twice.
    """
    with rig() as r:
        opened(r)
        reader = r.client(get("/v1/streams/room"))
        fighters = [r.client(chunked(NDJSON, "Expected-Seq: 0")) for _ in range(30)]
        for k, fighter in enumerate(fighters[-winners:]):
            if not fighter.gone:
                fighter.send(chunk(b"%d\n" % k) + LAST)
        for fighter in fighters:
            if not fighter.gone and not fighter.statuses:
                fighter.send(chunk(b'"late"\n') + LAST)
        assert sorted(fighter.statuses[0] for fighter in fighters) == [200] + [409] * 29
        assert [read.seq for read in events_in(reader.answer.body)] == [1]
        closed(r)


@pytest.mark.parametrize("name", ["__proto__", "constructor", "toString", "CON", "~", "-", "_", "...", "a" * 128, "0"])
def test_names_that_mean_something_elsewhere_mean_nothing_here(name: str) -> None:
    """Names that are members of every JavaScript object, devices, or options: a page's or a script's trap.

    Attacker: any publisher. Expected: a stream like any other, in lists too.
    """
    with rig() as r:
        opened(r, name)
        assert json.loads(r.client(get(f"/v1/streams/{name}", "Accept: application/json")).answer.body)["id"] == name
        assert [each["id"] for each in json.loads(r.client(get("/v1/streams")).answer.body)["data"]] == [name]
        closed(r, name)
