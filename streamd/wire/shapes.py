"""Shapes of events: templates that all streams of an upstream and a model share, so that not each has to learn them.

Learning a template parses the event (wire/template.py), 50 us for each stream. But the streams of a model differ only
in the ids that stand in their events. So a shape is a template with holes at the ids as well. An event that fits a
shape gives a stream its own template, with its own ids in the fixed pieces, in 5 us; the other pieces are the shape's
own objects, which all its streams share. The result is always the template that learning would give, as a property
test shows. A log, and so its snapshot, holds whole templates and depends on no shape.

Bounds: SHAPES_MAX for an upstream and a model, SOURCES_MAX of these, those used last. Models are names that clients
choose, so a client can push others' shapes out; then they are learnt again.
"""

from __future__ import annotations

import re
from typing import Final

from streamd.wire.template import (
    AGAIN,
    CREATED,
    PLAIN,
    TEMPLATE_BYTES_MAX,
    TEXT,
    VARIED_BYTES_MAX,
    Fill,
    Template,
    has_many_brackets,
    hole_end,
    is_string_inside,
    learn,
)

# An answer has a template for each part: choices, reasoning, text, calls of tools. Most answers have one to three.
SHAPES_MAX: Final = 8
# With the largest templates 64 x 8 x 2.7 KiB, 1.4 MiB; with ordinary templates of 700 B 100 KiB.
SOURCES_MAX: Final = 64

# The ids in the events of the APIs: chat completions and completions, Responses, Gemini.
_OWN_KEY: Final = re.compile(rb'"(?:id|item_id|responseId)"\s*:\s*"(?=[0-9A-Za-z_.:\-]{1,128}")')
_own = re.compile(rb"[0-9A-Za-z_.:\-]{1,128}").match

_OWN: Final = ord("O")  # the kind of hole that only a shape has
_PLAIN: Final = bytes((TEXT, CREATED, _OWN))


Learnt = tuple[Template, Fill]
"""A template, and what the event that it was made of has in the holes."""


def learnt_alone(event: bytes) -> Learnt | None:
    """What an event teaches that fits no known shape; None if it is no text delta."""
    template = learn(event)
    fill = template.match(event) if template is not None else None
    return (template, fill) if template is not None and fill is not None else None


class Shape:
    """A template with holes at the ids, which differ from stream to stream."""

    __slots__ = ("_fixed", "_holes", "_is_plain", "_template")

    def __init__(self, template: Template) -> None:
        self._template = template
        fixed: list[bytes] = []
        holes = bytearray()
        for piece, hole in zip(template.fixed, (*template.holes, 0), strict=True):
            at = 0
            for key in _OWN_KEY.finditer(piece):
                fixed.append(piece[at : key.end()])
                holes.append(_OWN)
                value = _own(piece, key.end())
                assert value is not None
                at = value.end()
            fixed.append(piece[at:] if at else piece)
            holes.append(hole)
        self._fixed = tuple(fixed)
        self._holes = bytes(holes[:-1])
        self._is_plain = not self._holes.translate(None, _PLAIN)  # what is in its holes is found on the way

    def template_of(self, event: bytes) -> Learnt | None:
        """The template that learn() makes of the event if it has this shape, else None."""
        fixed: list[bytes] = []
        at, text, own, created = 0, b"", b"", b""
        for piece, hole in zip(self._fixed, self._holes, strict=False):
            if not event.startswith(piece, at):
                return None
            at += len(piece)
            if hole == _OWN:
                value = _own(event, at)
                if value is None:
                    return None
                own += piece + value[0]
                at = value.end()
                continue
            if hole == TEXT:
                end = event.find(b'"', at)
                text = event[at:end]
                if end < 0 or text.translate(PLAIN) is not text:
                    end = hole_end(hole, event, at, b"")
                    text = event[at:end]
            else:
                end = hole_end(hole, event, at, text)
            if end < 0:
                return None
            if hole == CREATED:
                created = event[at:end]
            fixed.append(own + piece if own else piece)
            own, at = b"", end
        last = self._fixed[-1]
        if not text or event[at:] != last or has_many_brackets(event):
            return None
        fixed.append(own + last if own else last)
        texts = len(text) * (1 + self._holes.count(AGAIN))
        if len(event) - texts > VARIED_BYTES_MAX or sum(map(len, fixed)) > TEMPLATE_BYTES_MAX:
            return None
        like = self._template
        made = Template(tuple(fixed), like.holes, like.merges)
        if self._is_plain:
            return (made, Fill(created, -1, text, b"")) if is_string_inside(text) else None
        fill = made.match(event)
        return (made, fill) if fill is not None else None


class Shapes:
    """The shapes of an upstream and a model; the shape that came last is tried first."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: list[Shape] = []

    def learn(self, event: bytes) -> Learnt | None:
        """The same as template.learn(): a template made of an event, None if it is no text delta of a known shape."""
        for shape in self._known:
            learnt = shape.template_of(event)
            if learnt is not None:
                return learnt
        learnt = learnt_alone(event)
        if learnt is not None and not learnt[0].varied:  # their holes depend on the text
            self._known.insert(0, Shape(learnt[0]))
            del self._known[SHAPES_MAX:]
        return learnt

    def __len__(self) -> int:
        return len(self._known)


class KnownShapes:
    """The shapes of all upstreams and models, those used last."""

    __slots__ = ("_by_source",)

    def __init__(self) -> None:
        self._by_source: dict[tuple[str, str], Shapes] = {}  # the source used last comes last

    def of(self, upstream: str, model: str) -> Shapes:
        """The shapes of an upstream and a model, by their names."""
        by_source, source = self._by_source, (upstream, model)
        shapes = by_source.pop(source, None)
        if shapes is None:
            shapes = Shapes()
            if len(by_source) >= SOURCES_MAX:
                del by_source[next(iter(by_source))]
        by_source[source] = shapes
        return shapes

    def __len__(self) -> int:
        return len(self._by_source)
