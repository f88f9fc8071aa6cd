"""ClientPlace: the state of a client's connection, for another process.

The process that has the socket next makes a connection of it with continued(), and of its request an answer and an
intake. It takes places as a connection that another worker hands over does (no refusal), and is counted under its
client's address anew.

Some connections can't be told: under TLS, before a PROXY header has come, on a reserved place, with a large answer or
event on its way, waiting for work that can't be told, or while they are being closed. They stay where they are until
that is over.

Why functions that look into ClientConnection: it has as many methods as a class here may have, and none of them is
called while it serves.
"""

from __future__ import annotations

import asyncio
from typing import Final, NamedTuple

from streamd.core.ring import Ring
from streamd.core.stream import ReaderPlace, Stream, Subscriber, SubscriberState
from streamd.net.answer import Answer, AnswerState
from streamd.net.application import Application, BodySink, Plan
from streamd.net.client import EXPECTING, ClientConnection, ClientState
from streamd.net.frozen import NotNow
from streamd.net.gates import NOT_COUNTED
from streamd.net.intake import Intake
from streamd.net.origin import AWAITED, Entrance, Place, Remote
from streamd.net.reading import TURN
from streamd.net.request import Request
from streamd.wire.chunked import ChunkedDecoder, DecoderState, LengthDecoder, decoder_of
from streamd.wire.http1 import Framing, HeadReader, HeadState


class AnswerPlace(NamedTuple):
    """An answer without its request and the work that it waits for."""

    state: AnswerState
    framing: Framing
    body_bytes: int
    wrote_at: float
    reader: ReaderPlace | None


class IntakePlace(NamedTuple):
    """A request's body, as far as it has come. Bytes that are published as they come are the publication's."""

    decoder: DecoderState
    came_bytes: int
    thrown_bytes: int
    windows: int
    held: bytes | None


class ClientPlace(NamedTuple):
    """A connection from a client, without its request."""

    at: ClientState
    listener: str
    price_bytes: int
    is_tunnelled: bool
    remote: Remote | None  # from a PROXY header
    is_opening: bool  # it has not sent a complete request yet, and is counted so under its address
    due_at: float
    behind: bytes
    head: HeadState | None  # of a head that has begun
    answer: AnswerPlace | None
    intake: IntakePlace | None


TOLD: Final = (*EXPECTING, ClientState.BODY, ClientState.ANSWERING)


def check(client: ClientConnection) -> None:
    """Whether the connection can be frozen: raises NotNow, or ValueError for a connection that stays."""
    if client.at in (ClientState.LINGER, ClientState.CLOSING, ClientState.LOST):
        raise ValueError("the connection is over")
    transport, origin, answer = client.transport, client.origin, client.answer
    if transport.is_closing():
        raise NotNow("the connection is lost, and hears of it in this turn")
    if transport.get_extra_info("ssl_object") or origin._remote is AWAITED:
        raise ValueError("the connection has TLS, or waits for a PROXY header")
    if origin._place is not Place.REGULAR:
        raise ValueError("the connection has a reserved place")
    if client.pauses & TURN:
        raise NotNow("bytes of the client wait for a turn")
    if answer is None:
        return
    if answer._held is not None:
        raise NotNow("the writes of this turn leave at its end")
    if answer.state is AnswerState.WRITING or answer._large is not None:
        raise ValueError("a large answer, or a large event, is on its way")
    if answer.reader is not None and answer.reader.state is SubscriberState.ENDED:
        raise ValueError("the last bytes of an answer are on their way")
    if answer.reader is not None and answer.reader.state is SubscriberState.CATCHING:
        raise NotNow("the reader catches up")
    if client.at is ClientState.ANSWERING and answer._pending is None and answer.reader is None:
        raise ValueError("the answer waits for something that can't be told")


def place_of(client: ClientConnection) -> ClientPlace:
    """The state of this connection. Raises as check() does."""
    check(client)
    if client.transport.get_write_buffer_size():
        raise NotNow("bytes of an answer have not left yet")
    origin, answer, intake = client.origin, client.answer, client._intake
    return ClientPlace(
        client.at,
        origin.entrance.listener,
        origin.entrance.price_bytes,
        origin.entrance.is_tunnelled,
        origin._remote,
        origin._gate_keys[1] != NOT_COUNTED[1],
        client.due_at,
        client._behind,
        client._heads.state() if client._heads is not None else None,
        _answer_place(answer) if answer is not None else None,
        _intake_place(intake) if intake is not None else None,
    )


def _answer_place(answer: Answer) -> AnswerPlace:
    reader = answer.reader.place() if answer.reader is not None else None
    return AnswerPlace(answer.state, answer._framing, answer.body_bytes, answer.wrote_at, reader)


