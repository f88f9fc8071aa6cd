"""Health, readiness, metrics, status and the list of models: the first requests of operators, balancers and SDKs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from fakes import CHAT, DONE, LAST, SSE_HEAD, WHOLE, Client, Rig, chunk, event, get, post, rig, whole_answer

from streamd.config import UpstreamSettings
from streamd.daemon.control import DaemonState

TWO = (
    UpstreamSettings(name="a", url="http://a.test:1", models=("big", "small"), aliases={"fast": "small"}),
    UpstreamSettings(name="b", url="http://b.test:2"),
)


def models(*names: str) -> bytes:
    listed = [{"id": name, "object": "model", "created": 1, "owned_by": "x"} for name in names]
    return whole_answer(json.dumps({"object": "list", "data": listed}).encode())


@pytest.mark.parametrize("path", ["/healthz", "/health"])
def test_healthz_and_health_answer_ok(path: str) -> None:
    with rig() as r:
        answer = r.client(get(path)).answer
        assert (answer.status, answer.body) == (200, b'{"status":"ok"}')
        assert answer.get("cache-control") == "no-store"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_the_base_address_answers_a_client_that_knocks_there(method: str) -> None:
    with rig() as r:
        answer = r.client(get("/", method=method)).answer
        assert (answer.status, answer.get("content-length")) == (200, "8")
        assert answer.get("cache-control") == "no-store"


def test_options_of_the_whole_server_lists_its_methods() -> None:
    with rig() as r:
        answer = r.client(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").answer
        assert (answer.status, answer.body) == (204, b"")
        assert answer.get("allow") == "GET, HEAD, POST, PUT, DELETE, OPTIONS"


def test_readiness_follows_the_workers_state_and_not_the_upstreams() -> None:
    with rig() as r:
        r.refusing.add(1)
        r.client(post(WHOLE))
        assert r.client(get("/readyz")).answer.status == 200
        for state in (DaemonState.STARTING, DaemonState.DRAINING):
            r.worker.state = state
            answer = r.client(get("/readyz")).answer
            assert answer.status == 503 and json.loads(answer.body) == {"status": state.value}
        r.worker.state = DaemonState.SERVING


@pytest.mark.parametrize("path", ["/metrics", "/status"])
def test_metrics_and_status_are_served_outside_only_if_made_public(path: str) -> None:
    with rig() as r:
        assert r.client(get(path), listener="admin").answer.status == 200
        assert r.client(get(path), listener="loopback").answer.status == 404  # its peer is a proxy on this machine
        assert r.client(get(path), listener="public").answer.status in (401, 404)
    with rig(ops_public=True) as r:
        assert r.client(get(path), listener="public").answer.status == 200


def test_a_scrapers_listener_has_metrics_and_health_and_nothing_else() -> None:
    elsewhere = ("/status", "/v1/models", "/v1/streams", "/drain", "/streams", "/", "/health", "/nowhere")
    with rig() as r:
        for path in ("/metrics", "/healthz", "/readyz"):
            assert r.client(get(path), listener="metrics").answer.status == 200
            assert r.client(get(path, "Content-Length: 0", method="POST"), listener="metrics").answer.status == 405
        for path in elsewhere:
            for method in ("GET", "POST", "DELETE"):
                answer = r.client(get(path, "Content-Length: 0", method=method), listener="metrics").answer
                assert (answer.status, answer.error["code"]) == (404, "not_found"), path
        page = ("Origin: https://a.test", "Access-Control-Request-Method: GET")
        assert r.client(get("/metrics", *page, method="OPTIONS"), listener="metrics").answer.status == 405
        assert r.links == []


def test_a_scraper_is_answered_when_streamd_is_full() -> None:
    with rig(conns_max=1) as r:
        reader = r.client(post(CHAT))
        assert r.client(get("/v1/streams")).answer.status == 503
        assert r.client(get("/metrics"), listener="metrics").answer.status == 200
        reader.fin()


def test_metrics_count_a_running_stream() -> None:
    with rig() as r:
        reader = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), event("b")))
        answer = r.client(get("/metrics"), listener="admin").answer
        assert (answer.get("content-type") or "").startswith("text/plain")
        lines = answer.body.decode().splitlines()
        for line in (
            'streamd_streams{state="live"} 1.0',
            "streamd_subscribers 1.0",
            "streamd_events_total 2.0",
            'streamd_upstream_in_flight{upstream="up"} 1.0',
            "streamd_bugs_total 0.0",
        ):
            assert line in lines, line
        assert all(line.startswith(("#", "streamd_", "process_")) for line in lines)
        reader.fin()
        lines = r.client(get("/metrics"), listener="admin").answer.body.decode().splitlines()
        assert 'streamd_streams_sealed_total{reason="reader_gone"} 1.0' in lines
        assert 'streamd_upstream_cancels_total{upstream="up"} 1.0' in lines


def test_status_is_readable_json() -> None:
    with rig() as r:
        status = json.loads(r.client(get("/status"), listener="admin").answer.body)
        assert status["state"] == "serving" and "up" in status["upstreams"]
        assert status["streams"] == {"live": 0, "detached": 0, "sealed": 0}


def test_status_counts_tokens_and_the_memory_that_is_compared_with_the_budget() -> None:
    with rig() as r:
        r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), event("b")))
        r.pass_time(2.0)
        r.runtime.admission.note_resident(12_345_678)
        status = json.loads(r.client(get("/status"), listener="admin").answer.body)
        assert status["tokens_total"] == 2 and status["admission"]["resident_bytes"] == 12_345_678


# -- models


def answered(r: Rig, *wires: bytes) -> list[str]:
    """The ids of the list when the upstreams send these answers, in their order."""
    client = r.client(get("/v1/models"))
    for link, wire in zip(r.links[-len(wires) :], wires, strict=True):
        link.feed(wire)
    r.turn()
    assert client.answer.status == 200
    return [model["id"] for model in json.loads(client.answer.body)["data"]]


def test_the_model_list_has_the_served_models_of_all_upstreams_and_their_aliases() -> None:
    with rig(upstreams=TWO) as r:
        assert answered(r, models("big", "small", "hidden"), models("other", "big")) == [
            "big",
            "small",
            "fast",
            "other",
        ]
        head = r.client(get("/v1/models", method="HEAD"))
        head.methods = ("HEAD",)
        for link in r.links[-2:]:
            link.feed(models("big"))
        r.turn()
        assert head.answer.status == 200 and head.answer.body == b""


@pytest.mark.parametrize(
    "wire",
    [
        whole_answer(b"{}", "500 Oops"),
        whole_answer(b"nonsense"),
        whole_answer(b'{"data": 1}'),
        whole_answer(b"[]"),
        whole_answer(b'{"data": [1, {"id": 2}]}'),
        b"HTTP/1.1 banana\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 3000000\r\n\r\n" + b"x" * 2_200_000,
    ],
    ids=["500", "no json", "no list", "another shape", "no ids", "garbage", "too large"],
)
def test_a_failing_upstream_is_left_out_of_the_model_list(wire: bytes) -> None:
    with rig(upstreams=TWO) as r:
        assert answered(r, wire, models("other")) in (["other"], ["fast", "other"])


def test_a_silent_upstream_is_left_out_of_the_model_list() -> None:
    with rig(upstreams=TWO) as r:
        client = r.client(get("/v1/models"))
        r.links[1].feed(models("other"))
        r.pass_time(4)
        assert client.raw == b""
        r.pass_time(2)
        assert [model["id"] for model in json.loads(client.answer.body)["data"]] == ["other"]


def test_without_an_answering_upstream_the_model_list_is_a_502() -> None:
    with rig(upstreams=TWO) as r:
        r.refusing |= {1, 2}
        answer = r.client(get("/v1/models")).answer
        assert answer.status == 502 and answer.error["code"] == "no_models" and answer.get("x-should-retry") == "true"


WRONG_KEY = whole_answer(b'{"error": {"message": "the key is wrong"}}', "401 Unauthorized", "www-authenticate: Bearer")
BROKEN = whole_answer(b"<html>", "502 Bad Gateway", "content-type: text/html", "retry-after: 900")


@pytest.mark.parametrize(
    ("wires", "status", "upstream"),
    [((WRONG_KEY, BROKEN), 401, "a"), ((BROKEN, WRONG_KEY), 401, "b"), ((BROKEN, BROKEN), 502, "a")],
)
def test_where_no_upstream_has_a_list_an_upstreams_own_error_is_the_answer(
    wires: tuple[bytes, bytes], status: int, upstream: str
) -> None:
    with rig(upstreams=TWO) as r:
        client = r.client(get("/v1/models"))
        for link, wire in zip(list(r.links), wires, strict=True):
            link.feed(wire)
        r.turn()
        answer = client.answer
        assert answer.status == status and answer.get("x-upstream") == upstream
        assert answer.get("x-should-retry") is None
        if status == 401:
            assert answer.error["message"] == "the key is wrong" and answer.get("www-authenticate") == "Bearer"
        else:
            assert answer.get("retry-after") == "60" and answer.get("content-security-policy")


def test_without_a_configured_upstream_the_model_list_is_refused() -> None:
    with rig(upstreams=()) as r:
        assert r.client(get("/v1/models")).answer.status == 503


@pytest.mark.parametrize("mute", [False, True])
def test_a_client_that_leaves_ends_the_requests_for_models(mute: bool) -> None:
    with rig(upstreams=TWO) as r:
        if mute:
            r.mute |= {1, 2}
        r.client(get("/v1/models")).fin()
        assert all(link.closed for link in r.links)


UP = UpstreamSettings(name="up", url="http://up.test:1", inflight_max=8)


def listed(client: Client) -> list[str]:
    return [model["id"] for model in json.loads(client.answer.body)["data"]]


def test_many_who_want_the_list_take_one_place_and_leave_room_for_a_generation() -> None:
    ways = (
        get("/v1/models"),
        get("/v1/models/"),
        get("/v1/models", "Accept: text/html", "X-Request-Id: r", "X-Y: z", "If-None-Match: a", "Cookie: c=d"),
        get("/v1/models", "Authorization: Bearer mine"),
        get("/v1/models", "Content-Length: 4") + b"body",
        get("/v1/%6dodels"),
    )
    with rig(upstreams=(UP,)) as r:
        askers = [r.client(ways[k % len(ways)]) for k in range(24)]
        question = r.link
        assert len(r.links) == 1
        sent = bytes(question.sent)
        assert sent.startswith(b"GET /v1/models HTTP/1.1\r\n") and sent.endswith(b"\r\n\r\n")
        fields = {line.partition(b":")[0] for line in sent.split(b"\r\n")[1:-2]}
        assert fields == {b"host", b"accept", b"accept-encoding", b"via"}
        chat = r.client(post(CHAT))
        r.reply(SSE_HEAD + chunk(event("a"), DONE) + LAST)
        assert chat.answer.status == 200
        question.feed(models("m"))
        r.turn()
        assert [listed(asker) for asker in askers] == [["m"]] * 24
        assert listed(r.client(get("/v1/models"))) == ["m"]
        assert r.runtime.counters.upstream_requests == {"up": 2}
        r.pass_time(4)


def test_lists_for_other_credentials_are_other_lists_where_credentials_go_upstream() -> None:
    up = UpstreamSettings(name="up", url="http://up.test:1", pass_client_key=True)
    fields = ("Authorization: Bearer one", "Authorization: Bearer two", "Authorization: Bearer one")
    with rig(upstreams=(up,)) as r:
        askers = [r.client(get("/v1/models", field)) for field in fields]
        assert [b"Bearer one" in bytes(link.sent) for link in r.links] == [True, False]
        for link, name in zip(r.links, ("of-one", "of-two"), strict=True):
            link.feed(models(name))
        r.turn()
        assert [listed(asker) for asker in askers] == [["of-one"], ["of-two"], ["of-one"]]
        assert listed(r.client(get("/v1/models", fields[1]))) == ["of-two"]
        r.pass_time(4)


def test_a_full_upstream_is_not_asked_for_its_models() -> None:
    with rig(upstreams=(UP,)) as r:
        (upstream,) = r.worker.upstreams
        upstream.in_flight = 8
        answer = r.client(get("/v1/models")).answer
        assert (answer.status, answer.error["code"]) == (503, "no_upstream_available") and r.links == []
        upstream.in_flight = 0


def test_the_part_of_a_failed_upstream_is_asked_for_again_and_the_good_part_is_kept() -> None:
    with rig(upstreams=TWO) as r:
        assert answered(r, whole_answer(b"{}", "500 Oops"), models("other")) == ["other"]
        again = r.client(get("/v1/models"))
        assert sum(b"GET" in bytes(link.sent) for link in r.links) >= 2
        asked = [link for link in r.links if bytes(link.sent).count(b"GET /v1/models") == 2 or link is r.links[-1]]
        asked[0].feed(models("big"))
        r.turn()
        assert listed(again) == ["big", "fast", "other"]
        r.pass_time(4)


def test_a_model_that_cannot_be_written_again_costs_the_list_nothing_else() -> None:
    deep = b'{"id": "deep", "x": ' + b"[" * 400 + b"]" * 400 + b"}"
    with rig(upstreams=(replace(UP, aliases={"fast": "m"}),)) as r:
        client = r.client(get("/v1/models"))
        r.reply(whole_answer(b'{"data": [%b, {"id": "m"}]}' % deep))
        assert listed(client) == ["m", "fast"]
        r.pass_time(4)


def test_other_methods_of_models_go_upstream() -> None:
    with rig() as r:
        client = r.client(get("/v1/models/m", method="DELETE"))
        r.reply(whole_answer(b"{}"))
        assert client.statuses == [200] and bytes(r.link.sent).startswith(b"DELETE /v1/models/m HTTP/1.1")
