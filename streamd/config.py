"""Settings: a single table, from which the file, the environment, the flags and the reference all derive.

The table is the class body of `Settings`: a field is a row, and a row has the kind, the default, the bounds and two
texts: the meaning of the setting and the reason of its default. All other code reads rows: nothing names a setting a
second time.

    flags (--commit-after 5s) over environment (STREAMD_COMMIT_AFTER=5s) over file (commit_after = "5s") over default

Keys carry no unit, values do (`30s`, `500ms`, `16KiB`; a bare number is seconds or bytes), attributes carry the unit
that the code computes in (`commit_after_s: float`, `event_bytes_max: int`). Every given value is checked, even if
another source overrides it, and all problems are reported at once, with the key, the value, the allowed values and the
line.

`Settings(...)` itself checks nothing, so that a test may choose a bound of 3; `load()` checks all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from streamd import forward_proxy
from streamd.addresses import (
    FIELD_VALUE,
    HOST_NAME,
    ORIGIN,
    ROUTE_PATH,
    UPSTREAM_NAME,
    UPSTREAM_PATHS,
    UPSTREAM_URL,
    UpstreamOrigin,
    check_address,
    check_admin,
    check_collector,
    check_field_name,
    check_network,
    check_passed_field,
    check_url,
    matching,
    parse_address,
    split_url,
)
from streamd.engine_url import ENGINE_URL, check_engine_url, parse_engine_urls
from streamd.extras import missing_extra
from streamd.files import read_regular
from streamd.forward_proxy import ForwardProxy
from streamd.policy import Policy, treatments
from streamd.rows import (
    ENV_PREFIX,
    WORD_S,
    Kind,
    Refused,
    Row,
    bytes_row,
    count_row,
    duration_row,
    flag_row,
    format_bytes,
    format_duration,
    list_row,
    path_row,
    ratio_row,
    rows_of,
    table_row,
    text_row,
    word_row,
)
from streamd.sources import ConfigError, ConfigProblem, Sources, split_list

__all__ = [
    "ENV_PREFIX",
    "ROUTE_ROWS",
    "ROWS",
    "SECTIONS",
    "UPSTREAM_ROWS",
    "WORKERS_MAX",
    "ConfigError",
    "ConfigProblem",
    "RouteOverride",
    "RouteSettings",
    "Settings",
    "UpstreamOrigin",
    "UpstreamSettings",
    "load",
    "parse_address",
    "relations",
]

WORKERS_MAX = 64  # the slot of a worker is one base64url character of the ids that it gives out

# The tables

LISTENING = "Listening"
REQUESTS = "Limits of a request"
RELAY = "Relay"
READERS = "Readers, replay and resume"
STREAMS = "Published streams"
PROCESS = "Drain and processes"
ADMISSION = "Admission"
ACCESS = "Access"
TELEMETRY = "OpenTelemetry"
NODES = "Several nodes"
UPSTREAM = "[[upstream]]"
ROUTE = "[[route]]"

ENGINE_PREFIX: Final = re.compile(r"[A-Za-z0-9._:-]{1,32}", re.A)
HEALTH_PATH: Final = re.compile(r"/[!\"$-~]{0,255}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """An inference server. `url` is kept in a single form, however it was written; `origin` has its parts."""

    name: str = text_row(
        UPSTREAM,
        "",
        "Name of the server in logs, metrics and X-Upstream",
        "Host and port of the URL unless set, or the socket's path",
        check=matching(UPSTREAM_NAME),
        wanted="1 to 128 letters, digits and . _ : -",
    )
    url: str = text_row(
        UPSTREAM,
        "",
        "Base URL of the server; required",
        "A trailing /v1 or /v1beta says nothing. A query, such as ?api-version=…, becomes a part of each request",
        check=check_url,
        wanted=UPSTREAM_URL,
    )
    path: str = word_row(
        UPSTREAM,
        "auto",
        UPSTREAM_PATHS,
        "Treatment of the URL's path: replace puts it in place of a request's /v1 or /v1beta, append in front of it",
        "auto replaces where the URL's path has a version (/api/paas/v4, /v1beta/openai), else appends",
    )
    models: tuple[str, ...] = list_row(
        UPSTREAM,
        ("*",),
        "models' names, * for any",
        lambda text: None,
        "Names of the models that this server answers for, * for any",
    )
    inflight_max: int = count_row(
        UPSTREAM,
        0,
        1,
        100_000,
        "Most requests at once at this server, over all workers",
        "vLLM's --max-num-seqs is 256 unless set",
        zero="no limit",
    )
    key: str = dataclasses.field(default="", repr=False)
    key_file: str = path_row(UPSTREAM, "File with one line, the server's API key", exists=True)
    key_env: str = text_row(
        UPSTREAM,
        "",
        "Environment variable that holds the server's API key",
        check=matching(re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.A)),
        wanted="a variable's name",
    )
    pass_client_key: bool = flag_row(
        UPSTREAM, "Whether a client's own key goes to this server", "Unless set, no client's key leaves streamd"
    )
    headers: Mapping[str, str] = table_row(
        UPSTREAM,
        "header fields, none that streamd writes itself, with values of visible ASCII",
        "Further header fields of each request to this server",
        "Their values may be secrets and are never shown",
        check=check_field_name,
        check_value=matching(FIELD_VALUE),
        shown=False,
    )
    pass_fields: tuple[str, ...] = list_row(
        UPSTREAM,
        (),
        "names of header fields, none of CORS",
        check_passed_field,
        "Names of this server's response fields that pass although they speak for the whole origin, or to proxies",
        "Unless named, Set-Cookie, Strict-Transport-Security, Alt-Svc, X-Accel-* and their like go no further",
    )
    aliases: Mapping[str, str] = table_row(
        UPSTREAM, "models' names", "Public names of models, each with the server's own name of that model"
    )
    health_path: str = text_row(
        UPSTREAM,
        "",
        "Path below the URL's base that is asked every 5 s whether this server is well, e.g. /health",
        "Without it requests alone find out; with it none waits for a server that can't be reached",
        check=matching(HEALTH_PATH),
        wanted="a path that begins with /, of visible ASCII without #",
    )
    ca_file: str = path_row(UPSTREAM, "Certificates (PEM) to trust in place of the system's, for https", exists=True)

    client_cert: str = path_row(
        UPSTREAM, "Certificate (PEM) by which streamd shows itself to this server, with the chain", exists=True
    )
    client_key: str = path_row(
        UPSTREAM, "Private key (PEM) of client_cert", "Refused if others may read it: mode 0600 or 0640", exists=True
    )
    proxy: str = text_row(
        UPSTREAM,
        "",
        "Address of the forward proxy on the way to this server (CONNECT), or direct for none",
        "Unless set HTTPS_PROXY and NO_PROXY of the environment decide for an https server, and none is used for http",
        check=forward_proxy.check_proxy,
        wanted=forward_proxy.WANTED,
    )
    proxy_auth_file: str = path_row(UPSTREAM, "File with one line, USER:PASSWORD for the proxy", exists=True)
    # The proxy that these and the environment decide for.
    through: ForwardProxy | None = dataclasses.field(default=None, repr=False)

    origin: UpstreamOrigin = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive the origin, and the name from it. Raises Refused for an invalid URL."""
        origin = split_url(self.url, self.path)
        object.__setattr__(self, "origin", origin)
        object.__setattr__(self, "url", origin.url)
        if not self.name:
            object.__setattr__(self, "name", origin.name)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouteOverride:
    """A `[[route]]`: a path, exact or a prefix ending in `*`, and its own settings. None: as everywhere else."""

    path: str
    policy: str | None = None
    detach_grace_s: float | None = None
    commit_after_s: float | None = None
    heartbeat_s: float | None = None
    ttft_timeout_s: float | None = None
    idle_timeout_s: float | None = None
    write_interval_s: float | None = None
    write_interval_lower: bool | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """The settings of a path, with all overrides resolved."""

    policy: str
    detach_grace_s: float
    commit_after_s: float
    heartbeat_s: float
    ttft_timeout_s: float
    idle_timeout_s: float
    write_interval_s: float
    write_interval_lower: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting. The order here is the order of the reference."""

    listen: tuple[str, ...] = list_row(
        LISTENING,
        ("127.0.0.1:8080",),
        "HOST:PORT, [IPV6]:PORT or unix:/path",
        check_address,
        "Addresses for readers and applications",
        "Loopback as long as there are no keys",
        restart=True,
    )
    admin: str = text_row(
        LISTENING,
        "",
        "Address for status, drain and log level",
        "A Unix socket or loopback, because a peer that reaches it may do everything",
        check=check_admin,
        wanted="unix:/path or a loopback HOST:PORT",
        restart=True,
    )
    metrics_listen: str = text_row(
        LISTENING,
        "",
        "Address for a scraper, without TLS and keys",
        "/metrics, /healthz and /readyz are there and nothing else. Prometheus scrapes no Unix socket. Loopback unless "
        "metrics_public",
        check=check_address,
        wanted="HOST:PORT, [IPV6]:PORT or unix:/path",
        restart=True,
    )
    metrics_public: bool = flag_row(
        LISTENING,
        "Whether metrics_listen may be beyond loopback",
        "Metrics tell the load and the names of upstreams and models: a firewall has to keep all but the scraper out",
    )
    workers: int = count_row(
        LISTENING,
        1,
        1,
        WORKERS_MAX,
        "Number of worker processes; auto is one per core",
        "A core carries some 30,000 tokens/s. A worker's slot is one character of its ids, hence at most 64",
        words=("auto",),
        restart=True,
    )
    log_level: str = word_row(
        LISTENING,
        "info",
        ("debug", "info", "warning", "error"),
        "Least level of the lines that are logged",
        "info is one line per request, at its end; debug tells each step of every request",
    )
    log_format: str = word_row(
        LISTENING, "text", ("text", "json"), "Format of the log's lines", "text is key=value, for people and journald"
    )
    ops_public: bool = flag_row(
        LISTENING,
        "Whether /metrics and /status are on every listener",
        "They tell the load and the upstreams' names, so unless set only loopback and the admin listener have them",
    )
    insecure_public: bool = flag_row(
        LISTENING,
        "Whether to listen beyond loopback without keys",
        "Without keys every client may use the upstreams",
    )
    hosts: tuple[str, ...] = list_row(
        LISTENING,
        (),
        "host names without a port, such as llm.home.example",
        matching(HOST_NAME),
        "Names of this machine, beside loopback's and addresses",
        "Without keys, and on the admin listener, any other name gets 421: a web page can have its own name lead here",
    )
    keys_file: str = path_row(LISTENING, "File of hashed API keys, as `streamd keys` writes it", exists=True)
    state_dir: str = path_row(
        LISTENING,
        "Directory where logs of streams wait for a restart",
        "Unless set only systemd's store of descriptors has them",
        restart=True,
    )

    head_bytes_max: int = bytes_row(
        REQUESTS,
        "16KiB",
        "1KiB",
        "1MiB",
        "Largest head of a request; a larger one gets 431",
        "8 KiB of target and 8 KiB of fields: h11's own limit, twice nginx's",
    )
    headers_max: int = count_row(
        REQUESTS,
        100,
        8,
        1000,
        "Most header fields of a request; more get 431",
        "SDKs send 15 to 25 and proxies add 10; Apache's limit is 100",
    )
    target_bytes_max: int = bytes_row(
        REQUESTS,
        "8KiB",
        "256B",
        "64KiB",
        "Longest target of a request; a longer one gets 414",
        "RFC 9112 section 3 asks for 8,000 octets at least",
    )
    body_bytes_max: int = bytes_row(
        REQUESTS,
        "32MiB",
        "1KiB",
        "1GiB",
        "Largest body of a request; a larger one gets 413",
        "A dozen images of 2 MB in base64 (x 4/3)",
    )
    bodies_bytes_max: int = bytes_row(
        REQUESTS,
        "256MiB",
        "64KiB",
        "64GiB",
        "Memory of all request bodies together",
        "8 of the largest, or 25,000 chats of 10 KB",
    )
    head_timeout_s: float = duration_row(
        REQUESTS,
        "10s",
        "100ms",
        "5m",
        "Time for a request's head, from when the connection allows one; then 408",
        "HAProxy's usual 10 s, absolute, so that a byte now and then gains nothing",
    )
    body_grace_s: float = duration_row(
        REQUESTS,
        "10s",
        "100ms",
        "5m",
        "Time in which a request's body may come at any rate",
        "As long as a head may take",
    )
    body_bytes_per_s_min: int = count_row(
        REQUESTS,
        1000,
        1,
        1_000_000,
        "Least rate of a request's body in each window after body_grace, in bytes per second; then 408",
        "8 kbit/s is a third of GPRS; bodies_bytes_max bounds the memory of slow bodies",
    )
    keepalive_timeout_s: float = duration_row(
        REQUESTS,
        "75s",
        "1s",
        "1h",
        "Time that a connection may be idle between two requests",
        "Longer than the 5 to 50 s of SDKs' pools and the 60 s of balancers, so that the other side closes first",
    )
    pipeline_bytes_max: int = bytes_row(
        REQUESTS,
        "16KiB",
        "1KiB",
        "1MiB",
        "Bytes of further requests kept behind a running answer; more closes the connection",
        "Room for one more head",
    )
    close_timeout_s: float = duration_row(
        REQUESTS,
        "2s",
        "100ms",
        "1m",
        "Time between closing a connection and aborting it",
        "A stalled peer would keep the socket for ever; RFC 9112 section 9.6",
    )

    commit_after_s: float = duration_row(
        RELAY,
        "10s",
        "0s",
        "1h",
        "Silence of the upstream after which a stream gets its 200",
        "A third of the 30 s at which the first proxies give up",
    )
    heartbeat_s: float = duration_row(
        RELAY,
        "15s",
        "1s",
        "1h",
        "Interval of the heartbeats that keep a silent stream's connection alive",
        "WHATWG HTML 9.2.7 says every 15 s; a quarter of the 60 s of nginx and cloud balancers",
        zero="off",
    )
    connect_timeout_s: float = duration_row(
        RELAY,
        "5s",
        "50ms",
        "5m",
        "Time to connect to an upstream",
        "Two lost SYN are 3 s; a server that needs more is down",
    )
    ttft_timeout_s: float = duration_row(
        RELAY,
        "600s",
        "100ms",
        "24h",
        "Time until the upstream's first event, or until the head of a whole answer",
        "A whole answer's head comes when all is made, and the SDKs wait 600 s; a prefill of 128k tokens is 256 s",
        zero="off",
    )
    queue_timeout_s: float = duration_row(
        RELAY,
        "1800s",
        "100ms",
        "24h",
        "Time until the first event of an upstream that sends comments meanwhile, which put off ttft_timeout",
        "Hosted APIs keep requests in a queue for 10 to 30 minutes, and say each few seconds that they do",
        zero="off",
    )
    idle_timeout_s: float = duration_row(
        RELAY,
        "600s",
        "100ms",
        "24h",
        "Longest silence of the upstream between two events; comments count as life",
        "Tool calls that servers hold back until they are whole took 329 s; a generation that is cut is paid for twice",
        zero="off",
    )
    stream_timeout_s: float = duration_row(RELAY, "0s", "1s", "168h", "Longest duration of a whole stream", zero="off")
    event_bytes_max: int = bytes_row(
        RELAY,
        "8MiB",
        "1KiB",
        "64MiB",
        "Largest event; a larger one ends its stream",
        "An image of 4 to 6 MB in base64 (x 4/3), audio, the arguments of a tool call; a token is 200 B",
    )
    write_interval_s: float = duration_row(
        RELAY,
        "adaptive",
        "0s",
        "1s",
        "Time for which a token may wait for the next, so that both go out in one write; 0 writes each at once",
        "adaptive is 0 while a worker is idle, up to 50ms as it fills up, up to 1s while it can't keep up. "
        "Over 100ms is seen as stutter",
        words=("adaptive",),
        old_key="flush_interval",
    )
    write_interval_lower: bool = flag_row(
        RELAY,
        "Whether a request may also ask for a shorter write_interval, and not only for a longer",
        "Each write costs CPU that all readers share",
    )
    upstream_retry_after_max_s: float = duration_row(
        RELAY,
        "60s",
        "1s",
        "60s",
        "Longest Retry-After of an upstream that is passed on",
        "SDKs ignore a Retry-After over 60 s",
    )
    pool_idle_timeout_s: float = duration_row(
        RELAY,
        "4s",
        "1s",
        "10m",
        "Longest idle time after which an upstream's connection is used again",
        "uvicorn, under vLLM, closes at 5 s; a second less keeps requests off connections that are just closing",
        zero="never reused",
    )
    models_refresh_s: float = duration_row(
        RELAY,
        "60s",
        "1s",
        "1h",
        "Interval at which upstreams that share a model are asked for the models that they list",
        "of several that may take a model, one that lists it is preferred; a model that was loaded is noticed within a "
        "minute, at one small question",
        zero="no upstream is asked unless a client asks",
    )
    pool_idle_max: int = count_row(
        RELAY, 64, 0, 10_000, "Idle connections kept for each upstream and worker", "16 requests/s x 4 s"
    )

    notsent_lowat_bytes: int = bytes_row(
        READERS,
        "16KiB",
        "1KiB",
        "1MiB",
        "Bytes that the kernel may hold unsent for a reader",
        "80 tokens of 200 B; without this limit a stalled reader takes 2.6 MB",
        restart=True,
    )
    ring_slots: int = count_row(
        READERS, 64, 32, 128, "Frames that the ring of a paused reader holds", "64 x 50 ms are 3 s; a slot takes 4 B"
    )
    ring_bytes_max: int = bytes_row(
        READERS,
        "32KiB",
        "1KiB",
        "1MiB",
        "Bytes of the frames that a ring holds; one frame always fits",
        "64 slots x 200 B are 13 KB, and as much again",
    )
    policy: str = word_row(
        READERS,
        "coalesce",
        [policy.value for policy in Policy],
        f"Treatment of a reader with a full ring: {treatments()}",
        "The first loses no text",
    )
    stall_timeout_s: float = duration_row(
        READERS,
        "60s",
        "1s",
        "24h",
        "Time after which a reader that takes nothing is closed",
        "A phone's change of network takes 30 s",
        zero="off",
    )
    catchup_bytes_max: int = bytes_row(
        READERS,
        "16KiB",
        "1KiB",
        "1MiB",
        "Text of one coalesced event, and of all that a loop turn writes to one reader",
        "4,000 tokens",
    )
    log_bytes_max: int = bytes_row(
        READERS,
        "1MiB",
        "16KiB",
        "1GiB",
        "Memory of one stream's replay log",
        "500 tokens take 5 KB, so 100,000 tokens; beside it, the newest event that is larger by itself",
    )
    log_events_max: int = count_row(
        READERS,
        100_000,
        128,
        10_000_000,
        "Events in one stream's replay log",
        "A generation of 100,000 tokens; at least a ring of 128",
    )
    logs_bytes_max: int = bytes_row(
        READERS, "0", "1MiB", "1024GiB", "Memory of all replay logs together", zero="from the memory budget"
    )
    retention_s: float = duration_row(
        READERS,
        "60s",
        "0s",
        "24h",
        "Time that a finished stream can still be read; then 404",
        "12 times the longest retry",
    )
    resume_grace_s: float = duration_row(
        READERS,
        "30s",
        "0s",
        "1h",
        "Time that a generation goes on after streamd or the network cut its last reader",
        "6 times retry_max",
    )
    detach_grace_s: float = duration_row(
        READERS,
        "0s",
        "0s",
        "24h",
        "Time that a generation goes on after its last reader left by itself",
        "0 cancels at once, as users of SDKs expect",
    )
    detach_grace_max_s: float = duration_row(
        READERS,
        "300s",
        "0s",
        "24h",
        "Longest grace that X-Stream-Detach-Grace may ask for",
        "A bound on the time of a GPU that works without a reader",
    )
    detached_max: int = count_row(
        READERS, 1000, 0, 1_000_000, "Most generations without a reader at once", "4 servers of 256 sequences"
    )
    retry_min_s: float = duration_row(
        READERS,
        "100ms",
        "0s",
        "10m",
        "Shortest delay that `retry:` asks for, and the longest where there are few readers",
        "A pause that a reader doesn't notice, and a busy loop would be",
    )
    retry_max_s: float = duration_row(
        READERS,
        "5s",
        "100ms",
        "10m",
        "Longest delay that `retry:` asks for, where there are many readers",
        "The window grows by a second for each 1,250 readers of a worker: 10,000 over 4 s are 2,500 connections/s, "
        "which two workers accept",
    )

    publisher_grace_s: float = duration_row(
        STREAMS,
        "30s",
        "0s",
        "24h",
        "Time for a publisher that broke off to come back; then its stream is sealed as failed",
        "As long as resume_grace",
    )
    publisher_idle_timeout_s: float = duration_row(
        STREAMS,
        "1h",
        "1s",
        "168h",
        "Time without a publication after which a published stream is sealed as failed",
        "By then its publisher is gone for good",
        zero="off",
    )
    wait_max_s: float = duration_row(
        STREAMS, "60s", "0s", "60s", "Longest time that ?wait= may ask for", "Proxies give up at 60 s"
    )

    drain_delay_s: float = duration_row(
        PROCESS,
        "0s",
        "0s",
        "10m",
        "Time from readiness 503 to closed listeners",
        "A balancer's check interval x its failures",
    )
    drain_timeout_s: float = duration_row(
        PROCESS,
        "30s",
        "0s",
        "24h",
        "Time for running generations to finish before they are cut",
        "600 tokens at 50 ms; systemd is asked for more time as it is needed, whatever TimeoutStopSec says",
    )
    worker_stuck_s: float = duration_row(
        PROCESS,
        "10s",
        "2s",
        "10m",
        "Silence after which a worker is killed and replaced",
        "40 sweeps of 250 ms, and 10 times loop_lag_max",
    )
    demo: bool = flag_row(
        PROCESS,
        "Whether GET / on the listeners for clients is a chat page, to try streamd out with",
        "For demonstrations, as `streamd demo` is: users of a daemon in production have pages of their own",
    )

    memory_limit_bytes: int = bytes_row(
        ADMISSION,
        "0",
        "64MiB",
        "1024GiB",
        "Memory that all of streamd may use, the kernel's share included",
        zero="MemoryMax, else the machine's",
    )
    conns_max: int = count_row(
        ADMISSION,
        0,
        8,
        10_000_000,
        "Most connections, over all workers",
        "A relayed stream takes two descriptors",
        zero="from the memory budget",
    )
    streams_max: int = count_row(
        ADMISSION, 0, 1, 10_000_000, "Most streams, over all workers", zero="from the memory budget"
    )
    conns_per_address_max: int = count_row(
        ADMISSION,
        0,
        1,
        1_000_000,
        "Most connections of a client's address (IPv6: /64)",
        "A browser takes 6, an office behind NAT hundreds",
        zero="off",
    )
    conns_opening_per_address_max: int = count_row(
        ADMISSION,
        0,
        1,
        1_000_000,
        "Most connections of an address that have not sent a complete request yet",
        "A limit on slow heads; a browser opens 6 at once",
        zero="off",
    )
    loop_lag_max_s: float = duration_row(
        ADMISSION,
        "1s",
        "50ms",
        "1m",
        "Lateness of a worker's loop from which it takes no new streams",
        "20 tokens' time; a tenth of worker_stuck",
        zero="off",
    )

    cors_origins: tuple[str, ...] = list_row(
        ACCESS,
        (),
        "origins such as https://chat.example",
        matching(ORIGIN),
        "Origins of the pages that may read, each written exactly",
        "Unless set, no page of another origin may",
    )
    cors_credentials: bool = flag_row(ACCESS, "Whether pages may send cookies along")
    trusted_proxies: tuple[str, ...] = list_row(
        ACCESS,
        (),
        "addresses, networks, or unix",
        check_network,
        "Proxies that are believed about clients' addresses; `unix` is every peer on a Unix socket",
    )
    forwarded_header: str = word_row(
        ACCESS,
        "x-forwarded-for",
        ("x-forwarded-for", "forwarded"),
        "Header in which trusted proxies name the client",
        "A proxy that writes one of the two passes the other through as a client sent it, so only one is believed",
    )
    proxy_protocol: bool = flag_row(ACCESS, "Whether trusted proxies speak the PROXY protocol, version 2")
    tls_cert: str = path_row(ACCESS, "Certificate chain (PEM); with it the TCP listeners speak TLS", exists=True)
    tls_key: str = path_row(ACCESS, "Private key (PEM) of tls_cert", exists=True)
    streams_auth: str = word_row(
        ACCESS,
        "key",
        ("key", "token"),
        "Right to read a stream: knowledge of its id, or a JWT for it",
        "An id drawn by streamd has 128 random bits",
        key="streams.auth",
    )
    token_secret_file: str = path_row(ACCESS, "File with the secret of HS256 tokens", exists=True)
    token_jwks_file: str = path_row(ACCESS, "File with the public keys of RS256 and EdDSA tokens", exists=True)
    token_audience: str = text_row(
        ACCESS, "", "Audience (`aud`) that a token must have", "A token made for another service opens nothing here"
    )
    token_leeway_s: float = duration_row(
        ACCESS, "30s", "0s", "5m", "Tolerance for the issuer's clock", "NTP keeps machines within a second"
    )

    otlp_endpoint: str = text_row(
        TELEMETRY,
        "",
        "Base URL of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318, for spans and metrics",
        "Unless set nothing of OpenTelemetry is loaded. The packages of streamd[otel] have to be installed. "
        "Credentials go into OTEL_EXPORTER_OTLP_HEADERS",
        check=check_collector,
        wanted="http:// or https://HOST[:PORT][/PATH] without credentials and query; /v1/traces and /v1/metrics follow",
        restart=True,
    )
    otlp_sample_ratio: float = ratio_row(
        TELEMETRY,
        "1",
        "Share of the generations without a traceparent that become spans",
        "The flag of a valid traceparent decides by itself",
        restart=True,
    )
    otlp_metrics_interval_s: float = duration_row(
        TELEMETRY,
        "60s",
        "1s",
        "1h",
        "Interval at which metrics go to otlp_endpoint",
        "The interval of OpenTelemetry's SDKs",
        zero="no metrics",
        restart=True,
    )
    engine: tuple[str, ...] = list_row(
        NODES,
        (),
        f"URLs: {ENGINE_URL}",
        check_engine_url,
        "Addresses of the Valkey or Redis servers, 7.0 or later, that hold copies of all streams, so that every node "
        "with the same engine can resume them; needs the extra streamd[cluster]",
        "Several are shards, written equally on all nodes. Without it streamd is alone, and pays nothing",
        restart=True,
    )
    node: str = text_row(
        NODES,
        "",
        "Name of this node in the other nodes' logs and in /status",
        "The machine's host name unless set",
        check=matching(UPSTREAM_NAME),
        wanted="1 to 128 letters, digits and . _ : -",
        restart=True,
    )
    engine_user: str = text_row(
        NODES,
        "",
        "Name of streamd's user in the engine's access list",
        "`default` unless set; docs/CLUSTER.md has the rights that it needs",
        check=matching(UPSTREAM_NAME),
        wanted="1 to 128 letters, digits and . _ : -",
    )
    engine_password_file: str = path_row(
        NODES,
        "File with one line, the password of engine_user",
        "Refused if others may read it: mode 0600 or 0640",
        exists=True,
    )
    engine_ca_file: str = path_row(
        NODES, "Certificates (PEM) to trust in place of the system's, for an engine with TLS", exists=True
    )
    engine_prefix: str = text_row(
        NODES,
        "sd:",
        "Prefix of all keys and channels in the engine",
        "Clusters that share an engine each need a prefix of their own",
        check=matching(ENGINE_PREFIX),
        wanted="1 to 32 letters, digits and . _ : -",
        restart=True,
    )
    engine_push_s: float = duration_row(
        NODES,
        "30ms",
        "5ms",
        "1s",
        "Interval at which new events go to nodes that read the stream",
        "A third of a visible stutter; each push is a command for the engine",
    )
    engine_timeout_s: float = duration_row(
        NODES,
        "5s",
        "1s",
        "60s",
        "Time without a reply after which a connection to the engine is given up",
        "Longer than a fork for a snapshot takes an engine of some GB",
    )
    engine_patience_s: float = duration_row(
        NODES,
        "20s",
        "1s",
        "10m",
        "Time that readers of another node's stream wait for an engine that can't be reached, before they are told to "
        "come back",
        "Sentinels take 5 to 15 s for a failover",
    )
    engine_lease_s: float = duration_row(
        NODES,
        "10s",
        "6s",
        "10m",
        "Time without a sign of life after which a node counts as lost",
        "Three beats of 2 s, and a failover by sentinels with a down-after of up to 4 s",
    )
    engine_live_ttl_s: float = duration_row(
        NODES,
        "1h",
        "1m",
        "24h",
        "Time that the copy of a running stream outlives its node",
        "Copies of finished streams stay for their retention",
    )
    engine_lookups_max: int = count_row(
        NODES,
        10_000,
        8,
        100_000,
        "Most requests of a worker that wait for the engine to find a stream of another node",
        "The readers of a dead node: 2,000 take two seconds. A principal or an address has a quarter of them",
    )
    limits_alone: str = word_row(
        NODES,
        "share",
        ("share", "full"),
        "Share of a key's limits that a node allows after engine_lease without the engine: an even one among the nodes "
        "that were there last, or all of it",
        "A share keeps the sum; full refuses no request, and lets a key have its limits at each node",
        restart=True,
    )

    upstreams: tuple[UpstreamSettings, ...] = ()
    routes: tuple[RouteOverride, ...] = ()

    _exact: dict[str, RouteSettings] = dataclasses.field(init=False, repr=False, compare=False)
    _prefixes: tuple[tuple[str, RouteSettings], ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Resolve the routes once: a look-up costs a dict and the prefixes, and stores nothing for the path."""
        resolved = [(override.path, self._resolve(override)) for override in self.routes]
        prefixes = [(path[:-1], route) for path, route in resolved if path.endswith("*")]
        object.__setattr__(self, "_exact", {path: route for path, route in resolved if not path.endswith("*")})
        prefixes.sort(key=lambda prefix: -len(prefix[0]))
        object.__setattr__(self, "_prefixes", (*prefixes, ("", self._resolve(None))))

    def _resolve(self, override: RouteOverride | None) -> RouteSettings:
        values = {}
        for field in dataclasses.fields(RouteSettings):
            own = getattr(override, field.name, None)
            values[field.name] = getattr(self, field.name) if own is None else own
        return RouteSettings(**values)

    def route(self, path: str) -> RouteSettings:
        """The settings of a path (without its query): its own route, else the longest prefix, else `Settings`."""
        exact = self._exact.get(path)
        return exact or next(route for prefix, route in self._prefixes if path.startswith(prefix))