def _intake_place(intake: Intake) -> IntakePlace:
    decoder, held = intake._decoder, intake.held
    assert isinstance(decoder, ChunkedDecoder | LengthDecoder)
    own = bytes(held) if held is not None else None
    return IntakePlace(decoder.state(), intake._came_bytes, intake._thrown_bytes, intake._windows, own)


def continued(
    application: Application, entrance: Entrance, place: ClientPlace, transport: asyncio.Transport
) -> ClientConnection:
    """A connection on this transport, which has to be frozen; answer_of() follows where it has a request.

    It takes its place at admission, and is counted under its address, though there may be no room: it was let in
    before. The entrance is this process's, for the place's listener, price and tunnel. Raises ValueError for an
    impossible state, with nothing taken.
    """
    is_expecting = place.at in EXPECTING
    if place.at not in TOLD or (place.answer is None) is not is_expecting:
        raise ValueError("a connection that is over, or with an answer to no request")
    if (place.intake is None) is (place.at is ClientState.BODY) or (place.head is not None and not is_expecting):
        raise ValueError("a connection with parts of another state")
    runtime = entrance.runtime
    client = ClientConnection(application, entrance, remote=place.remote)
    if place.head is not None:
        client._heads = HeadReader(runtime.limits)
        client._heads.go_on_from(place.head)
    client.at, client.due_at, client._behind = place.at, place.due_at, place.behind
    client.transport = transport
    transport.set_write_buffer_limits(high=0)
    client.origin.adopt(transport, is_opening=place.is_opening)
    runtime.clients.add(client)
    runtime.sweep.add(client)
    client.due_at = place.due_at
    return client


def answer_of(client: ClientConnection, place: AnswerPlace, request: Request) -> Answer:
    """The answer to the request that this connection had. Raises ValueError for an impossible state."""
    if place.state in (AnswerState.WRITING, AnswerState.OVER) or (place.state is AnswerState.STREAMING) is (
        place.reader is None
    ):
        raise ValueError("an answer that is over, or a reader without a stream")
    answer = client.answer = Answer(client, client.origin, request)
    answer.state, answer._framing = place.state, place.framing
    answer.body_bytes, answer.wrote_at = place.body_bytes, place.wrote_at
    client.origin.adopt_request(request)
    return answer


def intake_of(client: ClientConnection, place: IntakePlace, plan: Plan | None, sink: BodySink | None) -> Intake:
    """The rest of the body that this connection had begun to read: by `plan`, or into `sink`.

    Raises ValueError for an impossible state, HttpError for a body that this process doesn't take.
    """
    answer = client.answer
    assert answer is not None and answer.request.head is not None
    head = answer.request.head
    intake = client._intake = Intake(client._runtime, head)
    intake._decoder = decoder_of(place.decoder)
    if intake._decoder.done:
        raise ValueError("a body behind its end")
    if plan is not None:
        intake.begin(plan, answer, head.content_length)
    else:
        intake._request, intake._sink = answer.request, sink
    intake.go_on_from(place.held, place.came_bytes, place.thrown_bytes, place.windows)
    return intake


def subscribe(answer: Answer, stream: Stream, place: ReaderPlace) -> Subscriber:
    """Make the answer a reader of the stream; go_on_from() follows when it may write."""
    runtime = answer._runtime
    ring = Ring(runtime.settings.ring_slots, runtime.settings.ring_bytes_max)
    reader = answer.reader = Subscriber(stream, answer, policy=place.policy, ring=ring, form=place.form)
    runtime.readers += 1
    stream.add_reader(reader)
    reader.check(place)
    return reader


def go_on(client: ClientConnection) -> None:
    """The connection is thawed: process what it has read before."""
    if client._behind and not client.paused and client.at in (*EXPECTING, ClientState.BODY):
        client.work_or_wait()


def leave(client: ClientConnection) -> None:
    """The connection goes on in another process: give back all that it holds here. Nobody hears of an end."""
    runtime, answer, intake = client._runtime, client.answer, client._intake
    if answer is not None:
        answer._pending = None
        reader, answer.reader = answer.reader, None
        if reader is not None:
            runtime.readers -= 1
            reader.end()
            reader.stream.leave(reader)
        answer.release_body()
        answer.state = AnswerState.OVER
        client.origin.leave_request(answer.request)
    if intake is not None:
        intake._sink = intake._decoder = intake.held = None
    client.answer = client._intake = client._heads = None
    client._behind, client.at = b"", ClientState.LOST
    runtime.clients.discard(client)
    runtime.sweep.discard(client)
    client.origin.leave()
