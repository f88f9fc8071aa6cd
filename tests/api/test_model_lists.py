"""Lists of models in every shape that servers have, of a single upstream and of several, for keys of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import Answer, Rig, get, rig, whole_answer
from hypothesis import given
from hypothesis import strategies as st

from streamd.api import models as api_models
from streamd.config import UpstreamSettings
from streamd.core.keys import SALT_BYTES, Key, digest, encode
from streamd.net.fetch import ANSWER_BYTES_MAX
from streamd.net.in_turns import at_once
from streamd.wire.dialect import Dialect
from streamd.wire.model_list import list_in, on_one_page
from streamd.wire.model_names import MARKS_MAX, MODELS_MAX

CHAT = Dialect.CHAT.api
SALT = bytes(SALT_BYTES)
KEY = "sk-alice-0123456789abcdefghij"
SEEN, HIDDEN = "llama-3", "secret-model"

OPENAI = ("/v1/models", ())
ANTHROPIC = ("/v1/models", ("Anthropic-Version: 2023-06-01",))
GOOGLE = ("/v1beta/models", ())
OPENAIS_AT_GOOGLE = ("/v1beta/openai/models", ())
ENGINES = ("/v1/engines", ())
GOOGLES_V1 = ("/v1/models", ("X-Goog-Api-Client: google-genai-sdk/3.6.0",))

Api = tuple[str, tuple[str, ...]]

# The API, and a server's list of two models in a shape of its own; unusual spaces show whether its bytes stay.
SHAPES: dict[str, tuple[Api, Any]] = {
    "OpenAI": (OPENAI, {"object": "list", "data": [{"id": SEEN, "x": 1.50}, {"id": HIDDEN}], "extra": {"a": [1]}}),
    "OpenAI's at Google": (OPENAIS_AT_GOOGLE, {"object": "list", "data": [{"id": SEEN}, {"id": HIDDEN}]}),
    "engines": (ENGINES, {"object": "list", "data": [{"id": SEEN, "object": "engine"}, {"id": HIDDEN, "ready": True}]}),
    "an array": (OPENAI, [{"id": SEEN, "type": "chat"}, {"id": HIDDEN}]),
    "an array of names": (OPENAI, [SEEN, HIDDEN]),
    "models alone": (OPENAI, {"models": [{"name": SEEN}, {"name": HIDDEN}]}),
    "both": (OPENAI, {"models": [{"name": HIDDEN}], "object": "list", "data": [{"id": SEEN}, {"id": HIDDEN}]}),
    "Anthropic": (
        ANTHROPIC,
        {
            "data": [{"type": "model", "id": SEEN}, {"type": "model", "id": HIDDEN}],
            "has_more": True,
            "first_id": SEEN,
            "last_id": HIDDEN,
        },
    ),
    "Google": (GOOGLE, {"models": [{"name": f"models/{SEEN}"}, {"name": f"models/{HIDDEN}"}], "nextPageToken": "t"}),
    "Google's v1": (GOOGLES_V1, {"models": [{"name": f"models/{SEEN}"}, {"name": f"models/{HIDDEN}"}], "more": 7}),
    "a default": (OPENAI, {"data": [{"id": SEEN}, {"id": HIDDEN}], "default": HIDDEN, "best": [f"models/{HIDDEN}"]}),
}


def keys_file(tmp_path: Path, *models: str, routes: tuple[str, ...] = ("*",)) -> str:
    path = tmp_path / "keys"
    path.write_bytes(
        encode(Key("alice", "alice", SALT, digest(SALT, KEY.encode()), models=models, routes=routes)) + b"\n"
    )
    path.chmod(0o600)
    return str(path)


def upstream(k: int = 0, **settings: Any) -> UpstreamSettings:
    return UpstreamSettings(name=f"up-{k}", url=f"http://up-{k}.test:{k + 1}", **settings)


def written(body: Any) -> bytes:
    """As no writer of streamd's writes it."""
    return json.dumps(body, indent=3).encode()


