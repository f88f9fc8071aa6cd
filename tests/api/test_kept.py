"""Objects that an upstream keeps: asked of their maker, for their principal."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakes import LAST, SSE_HEAD, Rig, chunk, get, post, rig, whole_answer
from loopback import run
from pair import pair

from streamd.config import UpstreamSettings
from streamd.core.keys import SALT_BYTES, Key, digest, encode
from streamd.core.makers import Makers
from streamd.mockllm import MockOptions

SALT = bytes(SALT_BYTES)
ONE, TWO = (
    UpstreamSettings(name=name, url=f"http://{name}.test:{port}") for port, name in enumerate(("one", "two"), 1)
)
MAKERS = {
    "whole": {"model": "m", "input": "x"},
    "background": {"model": "m", "input": "x", "background": True},
    "stream": {"model": "m", "input": "x", "stream": True},
}


def bearer(name: str) -> str:
    return f"Authorization: Bearer sk-{name}-{name * 8:0<20.20}"


@contextmanager
def two(tmp_path: Path, **rights: Any) -> Iterator[Rig]:
    """Two upstreams; alice's key has these rights, bob's all."""
    path = tmp_path / "keys"
    rows = []
    for name, own in (("alice", rights), ("bob", {})):
        presented = bearer(name).rpartition(" ")[2].encode()
        rows.append(encode(Key(name, name, SALT, digest(SALT, presented), **own)) + b"\n")
    path.write_bytes(b"".join(rows))
    path.chmod(0o600)
    with rig(keys_file=str(path), upstreams=(ONE, TWO), retention_s=1.0, pool_idle_timeout_s=0.0) as r:
        yield r


def make(r: Rig, object_id: str, name: str, how: str = "whole", *, at: int = 1, path: str = "/v1/responses") -> None:
    """An object, made by that upstream: the other is kept busy meanwhile."""
    busy = None
    if at == 2:
        busy = r.client(post({"model": "m"}, bearer("bob")))
    client = r.client(post(MAKERS[how], bearer(name), path=path))
    assert r.dialled[-1] == at
    if how == "stream":
        created = {"type": "response.created", "response": {"id": object_id}}
        r.reply(SSE_HEAD + chunk(b"data: " + json.dumps(created).encode() + b"\n\n"))
        r.reply(chunk(b'data: {"type": "response.completed"}\n\n') + LAST)
    else:
        r.reply(whole_answer(json.dumps({"id": object_id, "status": "queued"}).encode()))
    assert client.answer.status == 200
    if busy is not None:
        busy.fin()
    r.pass_time(2)  # the stream's retention, too


def asked(r: Rig, wire: bytes) -> int | None:
    """The port of the upstream that is asked; None if none is."""
    before = len(r.links)
    client = r.client(wire)
    if len(r.links) == before:
        assert client.answer.status == 404 and client.answer.error["code"] == "not_found"
        return None
    r.reply(whole_answer(b"{}"))
    assert client.answer.status == 200
    return r.dialled[-1]


REQUESTS = [
    ("GET", "/v1/responses/{}", None),
    ("DELETE", "/v1/responses/{}", None),
    ("GET", "/v1/responses/{}/", None),
    ("GET", "/v1/responses/{}?stream=true&starting_after=3", None),
    ("POST", "/v1/responses/{}/cancel", None),
    ("GET", "/v1/responses/{}/input_items?limit=2", None),
    ("POST", "/v1/responses", {"previous_response_id": "{}"}),
    ("POST", "/v1/responses", {"model": "m", "stream": False, "previous_response_id": "{}"}),
    ("POST", "/v1/responses/compact", {"model": "m", "previous_response_id": "{}"}),
    ("POST", "/v1/responses", {"model": "m", "conversation": "{}"}),
    ("POST", "/v1/responses", {"model": "m", "conversation": {"id": "{}"}}),
    ("GET", "/v1/conversations/{}/items", None),
]


def wire(method: str, path: str, body: dict[str, Any] | None, object_id: str, *fields: str) -> bytes:
    path = path.format(object_id)
    if body is not None:
        return post(json.loads(json.dumps(body).replace('"{}"', json.dumps(object_id))), *fields, path=path)
    return get(path, *fields, *(["Content-Length: 0"] if method == "POST" else []), method=method)


@pytest.mark.parametrize("how", MAKERS)
@pytest.mark.parametrize("at", [1, 2])
def test_an_object_is_asked_of_its_maker_for_its_principal(tmp_path: Path, how: str, at: int) -> None:
    with two(tmp_path) as r:
        make(r, "r1", "alice", how, at=at)
        for request in REQUESTS:
            assert asked(r, wire(*request, "r1", bearer("alice"))) == at, request
            assert asked(r, wire(*request, "r1", bearer("bob"))) is None, request
        # The maker counts also where the other has less to do.
        busy = [r.client(wire("GET", "/v1/responses/{}", None, "r1", bearer("alice"))) for _ in range(3)]
        assert r.dialled[-3:] == [at] * 3
        for client in busy:
            client.fin()


def test_a_conversation_is_asked_of_its_maker(tmp_path: Path) -> None:
    with two(tmp_path) as r:
        make(r, "conv_1", "alice", at=2, path="/v1/conversations")
        assert asked(r, wire("POST", "/v1/responses", {"conversation": "{}"}, "conv_1", bearer("alice"))) == 2
        assert asked(r, wire("DELETE", "/v1/conversations/{}", None, "conv_1", bearer("bob"))) is None


@pytest.mark.parametrize(
    "rights",
    [{"models": ("m",)}, {"streams_max": 9}, {"requests_per_minute": 99}, {"tokens_per_minute": 9999}],
    ids=lambda rights: next(iter(rights)),
)
def test_what_has_no_known_maker_is_off_for_a_key_with_limits(tmp_path: Path, rights: dict[str, Any]) -> None:
    with two(tmp_path, **rights) as r:
        make(r, "r1", "alice")
        for method, path, body in REQUESTS:
            body = body and {"model": "m", **body}
            assert asked(r, wire(method, path, body, "unheard-of", bearer("alice"))) is None
            assert asked(r, wire(method, path, body, "unheard-of", bearer("bob"))) is not None
            assert asked(r, wire(method, path, body, "r1", bearer("alice"))) is not None
        assert asked(r, wire("GET", "/v1/responses/{}", None, "r%2531", bearer("alice"))) is not None
        for path in ("/v1/responses", "/v1/chat/completions", "/v1/conversations"):
            assert r.client(get(path, bearer("alice"))).answer.status == 403
            assert asked(r, get(path, bearer("bob"))) is not None
        odd = post({"model": "m", "previous_response_id": ["r1"]}, bearer("alice"), path="/v1/responses")
        assert asked(r, odd) is None


STORED = [
    ("GET", "/v1/chat/completions/{}", None),
    ("GET", "/v1/chat/completions/{}/messages", None),
    ("POST", "/v1/chat/completions/{}", {"metadata": {"a": "b"}}),
    ("DELETE", "/v1/chat/completions/{}", None),
]


def complete(r: Rig, store: Any, how: str, at: int) -> None:
    """A chat completion of alice's by that upstream; the other is kept busy meanwhile."""
    busy = r.client(post({"model": "m"}, bearer("bob"))) if at == 2 else None
    asks_for = {"model": "m", "stream": how != "whole"} | ({} if store is None else {"store": store})
    client = r.client(post(asks_for, bearer("alice")))
    assert r.dialled[-1] == at
    if how == "whole":
        r.reply(whole_answer(b'{"id": "c1", "choices": []}'))
    else:
        event = b'data: {"id": "c1", "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\n'
        r.reply(SSE_HEAD + chunk(event) + {"ended": LAST, "done": chunk(b"data: [DONE]\n\n")}[how])
    assert client.answer.status == 200
    if busy is not None:
        busy.fin()


