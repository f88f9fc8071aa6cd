"""Settings: one table, from which the file, the environment, the flags and the reference all derive.

The table is the class body of `Settings`: a field is a row, and a row says the kind, the default, the bounds and, in
one line, why they are what they are. Everything else reads rows: nothing names a setting a second time.

    flags (--commit-after 5s) over environment (STREAMD_COMMIT_AFTER=5s) over file (commit_after = "5s") over default

Keys carry no unit, values do (`30s`, `500ms`, `16KiB`; a bare number is seconds or bytes), attributes carry the unit
that the code computes in (`commit_after_s: float`, `event_bytes_max: int`). Every value given is checked, also one that
another source overrides, and all problems are reported at once, with the key, the value, what is allowed, and the line.

`Settings(...)` itself checks nothing, so that a test may choose a bound of 3; `load()` checks all.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from streamd.addresses import (
    FIELD_VALUE,
    ORIGIN,
    ROUTE_PATH,
    UPSTREAM_NAME,
    Origin,
    check_address,
    check_admin,
    check_field_name,
    check_network,
    check_url,
    matching,
    parse_address,
    split_url,
)
from streamd.policy import Policy
from streamd.rows import (
    ENV_PREFIX,
    Kind,
    Row,
    bytes_row,
    count_row,
    duration_row,
    flag_row,
    format_bytes,
    format_duration,
    list_row,
    path_row,
    rows_of,
    table_row,
    text_row,
    word_row,
)
from streamd.sources import ConfigError, Problem, Sources, split_list

__all__ = [
    "ENV_PREFIX",
    "ROUTE_ROWS",
    "ROWS",
    "SECTIONS",
    "UPSTREAM_ROWS",
    "WORKERS_MAX",
    "ConfigError",
    "Origin",
    "Problem",
    "RouteOverride",
    "RouteSettings",
    "Settings",
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
UPSTREAM = "[[upstream]]"
ROUTE = "[[route]]"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamSettings:
    """One inference server. `url` is kept as the base without /v1, however it was written; `origin` is it in parts."""

    name: str = text_row(
        UPSTREAM,
        "",
        "what logs, metrics and X-Upstream call it; from the URL's host and port if not given",
        check=matching(UPSTREAM_NAME),
        wanted="1 to 128 letters, digits and . _ : -",
    )
    url: str = text_row(
        UPSTREAM,
        "",
        "with or without a trailing /v1; required",
        check=check_url,
        wanted="http://HOST[:PORT][/BASE] or https://…, without user, query and fragment",
    )
    models: tuple[str, ...] = list_row(
        UPSTREAM, ("*",), "models' names, * for any", lambda text: None, "the models that go there"
    )
    inflight_max: int = count_row(
        UPSTREAM,
        0,
        1,
        100_000,
        "requests at once, over all workers; vLLM's --max-num-seqs is 256 unless set",
        zero="no limit",
    )
    key: str = dataclasses.field(default="", repr=False)
    key_file: str = path_row(UPSTREAM, "the file whose one line is the server's API key", exists=True)
    key_env: str = text_row(
        UPSTREAM,
        "",
        "the environment variable that holds the server's API key",
        check=matching(re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.A)),
        wanted="a variable's name",
    )
    pass_client_key: bool = flag_row(UPSTREAM, "a client's own key goes to this server; off: it never leaves streamd")
    headers: Mapping[str, str] = table_row(
        UPSTREAM,
        "header fields, none that streamd writes itself, with values of visible ASCII",
        "further fields of each request; their values are never shown",
        check=check_field_name,
        check_value=matching(FIELD_VALUE),
        shown=False,
    )
    aliases: Mapping[str, str] = table_row(UPSTREAM, "models' names", "public name = this server's own name of a model")
    ca_file: str = path_row(UPSTREAM, "certificates (PEM) to trust in place of the system's; for https", exists=True)

    origin: Origin = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Derive the origin, and the name from it. Raises Refused for a URL that isn't one."""
        origin = split_url(self.url)
        object.__setattr__(self, "origin", origin)
        object.__setattr__(self, "url", origin.url)
        if not self.name:
            host = f"[{origin.host}]" if ":" in origin.host else origin.host
            object.__setattr__(self, "name", f"{host}:{origin.port}")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouteOverride:
    """One `[[route]]`: a path, exact or a prefix ending in `*`, and what differs there. None: as everywhere else."""

    path: str
    policy: str | None = None
    detach_grace_s: float | None = None
    commit_after_s: float | None = None
    heartbeat_s: float | None = None
    ttft_timeout_s: float | None = None
    idle_timeout_s: float | None = None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class RouteSettings:
    """What holds for one path, everything resolved."""

    policy: str
    detach_grace_s: float
    commit_after_s: float
    heartbeat_s: float
    ttft_timeout_s: float
    idle_timeout_s: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting. The order here is the order of the reference."""

    listen: tuple[str, ...] = list_row(
        LISTENING,
        ("127.0.0.1:8080",),
        "HOST:PORT, [IPV6]:PORT or unix:/path",
        check_address,
        "where readers and applications come in; loopback until there are keys",
        restart=True,
    )
    admin: str = text_row(
        LISTENING,
        "",
        "status, drain and log level; a Unix socket or loopback, because who reaches it may do all",
        check=check_admin,
        wanted="unix:/path or a loopback HOST:PORT",
        restart=True,
    )
    workers: int = count_row(
        LISTENING,
        1,
        1,
        WORKERS_MAX,
        "a core carries some 30,000 tokens/s; auto is one per core; at most 64: the slot is one character of ids",
        words=("auto",),
        restart=True,
    )
    log_level: str = word_row(
        LISTENING, "info", ("debug", "info", "warning", "error"), "info is one line per request, at its end"
    )
    log_format: str = word_row(LISTENING, "text", ("text", "json"), "text is key=value for people and journald")
    ops_public: bool = flag_row(
        LISTENING, "/metrics and /status on every listener; they tell load and upstreams' names"
    )
    insecure_public: bool = flag_row(LISTENING, "listen beyond loopback without keys: everybody may use the upstreams")
    keys_file: str = path_row(LISTENING, "the API keys, salted and hashed, as `streamd keys` writes them", exists=True)
    state_dir: str = path_row(
        LISTENING, "where logs of streams wait for a restart; empty: only systemd's store", restart=True
    )

    head_bytes_max: int = bytes_row(
        REQUESTS,
        "16KiB",
        "1KiB",
        "1MiB",
        "8 KiB of target and 8 KiB of fields: h11's own limit, twice nginx's; over it 431",
    )
    headers_max: int = count_row(
        REQUESTS, 100, 8, 1000, "SDKs send 15 to 25 and proxies add 10; Apache's limit is 100; over it 431"
    )
    target_bytes_max: int = bytes_row(
        REQUESTS, "8KiB", "256B", "64KiB", "RFC 9112 3 asks for 8,000 octets at least; over it 414"
    )
    body_bytes_max: int = bytes_row(
        REQUESTS, "32MiB", "1KiB", "1GiB", "a dozen images of 2 MB in base64 (x 4/3); over it 413"
    )
    bodies_bytes_max: int = bytes_row(
        REQUESTS, "256MiB", "64KiB", "64GiB", "all bodies held at once: 8 of the largest, or 25,000 chats of 10 KB"
    )
    head_timeout_s: float = duration_row(
        REQUESTS,
        "10s",
        "100ms",
        "5m",
        "absolute, from when the connection allows a head; HAProxy's usual 10 s; then 408",
    )
    body_grace_s: float = duration_row(REQUESTS, "10s", "100ms", "5m", "how long a body may come at any rate")
    body_bytes_per_s_min: int = count_row(
        REQUESTS,
        1000,
        1,
        1_000_000,
        "8 kbit/s: GPRS gives thrice that; 32 MiB at it would be 9 h, held by bodies_bytes_max",
    )
    keepalive_timeout_s: float = duration_row(
        REQUESTS,
        "60s",
        "1s",
        "1h",
        "idle between requests; longer than the 5 to 50 s of SDKs' pools, so the client closes first",
    )
    pipeline_bytes_max: int = bytes_row(
        REQUESTS,
        "16KiB",
        "1KiB",
        "1MiB",
        "bytes kept behind a running answer: one more head; over it the connection is closed",
    )
    close_timeout_s: float = duration_row(
        REQUESTS,
        "2s",
        "100ms",
        "1m",
        "from close to abort: a stalled peer would keep the socket for ever; RFC 9112 9.6",
    )

    commit_after_s: float = duration_row(
        RELAY,
        "10s",
        "0s",
        "1h",
        "silence before a stream gets its 200; a third of the 30 s at which the first proxies give up",
    )
    heartbeat_s: float = duration_row(
        RELAY,
        "15s",
        "1s",
        "1h",
        "WHATWG HTML 9.2.7 says every 15 s; a quarter of the 60 s of nginx and cloud balancers",
        zero="off",
    )
    connect_timeout_s: float = duration_row(
        RELAY, "5s", "50ms", "5m", "two lost SYN are 3 s; a server that needs more is down"
    )
    ttft_timeout_s: float = duration_row(
        RELAY, "300s", "100ms", "24h", "until the first event: a prefill of 128k tokens at 500/s is 256 s", zero="off"
    )
    idle_timeout_s: float = duration_row(
        RELAY,
        "120s",
        "100ms",
        "24h",
        "between events: 1,500 times the 80 ms of a slow model; comments count as life",
        zero="off",
    )
    stream_timeout_s: float = duration_row(RELAY, "0s", "1s", "168h", "for a whole stream", zero="off")
    event_bytes_max: int = bytes_row(
        RELAY,
        "1MiB",
        "1KiB",
        "16MiB",
        "one event: a token is 200 B, a Responses event with the whole answer 128k x 5 B",
    )
    upstream_retry_after_max_s: float = duration_row(
        RELAY, "60s", "1s", "60s", "SDKs ignore a Retry-After over 60 s, so none longer is passed on"
    )
    pool_idle_timeout_s: float = duration_row(
        RELAY,
        "4s",
        "1s",
        "10m",
        "uvicorn, under vLLM, closes at 5 s: a second less, against the race",
        zero="never reused",
    )
    pool_idle_max: int = count_row(
        RELAY, 64, 0, 10_000, "idle connections kept for each upstream and worker: 16 requests/s x 4 s"
    )

    notsent_lowat_bytes: int = bytes_row(
        READERS,
        "16KiB",
        "1KiB",
        "1MiB",
        "what the kernel may hold unsent: 80 tokens of 200 B; without it 2.6 MB for a stalled reader",
        restart=True,
    )
    ring_slots: int = count_row(READERS, 64, 32, 128, "frames a paused reader holds: 64 x 50 ms are 3 s; 8 B a slot")
    ring_bytes_max: int = bytes_row(
        READERS, "32KiB", "1KiB", "1MiB", "64 slots x 200 B are 13 KB, and as much again; one frame always fits"
    )
    policy: str = word_row(
        READERS,
        "coalesce",
        [policy.value for policy in Policy],
        "a full ring: catch up in few large events, skip and say so, or close",
    )
    stall_timeout_s: float = duration_row(
        READERS,
        "60s",
        "1s",
        "24h",
        "a reader that takes nothing is closed; a phone's change of network takes 30 s",
        zero="off",
    )
    catchup_bytes_max: int = bytes_row(
        READERS,
        "16KiB",
        "1KiB",
        "1MiB",
        "text of one coalesced event, and one loop turn's share of a reader: 4,000 tokens",
    )
    log_bytes_max: int = bytes_row(
        READERS,
        "1MiB",
        "16KiB",
        "1GiB",
        "a stream's replay log: 500 tokens take 5 KB, so 100,000 tokens; holds one largest event",
    )
    log_events_max: int = count_row(
        READERS, 100_000, 128, 10_000_000, "a 100,000-token generation; at least a ring of 128"
    )
    logs_bytes_max: int = bytes_row(
        READERS, "0", "1MiB", "1024GiB", "all replay logs together", zero="from the memory budget"
    )
    retention_s: float = duration_row(
        READERS, "60s", "0s", "24h", "how long a finished stream can be read: 12 times the longest retry, then 404"
    )
    resume_grace_s: float = duration_row(
        READERS,
        "30s",
        "0s",
        "1h",
        "a generation whose reader streamd or the network cut goes on so long: 6 times retry_max",
    )
    detach_grace_s: float = duration_row(
        READERS, "0s", "0s", "24h", "the same where the reader left by itself; 0 cancels at once, as SDKs' users expect"
    )
    detach_grace_max_s: float = duration_row(
        READERS, "300s", "0s", "24h", "the most that X-Stream-Detach-Grace may ask for: a GPU works unseen so long"
    )
    detached_max: int = count_row(
        READERS, 1000, 0, 1_000_000, "generations without a reader, at once: 4 servers of 256 sequences"
    )
    retry_min_s: float = duration_row(
        READERS, "1s", "0s", "10m", "least delay that `retry:` asks for; jitter runs from here"
    )
    retry_max_s: float = duration_row(
        READERS, "5s", "100ms", "10m", "10,000 readers over 4 s are 2,500 connections/s, which two workers accept"
    )

    publisher_grace_s: float = duration_row(
        STREAMS,
        "30s",
        "0s",
        "24h",
        "a publisher that broke off has so long to come back before its stream is sealed as failed",
    )
    publisher_idle_timeout_s: float = duration_row(
        STREAMS,
        "1h",
        "1s",
        "168h",
        "a published stream to which nobody publishes so long is sealed as failed: its publisher is gone for good",
        zero="off",
    )
    flush_interval_s: float = duration_row(
        STREAMS,
        "0s",
        "0s",
        "1s",
        "events of so long go out in one write; 0 is each at once; over 100 ms is seen as stutter",
    )
    wait_max_s: float = duration_row(
        STREAMS, "60s", "0s", "60s", "the most that ?wait= may ask for: proxies give up at 60 s"
    )

    drain_delay_s: float = duration_row(
        PROCESS, "0s", "0s", "10m", "from readiness 503 to closed listeners: a balancer's check interval x its failures"
    )
    drain_timeout_s: float = duration_row(
        PROCESS,
        "30s",
        "0s",
        "24h",
        "how long running generations may finish: 600 tokens at 50 ms; TimeoutStopSec has to be longer",
    )
    worker_stuck_s: float = duration_row(
        PROCESS, "10s", "2s", "10m", "a silent worker is killed; 40 sweeps of 250 ms, and 10 times loop_lag_max"
    )

    memory_limit_bytes: int = bytes_row(
        ADMISSION,
        "0",
        "64MiB",
        "1024GiB",
        "what all of streamd may use, kernel's share included",
        zero="MemoryMax, else the machine's",
    )
    conns_max: int = count_row(
        ADMISSION,
        0,
        8,
        10_000_000,
        "connections, over all workers; a relayed stream takes two descriptors",
        zero="from the memory budget",
    )
    streams_max: int = count_row(
        ADMISSION, 0, 1, 10_000_000, "streams, over all workers", zero="from the memory budget"
    )
    conns_per_address_max: int = count_row(
        ADMISSION,
        0,
        1,
        1_000_000,
        "for a client's address (IPv6: /64); a browser takes 6, an office behind NAT hundreds",
        zero="off",
    )
    conns_opening_per_address_max: int = count_row(
        ADMISSION,
        0,
        1,
        1_000_000,
        "of those, without a complete request yet: a browser opens 6 at once; holds one address's slow heads down",
        zero="off",
    )
    loop_lag_max_s: float = duration_row(
        ADMISSION,
        "1s",
        "50ms",
        "1m",
        "a loop that is so late takes no new streams: 20 tokens' time; a tenth of worker_stuck",
        zero="off",
    )

    cors_origins: tuple[str, ...] = list_row(
        ACCESS,
        (),
        "origins such as https://chat.example",
        matching(ORIGIN),
        "pages that may read; exact, none by default",
    )
    cors_credentials: bool = flag_row(ACCESS, "pages may send cookies along")
    trusted_proxies: tuple[str, ...] = list_row(
        ACCESS,
        (),
        "addresses, networks, or unix",
        check_network,
        "who is believed about clients' addresses; `unix` is whoever comes in through a Unix socket",
    )
    forwarded_header: str = word_row(
        ACCESS,
        "x-forwarded-for",
        ("x-forwarded-for", "forwarded"),
        "the one header that is believed: a proxy that writes one passes the other through as a client sent it",
    )
    proxy_protocol: bool = flag_row(ACCESS, "expect the PROXY protocol, version 2, from the trusted proxies")
    tls_cert: str = path_row(ACCESS, "the certificate chain (PEM); with it the TCP listeners speak TLS", exists=True)
    tls_key: str = path_row(ACCESS, "its private key (PEM)", exists=True)
    streams_auth: str = word_row(
        ACCESS,
        "key",
        ("key", "token"),
        "who may read a stream: who knows its id, or who has a JWT for it",
        key="streams.auth",
    )
    token_secret_file: str = path_row(ACCESS, "the secret of HS256 tokens", exists=True)
    token_jwks_file: str = path_row(ACCESS, "the public keys of RS256 and EdDSA tokens", exists=True)
    token_audience: str = text_row(
        ACCESS, "", "the `aud` that a token must have: one that was made for another service opens nothing here"
    )
    token_leeway_s: float = duration_row(
        ACCESS, "30s", "0s", "5m", "how far the issuer's clock may be off; NTP keeps machines within a second"
    )

    upstreams: tuple[UpstreamSettings, ...] = ()
    routes: tuple[RouteOverride, ...] = ()

    _exact: dict[str, RouteSettings] = dataclasses.field(init=False, repr=False, compare=False)
    _prefixes: tuple[tuple[str, RouteSettings], ...] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Resolve the routes once: a lookup costs a dict and the prefixes; nothing is kept per path asked for."""
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
        """What holds for a path (without its query): its own route, else the longest prefix, else the settings."""
        exact = self._exact.get(path)
        return exact or next(route for prefix, route in self._prefixes if path.startswith(prefix))