ROWS = rows_of(Settings)
UPSTREAM_ROWS = rows_of(UpstreamSettings)
ROUTE_ROWS = (
    Row(
        Kind.TEXT,
        ROUTE,
        "Path of the route, exact or a prefix that ends in *; the exact one wins, then the longest; required",
        "",
        "",
        check=matching(ROUTE_PATH),
        wanted="a path that begins with /, with at most one * at its end",
        key="path",
        attribute="path",
    ),
    *(row for row in ROWS if row.attribute in RouteSettings.__dataclass_fields__),
)
SECTIONS = tuple(dict.fromkeys(row.section for row in ROWS))


# Loading


def load(*, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object]) -> Settings:
    """Settings of all sources: flags over environment over file over default.

    `flags` has rows' `dest` and "upstream" (a list of URLs) as keys; None is "not given".
    Raises ConfigError with all problems.
    """
    sources = Sources(ROWS, ("upstream", "route"), environ)
    tables = sources.read(file) if file is not None else {}
    if "upstream" in tables:
        sources.keep("upstreams", tuple(_upstreams(sources, tables["upstream"])), sources.at("upstream"))
    if "route" in tables:
        sources.keep("routes", tuple(_routes(sources, tables["route"])), sources.at("route"))
    variable = ENV_PREFIX + "UPSTREAM"
    sources.read_environment([variable])
    if variable in environ:
        _upstream_urls(sources, split_list(environ[variable]), f"environment {variable}")
    sources.read_flags(flags, ["upstream"])
    if (urls := flags.get("upstream")) is not None:
        _upstream_urls(sources, urls if isinstance(urls, (list, tuple)) else [urls], "flag --upstream")
    settings = Settings(**sources.values)
    for attribute, allowed in relations(settings):
        key = attribute if attribute in ("upstreams", "routes") else _key_of(attribute)
        sources.refuse(sources.where(attribute), key, _written(settings, attribute), allowed)
    if sources.problems:
        raise ConfigError(sources.problems)
    return settings


