"""Attacks of a holder of a key, the cheapest that there is: all that the key allows, and the rest.

Each docstring says what is tried, what is expected and, if the idea is a public one, where it comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Rig, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.core.keys import SALT_BYTES, Key, digest, encode


def key(name: str) -> str:
    """The API key of that name."""
    return f"sk-{name}-{name * 8:0<20.20}"


def bearer(name: str = "alice") -> str:
    return f"Authorization: Bearer {key(name)}"


@contextmanager
def keyed(folder: Path, settings: dict[str, Any] | None = None, **rights: Any) -> Iterator[Rig]:
    """A rig with alice's key, of these rights, and bob's, of all."""
    salt, path = bytes(SALT_BYTES), folder / "keys"
    rows = [("alice", rights), ("bob", {})]
    path.write_bytes(b"".join(encode(Key(n, n, salt, digest(salt, key(n).encode()), **own)) + b"\n" for n, own in rows))
    path.chmod(0o600)
    with rig(keys_file=str(path), **(settings or {})) as r:
        yield r


def asked(r: Rig) -> list[bytes]:
    """The requests that went upstream, each on a connection of its own."""
    return [bytes(link.sent) for link in r.links if link.sent]


def answer_all(r: Rig) -> None:
    for link in r.links:
        if link.sent and not link.closed:
            link.feed(whole_answer(b"{}"))
            r.turn()


# -- rights


@pytest.mark.parametrize(
    "named", ["x-team", "X-Team, x-request-id", "accept-encoding", "x-team,keep-alive,traceparent", "x-forwarded-for"]
)
def test_connection_takes_no_field_of_ours_off_a_request(named: str, tmp_path: Path) -> None:
    """Fields named in Connection are for one hop, so a client may name the field by which the next server knows it.

    Attacker: any key. Expected: the fields that streamd and its operator add are there. Source: CVE-2022-1388 (F5
    BIG-IP), CVE-2021-33197 (Go's ReverseProxy).
    """
    upstream = UpstreamSettings(name="up", url="http://up.test:1", headers={"X-Team": "ours"}, key="sk-upstream")
    with keyed(tmp_path, {"upstreams": (upstream,)}) as r:
        r.client(post(WHOLE, bearer(), f"Connection: {named}"))
        answer_all(r)
        head = asked(r)[0].partition(b"\r\n\r\n")[0].lower()
        for field in (b"x-team: ours", b"x-request-id: ", b"accept-encoding: identity", b"authorization: bearer sk-up"):
            assert field in head


@pytest.mark.parametrize("first", ["alice", "mallory"])
def test_two_credentials_are_no_credential(first: str, tmp_path: Path) -> None:
    """Two Authorization fields, the second or the first valid: the checker reads this, the server behind that.

    Attacker: any key. Expected: 401, and nothing goes upstream, also where clients' keys are passed on.
    """
    upstream = UpstreamSettings(name="up", url="http://up.test:1", pass_client_key=True)
    second = "mallory" if first == "alice" else "alice"
    with keyed(tmp_path, {"upstreams": (upstream,)}) as r:
        client = r.client(post(CHAT, bearer(first), bearer(second)))
        assert client.answer.status in (400, 401)
        assert asked(r) == []


SECRET_QUERIES = [
    "access_token=SECRET",
    "access%5Ftoken=SECRET",
    "%61ccess_token=SECRET",
    "a=b;access_token=SECRET",
    "a=b&access%5ftoken=SECRET;c=d",
    "access_token=SECRET&access_token=SECRET",
    "key=SECRET",
    "k%65y=SECRET",
    "a;key=SECRET",
    "last_event_id=SECRET",
]


@pytest.mark.parametrize("query", SECRET_QUERIES)
def test_no_spelling_of_a_secret_in_a_query_goes_upstream(query: str, tmp_path: Path) -> None:
    """A token in the query is for streamd; another spelling of its name passes a filter that compares text.

    Cause: a mistake; the upstream's log has the token then. Expected: it never leaves (SECURITY.md, Tokens).
    """
    with keyed(tmp_path) as r:
        is_google = "key" in query.replace("%65", "e")
        path = "/v1beta/models/m:generateContent" if is_google else "/v1/embeddings"
        client = r.client(post({"model": "m"}, bearer(), path=f"{path}?{query}&z=1"))
        answer_all(r)
        assert client.statuses and not [head for head in asked(r) if b"SECRET" in head]


@pytest.mark.parametrize(
    "more",
    [
        {"api_base": "http://127.0.0.1:9/"},
        {"base_url": "http://169.254.169.254/latest/meta-data"},
        {"model": "http://127.0.0.1:9/m"},
        {"upstream": "other", "user": "x"},
        {"extra_headers": {"Host": "127.0.0.1:9"}},
    ],
)
def test_nothing_in_a_body_says_where_streamd_connects(more: dict[str, Any], tmp_path: Path) -> None:
    """Gateways that take the server's address from the request fetch what the client can't reach itself.

    Attacker: any key. Expected: streamd dials its configured upstream alone. Source: CVE-2024-6587 (LiteLLM).
    """
    with keyed(tmp_path) as r:
        r.client(post(WHOLE | more, bearer()))
        answer_all(r)
        assert r.dialled == [1]
        assert asked(r)[0].count(b"\r\nhost: up.test:1\r\n") == 1


# -- shared places


def test_a_hail_of_posts_in_a_conversation_leaves_one_generation(tmp_path: Path) -> None:
    """60 POSTs of one conversation, each of which takes the place of the one before.

    Attacker: any key, by a client that tries again and again. Expected: never more than a single upstream request is
    under way for it, and each of the earlier answers ends.
    """
    with keyed(tmp_path) as r:
        clients = []
        for _ in range(60):
            clients.append(r.client(post(CHAT, bearer(), "X-Conversation-Id: c")))
            r.reply(SSE_HEAD + chunk(event("a")))
            r.pass_time(0.3)
            assert sum(upstream.in_flight for upstream in r.worker.upstreams) == 1
        assert all(client.gone for client in clients[:-1]) and not clients[-1].gone
        r.reply(chunk(DONE) + LAST)


def test_a_reader_that_leaves_in_the_middle_frees_its_idempotency_key(tmp_path: Path) -> None:
    """The same Idempotency-Key again and again, left at every stage: before the head, in a whole answer, in a stream.

    Attacker: any key. Expected: the next request with it is asked anew or joins, never 409 for good.
    """
    stages = (b"", b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{", SSE_HEAD, SSE_HEAD + chunk(event("a")))
    with keyed(tmp_path, {"resume_grace_s": 0.0, "retention_s": 1.0}) as r:
        for stage in stages:
            for leave in ("fin", "reset"):
                client = r.client(post(CHAT, bearer(), "Idempotency-Key: k"))
                if stage:
                    r.reply(stage)
                getattr(client, leave)()
                r.pass_time(3)
                again = r.client(post(CHAT, bearer(), "Idempotency-Key: k"))
                r.reply(whole_answer(b"{}"))
                assert again.answer.status == 200


@pytest.mark.parametrize(
    "position",
    [
        "0",
        "-1",
        "1",
        "2",
        "00",
        "9007199254740991",
        "9007199254740993",
        "18446744073709551616",
        "1e3",
        "٣",
        "",
        " 1",
        "1 ",
    ],
)
def test_no_position_is_a_mistake_of_streamds(position: str, tmp_path: Path) -> None:
    """Every odd place to resume at, by every way to say it.

    Attacker: any key. Expected: the stream, 204 or a 4xx that names the mistake.
    """
    with keyed(tmp_path) as r:
        client = r.client(post(CHAT, bearer()))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        name = client.answer.get("x-stream-id")
        quoted = "".join(f"%{byte:02x}" for byte in position.encode())
        for wire in (
            get(f"/v1/streams/{name}?from={quoted}", bearer()),
            get(f"/v1/streams/{name}?last_event_id={name}:{quoted}", bearer()),
            get(f"/v1/streams/{name}", bearer(), f"Last-Event-ID: {name}:{position}".encode().decode("latin-1")),
            get(f"/v1/stream?conv_id=c&from={quoted}", bearer()),
            get(f"/v1/responses/none?stream=true&starting_after={quoted}", bearer(), method="HEAD"),
        ):
            asker = r.client(wire)
            answer_all(r)
            assert asker.answers[0].status in (200, 204, 400, 404)


# -- the log
