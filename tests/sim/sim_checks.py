"""Invariants of the code under test: of a single connection or stream (cheap), and of all objects together."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from sim_loop import must
from sim_reader import Reader

from streamd.api.publish import Publishing
from streamd.core.admission import SharedNumber
from streamd.core.stream import EVENTS_ONLY, Stream, SubscriberState
from streamd.core.write_interval import INTERVAL_S_MAX
from streamd.net.answer import AnswerState
from streamd.net.client import EXPECTING, ClientConnection, ClientState
from streamd.net.exchange import Exchange, ExchangeState
from streamd.net.fetch import Fetch
from streamd.net.pacing import TICK_S
from streamd.net.reading import PACE, TURN
from streamd.net.runtime import Runtime
from streamd.net.sweep import NEVER
from streamd.net.upstream import UpstreamConnection, UpstreamState

if TYPE_CHECKING:
    from sim_transport import Transport
    from sim_world import World

WRITABLE = (SubscriberState.LIVE, SubscriberState.CATCHING, SubscriberState.FOLLOWING)


def check_touched(world: World, transport: Transport) -> None:
    """The invariants of the touched objects, checked whenever the code under test has returned."""
    protocol = transport.protocol
    if type(protocol) is ClientConnection:
        if not _is_live(protocol, transport):
            check_client(world, protocol, transport)
    elif type(protocol) is UpstreamConnection and (protocol.at is not UpstreamState.EVENTS or protocol._asker is None):
        check_link(protocol, transport)


def _is_live(client: ClientConnection, transport: Transport) -> bool:
    """A short form of check_client() for the most frequent case by far: a reader to which everything was written."""
    reader = client.reader
    if reader is None or reader.state is not SubscriberState.LIVE or reader.sink is not client.answer:
        return False
    if client.paused or transport.told_paused or transport.buffer or reader.ring.held or reader.ring.bytes_held:
        return False
    stream = reader.stream
    return stream.readers[reader.index] is reader and reader.position <= stream.log.seq_next


def check_client(world: World, client: ClientConnection, transport: Transport) -> None:
    at = client.at
    must(
        client.paused == transport.told_paused,
        "connection and transport disagree about the pause",
        client.paused,
        transport.told_paused,
    )
    buffered = len(transport.buffer)
    must(transport.aborted or bool(buffered) == client.paused, "the buffer and the pause disagree", buffered, at)
    must(buffered <= world.buffer_bytes_max, "more is buffered than a reader may cost", buffered, at)
    check_reading(client, transport)
    if client._behind and (at in EXPECTING or at is ClientState.BODY) and not client.paused:
        must(client.pauses & TURN, "bytes wait, but for no turn", at, len(client._behind))
    if at is ClientState.CLOSING:
        must(transport.aborted or client.due_at < NEVER, "closing without a deadline")
    reader = client.reader
    streaming = client.answer is not None and client.answer.state is AnswerState.STREAMING
    must(
        (reader is not None) == streaming,
        "a subscriber outside of STREAMING, or STREAMING without a subscriber",
        at,
        reader,
    )
    if reader is None or ((transport.aborted or transport.gone) and reader.state is SubscriberState.ENDED):
        return
    must(reader.sink is client.answer, "a subscriber of another answer", reader.state)
    if reader.state is SubscriberState.ENDED:  # all is written, and the client has still to take the end
        must(client.paused and reader.stream.reason is not None, "the subscriber's state", reader.state)
        return
    must(
        (reader.state in WRITABLE) == (not client.paused),
        "the subscriber writes during a pause, or waits without a pause",
        reader.state,
    )
    check_subscriber(world, reader)


def check_reading(connection: ClientConnection | UpstreamConnection, transport: Transport) -> None:
    """A socket is silent exactly while there is a reason."""
    if not (transport.closing or transport.gone or transport.lost or transport.eof_received):
        must(transport.reading == (not connection.pauses), "reading and its reasons disagree", connection.pauses)


def check_subscriber(world: World, reader: Any) -> None:
    stream, ring, state = reader.stream, reader.ring, reader.state
    must(0 <= reader.index < len(stream.readers), "index", reader.index)
    must(stream.readers[reader.index] is reader, "the reader isn't at its index", reader.index)
    must(reader.position <= stream.log.seq_next, "a position beyond the end", reader.position)
    if state is SubscriberState.PAUSED:
        must(ring.held <= ring.slots, "ring slots", ring.held)
        must(ring.bytes_held <= ring.bytes_max or ring.held == 1, "ring bytes", ring.bytes_held)
        if stream.direct:
            must(reader.position + ring.held == stream.log.seq_next, "frames missing in the ring", ring.held)
    else:
        must(not ring.held and not ring.bytes_held, "a ring holds frames without a pause", state, ring.held)


def check_stream(world: World, stream: Stream, waited_for: Counter[int]) -> None:
    """waited_for: id(stream) of streams that their first reader still waits for."""
    log = stream.log
    must(1 <= log.seq_first <= log.seq_next, "seqs of the log", log.seq_first, log.seq_next)
    # Both caps are checked when a segment is sealed: the log may exceed them by a segment and an event, and by the aims
    # of AIMS_MAX templates, which come between two seals.
    must(
        log.bytes_held <= log.bytes_max + 4096 + world.event_bytes_max,
        "log bytes",
        log.bytes_held,
        log.bytes_max,
    )
    for k, reader in enumerate(stream.readers):
        must(reader.index == k and reader.stream is stream, "a reader's index", k, reader.index)
    if stream.reason is not None:
        must(stream.source is None, "sealed, with a source", stream.id)
        must(not stream.grace_until, "sealed and detached")
        for reader in stream.readers:
            must(
                reader.state not in (SubscriberState.LIVE, SubscriberState.FOLLOWING) or not stream.direct,
                "sealed with a live reader",
                reader.state,
            )
        return
    if stream.source is None:
        # Hub._stop() frees the GPU at once and seals in a later turn; its callback stands in front of this call.
        world.loop.call_soon(check_sealed, stream)
        return
    if stream.grace_until:
        must(not stream.readers, "detached with a reader")
        must(world.loop.time() <= stream.grace_until + world.slack_s, "a grace that doesn't end")
    elif not stream.readers and not stream.terms.published:
        must(waited_for[id(stream)], "a generation without a reader is neither awaited nor detached", stream.id)


def check_sealed(stream: Stream) -> None:
    """The source of this stream was stopped a turn ago."""
    must(stream.reason is not None, "a stream is not sealed and has no source", stream.id)


def check_link(link: UpstreamConnection, transport: Transport) -> None:
    if transport.closing:
        # IDLE: its connecting was cancelled, so it never had a request.
        must(
            link.at in (UpstreamState.CLOSED, UpstreamState.IDLE) or not transport.aborted,
            "aborted but not closed",
            link.at,
        )
        return
    check_reading(link, transport)
    if link._read is not None and link.at is not UpstreamState.EVENTS:
        must(link.pauses, "an upstream's bytes wait, but for no turn", link.at, len(link._read))
    if link.at is UpstreamState.IDLE:
        must(link._asker is None and link.stream is None, "idle with a request")
    elif link.at is not UpstreamState.CLOSED:
        must(link._asker is not None, "a busy connection without a request", link.at)


def check_all(world: World) -> None:
    """All objects, checked against each other."""
    runtime, hub = world.worker.runtime, world.worker.runtime.hub
    streams = list(hub)
    members = list(runtime.sweep._members)
    for reader in list(world.readers):
        transport = reader.transport
        if transport is not None and isinstance(transport.protocol, ClientConnection):
            check_client(world, transport.protocol, transport)
            check_position(reader, transport.protocol)
    clients = [transport.protocol for transport in world.open_clients()]
    must(set(runtime.clients) == set(clients), "clients", len(runtime.clients), len(clients))
    exchanges = [member for member in members if isinstance(member, Exchange)]
    check_members(clients, exchanges, members)
    waited_for: Counter[int] = Counter(
        id(exchange.stream) for exchange in exchanges if exchange.answer is not None and exchange.stream is not None
    )
    for stream in streams:
        check_stream(world, stream, waited_for)
    check_hub(hub, streams)
    check_upstreams(world, clients, exchanges)
    charges = [exchange._body_charge for exchange in exchanges if exchange._body_charge is not None]
    charges += [publishing._charge for publishing in _publishings(runtime, clients)]
    bodies = sum(len(_intake(client)) for client in clients) + sum(charge.held_bytes for charge in charges)
    must(runtime.bodies_bytes == bodies, "bodies_bytes", runtime.bodies_bytes, bodies)
    readers = sum(len(stream.readers) for stream in streams)
    must(readers == sum(1 for client in clients if client.reader is not None), "readers", readers)
    check_deadlines(world, clients)
    check_times(world, clients)
    check_progress(world, streams)
    live = sum(1 for stream in streams if stream.terms.published and stream.reason is None)
    check_admission(world, clients, exchanges, live)
    check_totals(world, streams)


def _intake(client: ClientConnection) -> bytes:
    """The bytes received of an incomplete body."""
    return bytes((client._intake.held if client._intake is not None else None) or b"")


def _publishings(runtime: Runtime, clients: list[ClientConnection]) -> set[Publishing]:
    """The requests that publish: each holds a whole body, which it goes on appending when its client has left, or half
    an event.
    """
    sinks = [client._intake._sink for client in clients if client._intake is not None]
    appending = [member for members in runtime.turns._rotation._members.values() for member in members]
    return {each for each in (*sinks, *appending) if isinstance(each, Publishing)}


def check_position(reader: Reader, client: ClientConnection) -> None:
    """A reader that has received all written bytes is at the position that the code under test has for it."""
    answer = reader.catch_up()
    subscriber = client.reader
    transport = reader.transport
    if subscriber is None or answer is None or transport is None or not answer.streaming:
        return
    is_held = client.answer is not None and client.answer._held is not None  # until this turn's end
    if is_held or transport.buffer or transport.kernel or transport.aborted:  # an abort throws written bytes away
        return
    if subscriber.stream is not answer.stream or reader.waits:
        return
    must(answer.position == subscriber.position, "position", answer.position, subscriber.position, subscriber.state)


def check_members(clients: list[ClientConnection], exchanges: list[Exchange], members: list[Any]) -> None:
    must(set(clients) <= set(members), "a connection is not in the sweep")
    for exchange in exchanges:
        must(exchange.state is not ExchangeState.OVER, "an exchange that is over is still swept")
    for member in members:
        must(
            not isinstance(member, ClientConnection) or member.at is not ClientState.LOST, "a lost connection is swept"
        )


def check_hub(hub: Any, streams: list[Stream]) -> None:
    for stream in streams:
        must(stream.ledger.charged_bytes <= stream.log.bytes_held + (1 << 30), "charge")
    charged = sum(stream.ledger.charged_bytes for stream in streams)
    must(hub.log_bytes == charged, "log_bytes", hub.log_bytes, charged)
    detached = sum(1 for stream in streams if stream.grace_until)
    must(hub.detached == detached <= max(hub.detached_max, 0), "detached", hub.detached, detached)
    known = {id(stream) for stream in streams}
    for kept in hub._by_key.values():
        must(kept.stream is None or id(kept.stream) in known, "a key of a stream that is gone")
    for stream in hub._by_response.values():
        must(id(stream) in known, "a response id of a stream that is gone")


def fetches_of(world: World) -> list[Fetch]:
    """The questions for lists of models that are at an upstream."""
    questions = world.worker.router._models._questions._under_way.values()
    return [question.fetch for question in questions if question.fetch is not None]


def check_upstreams(world: World, clients: list[ClientConnection], exchanges: list[Exchange]) -> None:
    """Requests in flight and connections, from both sides."""
    fetches = fetches_of(world)
    waiting = [client.answer._pending for client in clients if client.answer is not None]
    for question in world.worker.router._models._questions._under_way.values():
        must(bool(question.listeners), "a question that nobody waits for", question.key)
        must(all(listener in waiting for listener in question.listeners), "a question's asker has gone", question.key)
    askers = {id(asker) for asker in (*exchanges, *fetches)}
    for upstream in world.worker.upstreams:
        name = upstream.settings.name
        attempts = [asker._attempt for asker in (*exchanges, *fetches)]
        expected = sum(1 for attempt in attempts if attempt is not None and attempt.upstream is upstream)
        must(upstream.in_flight == expected, "in_flight", name, upstream.in_flight, expected)
        must(len(upstream._idle) <= world.settings.pool_idle_max, "pooled connections", len(upstream._idle))
        pooled = {id(link) for link in upstream._idle}
        must(len(pooled) == len(upstream._idle), "pooled twice", name)
        for link in upstream._idle:
            idle_s = world.loop.time() - link.idle_since
            must(idle_s <= world.settings.pool_idle_timeout_s + world.slack_s, "pooled for too long", idle_s)
        for server_link in world.servers[name].links:
            transport = server_link.transport
            if transport is None or transport.closing or transport.gone or server_link.connecting:
                continue
            link = transport.protocol
            if link.at is UpstreamState.IDLE:
                must(id(link) in pooled or server_link.fresh, "an idle connection is in no pool", name)
            else:
                must(id(link._asker) in askers, "a connection whose asker is over", link.at)


def check_deadlines(world: World, clients: list[ClientConnection]) -> None:
    """No connection is kept for ever: each that is not running has a deadline, and the deadline isn't long past."""
    now = world.loop.time()
    for client in clients:
        if client.transport.closing and client.transport.aborted:
            continue
        at, answer = client.at, client.answer
        held = client._intake is not None and client._intake.held is not None
        closing = at in (ClientState.LINGER, ClientState.CLOSING)
        if at in EXPECTING or closing or (at is ClientState.BODY and held):
            must(client.due_at < NEVER, "no deadline", client.at)
        if client.paused and answer is not None and not answer.is_open and world.settings.stall_timeout_s:
            latest = max(client.stall.progress_at, now) + world.settings.stall_timeout_s + world.slack_s
            must(client.due_at <= latest, "a paused connection is not checked in time", client.due_at - now)
        if client.due_at < NEVER:
            late_s = now - client.due_at
            if answer is not None and client.due_at == answer.request.expires_at:
                # A right to read may have ended before the answer began; its end concerns only streams.
                late_s = now - max(client.due_at, answer.wrote_at) if client.reader is not None else 0.0
            must(late_s <= world.slack_s, "overdue", client.at, late_s)