def asked(r: Rig, api: Api, *bodies: Any, query: str = "", slash: str = "") -> Answer:
    """The answer to a client when the upstreams send these lists."""
    path, fields = api
    client = r.client(get(path + slash + query, f"Authorization: Bearer {KEY}", *fields))
    for link, body in zip(r.links[-len(bodies) :], bodies, strict=True):
        link.feed(whole_answer(body if isinstance(body, bytes) else written(body)))
    r.turn()
    return client.answer


def entries_of(body: Any) -> list[Any]:
    return body if isinstance(body, list) else next(body[name] for name in ("data", "models") if name in body)


def names_of(body: Any) -> list[str]:
    """The names in any of these lists."""
    names = [each if isinstance(each, str) else each.get("id") or each["name"] for each in entries_of(body)]
    return [name.removeprefix("models/") for name in names]


def targets(r: Rig) -> list[str]:
    return [bytes(link.sent).split(b" ")[1].decode() for link in r.links]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_single_upstreams_list_passes_as_its_bytes(shape: str) -> None:
    api, body = SHAPES[shape]
    with rig(upstreams=(upstream(),)) as r:
        answer = asked(r, api, body)
        assert answer.status == 200 and answer.body == written(body) and targets(r) == [api[0]]
        again = r.client(get(api[0], *api[1])).answer
        assert again.body == answer.body and len(r.links) == 1
        r.pass_time(4)


@pytest.mark.parametrize("slash", ["", "/"])
@pytest.mark.parametrize(
    ("api", "query", "there"),
    [
        (ANTHROPIC, "?limit=1&after_id=m-1", "?limit=1&after_id=m-1"),
        (ANTHROPIC, "?before_id=m%2F1", "?before_id=m%2F1"),
        (OPENAI, "?category=x", "?category=x"),
        (GOOGLE, "?pageSize=1&pageToken=x", "?pageSize=1&pageToken=x"),
        (GOOGLE, "?key=AIza-mine&pageSize=1", "?pageSize=1"),
    ],
)
def test_a_clients_query_reaches_a_single_upstream(api: Api, query: str, there: str, slash: str) -> None:
    with rig(upstreams=(upstream(),)) as r:
        assert asked(r, api, {"data": [], "has_more": False}, query=query, slash=slash).status == 200
        assert targets(r) == [api[0] + there]
        (of_rig,) = r.worker.upstreams
        assert of_rig.listed == frozenset() and of_rig.health.is_reachable()
        r.pass_time(4)


def test_pages_of_a_single_upstream_are_different_answers() -> None:
    with rig(upstreams=(upstream(),)) as r:
        for k in range(3):
            page = {"data": [{"id": f"m-{k}"}], "has_more": k < 2, "first_id": f"m-{k}", "last_id": f"m-{k}"}
            answer = asked(r, ANTHROPIC, page, query=f"?limit=1&after_id=m-{k - 1}" if k else "?limit=1")
            assert json.loads(answer.body) == page
        r.pass_time(4)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_alias_is_added_and_the_shape_stays(shape: str) -> None:
    api, body = SHAPES[shape]
    with rig(upstreams=(upstream(aliases={"fast": SEEN}),)) as r:
        seen = json.loads(asked(r, api, body).body)
        assert type(seen) is type(body) and names_of(seen) == [SEEN, HIDDEN, "fast"]
        if isinstance(body, dict):
            lists = {"data", "models"}
            assert {k: v for k, v in seen.items() if k not in lists} == {
                k: v for k, v in body.items() if k not in lists
            }
        r.pass_time(4)


