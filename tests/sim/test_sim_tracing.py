"""A simulated run in which every generation is traced: each gets exactly one span, and nothing is kept behind it."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from sim_world import World

from streamd.net.request import Request
from streamd.net.tracing import Tracing
from streamd.otel.spans import SpanWriter
from streamd.reasons import CloseReason

STEPS = 4_000
REASONS = {reason.word for reason in CloseReason}


class Kept(SpanProcessor):
    """Counts the spans by their ids, and the events and ends that they tell."""

    def __init__(self) -> None:
        self.written: Counter[int] = Counter()
        self.told: Counter[str] = Counter()

    def on_end(self, span: ReadableSpan) -> None:
        facts: dict[str, Any] = dict(span.attributes or {})
        assert span.context is not None and span.start_time is not None and span.end_time is not None
        assert span.start_time <= span.end_time
        assert all(span.start_time <= event.timestamp for event in span.events)
        assert facts["streamd.reason"] in REASONS
        self.written[span.context.span_id] += 1
        self.told.update(event.name for event in span.events)
        self.told[facts["streamd.reason"]] += 1


class Begun(Tracing):
    """Remembers the ids of all that it has begun to trace."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.ids: list[int] = []

    def begin(self, request: Request) -> None:
        super().begin(request)
        if request.trace is not None:
            self.ids.append(request.trace.own.span_id)


@pytest.mark.parametrize("seed", [2, 7])
def test_each_generation_has_exactly_one_span(seed: int) -> None:
    world, kept = World(seed), Kept()
    writer = SpanWriter(
        Resource({}), kept, origin_of=lambda name: None, unix_s=lambda at: 1.7e9 + at, shown=lambda text: text
    )
    tracing = Begun(ratio=1.0, time=world.loop.time, rng=random.Random(seed), write=writer.write)
    world.worker.runtime.tracing = tracing
    world.play(STEPS)
    assert kept.written == Counter(tracing.ids) and len(tracing.ids) > 50
    assert tracing._live == {}
    assert {"detach", "resume", "complete"} <= set(kept.told), kept.told