def check_times(world: World, clients: list[ClientConnection]) -> None:
    """The limits on time, by the network's own clock: the times that the code under test keeps prove nothing."""
    now, slack_s = world.loop.time(), world.slack_s
    for client in clients:
        if not client.transport.aborted and not client.transport.gone:
            _check_client_times(world, client, client.transport, now, slack_s)
    for server in world.servers.values():
        for link in server.links:
            if link.transport is not None and not link.transport.closing and not link.transport.gone:
                _check_link_times(world, link, now, slack_s)


def _check_client_times(world: World, client: ClientConnection, transport: Any, now: float, slack_s: float) -> None:
    settings, answer, reader = world.settings, client.answer, client.reader
    if transport.told_paused and settings.stall_timeout_s:
        # It is checked four times within the limit, and a closing connection has a little longer.
        limit_s = settings.stall_timeout_s * 1.25 + settings.close_timeout_s * 2
        limit_s += world.stood_still_s(transport.taken_at)  # a check and the close may both be late
        must(
            now - transport.taken_at <= limit_s + slack_s, "a stalled reader stays", client.at, now - transport.taken_at
        )
    if transport.closing and not transport.told_paused:
        must(now - transport.closed_at <= settings.close_timeout_s + slack_s, "closing takes too long", client.at)
    if answer is None and client.at in EXPECTING:
        moved_at = max(transport.written_at, transport.taken_at)  # an answer is complete when the client has taken it
        idle_since = max(transport.opened_at, moved_at, transport.peer.errand.asked_at)
        # Two limits in a row, and the process may have stood still before each of them.
        limit_s = settings.keepalive_timeout_s + settings.head_timeout_s + world.stood_still_s(idle_since)
        must(now - idle_since <= limit_s + slack_s, "an idle connection stays", now - idle_since)
    if reader is None or answer is None:
        return
    expires_at = answer.request.expires_at
    if expires_at:
        must(now - max(expires_at, answer.wrote_at) <= slack_s, "a reader stays beyond its right", now - expires_at)
    is_due = reader.state in (SubscriberState.LIVE, SubscriberState.FOLLOWING) and reader.form not in EVENTS_ONLY
    if settings.heartbeat_s and is_due and reader.stream.reason is None:
        silent_s = now - max(transport.written_at, transport.taken_at)
        must(silent_s <= settings.heartbeat_s + slack_s, "a silent stream without a heartbeat", silent_s)