def _routes(sources: Sources, raw: object) -> Iterator[RouteOverride]:
    seen: set[str] = set()
    for index, values in sources.tables("route", raw, ROUTE_ROWS):
        path = values.get("path", "")
        if not path or path in seen:
            sources.refuse(sources.at("route", index), "route.path", path, "every [[route]] needs a path of its own")
        else:
            seen.add(path)
            yield RouteOverride(**values)


def _upstreams(sources: Sources, raw: object) -> Iterator[UpstreamSettings]:
    seen: set[str] = set()
    for index, values in sources.tables("upstream", raw, UPSTREAM_ROWS):
        where = sources.at("upstream", index)
        if not values.get("url"):
            sources.refuse(where, "upstream.url", None, "every [[upstream]] needs a url")
            continue
        values["key"] = _key(sources, values, index)
        upstream = UpstreamSettings(**values)
        _check_tls_files(sources, upstream, where)
        upstream = _with_proxy(sources, upstream, index)
        if _is_new(sources, upstream, seen, where):
            yield upstream


def _upstream_urls(sources: Sources, urls: Sequence[object], where: str) -> None:
    """Take upstreams given as URLs alone; they replace those of the sources with less precedence."""
    row = next(row for row in UPSTREAM_ROWS if row.key == "url")
    upstreams: list[UpstreamSettings] = []
    seen: set[str] = set()
    for url in urls:
        values: dict[str, Any] = {}
        sources.take_into(values, row, url, where, "upstream")
        if values and _is_new(sources, upstream := UpstreamSettings(**values), seen, where):
            upstreams.append(_with_proxy(sources, upstream))
    sources.keep("upstreams", tuple(upstreams), where)


