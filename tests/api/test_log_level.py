"""The log level over the admin surface: for a time, for a key or a stream, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fakes import Rig, get, rig

from streamd.core.keys import SALT_BYTES, Key, digest, encode
from streamd.daemon import logs
from streamd.log_levels import FOR_S_MAX, WATCH_S, WATCHES_MAX


def put(r: Rig, query: str = "", word: bytes = b"") -> tuple[int, str]:
    """The status and the error's code."""
    data = get(f"/log-level{query}", f"Content-Length: {len(word)}", method="PUT") + word
    answer = r.client(data, listener="admin").answer
    return answer.status, answer.error["code"] if answer.body else ""


def shown(r: Rig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(r.client(get("/log-level"), listener="admin").answer.body)
    return found


@pytest.fixture
def keys(tmp_path: Path) -> str:
    path, salt = tmp_path / "keys", bytes(SALT_BYTES)
    made = [Key(id=f"id{k}", name=name, salt=salt, digest=digest(salt, b"%d" % k)) for k, name in enumerate("aab")]
    path.write_bytes(b"\n".join(map(encode, made)) + b"\n")
    path.chmod(0o600)
    return str(path)


def test_a_level_for_a_time_returns_to_the_settings_own() -> None:
    with rig(log_level="error") as r:
        assert shown(r) == {"level": "error", "usual": "error", "watches": []}
        assert put(r, "?for=5m", b"debug") == (204, "")
        assert logs._sink.level == logs.DEBUG and r.runtime.story.is_on
        assert shown(r) == {"level": "debug", "usual": "error", "left_s": 300.0, "watches": []}
        r.pass_time(301.0)
        assert logs._sink.level == logs.ERROR and not r.runtime.story.is_on


def test_a_key_is_watched_by_id_or_name_and_a_stream_by_its_own(keys: str) -> None:
    with rig(keys_file=keys) as r:
        assert [put(r, "?for=5m&key=id0"), put(r, "?key=b", b"debug"), put(r, "?stream=room")] == [(204, "")] * 3
        assert shown(r)["watches"] == [
            {"key": "id0", "left_s": 300.0},
            {"key": "id2", "left_s": WATCH_S},
            {"stream": "room", "left_s": WATCH_S},
        ]
        assert put(r, "?key=id0&for=0s") == (204, "") and len(shown(r)["watches"]) == 2
        r.pass_time(WATCH_S + 1)
        assert shown(r)["watches"] == [] and not r.runtime.story.is_on


@pytest.mark.parametrize(
    ("query", "word", "status", "code"),
    [
        ("", b"", 400, "bad_log_level"),
        ("?for=5m", b"", 400, "bad_log_level"),
        ("?for=5m", b"loud", 400, "bad_log_level"),
        ("?key=id0", b"info", 400, "bad_log_level"),
        ("?for=forever", b"debug", 400, "bad_duration"),
        ("?for=-1s", b"debug", 400, "bad_duration"),
        (f"?for={FOR_S_MAX + 1}s", b"debug", 400, "bad_duration"),
        ("?key=nobody", b"", 404, "key_not_found"),
        ("?key=a", b"", 400, "bad_watch"),  # two keys have this name
        ("?key=id0&stream=room", b"", 400, "bad_watch"),
        (f"?stream={'x' * 300}", b"", 400, "bad_watch"),
    ],
)
def test_a_change_that_makes_no_sense_is_refused(keys: str, query: str, word: bytes, status: int, code: str) -> None:
    with rig(keys_file=keys) as r:
        level = logs._sink.level
        assert put(r, query, word) == (status, code)
        assert logs._sink.level == level and not r.runtime.story.is_on


def test_without_a_key_file_any_principal_is_watched() -> None:
    with rig() as r:
        assert put(r, "?key=h-abc") == (204, "") and put(r, f"?key={'x' * 300}") == (400, "bad_watch")
        assert r.runtime.story.is_on


def test_watches_are_bounded() -> None:
    with rig() as r:
        for k in range(WATCHES_MAX):
            assert put(r, f"?stream=s{k}") == (204, "")
        assert put(r, "?stream=more") == (409, "too_many_watches")
        assert put(r, "?stream=s1&for=10m") == (204, "") and put(r, "", b"info") == (204, "")