def _check_link_times(world: World, link: Any, now: float, slack_s: float) -> None:
    connection = link.transport.protocol
    if connection.pauses & PACE and not link.transport.closing:
        due = world.worker.runtime.pacing._due
        until_s = [tick * TICK_S for (tick, _), resting in due.items() if connection in resting]
        awake = connection in world.worker.runtime.pacing._awake
        must(len(until_s) + awake == 1, "an upstream rests without an end", len(until_s))
        ends_at = until_s[0] if until_s else now
        must(now - slack_s <= ends_at <= now + INTERVAL_S_MAX, "an upstream rests for too long", ends_at - now)
    settings, script = world.settings, link.script
    if not link.busy or not link.transport.reading:
        return
    if settings.stream_timeout_s:
        must(now - link.asked_at <= settings.stream_timeout_s + slack_s, "a generation beyond stream_timeout")
    if script is None or script.events:
        # While it wasn't read, nobody could tell whether it was silent.
        silent_s = now - max(link.read_at, link.asked_at, link.transport.resumed_at)
        limit_s = max(settings.idle_timeout_s, settings.ttft_timeout_s)
        must(silent_s <= limit_s + slack_s, "a silent upstream keeps its place", silent_s)
    else:  # comments put off ttft_timeout
        must(
            now - link.asked_at <= settings.queue_timeout_s + slack_s,
            "an answer without events has no end",
            now - link.asked_at,
        )