@pytest.mark.parametrize("how", ["whole", "ended", "done"])
@pytest.mark.parametrize("at", [1, 2])
def test_a_stored_chat_completion_is_asked_of_its_maker_for_its_principal(tmp_path: Path, how: str, at: int) -> None:
    with two(tmp_path, models=("m",)) as r:
        complete(r, True, how, at)
        for method, path, body in STORED:
            body = body and {"model": "m", **body}
            assert asked(r, wire(method, path, body, "c1", bearer("alice"))) == at
            assert asked(r, wire(method, path, body, "c1", bearer("bob"))) is None
        r.pass_time(4)


@pytest.mark.parametrize("store", [None, False, "false", {}, []])
@pytest.mark.parametrize("how", ["whole", "done"])
def test_a_chat_completion_that_is_not_stored_is_not_remembered(tmp_path: Path, store: Any, how: str) -> None:
    with two(tmp_path) as r:
        complete(r, store, how, 1)
        assert len(r.worker.kept.makers) == 0
        r.pass_time(4)


@pytest.mark.parametrize("status", ["404 Not Found", "500 Internal Server Error"])
def test_an_error_makes_nothing(tmp_path: Path, status: str) -> None:
    with two(tmp_path) as r:
        r.client(post(MAKERS["whole"], bearer("alice"), path="/v1/responses"))
        r.reply(whole_answer(b'{"id": "r1"}', status))
        assert len(r.worker.kept.makers) == 0


