"""Counters: every number that streamd counts, declared once; rendered for Prometheus on demand.

The table is the class body of `Counters`, and `GAUGES`: a row says the metric, its help, its labels and how workers'
values combine (streamd/measure.py). The code that counts bumps an attribute; all other code reads the rows.

Tokens bump no counter: a stream's own seq and byte positions count them, and the sweep folds the differences in once a
second.
"""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from streamd.measure import SERVED, Combine, Histogram, Label, counter, gauge, histogram
from streamd.reasons import CloseReason

K = TypeVar("K")

ByReason = dict[CloseReason, int]
Pair = tuple[str, str]
"""An upstream and a model, as net/served.py names them."""


@dataclasses.dataclass(slots=True, eq=False)
class Counters:
    """A worker's counters since its start. All of them only grow."""

    # connections
    connections_accepted: int = counter("streamd_connections_accepted", "Downstream connections accepted.")
    connections_closed: ByReason = counter("streamd_connections_closed", "Downstream connections ended.", Label.REASON)
    handed_over: int = counter(
        "streamd_passed_on", "Requests and fresh connections handed to another worker, such as a stream's owner."
    )
    # requests
    requests: int = counter("streamd_requests", "Requests whose head was read.")
    requests_ended: ByReason = counter("streamd_requests_ended", "Requests ended.", Label.REASON)
    refused: ByReason = counter(
        "streamd_requests_refused", "Requests that streamd answered with an error.", Label.REASON
    )
    responses: dict[int, int] = counter("streamd_responses", "Answers begun, by status.", Label.STATUS)
    request_s: Histogram = histogram("streamd_request_duration_seconds", "From a request's head to its end.")
    # Admission's own; copied here when asked for, and shown by /status alone.
    refused_by_gate: dict[str, int] = counter("", "Refusals by admission, by gate.", Label.GATE)
    # streams
    streams_opened: int = counter("streamd_streams_opened", "Streams opened.")
    streams_ended: ByReason = counter("streamd_streams_sealed", "Streams ended.", Label.REASON)
    # The hub's own; copied here when asked for.
    events: int = counter("streamd_events", "Events that came from upstreams and publishers.")
    text_events: int = counter("streamd_text_events", "Events with text: tokens, for most servers.")
    event_bytes: int = counter("streamd_event_bytes", "Bytes of events, framed, each event counted once.")
    event_writes: int = counter(
        "streamd_event_writes",
        "Times that new events of a stream were handed to its readers; streamd_events_total by it is events per write.",
    )
    held_s: Histogram = histogram(
        "streamd_write_held_seconds",
        "Pauses of an upstream's reads, and waits of events in a dispatcher, for the write interval.",
    )
    # readers
    subscriptions: int = counter("streamd_subscriptions", "Subscriptions begun.")
    resumes: int = counter("streamd_resumes", "Subscriptions begun at a position that the reader named.")
    delivered_events: int = counter(
        "streamd_delivered_events", "Events handed to the sockets of readers that have ended."
    )
    delivered_bytes: int = counter("streamd_delivered_bytes", "Bytes handed to the sockets of readers that have ended.")
    dropped_events: int = counter("streamd_dropped_events", "Events announced to readers as gaps.")
    paused: int = counter("streamd_pauses", "Times that a connection's socket was full.")
    first_event_s: Histogram = histogram(
        "streamd_time_to_first_event_seconds",
        "From a request's head to the first event of its generation, observed as it comes.",
    )
    added_s: Histogram = histogram(
        "streamd_added_before_upstream_seconds",
        "The share of streamd in the time to the first event: from the head to the request sent upstream, "
        "connecting included.",
    )
    # generations, by upstream and model; named as vLLM names the same
    first_token_s: dict[Pair, Histogram] = histogram(
        "streamd_time_to_first_token_seconds",
        "From a request's head to the first text of its generation, observed as it comes.",
        *SERVED,
    )
    token_gap_s: dict[Pair, Histogram] = histogram(
        "streamd_request_time_per_output_token_seconds",
        "Mean time between the tokens of a complete stream, observed at its end.",
        *SERVED,
    )
    longest_gap_s: dict[Pair, Histogram] = histogram(
        "streamd_request_longest_token_gap_seconds",
        "Longest silence after a stream's first token as sweeps saw it, at its end: at most 0.25 s too short.",
        *SERVED,
    )
    e2e_s: dict[Pair, Histogram] = histogram(
        "streamd_e2e_request_latency_seconds",
        "From the head of a POST that an upstream answered to the end of the whole answer.",
        *SERVED,
    )
    prompt_tokens: dict[Pair, int] = counter(
        "streamd_prompt_tokens", "Input tokens, as upstreams state them at an answer's end.", *SERVED
    )
    generation_tokens: dict[Pair, int] = counter(
        "streamd_generation_tokens",
        "Output tokens, as upstreams state them at an answer's end; of a stream that states none, events with text.",
        *SERVED,
    )
    # upstreams
    upstream_requests: dict[str, int] = counter("streamd_upstream_requests", "Requests sent.", Label.UPSTREAM)
    upstream_checks: dict[str, int] = counter(
        "streamd_upstream_checks",
        "Streamd's own questions and connections: health checks, lists of models, knocks.",
        Label.UPSTREAM,
    )
    upstream_connects: dict[str, int] = counter("streamd_upstream_connects", "Connections established.", Label.UPSTREAM)
    upstream_cancels: dict[str, int] = counter(
        "streamd_upstream_cancels", "Requests cut off because no reader is left.", Label.UPSTREAM
    )
    upstream_failures: dict[tuple[str, CloseReason], int] = counter(
        "streamd_upstream_failures", "Failures.", Label.UPSTREAM, Label.REASON
    )
    upstream_connect_s: Histogram = histogram("streamd_upstream_connect_seconds", "Establishing a connection.")
    upstream_first_byte_s: Histogram = histogram(
        "streamd_upstream_first_byte_seconds", "From a request sent to its answer's head."
    )
    # the collector of OpenTelemetry
    otlp_spans: int = counter("streamd_otlp_spans", "Spans of generations that the collector of otlp_endpoint took.")
    otlp_spans_lost: int = counter(
        "streamd_otlp_spans_lost",
        "Spans that the collector didn't take, that found their queue full, or that a bug kept from being made.",
    )
    otlp_export_failures: int = counter(
        "streamd_otlp_export_failures", "Exports of spans or metrics that the collector didn't take."
    )
    # copies in an engine; the cluster's own, copied here when asked for
    engine_writes: dict[str, int] = counter(
        "streamd_engine_writes",
        "Entries written to copies: events since the last, a whole log, and of both those with an end.",
        Label.KIND,
    )
    engine_written_bytes: int = counter("streamd_engine_written_bytes", "Bytes of commands that write copies.")
    engine_verifies: dict[str, int] = counter(
        "streamd_engine_verifies", "Looks at own copies after a loss, by their outcome.", Label.FOUND
    )
    engine_refused: dict[str, int] = counter("streamd_engine_refused", "Writes that the engine refused.", Label.WHY)
    engine_revived: int = counter(
        "streamd_engine_revived", "Streams taken back that another node had declared lost while this one lived."
    )
    engine_pushes: int = counter("streamd_engine_pushes", "Pushes of new events to nodes that follow a stream.")
    engine_lookups: int = counter("streamd_engine_lookups", "Streams of other nodes that were looked for.")
    engine_reads: int = counter("streamd_engine_reads", "Reads of copies.")
    engine_holes: int = counter(
        "streamd_engine_holes", "Pushes and entries of followed streams that didn't continue the log; reads fill them."
    )
    engine_notes_sent: int = counter("streamd_engine_notes_sent", "Notes to other workers of the cluster.")
    engine_notes_read: int = counter("streamd_engine_notes_read", "Notes from other workers of the cluster.")
    engine_notes_lost: int = counter(
        "streamd_engine_notes_lost", "Notes that the engine refused, that are none, or that got no answer in time."
    )
    engine_lost: int = counter("streamd_engine_lost", "Followed streams that ended because their node was lost.")
    # process
    cpu_us: int = counter("process_cpu_seconds", "CPU time that the workers have used.", unit=1_000_000)
    loop_lag_s: Histogram = histogram("streamd_loop_lag_seconds", "How late the 250 ms sweep came.")
    # The log's own; copied here when asked for.
    log_lines_lost: int = counter("streamd_log_lines_lost", "Log lines lost because standard error took no more.")
    bugs: int = counter("streamd_bugs", "Mistakes of streamd itself; the log has their tracebacks.")
    tls_refused: int = counter("streamd_tls_refused", "Times that a peer's TLS refused a write, which ended it.")
    transport_refused: int = counter(
        "streamd_transport_refused", "Times that the system refused a call for a connection, which ended it."
    )
    no_memory: int = counter(
        "streamd_no_memory", "Times that there was no memory for a request or a connection, which ended it."
    )