def test_an_alias_stands_on_the_first_page_alone() -> None:
    with rig(upstreams=(upstream(aliases={"fast": "a"}),)) as r:
        first = asked(r, ANTHROPIC, {"data": [{"id": "a"}], "has_more": True, "last_id": "a"}, query="?limit=1")
        assert json.loads(first.body) == {"data": [{"id": "a"}, {"id": "fast"}], "has_more": True, "last_id": "a"}
        last = asked(r, ANTHROPIC, {"data": [{"id": "b"}], "has_more": False}, query="?limit=1&after_id=a")
        assert json.loads(last.body) == {"data": [{"id": "b"}], "has_more": False}
        r.pass_time(4)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("aliases", [{}, {"open": HIDDEN, "closed": SEEN}])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_limited_key_sees_its_models_alone(tmp_path: Path, shape: str, aliases: dict[str, str], count: int) -> None:
    api, body = SHAPES[shape]
    ups = tuple(upstream(k, aliases=aliases if k == 0 else {}) for k in range(count))
    with rig(upstreams=ups, keys_file=keys_file(tmp_path, "llama-*", "open")) as r:
        answer = asked(r, api, *[body] * count, query="?limit=1&after_id=x")
        seen = json.loads(answer.body)
        assert names_of(seen) == [SEEN, *(["open"] if aliases else [])]
        assert all("after_id" not in target for target in targets(r))
        assert b'"closed"' not in answer.body
        if not aliases:  # an alias's own entry may tell its model
            assert HIDDEN.encode() not in answer.body
        if count == 1:
            assert type(seen) is type(body)
        if shape == "Anthropic":
            shown = names_of(seen)
            assert (seen["has_more"], seen["first_id"], seen["last_id"]) == (False, shown[0], shown[-1])
        if shape == "OpenAI":
            assert seen["extra"] == {"a": [1]} and seen["object"] == "list"
        r.pass_time(4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_key_without_any_listed_model_gets_an_empty_list(tmp_path: Path, shape: str) -> None:
    api, body = SHAPES[shape]
    with rig(upstreams=(upstream(),), keys_file=keys_file(tmp_path, "none")) as r:
        answer = asked(r, api, body)
        assert answer.status == 200 and entries_of(json.loads(answer.body)) == []
        assert SEEN.encode() not in answer.body and HIDDEN.encode() not in answer.body
        r.pass_time(4)


@pytest.mark.parametrize(("path", "fields"), [OPENAI, ANTHROPIC, GOOGLE, GOOGLES_V1])
@pytest.mark.parametrize("end", ["", "/"])
def test_a_model_that_a_key_may_not_use_is_not_looked_up(
    tmp_path: Path, path: str, fields: tuple[str, ...], end: str
) -> None:
    with rig(upstreams=(upstream(),), keys_file=keys_file(tmp_path, "llama-*")) as r:
        answer = r.client(get(f"{path}/{HIDDEN}{end}", f"Authorization: Bearer {KEY}", *fields)).answer
        assert answer.status == 403 and r.links == []


def test_the_lists_of_several_upstreams_become_a_single_page_of_the_firsts_members() -> None:
    bodies = (
        [{"id": "a"}, "b"],
        {"data": [{"id": "b"}, {"id": "c"}], "has_more": True, "first_id": "b", "last_id": "c", "extra": 1},
        {"models": [{"name": "d"}], "other": 2},
    )
    with rig(upstreams=tuple(upstream(k) for k in range(3))) as r:
        seen = json.loads(asked(r, ANTHROPIC, *bodies, query="?limit=1").body)
        assert names_of(seen) == ["a", "b", "c", "d"] and "models" not in seen
        assert {k: v for k, v in seen.items() if k != "data"} == {
            "has_more": False,
            "first_id": "a",
            "last_id": "d",
            "extra": 1,
        }
        assert targets(r) == ["/v1/models?limit=1000"] * 3
        r.pass_time(4)


ODD = (b"[]", b"{}", b'{"data": 1}', b'{"error": "busy"}', b'[1, {"x": 2}]', b'{"data": [], "x": NaN}')


@pytest.mark.parametrize("body", ODD)
def test_an_odd_list_of_a_single_upstream_passes_and_is_no_failure_of_its_server(body: bytes) -> None:
    with rig(upstreams=(upstream(),)) as r:
        answer = asked(r, OPENAI, body)
        assert (answer.status, answer.body) == (200, body)
        (of_rig,) = r.worker.upstreams
        assert of_rig.health.is_reachable() and of_rig.listed == frozenset()
        r.pass_time(4)


@pytest.mark.parametrize("body", [b"{}", b'{"data": 1}', b"nonsense"])
def test_several_odd_lists_are_no_list(body: bytes) -> None:
    with rig(upstreams=(upstream(0), upstream(1))) as r:
        answer = asked(r, OPENAI, body, body)
        assert (answer.status, answer.error["code"]) == (502, "no_models")
        r.pass_time(4)


@pytest.mark.parametrize(("route", "status"), [("/v1/models", 200), ("/v1/models/*", 403)])
def test_a_slash_at_the_end_gives_and_takes_no_right(tmp_path: Path, route: str, status: int) -> None:
    with rig(upstreams=(upstream(),), keys_file=keys_file(tmp_path, "*", routes=(route,))) as r:
        client = r.client(get("/v1/models/", f"Authorization: Bearer {KEY}"))
        if status == 200:
            r.reply(whole_answer(b"[]"))
        assert client.answer.status == status
        r.pass_time(4)


@pytest.mark.parametrize("api", [OPENAI, ANTHROPIC, GOOGLE, GOOGLES_V1, OPENAIS_AT_GOOGLE, ENGINES])
def test_a_slash_at_the_end_changes_nothing(api: Api) -> None:
    with rig(upstreams=(upstream(0), upstream(1))) as r:
        member = "models" if api in (GOOGLE, GOOGLES_V1) else "data"
        lists = [{member: [{"id": name, "name": name}]} for name in "ab"]
        assert names_of(json.loads(asked(r, api, *lists, slash="/").body)) == ["a", "b"]
        assert all(not target.partition("?")[0].endswith("/") for target in targets(r))
        assert r.client(get(api[0], *api[1])).answer.status == 200 and len(r.links) == 2
        r.pass_time(4)


# Lists that would hold the loop for long, and the bound that each is beyond.
TOO_LARGE = {
    "models": (json.dumps([{"id": f"m-{k}"} for k in range(MODELS_MAX + 1)]).encode(), f"{MODELS_MAX} models"),
    "names": (json.dumps([f"m-{k}" for k in range(MODELS_MAX + 1)]).encode(), f"{MODELS_MAX} models"),
    "no models": (b"[%b]" % b",".join([b"{}"] * (MODELS_MAX + 1)), f"{MODELS_MAX} models"),
    "values": (b'{"data":[{"id":"a","x":[%b]}]}' % b",".join([b"1"] * MARKS_MAX), f"{MARKS_MAX} values"),
    "lists": (b'{"data":[],"x":[%b]}' % b",".join([b"[]"] * MARKS_MAX), f"{MARKS_MAX} values"),
    "bytes": (b'{"data":[{"id":"%b"}]}' % (b"x" * ANSWER_BYTES_MAX), f"{ANSWER_BYTES_MAX} bytes"),
}


@pytest.mark.parametrize("kind", TOO_LARGE)
@pytest.mark.parametrize("count", [1, 2])
def test_a_list_that_is_too_large_to_be_read_is_named_with_the_bound(tmp_path: Path, kind: str, count: int) -> None:
    body, bound = TOO_LARGE[kind]
    ups = tuple(upstream(k) for k in range(count))
    with rig(upstreams=ups, keys_file=keys_file(tmp_path, "llama-*")) as r:
        answer = asked(r, OPENAI, body, *[b"nonsense"] * (count - 1))
        assert (answer.status, answer.error["code"]) == (502, "models_too_many")
        assert answer.error["message"].startswith("The list of models of up-0 is too large: it ")
        assert answer.error["message"].endswith(f" more than {bound}.")
        assert all(each.health.is_reachable() for each in r.worker.upstreams)
        if count == 1:
            again = r.client(get("/v1/models", f"Authorization: Bearer {KEY}")).answer
            assert again.status == 502 and len(r.links) == 1
        r.pass_time(4)


@pytest.mark.parametrize("kind", ["models", "names", "values", "lists"])
def test_a_large_list_that_nobody_has_to_read_passes_as_its_bytes(kind: str) -> None:
    body, _ = TOO_LARGE[kind]
    with rig(upstreams=(upstream(),)) as r:
        assert asked(r, OPENAI, body).body == body
        assert r.client(get("/v1/models")).answer.body == body and len(r.links) == 1
        r.pass_time(4)


def test_of_several_lists_one_that_is_too_large_is_left_out() -> None:
    with rig(upstreams=(upstream(0), upstream(1))) as r:
        answer = asked(r, OPENAI, TOO_LARGE["models"][0], {"data": [{"id": "a"}]})
        assert names_of(json.loads(answer.body)) == ["a"]
        r.pass_time(4)


@pytest.mark.parametrize(("patterns", "a_turn"), [(("m-*",), 256), (tuple(f"x-{k}" for k in range(40)), 23)])
def test_a_page_is_made_in_shares_of_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, patterns: tuple[str, ...], a_turn: int
) -> None:
    shares: list[int] = []
    made = api_models._Merge.work

    def work(merge: Any) -> bool:
        before = len(looked)
        more = made(merge)
        shares.append(len(looked) - before)
        return more

    looked: list[str] = []
    refuse = Key.refuse_model
    monkeypatch.setattr(Key, "refuse_model", lambda key, name: looked.append(name) or refuse(key, name))
    monkeypatch.setattr(api_models._Merge, "work", work)
    body = json.dumps({"data": [{"id": f"m-{k}"} for k in range(600)], "default": "m-7"}).encode()
    with rig(upstreams=(upstream(),), keys_file=keys_file(tmp_path, *patterns)) as r:
        answer = asked(r, OPENAI, body)
        assert sum(shares) == 600 and max(shares) <= a_turn + 1
        assert len(entries_of(json.loads(answer.body))) == (600 if patterns == ("m-*",) else 0)
        client = r.client()
        client.transport.feed(get("/v1/models", f"Authorization: Bearer {KEY}"))
        client.reset()  # in the middle of the page
        r.pass_time(4)