ROWS = rows_of(Settings)
UPSTREAM_ROWS = rows_of(UpstreamSettings)
ROUTE_ROWS = (
    Row(
        Kind.TEXT,
        ROUTE,
        "exact, or a prefix that ends in *; the exact one wins, then the longest; required",
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
    Raises ConfigError with everything that is wrong.
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
        if upstream.ca_file and not upstream.origin.tls:
            sources.refuse(where, "upstream.ca_file", upstream.ca_file, "is for a url that begins with https://")
        if _is_new(sources, upstream, seen, where):
            yield upstream


def _upstream_urls(sources: Sources, urls: Sequence[object], where: str) -> None:
    """Take upstreams given as URLs alone, in place of those of the source below."""
    row = next(row for row in UPSTREAM_ROWS if row.key == "url")
    upstreams: list[UpstreamSettings] = []
    seen: set[str] = set()
    for url in urls:
        values: dict[str, Any] = {}
        sources.take_into(values, row, url, where, "upstream")
        if values and _is_new(sources, upstream := UpstreamSettings(**values), seen, where):
            upstreams.append(upstream)
    sources.keep("upstreams", tuple(upstreams), where)


def _is_new(sources: Sources, upstream: UpstreamSettings, seen: set[str], where: str) -> bool:
    """Whether no upstream before this one has its name; a second one is a problem."""
    if upstream.name in seen:
        sources.refuse(where, "upstream.name", upstream.name, "every upstream needs a name of its own")
        return False
    seen.add(upstream.name)
    return True


def _key(sources: Sources, values: Mapping[str, Any], index: int) -> str:
    """Read an upstream's API key from where its table says; what is wrong with it is said without showing it."""
    file, variable = values.get("key_file"), values.get("key_env")
    if not file and not variable:
        return ""
    if file and variable:
        sources.refuse(sources.at("upstream", index), "upstream.key_file", file, "give key_file or key_env, not both")
        return ""
    name = "key_file" if file else "key_env"
    try:
        key = (
            Path(file).read_text("ascii", "replace").strip() if file else sources.environ.get(str(variable), "").strip()
        )
    except OSError:
        key = ""
    if not re.fullmatch(r"[!-~]+", key):  # what may stand in a header field, without blanks
        wanted = "must name what holds one API key: visible ASCII on one line"
        sources.refuse(sources.at("upstream", index, name), f"upstream.{name}", file or variable, wanted)
    return key


def _key_of(attribute: str) -> str:
    return next(row.key for row in ROWS if row.attribute == attribute)


def _written(settings: Settings, attribute: str) -> object:
    """An attribute's value as a person would write it; None for tables, which are too long to show."""
    if attribute in ("upstreams", "routes"):
        return None
    row = next(row for row in ROWS if row.attribute == attribute)
    value = getattr(settings, attribute)
    if row.kind is Kind.DURATION:
        return format_duration(value)
    return format_bytes(value) if row.kind is Kind.BYTES else value


def relations(settings: Settings) -> Iterator[tuple[str, str]]:
    """What has to hold between settings: yields the attribute to change and what is allowed, for each that doesn't."""
    s = settings
    at_most = [
        ("target_bytes_max", "head_bytes_max", "the target is a part of the head"),
        ("body_bytes_max", "bodies_bytes_max", "or the largest body never fits"),
        ("event_bytes_max", "log_bytes_max", "or the largest event is a gap at once"),
        ("ring_slots", "log_events_max", "or what a ring held is gone from the log"),
        ("detach_grace_s", "detach_grace_max_s", "which bounds all detach graces"),
        ("retry_min_s", "retry_max_s", "the jitter runs between them"),
        ("loop_lag_max_s", "worker_stuck_s", "or a worker is killed before it refuses streams"),
    ]
    for less, more, why in at_most:
        if getattr(s, less) > getattr(s, more):
            yield less, f"must be at most {_key_of(more)}; {why}"
    if s.log_bytes_max < 2 * s.ring_bytes_max:
        yield (
            "log_bytes_max",
            "must be at least 2 x ring_bytes_max, or a reader that leaves its ring finds a gap in the log",
        )
    if s.logs_bytes_max and s.logs_bytes_max < s.log_bytes_max:
        yield "logs_bytes_max", "must be at least log_bytes_max, or 0"
    for route in s.routes:
        if (route.detach_grace_s or 0) > s.detach_grace_max_s:
            yield "routes", f"route {route.path}: detach_grace must be at most detach_grace_max"
    yield from _relations_of_access(s)


def _relations_of_access(s: Settings) -> Iterator[tuple[str, str]]:
    addresses = [parse_address(text) for text in s.listen]
    if not (s.keys_file or s.insecure_public or all(address.is_loopback for address in addresses)):
        yield (
            "listen",
            "must be loopback or Unix sockets without keys_file (or say insecure_public: everybody may use it)",
        )
    fixed = [address for address in addresses if address.is_unix or address.port]
    if len(set(fixed)) < len(fixed):
        yield "listen", "must not have an address twice"
    if s.admin and parse_address(s.admin) in fixed:
        yield "admin", "must be an address of its own"
    if bool(s.tls_cert) != bool(s.tls_key):
        yield ("tls_key" if s.tls_cert else "tls_cert"), "tls_cert and tls_key go together"
    if s.proxy_protocol and not s.trusted_proxies:
        yield "proxy_protocol", "needs trusted_proxies: anybody else could choose an address"
    if s.streams_auth == "token" and not (s.token_secret_file or s.token_jwks_file):
        yield "streams_auth", "needs token_secret_file or token_jwks_file"
    if (s.token_secret_file or s.token_jwks_file) and not s.token_audience:
        yield "token_audience", "must be set for tokens: without it any service's token from the same issuer fits"
    if s.conns_opening_per_address_max > s.conns_per_address_max > 0:
        yield "conns_opening_per_address_max", "must be at most conns_per_address_max, of which it is a part"
    if s.cors_credentials and not s.cors_origins:
        yield "cors_credentials", "needs cors_origins"