def check_progress(world: World, streams: list[Stream]) -> None:
    """Each reader that can be written to has all events: no event waits for a later event that may never come."""
    now = world.loop.time()
    for stream in streams:
        changed_at = max(stream.touched_at, stream.sealed_at)
        if now - changed_at <= world.slack_s:
            continue
        for reader in stream.readers:
            if now - reader.sink._carrier.transport.written_at <= world.slack_s:
                continue  # it has just joined, or is catching up
            must(
                reader.state is not SubscriberState.CATCHING,
                "a reader that doesn't catch up",
                stream.id,
                reader.position,
            )
            if reader.state in (SubscriberState.LIVE, SubscriberState.FOLLOWING):
                must(
                    reader.at_end,
                    "a reader waits for events that the log has",
                    stream.id,
                    reader.position,
                    stream.log.seq_next,
                )
                must(stream.reason is None, "a reader isn't told of the end", stream.id)
        if stream.reason is not None and not stream.readers:
            kept_s = now - max(stream.sealed_at + stream.terms.retention_s, world.left_at(stream))
            must(kept_s <= world.slack_s, "a stream is kept beyond its retention", stream.id, kept_s)


def check_admission(world: World, clients: list[ClientConnection], exchanges: list[Exchange], live: int) -> None:
    """The accounts of admission, counted again."""
    row = world.worker.runtime.admission._row
    admitted = sum(1 for client in clients if client.origin.refusal is None)
    must(row[SharedNumber.CONNECTIONS] == admitted, "connections admitted", row[SharedNumber.CONNECTIONS], admitted)
    asked = len(exchanges) + len(fetches_of(world))
    must(row[SharedNumber.UPSTREAM] == asked, "requests for upstreams", row[SharedNumber.UPSTREAM], asked)
    published = row[SharedNumber.STREAMS] - row[SharedNumber.UPSTREAM]
    must(published == live, "published streams", published, live)