def _check_tls_files(sources: Sources, upstream: UpstreamSettings, where: str) -> None:
    for name in ("ca_file", "client_cert", "client_key"):
        if getattr(upstream, name) and not upstream.origin.tls:
            allowed = "must be left out, or url must begin with https://"
            sources.refuse(where, f"upstream.{name}", getattr(upstream, name), allowed)
    if bool(upstream.client_cert) != bool(upstream.client_key):
        missing = "client_key" if upstream.client_cert else "client_cert"
        allowed = "must be set, because client_cert and client_key are used together"
        sources.refuse(where, f"upstream.{missing}", None, allowed)


def _with_proxy(sources: Sources, upstream: UpstreamSettings, index: int = -1) -> UpstreamSettings:
    """The upstream with the proxy that its table or the environment names. No problem's text shows credentials."""
    origin, file = upstream.origin, upstream.proxy_auth_file
    if upstream.proxy == forward_proxy.DIRECT:
        return upstream
    if upstream.proxy and origin.socket:
        sources.refuse(sources.at("upstream", index), "upstream.proxy", upstream.proxy, "must be left out for a socket")
    elif upstream.proxy:
        proxy = forward_proxy.parse_proxy(upstream.proxy)
        if file:
            proxy = proxy._replace(credentials=_proxy_credentials(sources, file, index))
        return dataclasses.replace(upstream, through=proxy)
    if file:
        sources.refuse(sources.at("upstream", index), "upstream.proxy", None, "must be set for proxy_auth_file")
    if not origin.tls:
        return upstream
    try:
        found = forward_proxy.of_environment(sources.environ, origin.host, origin.port)
    except Refused:
        allowed = 'must be http://[USER:PASSWORD@]HOST[:PORT]; NO_PROXY, or proxy = "direct", excepts a server'
        where = f"environment {forward_proxy.variable_in(sources.environ)}"
        sources.refuse(where, "upstream.proxy", None, allowed)
        return upstream
    return dataclasses.replace(upstream, through=found)