def test_a_maker_that_does_not_take_the_model_is_not_asked_for_it() -> None:
    upstreams = (ONE, UpstreamSettings(name="two", url="http://two.test:2", models=("n",)))
    with rig(upstreams=upstreams) as r:
        r.worker.kept.makers.learn("r1", "anonymous", "two")
        other = r.client(post({"model": "m", "previous_response_id": "r1"}, path="/v1/responses")).answer
        assert (other.status, other.error["code"]) == (404, "model_not_found") and r.links == []
        r.client(post({"model": "n", "previous_response_id": "r1"}, path="/v1/responses"))
        assert r.dialled == [2]


def test_the_object_of_an_upstream_that_left_goes_where_others_go() -> None:
    with rig(upstreams=(ONE, TWO)) as r:
        r.worker.kept.makers.learn("r1", "anonymous", "gone")
        r.client(get("/v1/responses/r1"))
        assert r.dialled == [1]


def test_an_object_is_known_at_every_worker() -> None:
    async def main() -> None:
        async with pair(MockOptions(interval_s=0, ttft_s=0, tokens=3)) as p:
            for at, ask in zip(p.both, p.both[::-1], strict=True):
                made = await at.ask(post({"model": "m", "input": "x"}, "x-api-key: a", path="/v1/responses"))
                object_id = json.loads(made.body)["id"]
                await ask.until(lambda ask=ask, object_id=object_id: ask.worker.kept.makers.of(object_id))
                for each in p.both:
                    other = await each.ask(get(f"/v1/responses/{object_id}", "x-api-key: b"))
                    assert other.status == 404 and other.error["message"].startswith("There is no such object")

    run(main)


def test_a_worker_that_does_not_know_an_object_asks_the_others() -> None:
    async def main() -> None:
        async with pair() as p:
            p.a.worker.kept.makers.learn("r1", "somebody", "mock")
            before = p.mock.stats.requests.total()
            for wire in (
                get("/v1/responses/r1"),
                post({"model": "m", "previous_response_id": "r1"}, path="/v1/responses"),
            ):
                p.b.worker.kept.makers = Makers()
                assert (await p.b.ask(wire)).status == 404
            assert p.b.worker.kept.makers.of("r1") == p.a.worker.kept.makers.of("r1")
            assert p.mock.stats.requests.total() == before

    run(main)