# A worker's state: net/totals.py reads it from the objects that have it. It ends with the worker.
GAUGES = (
    gauge("connections", "Downstream connections open now.", "streamd_connections", status="connections"),
    gauge("streams_live", "Streams not sealed yet, those without a reader included.", status="streams.live"),
    gauge("streams_detached", "Streams not sealed yet, without a reader.", status="streams.detached"),
    gauge("streams_sealed", "Sealed streams that can still be read.", status="streams.sealed"),
    gauge("subscribers", "Readers of streams now.", "streamd_subscribers", status="subscribers"),
    gauge(
        "subscribers_paused",
        "Readers whose connection takes nothing now.",
        "streamd_subscribers_paused",
        status="subscribers_paused",
    ),
    gauge(
        "lag_events",
        "Most events that a reader whose connection takes nothing has still to get.",
        "streamd_subscriber_lag_events",
        status="lag_events",
        combine=Combine.MAX,
    ),
    gauge(
        "log_bytes",
        "Memory of all replay logs, of streams' names, and of finished streams.",
        "streamd_replay_log_bytes",
        status="log_bytes",
    ),
    gauge("bodies_bytes", "Request bodies held now.", "streamd_request_bodies_bytes"),
    gauge("pid", "Id of the process.", combine=Combine.LAST),
    gauge("bytes_resident", "Memory of the process as it was measured last."),
    gauge("lag_us", "Lateness of the loop, microseconds, smoothed.", combine=Combine.MAX),
    gauge(
        "write_interval_us",
        "Write interval that the load asks for, microseconds.",
        "streamd_write_interval_microseconds",
        combine=Combine.MAX,
        status="write_interval_us",
    ),
    gauge("descriptors", "File descriptors that the workers use.", "process_open_fds"),
    gauge("descriptors_max", "File descriptors that the workers may use.", "process_max_fds"),
    gauge(
        "rss_bytes",
        "Memory of the workers, with pages that they share counted in each.",
        "process_resident_memory_bytes",
    ),
    gauge("virtual_bytes", "Address space of the workers.", "process_virtual_memory_bytes"),
    gauge(
        "started_ms",
        "When the daemon started, Unix time.",
        "process_start_time_seconds",
        combine=Combine.LAST,
        unit=1000,
    ),
    gauge(
        "reload_succeeded",
        "1 if the last reload was taken, or none was tried; 0 if it was refused.",
        "streamd_config_last_reload_successful",
        combine=Combine.LAST,
    ),
    gauge(
        "reloaded_ms",
        "When the settings in use were read, Unix time.",
        "streamd_config_last_reload_success_timestamp_seconds",
        combine=Combine.LAST,
        unit=1000,
    ),
    gauge(
        "certificate_s",
        "When the first certificate in tls_cert expires, Unix time.",
        "streamd_certificate_expiry_timestamp_seconds",
        combine=Combine.LAST,
        hides_zero=True,
    ),
    gauge(
        "engine_lag_ms",
        "Age of the oldest event that the engine lacks: what the death of a worker would lose.",
        "streamd_engine_lag_seconds",
        combine=Combine.MAX,
        unit=1000,
    ),
    gauge("engine_servers", "Servers of the engine; 0 without an engine.", combine=Combine.MAX),
    gauge("engine_down", "Servers of the engine that a worker has no link to.", combine=Combine.MAX),
    gauge(
        "engine_round_trip_us",
        "Round trip of the last sign of life of the engine.",
        "streamd_engine_round_trip_seconds",
        combine=Combine.MAX,
        unit=1_000_000,
    ),
    gauge("engine_pending", "Commands without a reply.", "streamd_engine_pending_commands"),
    gauge("engine_copies", "Copies that the workers own.", "streamd_engine_copies"),
    gauge("engine_unsettled", "Copies that have to be looked at, or written.", "streamd_engine_unsettled_copies"),
    gauge("engine_pushed", "Own streams that other nodes follow now.", "streamd_engine_pushed_streams"),
    gauge("engine_follows", "Streams of other nodes that are followed now.", "streamd_engine_follows"),
    gauge("engine_remote", "Readers elsewhere of own streams, by stream and worker.", "streamd_engine_remote_readers"),
    gauge(
        "engine_members",
        "Workers of all nodes, by their signs of life.",
        "streamd_engine_members",
        combine=Combine.LAST,
    ),
    gauge("reserved", "Connections admitted from the operators' reserve, beyond the gates."),
    gauge("draining", "1 while streamd drains.", "streamd_draining", combine=Combine.MAX),
    gauge(
        "drain_deadline_s",
        "When the drain under way should have ended at the latest, Unix time.",
        "streamd_drain_deadline_timestamp_seconds",
        combine=Combine.MAX,
        hides_zero=True,
    ),
    gauge("drain_left", "Generations that still run in a drain; 0 without a drain.", "streamd_drain_left"),
    gauge("drain_finished", "Generations that ended by themselves in this drain."),
    gauge("drain_sent_away", "Readers of published streams that were told to come back in this drain."),
    gauge("drain_cut", "Readers that were told at the deadline of this drain."),
    # A process's own parts of streamd_saturation, in millionths.
    gauge("descriptors_ppm", "Share of the file descriptors in use.", combine=Combine.MAX),
    gauge("loop_lag_ppm", "Lateness of the loop as a share of its limit.", combine=Combine.MAX),
    gauge("beat_ms", "When the loop turned last.", combine=Combine.LAST),
    gauge("in_flight", "Requests under way.", "streamd_upstream_in_flight", Label.UPSTREAM),
    gauge("idle", "Pooled connections.", "streamd_upstream_idle_connections", Label.UPSTREAM),
    gauge(
        "first_token_wait_ms",
        "The longest that a stream has been waiting for its first token, from its opening until now.",
        "streamd_upstream_first_token_wait_seconds",
        Label.UPSTREAM,
        combine=Combine.MAX,
        unit=1000,
    ),
    gauge(
        "client_certificate_s",
        "When the first certificate in its client_cert expires, Unix time.",
        "streamd_upstream_client_certificate_expiry_timestamp_seconds",
        Label.UPSTREAM,
        combine=Combine.LAST,
        hides_zero=True,
    ),
    # Each worker judges for itself: the sum would count workers, the maximum is 1 if any leaves it out.
    gauge(
        "left_out",
        "1 while left out for failing.",
        "streamd_upstream_left_out",
        Label.UPSTREAM,
        combine=Combine.MAX,
    ),
    # Written by daemon/request_log.py for the other workers alone: a sum of these says nothing.
    gauge("warned", "Warnings about its requests in the present minute, with that minute.", "", Label.UPSTREAM),
    # The daemon's verdict, which all workers are told (daemon/outages.py).
    gauge(
        "up",
        "1 while requests go there, for all workers together; 0 while it is out or probed.",
        "streamd_upstream_up",
        Label.UPSTREAM,
        combine=Combine.LAST,
    ),
)


def observe(table: dict[Pair, Histogram], key: Pair, value: float) -> None:
    """Add an observation to that key's distribution."""
    found = table.get(key)
    if found is None:
        found = table[key] = Histogram()
    found.observe(value)


def bump(table: dict[K, int], key: K, by: int = 1) -> None:
    """Raise the count of that key."""
    table[key] = table.get(key, 0) + by