def _proxy_credentials(sources: Sources, file: str, index: int) -> str:
    try:
        line = read_regular(Path(file), _KEY_BYTES_MAX).decode("utf-8", "replace").strip()
    except OSError:
        line = ""
    if not re.fullmatch(r"[^\x00-\x1f\x7f:]+:[^\x00-\x1f\x7f]*", line):
        wanted = "must hold USER:PASSWORD on one line"
        sources.refuse(sources.at("upstream", index, "proxy_auth_file"), "upstream.proxy_auth_file", file, wanted)
        return ""
    return forward_proxy.basic(line)


def _is_new(sources: Sources, upstream: UpstreamSettings, seen: set[str], where: str) -> bool:
    """Whether no upstream before this has the same name; note a problem otherwise."""
    if upstream.name in seen:
        sources.refuse(where, "upstream.name", upstream.name, "every upstream needs a name of its own")
        return False
    seen.add(upstream.name)
    return True


_KEY_BYTES_MAX: Final = 64 * 1024  # longer than any header field may be


def _key(sources: Sources, values: Mapping[str, Any], index: int) -> str:
    """Read an upstream's API key from the file or variable that its table names. No problem's text shows the key."""
    file, variable = values.get("key_file"), values.get("key_env")
    if not file and not variable:
        return ""
    if file and variable:
        sources.refuse(sources.at("upstream", index), "upstream.key_file", file, "give key_file or key_env, not both")
        return ""
    name = "key_file" if file else "key_env"
    try:
        key = (
            read_regular(Path(file), _KEY_BYTES_MAX).decode("utf-8-sig", "replace").strip()
            if file
            else sources.environ.get(str(variable), "").strip()
        )
    except OSError:
        key = ""
    if not re.fullmatch(r"[!-~]+", key):  # the characters of a header field, without blanks
        wanted = "must hold one API key: visible ASCII on one line"
        sources.refuse(sources.at("upstream", index, name), f"upstream.{name}", file or variable, wanted)
    return key


