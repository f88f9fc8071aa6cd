"""The fate of each attribute of a live connection when it is handed over: the decision for all of its classes.

    CARRIED    its value, or a record of the object that it refers to, is in the object's record
    DERIVED    the new process makes it: from the process itself, the carried facts, or the settings
    REFUSED    while it holds anything, its unit isn't handed over, and stays where it is until that is over

tests/handover/test_slots.py fails for an attribute that isn't named here, and for an object in a live connection whose
class isn't: a new attribute has to be decided on first. `units` has the record of all of them.
"""

from __future__ import annotations

from enum import Enum
from typing import Final


class Fate(Enum):
    """What becomes of an attribute."""

    CARRIED = "carried"
    DERIVED = "derived"
    REFUSED = "refused"


CARRIED, DERIVED, REFUSED = Fate

FATES: Final[dict[str, dict[Fate, str]]] = {
    # -- a client's connection
    "net.client.ClientConnection": {
        CARRIED: "_behind _close_reason _heads _intake answer at due_at origin transport",
        # paused: the new transport tells. pauses, stall: reading and the stall's time begin anew.
        DERIVED: "__weakref__ _application _runtime paused pauses stall",
        REFUSED: "_last_bytes",  # LINGER and CLOSING: the old process ends them within close_timeout
    },
    "net.origin.Origin": {
        CARRIED: "_gate_keys _place _remote entrance refusal",
        DERIVED: "_head_bytes _transport",  # the head is charged again
    },
    "net.origin.Entrance": {
        CARRIED: "is_tunnelled listener price_bytes",
        DERIVED: "runtime",
    },
    "net.intake.Intake": {
        CARRIED: "_came_bytes _decoder _sink _thrown_bytes _windows held",
        # The plan is made again from the head, with no effect on limits; the bound is the plan's.
        DERIVED: "_body_bytes_max _plan _request _runtime _spent",
        REFUSED: "rest",  # only within a call
    },
    "net.outlet.Stall": {
        DERIVED: "_left _looked_at progress_at since",
    },
    "net.outlet.LastBytes": {
        REFUSED: "_left _since came_bytes unread_bytes_max",
    },
    "net.outlet.LargeWrite": {
        REFUSED: "_at _parts",  # views of a body of megabytes that leaves at the client's pace
    },
    # -- a request and its answer
    "net.request.Request": {
        CARRIED: "answered_at body client conversation data_only dialect expires_at extra_headers gate_key head http10"
        " id is_handed_over keep_alive method model path principal reason started_at status trace traceparent"
        " upstream upstream_id",
        # The body is charged and scanned again; the route's settings are those of the new process.
        DERIVED: "body_charge form json route",
    },
    "wire.heads.RequestHead": {
        CARRIED: "authority bytes_read content_length expect_continue framing headers http10 keep_alive method"
        " path query target upgrade",
        DERIVED: "by_name",
    },
    # The bytes are held, and are scanned again.
    "wire.json_scan.JsonScan": {
        DERIVED: "_at _depth_max _looked_into _name _odd_names _open _quick _seen _since _string_is_name _under_way"
        " _watched containers found position root values",
    },
    "wire.form_scan.FormScan": {
        DERIVED: "_at _delimiter _is_model _since _values is_plain parts position",
    },
    "net.answer.Answer": {
        CARRIED: "_framing _pending body_bytes reader request state wrote_at",
        DERIVED: "_carrier _runtime origin write",
        REFUSED: "_held _large",  # held: until the turn's end
    },
    "net.trace.Trace": {
        # A traced request stays: its span would need its worker's map of live traces as well.
        REFUSED: "edges ended_at events is_request_over operation own parent reason status stream",
    },
    "core.body_charge.BodyCharge": {
        DERIVED: "_admission _holders held_bytes",
    },
    # -- upstream
    "net.upstream.UpstreamConnection": {
        CARRIED: "_asker _bodiless _decoder _heads _interim_answers _keep_alive _read _splitter answers any_byte at"
        " idle_since read_at stream touched_at transport upstream",
        # _fast_path: both decoders are between two pieces. Held bytes are charged again. pauses: of the turn and the
        # pace are over, and the client's new transport tells of backpressure. turned_away: only at the end.
        DERIVED: "__weakref__ _fast_path _held_bytes _read_batch _runtime _unsent_bytes pauses turned_away",
        REFUSED: "_ended_by",  # its last bytes are worked off first
    },
    "net.exchange.Exchange": {
        CARRIED: "_attempt _charge _collected _ends_at _learns _may_be_foreign _owner _request _stale_links"
        " _started_at _state _tried answer due_at policy stream watch",
        # _ask: from the request again, as long as it may be sent a second time; then None, as before.
        DERIVED: "__weakref__ _ask _body_charge _route _runtime _upstreams",
    },
    "net.attempt.Attempt": {
        CARRIED: "_method _principal asked_at began_at is_reused link upstream",
        DERIVED: "_owner _runtime",
        REFUSED: "_connecting _request connect_by",  # no connection yet: it is given up unsent, and chosen anew
    },
    "net.collected.Collected": {
        CARRIED: "_bytes_max body head",
        DERIVED: "_admission _has_lines",
    },
    "net.generation.GenerationWatch": {
        CARRIED: "_tally",
        DERIVED: "_counters _request _served",
    },
    "api.relayed_request.RelayedRequest": {
        CARRIED: "_grace_s _interval _key _policy _wants_whole charge",
        DERIVED: "_request _rights _runtime",
    },
    "api.relayed_ask.RelayedAsk": {
        CARRIED: "_body _is_bodiless _keeps_position _passed _path _query _request_id _secrets at method model",
        DERIVED: "_api _form _json principal",  # the body is scanned again
    },
    "api.kept.MadeReader": {
        CARRIED: "_ids",
        DERIVED: "_kept _principal_id",
    },
    "wire.kept_objects.IdReader": {
        CARRIED: "_data",
        DERIVED: "_scan",
    },
    "core.usage.Charge": {
        CARRIED: "_events _has_stream _is_asked _is_over _pays_tokens _tail _tally",
        DERIVED: "_account _key",
    },
    "core.usage.Tally": {
        CARRIED: "_found _tail",
    },
    "core.answer_edges.AnswerEdges": {
        REFUSED: "_back _found _front _size _tail facts usage",  # of a traced answer
    },
    # -- streams and their readers: streams.py
    "core.terms.Terms": {
        CARRIED: "catchup_bytes_max detach_grace_s model name_public owner pays_tokens policy published resume_grace_s"
        " retention_s write_interval",
        DERIVED: "account",  # that of the owner's key in the new process
        REFUSED: "is_copy",  # the new process follows the stream anew
    },
    "core.stream.Stream": {
        CARRIED: "dialect drops ended_clean epoch first_event_at frame_bytes grace_until id ledger log opened_at"
        " progress readers reason sealed_at source terms touched_at upstream",
        DERIVED: "charge_turn direct fanout id_prefix keeper push",
    },
    "core.stream.CountedStream": {
        CARRIED: "_marks dialect drops ended_clean epoch event_bytes first_event_at frame_bytes grace_until id ledger"
        " log opened_at progress readers reason sealed_at source terms touched_at upstream",
        DERIVED: "charge_turn direct fanout id_prefix keeper push",
    },
    "core.stream.StreamLedger": {
        CARRIED: "first_token_at longest_gap_s",
        # The giver settles its accounts before it tells, so the taker counts from the totals on.
        DERIVED: "charged_bytes counted_bytes counted_events counted_text_events names_bytes",
    },
    "core.stream.Subscriber": {
        CARRIED: "_bytes_written _gap_from dropped form own_position policy seq_start",
        # The reader catches up from its position. A full socket makes it BEHIND by itself, and its ring is empty.
        DERIVED: "_cursor _live_from_bytes index own_bytes push ring sink state stream write",
    },
    "core.ring.Ring": {
        DERIVED: "_first _sizes bytes_held bytes_max held",
    },
    "core.replay.Cursor": {
        DERIVED: "_created _number _offset _segment _template seq",
    },
    "core.replay.ReplayLog": {
        CARRIED: "_other_events _segments _tail _templates _text_base bytes_max events_max seq_first seq_next",
        # The state of writing begins anew: the next event looks for its template.
        DERIVED: "_aims _base _counting _created _current _cut _from _learnt _number _numbering _padding _prefix"
        " _suffix bytes_held shapes",
    },
    "wire.template.Template": {
        CARRIED: "fixed holes merges",
        DERIVED: "varied",
    },
    # A pass ends before its stream is told; the new process makes a dispatcher for as many readers.
    "core.fanout.SlicedFanout": {
        DERIVED: "_interval_s _later _on_pass _readers _soon _stream _time",
        REFUSED: "_at _begun_at _bytes _end_at_start _first _frames _is_urgent _loose _loose_of_pass _sealed_at_start"
        " _timer _waits_since running",
    },
    # -- parsers: wire_kinds.py
    "wire.dialects.api.Progress": {
        CARRIED: "_begun _finished chunk_head complete failed response_id sequence_number strays terminal text_bytes"
        " text_events usage usage_at",
        DERIVED: "api",
    },
    "wire.strays.Strays": {
        CARRIED: "bytes lines names",
    },
    "wire.chunked.ChunkedDecoder": {
        CARRIED: "_at _data_bytes_left _is_loose _line _trailer_bytes _trailers",
        DERIVED: "at_boundary done",
        REFUSED: "rest",  # behind the body's end, which is worked off
    },
    "wire.chunked.LengthDecoder": {
        CARRIED: "_bytes_left",
        DERIVED: "done",
        REFUSED: "rest",
    },
    "wire.chunked.UntilCloseDecoder": {
        DERIVED: "done rest",
    },
    "wire.inflate.InflatingDecoder": {
        REFUSED: "_framing _is_gzip _is_known _is_over _tail _zlib done has_more rest",  # zlib can't tell its state
    },
    "wire.sse.EventSplitter": {
        CARRIED: "_edge _held",
        DERIVED: "_event_bytes_max _strays pending stray_blocks",
    },
    "wire.inner.InnerSplitter": {
        CARRIED: "_edge _held _next_seq",
        DERIVED: "_event_bytes_max _heartbeat _strays pending stray_blocks",
    },
    "wire.json_lines.JsonLines": {
        CARRIED: "_edge _held _line",
        DERIVED: "_api _event_bytes_max _line_bytes_max _strays pending stray_blocks",
    },
    "wire.http1.HeadReader": {
        CARRIED: "_held _leading_lines",
        DERIVED: "_limits _opening _scanned",
    },
    # -- publishing
    "api.publish.Publisher": {
        CARRIED: "due_at fence stream",
        DERIVED: "_runtime under_way",  # counted as its requests arrive
        REFUSED: "appending",  # a whole body that is being appended, over some turns
    },
    "api.publish.Publishing": {
        CARRIED: "_expected _fence _held _publication _publisher _seal due_at must_flow",
        DERIVED: "_answer _charge _held_bytes _make _rights _runtime",
        REFUSED: "_over",
    },
    "wire.publish.TextPublication": {
        CARRIED: "_decoder _offset containers done",
        DERIVED: "_event_bytes_max",
    },
    "wire.publish.LinesPublication": {
        CARRIED: "_held _lines containers done",
        DERIVED: "_event_bytes_max _scan",
    },
    "wire.publish.EventsPublication": {
        CARRIED: "_events _splitter containers done",
    },
    # -- around a connection
    "net.proxied.ProxiedConnection": {
        REFUSED: "_below _connection _held _runtime _transport",  # until the header is there, head_timeout at most
    },
    "net.tls.TlsLayer": {
        # The keys stay: the client's bytes are carried by the old process, and its far end is handed over.
        REFUSED: "_connection _ended _extra _fin_waits _held _hello _incoming _open _outgoing _protocol _raw _runtime"
        " _tls pauses",
    },
    "api.streams.WaitForName": {
        CARRIED: "due_at name",
        DERIVED: "_answer _runtime _streams owner refusal",
    },
}
"""Of each class the attributes by their fate, names between blanks."""

# Each has its own way to the new process, or is made from the settings there.
SHARED: Final = frozenset(
    (
        "api.kept.KeptObjects",
        "api.publish.Publish",
        "api.rights.Rights",
        "api.streams.Streams",
        "core.admission.Admission",
        "core.guard.Guard",
        "core.hub.Hub",
        "core.limits.Account",
        "counters.Counters",
        "net.application.Application",
        "net.read_batch.ReadBatch",
        "net.runtime.Runtime",
        "net.upstream.Upstream",
        "net.upstreams.Upstreams",
        "wire.dialects.api.Api",
        "wire.json_scan.Watched",
        "wire.shapes.Shapes",
    )
)
"""Classes of objects that connections share with their process: no part of a connection, though it refers to them."""
