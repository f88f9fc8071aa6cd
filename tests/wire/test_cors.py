import pytest

from streamd.wire.cors import METHODS, REPLACED, Cors, HeaderList, is_preflight, parse_origin

ORIGIN = b"https://chat.example"
CORS = Cors.of(["https://chat.example", "http://localhost:3000"], credentials=False)
VARY = (b"Vary", b"Origin")


def preflight(cors: Cors = CORS, **named: bytes) -> dict[bytes, bytes]:
    asked = {"origin": ORIGIN, "access-control-request-method": b"POST"}
    asked |= {name.replace("_", "-"): value for name, value in named.items()}
    answer = cors.preflight_headers(lambda name: asked.get(name.decode()))
    assert len(dict(answer)) == len(answer)
    return dict(answer)


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://chat.example", b"https://chat.example"),
        ("HTTPS://Chat.Example/", b"https://chat.example"),
        ("https://chat.example:443", b"https://chat.example"),
        ("http://chat.example:443", b"http://chat.example:443"),
        ("http://localhost:03000", b"http://localhost:3000"),
        ("http://[::1]:8080", b"http://[::1]:8080"),
        ("tauri://localhost", b"tauri://localhost"),
        ("capacitor://localhost/", b"capacitor://localhost"),
        ("chrome-extension://bpoadfkcbjbfhfodiogcnhhhpibjhbnh", b"chrome-extension://bpoadfkcbjbfhfodiogcnhhhpibjhbnh"),
        ("app://obsidian.md:443", b"app://obsidian.md:443"),
    ],
)
def test_an_origin_is_normalized(text: str, origin: bytes) -> None:
    assert parse_origin(text) == origin


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        "null",
        "chat.example",
        "https://",
        "https://*.example",
        "https://a/b",
        "https://u@a",
        "file://",
        "tauri:localhost",
        "1a://localhost",
        "https://a\r\nX: y",
    ],
)
def test_a_text_that_is_no_origin_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"https://chat\.example"):
        parse_origin(text)


@pytest.mark.parametrize("origin", [None, ORIGIN, b"null"])
def test_without_origins_there_is_no_cors_header(origin: bytes | None) -> None:
    off = Cors()
    assert off.response_headers(origin) == []
    assert preflight(off) == {}


def test_an_allowed_origin_is_echoed_with_the_exposed_headers() -> None:
    exposed = (b"Access-Control-Expose-Headers", b"X-Stream-Id, X-Request-Id, X-Upstream, Retry-After")
    assert CORS.response_headers(ORIGIN) == [VARY, (b"Access-Control-Allow-Origin", ORIGIN), exposed]


def test_credentials_are_allowed_only_to_an_allowed_origin() -> None:
    cors = Cors.of(["https://chat.example"], credentials=True)
    allow = (b"Access-Control-Allow-Credentials", b"true")
    assert allow in cors.response_headers(ORIGIN)
    assert preflight(cors)[allow[0]] == allow[1]
    assert cors.response_headers(b"https://other.example") == [VARY]


@pytest.mark.parametrize(
    "origin",
    [
        None,
        b"",
        b"null",
        b"*",
        b"https://chat.example.evil",
        b"https://evil-chat.example",
        b"http://chat.example",
        b"https://chat.example:8443",
        b"https://chat.example/",
        b"HTTPS://CHAT.EXAMPLE",
        b"https://chat.example, https://chat.example",
    ],
)
def test_any_other_origin_gets_only_vary(origin: bytes | None) -> None:
    assert CORS.response_headers(origin) == [VARY]
    if origin is not None:
        assert list(preflight(origin=origin)) == [b"Vary"]


def test_a_preflight_of_an_allowed_origin_is_granted() -> None:
    names = b"authorization,content-type, last-event-id,idempotency-key,x-stream-policy,x-stainless-os"
    assert preflight(access_control_request_headers=names) == {
        b"Vary": b"Origin, Access-Control-Request-Method, Access-Control-Request-Headers",
        b"Access-Control-Allow-Origin": ORIGIN,
        b"Access-Control-Allow-Methods": b"GET, POST, PUT, DELETE, HEAD",
        b"Access-Control-Allow-Headers": names,
        b"Access-Control-Max-Age": b"7200",
    }


@pytest.mark.parametrize(
    "names",
    [
        b"",
        b",",
        b"a,,b",
        b"a b",
        b"a;b",
        b"a\r\nX-Evil: 1",
        b"a\x00",
        b"\xc3\xa9",
        b"*,a\n",
        b",".join([b"a"] * 65),
        b"a" * 2049,
    ],
)
def test_odd_names_are_not_echoed(names: bytes) -> None:
    answer = preflight(access_control_request_headers=names)
    assert b"Access-Control-Allow-Headers" not in answer
    assert answer[b"Access-Control-Allow-Methods"] == METHODS


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({b"origin": b"x", b"access-control-request-method": b"PUT"}, True),
        ({b"origin": b"x"}, False),
        ({b"access-control-request-method": b"PUT"}, False),
    ],
)
def test_a_preflight_needs_origin_and_access_control_request_method(asked: dict[bytes, bytes], expected: bool) -> None:
    assert is_preflight(asked.get) is expected
    if not expected:
        assert [name for name, _ in CORS.preflight_headers(asked.get)] == [b"Vary"]


def test_every_cors_header_of_streamd_replaces_that_of_an_upstream() -> None:
    written: HeaderList = Cors.of(["https://chat.example"], credentials=True).response_headers(ORIGIN)
    ours = {name.lower() for name, _ in written} | {
        name.lower() for name in preflight(access_control_request_headers=b"a")
    }
    assert {name for name in ours if name.startswith(b"access-control-")} <= REPLACED