def _key_of(attribute: str) -> str:
    return next(row.key for row in ROWS if row.attribute == attribute)


def _written(settings: Settings, attribute: str) -> object:
    """An attribute's value as people write it; None for tables, which are too long to show."""
    if attribute in ("upstreams", "routes"):
        return None
    row = next(row for row in ROWS if row.attribute == attribute)
    value = getattr(settings, attribute)
    if row.kind is Kind.DURATION:
        return row.words[0] if value == WORD_S else format_duration(value)
    return format_bytes(value) if row.kind is Kind.BYTES else value


def relations(settings: Settings) -> Iterator[tuple[str, str]]:
    """Relations between settings: for each that is broken, yields the attribute to change and its allowed values."""
    s = settings
    at_most = [
        ("target_bytes_max", "head_bytes_max", "the target is a part of the head"),
        ("body_bytes_max", "bodies_bytes_max", "otherwise the largest body never fits"),
        ("ring_slots", "log_events_max", "otherwise the log drops events that a full ring still refers to"),
        ("detach_grace_s", "detach_grace_max_s", "which bounds all detach graces"),
        ("retry_min_s", "retry_max_s", "the jitter runs between them"),
        ("loop_lag_max_s", "worker_stuck_s", "otherwise a late worker is killed before it refuses streams"),
    ]
    for less, more, why in at_most:
        if getattr(s, less) > getattr(s, more):
            yield less, f"must be at most {_key_of(more)}; {why}"
    if s.log_bytes_max < 2 * s.ring_bytes_max:
        yield (
            "log_bytes_max",
            "must be at least 2 x ring_bytes_max, or a reader that leaves its ring finds a gap in the log",
        )
    if s.logs_bytes_max and s.logs_bytes_max < s.log_bytes_max + s.event_bytes_max:
        yield "logs_bytes_max", "must be at least log_bytes_max + event_bytes_max, which a single log may take, or 0"
    for route in s.routes:
        if (route.detach_grace_s or 0) > s.detach_grace_max_s:
            yield "routes", f"route {route.path}: detach_grace must be at most detach_grace_max"
    if s.otlp_endpoint and (missing := missing_extra("otel")):
        yield "otlp_endpoint", missing
    yield from _relations_of_access(s)
    yield from _relations_of_nodes(s)


