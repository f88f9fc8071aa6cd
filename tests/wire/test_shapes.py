"""Shapes: a stream gets from them exactly the template that learning would give it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_template import DELTAS, OTHERS, wire

from streamd.core.replay import ReplayLog
from streamd.wire import shapes as shapes_module
from streamd.wire.shapes import SHAPES_MAX, SOURCES_MAX, KnownShapes, Learnt, Shapes
from streamd.wire.template import TEMPLATE_BYTES_MAX, Template, learn

EVENTS = [
    wire(parsed, name=name, spaced=spaced)
    for parsed in (*DELTAS.values(), *OTHERS.values())
    for name in ("", "some")
    for spaced in (False, True)
]
ID = re.compile(rb'("(?:id|item_id|responseId)"\s*:\s*)"[^"]*"')


def parts(learnt: Template | Learnt | None) -> tuple[tuple[bytes, ...], bytes, bool] | None:
    """What a template consists of; one that comes with the content of its holes has the event's."""
    template = learnt[0] if isinstance(learnt, tuple) else learnt
    return (template.fixed, template.holes, template.merges) if template is not None else None


def of_another_stream(event: bytes, own: str) -> bytes:
    """The same event with other ids."""
    return ID.sub(lambda found: found[1] + json.dumps(own).encode(), event)


class Counted:
    """Counts the events that had to be parsed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parsed = 0

        def counted(event: bytes) -> Template | None:
            self.parsed += 1
            return learn(event)

        monkeypatch.setattr(shapes_module, "learn", counted)


@pytest.mark.parametrize("parsed", DELTAS.values(), ids=DELTAS)
def test_the_next_stream_of_a_model_parses_nothing(parsed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    counted, shapes = Counted(monkeypatch), Shapes()
    first = wire(parsed)
    assert parts(shapes.learn(first)) == parts(learn(first)) is not None
    for own in ("chatcmpl-8f2c1e7a9b", "msg_0", "a.b:c"):
        event = of_another_stream(first, own).replace(b"TEXT", b'some \\"other\\" text')
        learnt = shapes.learn(event)
        assert parts(learnt) == parts(learn(event))
        assert learnt is None or learnt[1] == learnt[0].match(event)
    template = learn(first)
    assert counted.parsed == (1 if template is not None and not template.varied else 4)


@given(
    st.sampled_from(EVENTS),
    st.sampled_from(EVENTS),
    st.text(max_size=12),
    st.lists(
        st.tuples(st.integers(0, 400), st.integers(0, 6), st.sampled_from([b"", b'"', b"\\", b"1", b"}", b"[", b"\n"]))
    ),
)
@settings(max_examples=1000, deadline=None)
def test_what_is_learnt_depends_on_no_other_stream(
    known: bytes, event: bytes, own: str, edits: list[tuple[int, int, bytes]]
) -> None:
    shapes = Shapes()
    shapes.learn(known)
    shapes.learn(event)
    event = of_another_stream(event, own)
    for at, removed, inserted in edits[:2]:
        event = event[:at] + inserted + event[at + removed :]
    assert parts(shapes.learn(event)) == parts(learn(event))


@pytest.mark.parametrize(
    "change",
    [
        lambda event: event.replace(b"TEXT", b""),
        lambda event: event.replace(b"TEXT", b"[" * 250),
        lambda event: event.replace(b'"chatcmpl-1"', b'"%b"' % (b"x" * 129)),
        lambda event: event.replace(b'"chatcmpl-1"', b'"a b"'),
        lambda event: event.replace(b'"chatcmpl-1"', b"null"),
        lambda event: event.replace(b'"chatcmpl-1"', b'"a\\"b"'),
        lambda event: event.replace(b'"finish_reason":null', b'"finish_reason":"stop"'),
        lambda event: event[:-1],
        lambda event: event + event,
    ],
)
def test_an_event_that_is_only_like_the_others_is_learnt_by_itself(change: Any) -> None:
    shapes, first = Shapes(), wire(DELTAS["vllm"])
    shapes.learn(first)
    event = change(first)
    assert event != first
    assert parts(shapes.learn(event)) == parts(learn(event))


def test_a_larger_event_of_a_known_shape_is_not_learnt() -> None:
    shapes, least = Shapes(), learn(wire(DELTAS["vllm"] | {"model": ""}))
    assert least is not None
    room = TEMPLATE_BYTES_MAX - sum(map(len, least.fixed))
    near = wire(DELTAS["vllm"] | {"model": "m" * (room - 20)})
    assert shapes.learn(near) is not None
    longest = len("chatcmpl-1") + 20
    for length in (longest, longest + 1):
        event = of_another_stream(near, "x" * length)
        assert parts(shapes.learn(event)) == parts(learn(event))
        assert (learn(event) is None) == (length > longest)


def test_streams_share_the_pieces_without_ids() -> None:
    shapes, event = Shapes(), wire(DELTAS["vllm"])
    shapes.learn(event)
    one, other = (shapes.learn(of_another_stream(event, own)) for own in ("a", "b"))
    assert one is not None and other is not None
    assert one[0].fixed[-1] is other[0].fixed[-1] and one[0].holes is other[0].holes
    assert b'"a"' in one[0].fixed[0] and b'"b"' in other[0].fixed[0]


def test_a_log_is_the_same_with_shapes_and_without() -> None:
    known = KnownShapes()
    for number in range(3):
        alone, sharing = (ReplayLog(bytes_max=1 << 20, events_max=1 << 20) for _ in range(2))
        sharing.shapes = known.of("gpu1", "m")
        for event in EVENTS:
            event = of_another_stream(event, f"chatcmpl-{number}")
            assert alone.append(event) == sharing.append(event)
        assert alone.parts() == sharing.parts() and alone.bytes_held == sharing.bytes_held


def test_shapes_are_bounded_and_those_used_last_stay() -> None:
    known = KnownShapes()
    first = known.of("gpu1", "0")
    for number in range(SOURCES_MAX * 2):
        assert known.of("gpu1", "0") is first
        known.of("gpu1", str(number))
    assert len(known) == SOURCES_MAX
    assert known.of("gpu2", "0") is not first
    for number in range(SHAPES_MAX * 2):
        first.learn(wire(DELTAS["vllm"] | {"model": f"m{number}"}))
    assert len(first) == SHAPES_MAX