def check_totals(world: World, streams: list[Stream]) -> None:
    """The counters' sums are those of all present and removed streams."""
    hub, gone = world.worker.runtime.hub, world.removed_totals
    for stream in streams:
        hub.charge(stream)
    must(hub.events_total == gone["events"] + sum(stream.events for stream in streams), "events", hub.events_total)
    frames = gone["event_bytes"] + sum(stream.frame_bytes for stream in streams)
    must(hub.event_bytes_total == frames, "bytes of events", hub.event_bytes_total, frames)
    texts = gone["text_events"] + sum(stream.text_events for stream in streams)
    must(hub.text_events_total == texts, "events with text", hub.text_events_total, texts)


def check_stopped(world: World) -> None:
    """The drain has ended: no connection is left, on either side, and every stream has its end."""
    runtime, hub = world.worker.runtime, world.worker.runtime.hub
    must(world.worker.drained.done(), "the drain doesn't end")
    must(not runtime.clients, "clients left", len(runtime.clients))
    must(all(stream.terms.published or stream.reason is not None for stream in hub), "streams without an end")
    must(not hub.detached and not runtime.bodies_bytes, "accounts", hub.detached, runtime.bodies_bytes)
    must(not any(upstream.in_flight or upstream._idle for upstream in world.worker.upstreams), "upstreams in use")
    must(not any(server.links for server in world.servers.values()), "connections left")
    must(runtime.counters.bugs == 0, "bugs", runtime.counters.bugs)


