"""The attributes of a generation's span, by OpenTelemetry's conventions for generative AI (wire/gen_ai.py).

None of them holds a text of the request or the answer, a key, or the name of a client. A stream's id isn't there
either: knowing it is the right to read the stream.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from streamd.addresses import UpstreamOrigin
from streamd.core.stream import Stream
from streamd.net.request import Request
from streamd.net.trace import Trace
from streamd.reasons import CloseReason
from streamd.wire.answer_facts import AnswerFacts, facts_in
from streamd.wire.dialects.excerpt import excerpt
from streamd.wire.gen_ai import provider_of

Value = str | int | float | bool | tuple[str, ...]

# Events at a stream's end in which the ends of its choices are looked for: two choices, usage, [DONE]. Each is 5 us.
LAST_EVENTS: Final = 4

# Ends that a reader or an operator wanted, or a network caused: the generation was stopped, it didn't fail.
_NO_ERROR: Final = frozenset(
    (
        CloseReason.COMPLETE,
        CloseReason.READER_GONE,
        CloseReason.NETWORK_LOST,
        CloseReason.SLOW_CONSUMER,
        CloseReason.STALLED,
        CloseReason.TOKEN_EXPIRED,
        CloseReason.CANCELLED,
        CloseReason.ABANDONED,
    )
)


def attributes_of(trace: Trace, request: Request, origin: UpstreamOrigin | None, model: str) -> dict[str, Value]:
    """All that is known of a finished generation. `origin`: its last upstream's; `model`: as the log shows it."""
    made: dict[str, Value] = {"gen_ai.operation.name": trace.operation}
    if model:
        made["gen_ai.request.model"] = model
    made.update(_of_server(request, origin))
    stream = trace.stream
    usage: tuple[int, int] | None
    if stream is not None:
        facts, usage = facts_of(stream), stream.progress.usage
        made["gen_ai.request.stream"] = True
        if stream.first_event_at:
            made["gen_ai.response.time_to_first_chunk"] = max(0.0, stream.first_event_at - request.started_at)
    else:
        facts, usage = (trace.edges.facts, trace.edges.usage) if trace.edges is not None else (AnswerFacts(), None)
    made.update(_of_answer(facts, usage))
    if trace.status:
        made["http.response.status_code"] = trace.status
    if request.status:
        made["streamd.response.status_code"] = request.status
    if trace.reason is not None:
        made["streamd.reason"] = trace.reason.word
    error = error_of(trace, request)
    if error:
        made["error.type"] = error
    return made


def error_of(trace: Trace, request: Request) -> str:
    """The generation's failure: the word of its end, or the error status that an upstream answered with; "" if none."""
    if trace.reason is not None and trace.reason not in _NO_ERROR:
        return trace.reason.word
    return str(request.status) if request.status >= 400 else ""


def _of_server(request: Request, origin: UpstreamOrigin | None) -> Iterator[tuple[str, Value]]:
    if request.upstream:
        yield "streamd.upstream", request.upstream
    if origin is None:
        return
    yield "server.address", origin.socket or origin.host
    if not origin.socket:
        yield "server.port", origin.port
        provider = provider_of(origin.host)
        if provider:
            yield "gen_ai.provider.name", provider


def _of_answer(facts: AnswerFacts, usage: tuple[int, int] | None) -> Iterator[tuple[str, Value]]:
    if facts.id:
        yield "gen_ai.response.id", facts.id
    if facts.model:
        yield "gen_ai.response.model", facts.model
    if facts.finish_reasons:
        yield "gen_ai.response.finish_reasons", facts.finish_reasons
    if usage is not None and any(usage):
        yield "gen_ai.usage.input_tokens", usage[0]
        yield "gen_ai.usage.output_tokens", usage[1]


def facts_of(stream: Stream) -> AnswerFacts:
    """The facts that a stream states in its first event, if the log still has it, and in its last."""
    log = stream.log
    events: list[bytes] = []
    last = max(log.seq_first, log.seq_next - LAST_EVENTS)
    if log.seq_first == 1 < last:
        events.append(log.read(log.seek(1), bytes_max=1)[0][1])
    cursor = log.seek(last)
    while cursor.seq < log.seq_next:
        events += [event for _, event in log.read(cursor, bytes_max=1)]
    return facts_in(body for event in events if (body := excerpt(event).body) is not None)
