"""Lines of JSON become events as they come, however they are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_whole_events import WHOLE

from streamd.wire.dialect import Dialect
from streamd.wire.dialects.api import Progress
from streamd.wire.json_lines import FIRST_LINE_BYTES_MAX, JsonLines, begins_lines
from streamd.wire.sse import EventTooLarge

DELTA = {"choices": [{"index": 0, "delta": {"content": "a"}, "finish_reason": None}]}
FIRST: dict[str, dict[str, Any]] = {
    "chat": DELTA,
    "completions": {"choices": [{"index": 0, "text": "a", "finish_reason": None}]},
    "messages": {"type": "message_start", "message": {}},
    "responses": {"type": "response.created", "response": {"id": "r"}, "sequence_number": 0},
    "gemini": {"candidates": [{"content": {"parts": [{"text": "a"}]}}]},
}


class Strays:
    """Notes the lines that are shown to it."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []

    def take_strays(self, lines: bytes, before: list[bytes], *, dropped: bool) -> list[bytes]:
        self.lines.append(lines)
        return []


def pieces_of(word: str, data: bytes, size: int, strays: Strays | None = None, most: int = 10_000) -> list[bytes]:
    splitter = JsonLines(Dialect(word).api, event_bytes_max=most, strays=strays or Strays())
    out = []
    for at in range(0, len(data), size):
        out += splitter.feed(data[at : at + size])
        assert splitter.pending <= most and not splitter.at_rest
    return out + splitter.finish()


@pytest.mark.parametrize("word", FIRST)
def test_lines_are_known_by_a_first_line_that_is_an_event_and_no_end(word: str) -> None:
    api, line = Dialect(word).api, json.dumps(FIRST[word]).encode()
    for cut in range(len(line) + 1):
        assert begins_lines(api, line[:cut]) is None
    assert begins_lines(api, b"\xef\xbb\xbf\n " + line + b"\r\n") is True
    whole = json.dumps(WHOLE[word]).encode()
    assert begins_lines(api, whole + b"\n") is False
    assert begins_lines(api, json.dumps(WHOLE[word], indent=1).encode()) is False
    for other in (b'{"error": {"message": "no"}}', b'{"x": 1}', b"{", b"[1]", b'{"detail": "no"}'):
        assert begins_lines(api, other + b"\n") is False
    assert begins_lines(api, b'{"x": "' + b"y" * FIRST_LINE_BYTES_MAX) is False


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\n\n"])
@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize("word", FIRST)
def test_each_line_is_an_event_of_its_type(word: str, size: int, end: bytes) -> None:
    text = json.dumps(FIRST[word]).encode()
    kind = FIRST[word].get("type")
    event = (f"event: {kind}\n" if kind else "").encode() + b"data: " + text + b"\n\n"
    data = end.join([text, text, b"data: [DONE]", b"[DONE]", b": hm", text])
    done = b"data: [DONE]\n\n"
    assert pieces_of(word, data, size) == [event, event, done, done, b": hm\n", event]


@pytest.mark.parametrize("size", [1, 10_000])
def test_other_lines_are_shown_as_strays(size: int) -> None:
    strays = Strays()
    line = json.dumps(DELTA).encode()
    pieces_of("chat", line + b"\nerror: slow down\n<p>\n" + line, size, strays)
    assert strays.lines == [b"error: slow down\n", b"<p>\n"]


@pytest.mark.parametrize("size", [1, 64, 10_000])
@pytest.mark.parametrize("last", [b"\n", b""])
def test_a_line_has_the_bound_of_an_event(size: int, last: bytes) -> None:
    line = json.dumps(DELTA).encode()
    with pytest.raises(EventTooLarge) as caught:
        pieces_of("chat", line + b'\n{"x": "' + b"y" * 500 + b'"}' + last, size, most=400)
    assert caught.value.before in ([], [b"data: " + line + b"\n\n"])


def test_a_line_that_was_cut_is_shown_when_the_answer_breaks_off() -> None:
    strays = Strays()
    splitter = JsonLines(Dialect.CHAT.api, event_bytes_max=1000, strays=strays)
    splitter.feed(b'{"error": "no"}')
    assert splitter.give_up() == [] and strays.lines == [b'{"error": "no"}\n'] and splitter.pending == 0


def test_the_last_event_is_added_where_the_lines_are_complete() -> None:
    for reason, count in (("stop", 1), (None, 0)):
        progress = Progress(Dialect.CHAT.api)
        progress.see(b"data: " + json.dumps({"choices": [{"index": 0, "finish_reason": reason}]}).encode() + b"\n\n")
        splitter = JsonLines(Dialect.CHAT.api, event_bytes_max=1000, strays=Strays())
        assert splitter.closing(progress) == [b"data: [DONE]\n\n"] * count
    progress.end()
    assert splitter.closing(progress) == []


@given(st.lists(st.sampled_from([b"{}", b"\n", b"\r", b"data: ", b"x", b"[DONE]", b'{"a": 1}'])), st.integers(1, 9))
def test_any_cut_gives_the_same_events(parts: list[bytes], size: int) -> None:
    data = b"".join(parts)
    whole = pieces_of("chat", data, len(data) or 1)
    assert pieces_of("chat", data, size) == whole
    assert all(piece.endswith(b"\n") and not piece.startswith(b"\n") for piece in whole)