def check_nothing_left(world: World) -> None:
    """After everything has ended, no object and no account of it is left."""
    runtime, hub = world.worker.runtime, world.worker.runtime.hub
    counters = runtime.counters
    must(not runtime.clients, "clients left", len(runtime.clients))
    must(not len(hub), "streams left", [(stream.id, stream.reason) for stream in hub])
    must(not hub.log_bytes and not hub.detached, "accounts", hub.log_bytes, hub.detached)
    must(not hub._by_key and not hub._by_response and not hub._forget_on_remove, "names left")
    must(not list(runtime.sweep._members), "the sweep has members left", list(runtime.sweep._members))
    must(not runtime.bodies_bytes, "bodies", runtime.bodies_bytes)
    for upstream in world.worker.upstreams:
        must(not upstream.in_flight, "in flight", upstream.settings.name, upstream.in_flight)
        must(not upstream._idle, "pooled", upstream.settings.name)
    for server in world.servers.values():
        must(not server.links, "connections left", server.name, len(server.links))
    must(counters.bugs == 0, "bugs", counters.bugs)
    gates = {slot.name: runtime.admission._row[slot.value] for slot in SharedNumber}
    must(not any(gates.values()) and not runtime.admission._own.reserved, "admission", gates)
    closed = sum(counters.connections_closed.values())
    must(counters.connections_accepted == closed, "connections", counters.connections_accepted, closed)
    sealed = sum(counters.streams_ended.values())
    must(counters.streams_opened == sealed, "streams", counters.streams_opened, sealed)