NAMES = st.lists(st.sampled_from(["a", "b", "data", "first_id", "x/y"]), max_size=4)
AROUND = st.dictionaries(
    st.sampled_from(["default", "has_more", "first_id", "a", "models", "next"]),
    st.sampled_from(["a", "b", "x/y", 1, None, ["a"], "models/b"]),
)


@given(
    NAMES,
    AROUND,
    st.lists(st.tuples(NAMES, AROUND), max_size=2),
    st.sets(st.sampled_from(["a", "b", "data", "first_id", "x/y"])),
)
def test_no_page_tells_a_model_that_may_not_be_seen(
    names: list[str], around: dict[str, Any], others: list[tuple[list[str], dict[str, Any]]], seen: set[str]
) -> None:
    lists = []
    for own, members in [(names, around), *others]:
        found = list_in({**members, "data": [{"id": name} for name in own]}, CHAT, "up")
        assert found is not None
        models, of_list = found
        lists.append(of_list._replace(entries=tuple((name, json.dumps(entry).encode()) for name, entry in models)))
    page = json.loads(at_once(on_one_page(CHAT, lists, seen.__contains__, keeps_shape=not others)))
    listed = [each for own, _ in [(names, around), *others] for each in own]
    assert [each["id"] for each in page["data"]] == list(dict.fromkeys(name for name in listed if name in seen))
    rest = json.dumps({name: value for name, value in page.items() if name != "data"})
    for hidden in set(listed) - seen - {"first_id"}:
        assert f'"{hidden}"' not in rest.replace('"data"', "")