# For the addresses of `listen`, and for the sockets of systemd in their place (daemon/parent.py).
LISTEN_WITHOUT_KEYS = (
    "must be loopback or Unix sockets, unless keys_file is set (or insecure_public = true, which lets every client "
    "that reaches them use the upstreams)"
)


METRICS_BEYOND_LOOPBACK = (
    "must be loopback or a Unix socket, unless metrics_public = true: each machine that reaches it reads the metrics"
)


def _relations_of_nodes(s: Settings) -> Iterator[tuple[str, str]]:
    if not s.engine:
        needless = ("engine_user", "engine_password_file", "engine_ca_file")
        yield from ((name, "must be left out without engine") for name in needless if getattr(s, name))
        return
    try:
        urls = parse_engine_urls(s.engine)
    except Refused as refused:
        yield "engine", f"must be {refused}"
        return
    if missing := missing_extra("cluster"):
        yield "engine", missing
    if s.engine_ca_file and not urls[0].tls:
        yield "engine_ca_file", "must be left out, or engine must begin with valkeys://, rediss:// or sentinels://"
    if s.engine_user and not s.engine_password_file:
        yield "engine_password_file", "must be set, because engine_user and engine_password_file are used together"


def _relations_of_access(s: Settings) -> Iterator[tuple[str, str]]:
    addresses = [parse_address(text) for text in s.listen]
    if not (s.keys_file or s.insecure_public or all(address.is_loopback for address in addresses)):
        yield "listen", LISTEN_WITHOUT_KEYS
    fixed = [address for address in addresses if address.is_unix or address.port]
    if len(set(fixed)) < len(fixed):
        yield "listen", "must not have an address twice"
    if s.admin and parse_address(s.admin) in fixed:
        yield "admin", "must not be an address of listen too"
    if s.metrics_listen:
        scraped = parse_address(s.metrics_listen)
        if (scraped.is_unix or scraped.port) and scraped in (*fixed, *([parse_address(s.admin)] if s.admin else ())):
            yield "metrics_listen", "must not be an address of listen or admin too"
        if not (s.metrics_public or scraped.is_loopback):
            yield "metrics_listen", METRICS_BEYOND_LOOPBACK
    if bool(s.tls_cert) != bool(s.tls_key):
        yield ("tls_key" if s.tls_cert else "tls_cert"), "must be set, because tls_cert and tls_key are used together"
    if s.proxy_protocol and not s.trusted_proxies:
        yield "proxy_protocol", "needs trusted_proxies: any other peer could choose its address"
    if s.streams_auth == "token" and not (s.token_secret_file or s.token_jwks_file):
        yield "streams_auth", "needs token_secret_file or token_jwks_file"
    if (s.token_secret_file or s.token_jwks_file) and not s.token_audience:
        yield "token_audience", "must be set for tokens: without it any service's token from the same issuer fits"
    if s.conns_opening_per_address_max > s.conns_per_address_max > 0:
        yield "conns_opening_per_address_max", "must be at most conns_per_address_max, of which it is a part"
    if s.cors_credentials and not s.cors_origins:
        yield "cors_credentials", "needs cors_origins"
