"""HTTP/1.1 heads: collected under limits, checked strictly, parsed by h11; and written.

Most heads are of a few usual forms, which quick_head.py reads in a tenth of the time. All other heads, and all that may
be wrong, go through three gates, and the first that refuses a head wins:

1. `HeadReader` collects its bytes. Limits hold before a parser sees anything: a head over `head_bytes_max` is refused
   before its end has come. So are bytes that can't become a head any more (a bare LF, a TLS hello on a plain port), so
   that no client waits for an answer to them.
2. The check of this module. h11 0.16 is lenient where leniency is how requests are smuggled: it takes Content-Length
   together with Transfer-Encoding, folds lines, takes a bare LF for a line end, control bytes in values, `Host: a b`,
   HTTP/9.9, and merges equal Content-Lengths. RFC 9112 lets a recipient refuse all of these. A proxy that reads them
   differently from its neighbour is the whole of request smuggling, so they are refused here.
3. h11, with a fresh `h11.Connection` per head that is thrown away afterwards, so that it takes no memory between heads.
   (It costs 50 us a head, and 7 us for each body chunk: bodies never go through it.) Its refusals are streamd's,
   but for the CRLF in front of a request, which it never gets to see.

Accepted beside the everyday form, because the RFCs say so: absolute-form targets (their authority replaces Host), up to
two CRLF in front of a request (RFC 9112 2.2), HTTP/1.0, minor versions above 1 (RFC 9110 2.5), obs-text in values.

Stricter than the RFCs, by choice: a request's Content-Length comes once; Host is limited to the characters that name
hosts in practice (letters, digits, `-._~`, IPv6 in brackets: reg-name would allow percent-encodings and `!$&'()*+,;=`,
which is how Host poisoning is tried); Connection may not name the fields that frame, route or authorize a request; no
`%00` and no broken percent-encoding in a path.

Two offers of another protocol are ignored, which RFC 9110 7.8 allows, and not counted as `upgrade`: h2c, which RFC 9113
3.1 retired (Java's HttpClient sends it with every first request), and any offer in HTTP/1.0.

Rejected: parsing with h11 alone and checking its result (a bare LF or a fold is gone by then); keeping an
h11.Connection per connection (its state machine would have to be told of bodies that it doesn't read).
"""

from __future__ import annotations

import http
import ipaddress
import re
from collections.abc import Iterable
from typing import NamedTuple, NoReturn

import h11

from streamd.wire.heads import (
    HEAD_LIMITS,
    Framing,
    Headers,
    HeadLimits,
    RequestHead,
    ResponseHead,
    joined,
)
from streamd.wire.possessive import compiled
from streamd.wire.quick_head import quick_request, quick_response

__all__ = ("HEAD_LIMITS", "Framing", "HeadLimits", "Headers", "RequestHead", "ResponseHead")


class RemoteProtocolError(Exception):
    """The peer broke the rules.

    `status` is the answer for a client, `code` a short snake_case word for logs and the error object, and the text says
    how to correct the mistake. For a response's head the status is always 502; for a body, of either side, it is 400.
    `before`: the payload of a body that was whole in the same read, in front of the broken part.
    """

    def __init__(self, text: str, code: str, status: int = 400) -> None:
        super().__init__(text)
        self.code = code
        self.status = status
        self.before: list[bytes] = []


class LocalProtocolError(Exception):
    """streamd was about to break the rules: a bug, or an injection that got this far."""


RESPONSE_OPENING = b"HTTP/1."  # `opening` of a HeadReader for responses

LEADING_LINES_MAX = 2  # RFC 9112 2.2 asks for at least one: old clients send a CRLF behind a body

_TCHAR = rb"!#$%&'*+\-.^_`|~0-9A-Za-z"  # RFC 9110 5.6.2
_TOKEN = compiled(rb"[" + _TCHAR + rb"]+")
_TOKEN_BYTES = bytes(byte for byte in range(256) if _TOKEN.fullmatch(bytes([byte])))
_FIELD_VALUE = compiled(rb"[\t\x20-\x7e\x80-\xff]*+")  # RFC 9110 5.5, obs-text included
_VALUE_BYTES = bytes(byte for byte in range(256) if _FIELD_VALUE.fullmatch(bytes([byte])))
_FIELDS = compiled(rb"(?:[" + _TCHAR + rb"]++:[\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n")
_REQUEST_LINE = compiled(rb"([" + _TCHAR + rb"]++) ([\x21-\x7e]++) HTTP/([0-9])\.([0-9])\r\n")
_STATUS_LINE = compiled(rb"HTTP/([0-9])\.([0-9]) ([0-9]{3})(?: [\t\x20-\x7e\x80-\xff]*+)?\r\n")
_BARE = compiled(rb"\r(?!\n)|(?<!\r)\n|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTENT_LENGTH = compiled(rb"\r\ncontent-length:[ \t]*+([^\r]*+)", re.IGNORECASE)
_HOST = compiled(rb"\r\nhost:[ \t]*+([^\r]*+)", re.IGNORECASE)
_CONTENT_TYPE = compiled(rb"\r\ncontent-type:[ \t]*+([^\r]*+)", re.IGNORECASE)
_QUOTED = compiled(rb'"(?:[^"\\]|\\.)*+"')  # RFC 9110 5.6.4
_TRANSFER_ENCODING = compiled(rb"\r\ntransfer-encoding:[ \t]*+([^\r]*+)", re.IGNORECASE)
_DIGITS = compiled(rb"[0-9]{1,18}")  # 18 digits stay below 2^63
# RFC 3986 3.3 pchar and "/", and the characters that browsers leave raw (WHATWG URL, path percent-encode set).
_PATH = compiled(rb"/(?:[A-Za-z0-9\-._~!$&'()*+,;=:@/|\[\]]|%(?!00)[0-9A-Fa-f]{2})*+")
_ESCAPE = compiled("%([0-9A-Fa-f]{2})")
_SLASHES = compiled("//+")
_ABSOLUTE = compiled(rb"(https?)://([^/?]*+)(.*+)", re.IGNORECASE)
_AUTHORITY = compiled(rb"(?:([A-Za-z0-9\-._~]++)|\[([0-9A-Fa-f:.]++)\])(?::([0-9]{0,5}))?")


class HeadState(NamedTuple):
    """A HeadReader between two reads."""

    held: bytes
    leading_lines: int


class HeadReader:
    """Collects the bytes of a connection's heads, one after another.

    Each head has to begin with `opening`. For requests, which may begin with any method, it is empty, and up to
    `LEADING_LINES_MAX` empty lines in front are skipped. Raises RemoteProtocolError for bytes that can't become a head.
    """

    __slots__ = ("_held", "_leading_lines", "_limits", "_opening", "_scanned")

    def __init__(self, limits: HeadLimits = HEAD_LIMITS, *, opening: bytes = b"") -> None:
        self._limits = limits
        self._opening = opening
        self._held = bytearray()
        self._leading_lines = 0
        self._scanned = 0  # no blank line ends, and no bare LF is, before this offset of _held

    @property
    def bytes_held(self) -> int:
        """Bytes of a head that has begun and not ended; 0 between heads."""
        return len(self._held)

    def state(self) -> HeadState:
        """What go_on_from() takes."""
        return HeadState(bytes(self._held), self._leading_lines)

    def go_on_from(self, state: HeadState) -> None:
        """Take the state of another reader; this one is new. Raises ValueError for bytes that can't have begun a head,
        by this reader's limits.
        """
        if not 0 <= state.leading_lines <= (0 if self._opening else LEADING_LINES_MAX):
            raise ValueError("a head with empty lines in front that can't be")
        self._leading_lines = state.leading_lines
        try:
            found = self.feed(state.held)
        except RemoteProtocolError as broken:
            raise ValueError(f"a head that can't begin so: {broken}") from None
        if found is not None or self.state() != state:
            raise ValueError("a head that is whole already")

    def feed(self, chunk: bytes) -> tuple[bytes, bytes] | None:
        """The next bytes in; out the whole head with its blank line and the bytes after it, or None: more is needed.

        A head may come in any cut; the work is linear in its bytes. After a head the reader is ready for the next.
        """
        held = self._held
        held += chunk
        if held.startswith(b"\r") and not self._opening:
            self._skip_leading_lines()
        end = held.find(b"\r\n\r\n", max(self._scanned - 3, 0))
        if end < 0:
            self._check_unfinished()
            return None
        end += 4
        if end > self._limits.head_bytes_max:
            self._refuse_size()
        head, rest = bytes(held[:end]), bytes(held[end:])
        self._held = bytearray()
        self._scanned = self._leading_lines = 0
        return head, rest

    def _skip_leading_lines(self) -> None:
        held = self._held
        while held.startswith(b"\r\n") and self._leading_lines < LEADING_LINES_MAX:
            del held[:2]
            self._leading_lines += 1
        self._scanned = 0
        if held.startswith(b"\r") and held != b"\r":
            raise RemoteProtocolError(
                "begin the request with its request line, not with empty lines", "bad_request_line"
            )

    def _check_unfinished(self) -> None:
        held, scanned = self._held, self._scanned
        if len(held) > self._limits.head_bytes_max:
            self._refuse_size()
        if held.count(b"\n", scanned) != held.count(b"\r\n", max(scanned - 1, 0)):
            status = 502 if self._opening else 400
            raise RemoteProtocolError("end each line of the head with CRLF, not with a bare LF", "bare_lf", status)
        if self._opening:
            if not held.startswith(self._opening[: len(held)]):
                raise _bad_status_line()
        elif held and held[0] not in _TOKEN_BYTES and held != b"\r":
            raise RemoteProtocolError(_NOT_A_METHOD, "bad_request_line")
        self._scanned = len(held)

    def _refuse_size(self) -> NoReturn:
        if self._opening:
            raise _head_too_large(self._limits, 502)
        if self._held.find(b"\r\n", 0, self._limits.head_bytes_max) < 0:
            raise _target_too_long(self._limits)
        raise _head_too_large(self._limits, 431)


_NOT_A_METHOD = (
    "begin the request with a method, as in 'GET /path HTTP/1.1'; "
    "for TLS use a port that speaks it (is the URL's scheme wrong?)"
)


def _target_too_long(limits: HeadLimits) -> RemoteProtocolError:
    return RemoteProtocolError(f"shorten the request target to {limits.target_bytes_max} bytes", "target_too_long", 414)


def _head_too_large(limits: HeadLimits, status: int) -> RemoteProtocolError:
    return RemoteProtocolError(f"send a head of at most {limits.head_bytes_max} bytes", "head_too_large", status)


def _bad_status_line() -> RemoteProtocolError:
    return RemoteProtocolError("begin the answer with an HTTP/1.1 status line", "bad_status_line", 502)


def parse_request(head: bytes, limits: HeadLimits = HEAD_LIMITS) -> RequestHead:
    """The parts of a whole head with its blank line. Raises RemoteProtocolError with the status to answer."""
    return quick_request(head, limits) or judged_request(head, limits)


def judged_request(head: bytes, limits: HeadLimits = HEAD_LIMITS) -> RequestHead:
    """As parse_request(), through all gates."""
    _check_size(head, limits, 431)
    line = _REQUEST_LINE.match(head)
    if line is None:
        _refuse_request_line(head)
    method, target, major, minor = line.groups()
    if len(target) > limits.target_bytes_max:
        raise _target_too_long(limits)
    if major != b"1":
        raise RemoteProtocolError("speak HTTP/1.1 (or 1.0); this port has no other version", "bad_version", 505)
    http10 = minor == b"0"
    _check_fields(head, line.end(), 400)
    host = _host(head, http10)
    _check_content_type(head)
    framing, content_length = _framing(head, http10, 400)
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=len(head))
    event = _through_h11(connection, head, 400)
    assert isinstance(event, h11.Request)
    headers = tuple(event.headers)
    origin_form, authority = _resolve_target(method, target, host)
    path, _, query = origin_form.decode("ascii").partition("?")
    path = normal_path(path)
    by_name = joined(headers)
    options = _connection_options(by_name, 400)
    return RequestHead(
        method=method.decode("ascii"),
        target=origin_form,
        path=path,
        query=query,
        http10=http10,
        headers=headers,
        authority=authority,
        framing=framing,
        content_length=content_length,
        keep_alive=b"close" not in options and (not http10 or b"keep-alive" in options),
        expect_continue=_expects_continue(by_name) and not http10,
        upgrade=not http10 and by_name.get(b"upgrade", b"").lower() not in _UPGRADES_IGNORED,
        bytes_read=len(head),
        by_name=by_name,
    )


_UPGRADES_IGNORED = (b"", b"h2c")


_ASKED = h11.Request(method=b"GET", target=b"/", headers=[(b"host", b"a")])


def parse_response(head: bytes, request_method: str, limits: HeadLimits = HEAD_LIMITS) -> ResponseHead:
    """The parts of a whole head that answers a `request_method`. Raises RemoteProtocolError, always a 502."""
    return quick_response(head, request_method, limits) or judged_response(head, request_method, limits)


def judged_response(head: bytes, request_method: str, limits: HeadLimits = HEAD_LIMITS) -> ResponseHead:
    """As parse_response(), through all gates."""
    _check_size(head, limits, 502)
    line = _STATUS_LINE.match(head)
    if line is None:
        _refuse_bytes(head, 502)
        raise _bad_status_line()
    major, minor, digits = line.groups()
    status = int(digits)
    if major != b"1" or not 100 <= status <= 599:
        raise RemoteProtocolError("the answer's status line has no known version and status", "bad_status_line", 502)
    if status == 101:
        raise RemoteProtocolError("the answer switches protocols unasked", "unasked_upgrade", 502)
    http10 = minor == b"0"
    _check_fields(head, line.end(), 502)
    framing, content_length = _framing(head, http10, 502)
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=len(head))
    connection.send(_ASKED)  # h11 takes no 1xx before a request
    event = _through_h11(connection, head, 502)
    assert isinstance(event, h11.Response | h11.InformationalResponse)
    headers = tuple(event.headers)
    by_name = joined(headers)
    options = _connection_options(by_name, 502)
    if request_method == "HEAD" or status < 200 or status in (204, 304):
        framing, content_length = Framing.NONE, 0
    elif framing is Framing.NONE:
        framing = Framing.UNTIL_CLOSE
    return ResponseHead(
        status=status,
        reason=event.reason,
        headers=headers,
        framing=framing,
        content_length=content_length,
        keep_alive=not http10 and b"close" not in options and framing is not Framing.UNTIL_CLOSE,
        by_name=by_name,
    )


def _check_size(head: bytes, limits: HeadLimits, status: int) -> None:
    if len(head) > limits.head_bytes_max:
        raise _head_too_large(limits, status)
    if head.count(b"\r\n") - 2 > limits.headers_max:  # less the first line and the blank line
        raise RemoteProtocolError(f"send at most {limits.headers_max} header fields", "too_many_headers", status)


def _check_fields(head: bytes, start: int, status: int) -> None:
    if _FIELDS.fullmatch(head, start):
        return
    _refuse_bytes(head, status)
    for field in head[start:].split(b"\r\n"):
        name, colon, _ = field.partition(b":")
        if field[:1] in (b" ", b"\t"):
            raise RemoteProtocolError(
                "write each header field on one line: folded lines are obsolete", "obs_fold", status
            )
        if field and not colon:
            raise RemoteProtocolError("write each header field as 'name: value'", "bad_header", status)
        if name[-1:] in (b" ", b"\t"):
            raise RemoteProtocolError(
                "put no space between a header's name and its colon", "space_before_colon", status
            )
        if field and not _TOKEN.fullmatch(name):
            raise RemoteProtocolError(
                "use only letters, digits and !#$%&'*+-.^_`|~ in header names", "bad_header", status
            )
    raise RemoteProtocolError("end the head with one empty line", "bad_header", status)


def _refuse_bytes(head: bytes, status: int) -> None:
    """Raise for the first CR, LF or control byte that can't stand where it stands; return if there is none."""
    found = _BARE.search(head)
    if found is None:
        return
    byte, where = found[0], f"(at byte {found.start()} of the head)"
    if byte == b"\n":
        raise RemoteProtocolError(f"end each line of the head with CRLF, not with a bare LF {where}", "bare_lf", status)
    if byte == b"\r":
        raise RemoteProtocolError(f"remove the CR that isn't followed by LF {where}", "bare_cr", status)
    raise RemoteProtocolError(f"remove the control byte 0x{byte[0]:02x} {where}", "control_byte", status)


def _refuse_request_line(head: bytes) -> NoReturn:
    _refuse_bytes(head, 400)
    line = head[: head.find(b"\r\n")]
    parts = line.split(b" ")
    if len(parts) == 2:
        raise RemoteProtocolError(
            "end the request line with ' HTTP/1.1'; HTTP/0.9 isn't spoken here", "bad_request_line"
        )
    if len(parts) != 3 or not parts[1]:
        raise RemoteProtocolError(
            "write the request line as 'METHOD TARGET HTTP/1.1' with single spaces", "bad_request_line"
        )
    if not _TOKEN.fullmatch(parts[0]):
        raise RemoteProtocolError(_NOT_A_METHOD, "bad_request_line")
    if not parts[1].isascii():
        raise RemoteProtocolError("percent-encode what isn't ASCII in the request target", "bad_target")
    raise RemoteProtocolError("write the version as HTTP/1.1", "bad_request_line")


def _through_h11(connection: h11.Connection, head: bytes, status: int) -> object:
    """The head as h11's event. A head that passed the check of this module but not h11 is refused in h11's words."""
    try:
        connection.receive_data(head)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        hint = error.error_status_hint if status == 400 else status
        code = "bad_transfer_encoding" if hint == 501 else "bad_head"
        raise RemoteProtocolError(f"correct the head: {error}", code, hint) from error
    assert event is not h11.NEED_DATA  # gate 1 found the blank line
    return event


def _host(head: bytes, http10: bool) -> bytes:
    """RFC 9112 3.2: exactly one valid Host; an HTTP/1.0 client may leave it out."""
    hosts = _raw_values(_HOST, head)
    if len(hosts) > 1:
        raise RemoteProtocolError("send one Host header", "doubled_host")
    if not hosts:
        if http10:
            return b""
        raise RemoteProtocolError("send a Host header", "missing_host")
    _check_authority(hosts[0])
    return hosts[0]


def _check_content_type(head: bytes) -> None:
    """RFC 9110 8.3: a single media type. Of two of them servers take the first, the last, or both joined."""
    types = _raw_values(_CONTENT_TYPE, head)
    if len(types) > 1 or (types and b"," in _QUOTED.sub(b"", types[0])):
        raise RemoteProtocolError("send one Content-Type", "doubled_content_type")


def _raw_values(field: re.Pattern[bytes], head: bytes) -> list[bytes]:
    """The values of a field, one for each of its lines: raw, where h11 would refuse, merge or lower-case them."""
    return [value.rstrip(b" \t") for value in field.findall(head)]


def _check_authority(authority: bytes) -> None:
    """RFC 9110 7.2 uri-host [":" port], of the hosts that exist. An empty host is invalid for http (RFC 9110 4.2.1)."""
    match = _AUTHORITY.fullmatch(authority)
    if match is not None and int(match[3] or b"0") <= 65535:
        if match[2] is None:
            return
        try:
            ipaddress.IPv6Address(match[2].decode("ascii"))
            return
        except ValueError:
            pass
    raise RemoteProtocolError("name a host, as in 'Host: example.org:8080', and nothing else", "bad_host")


def _resolve_target(method: bytes, target: bytes, host: bytes) -> tuple[bytes, bytes]:
    """RFC 9112 3.2: the target in origin-form (or `*`), and its authority."""
    authority = host
    if method == b"CONNECT":
        raise RemoteProtocolError("use another method: no tunnels are opened here", "connect_unsupported", 501)
    if target == b"*":
        if method != b"OPTIONS":
            raise RemoteProtocolError("use the target '*' with OPTIONS alone", "bad_target")
        return target, authority
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        authority, target = absolute[2], absolute[3]
        _check_authority(authority)
        if not target.startswith(b"/"):
            target = b"/" + target
    if b"#" in target:
        raise RemoteProtocolError("leave the fragment ('#' and after) out of the request target", "bad_target")
    path = target.partition(b"?")[0]
    if not path.startswith(b"/"):
        raise RemoteProtocolError("begin the request target with '/' (or http://)", "bad_target")
    if not _PATH.fullmatch(path):
        raise RemoteProtocolError(
            "percent-encode the path of the request target as RFC 3986 says, without %00", "bad_target"
        )
    return target, authority


def normal_path(path: str) -> str:
    """The path in RFC 3986's normal form (6.2.2): no escape for an unreserved character, other escapes in capitals.

    Slashes in a row are a single slash, as in nginx's `merge_slashes`: clients join a base that ends in a slash with a
    path that begins with a slash. Done once, here: rights, routes, dialects, hashes and the upstream all see the same
    path.
    """
    if "//" in path:
        path = _SLASHES.sub("/", path)
    return _ESCAPE.sub(_normal_escape, path) if "%" in path else path


def _normal_escape(escape: re.Match[str]) -> str:
    character = chr(int(escape[1], 16))
    return character if character.isascii() and (character.isalnum() or character in "-._~") else escape[0].upper()


def _framing(head: bytes, http10: bool, status: int) -> tuple[Framing, int]:
    """RFC 9112 6.3 without its leniencies, from the raw head because h11 merges equal Content-Lengths."""
    lengths = _raw_values(_CONTENT_LENGTH, head)
    codings = [coding.lower() for coding in _raw_values(_TRANSFER_ENCODING, head)]
    if codings and lengths:
        raise RemoteProtocolError("send Content-Length or Transfer-Encoding, not both", "length_and_encoding", status)
    if codings and http10:
        raise RemoteProtocolError("leave Transfer-Encoding out of HTTP/1.0", "encoding_in_http10", status)
    if codings:
        if codings != [b"chunked"]:
            # RFC 9112 6.3: without chunked at the end the length of a request can't be known; 6.1: 501 where only the
            # coding below it is unknown.
            names = [name.strip(b" \t") for coding in codings for name in coding.split(b",")]
            is_framed = names[-1] == b"chunked" and b"chunked" not in names[:-1]
            status = 501 if status == 400 and is_framed else status
            raise RemoteProtocolError(
                "send 'Transfer-Encoding: chunked', once, or none", "bad_transfer_encoding", status
            )
        return Framing.CHUNKED, 0
    if not lengths:
        return Framing.NONE, 0
    if not _DIGITS.fullmatch(lengths[0]) or (len(lengths) > 1 and (status == 400 or len(set(lengths)) > 1)):
        raise RemoteProtocolError("send one Content-Length of 1 to 18 decimal digits", "bad_content_length", status)
    return Framing.LENGTH, int(lengths[0])


_FIXED_FIELDS = frozenset((b"content-length", b"host", b"content-type", b"content-encoding", b"authorization"))


def _connection_options(by_name: dict[bytes, bytes], status: int) -> frozenset[bytes]:
    """The options of Connection. RFC 9110 7.6.1: a sender must not name fields there that are for all recipients.

    Obeying such an option would let a client strip the framing or the credentials off the request for the next hop.
    """
    named = by_name.get(b"connection")
    if named is None:
        return frozenset()
    options = frozenset(option.strip(b" \t").lower() for option in named.split(b","))
    if options & _FIXED_FIELDS:
        raise RemoteProtocolError("name only hop-by-hop fields in Connection", "bad_connection_option", status)
    return options


def _expects_continue(by_name: dict[bytes, bytes]) -> bool:
    expect = by_name.get(b"expect")
    if expect is None:
        return False
    if any(option.strip(b" \t").lower() not in (b"100-continue", b"") for option in expect.split(b",")):
        raise RemoteProtocolError("expect 100-continue or nothing", "bad_expectation", 417)
    return True


# RFC 9110 7.6.1 and 11.7 (proxy authentication is between neighbours), Trailer because trailers are dropped.
HOP_BY_HOP: frozenset[bytes] = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)


_NAMES_NO_FIELD = frozenset((b"keep-alive", b"close"))


def end_to_end(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers for the next hop: without hop-by-hop fields and those that Connection names (RFC 9110 7.6.1)."""
    headers = tuple(headers)
    named = [value.lower() for name, value in headers if name == b"connection"]
    dropped = HOP_BY_HOP
    if named and not _NAMES_NO_FIELD.issuperset(named):
        dropped = HOP_BY_HOP.union(option.strip(b" \t") for value in named for option in value.split(b","))
    return [field for field in headers if field[0] not in dropped]


_STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode("ascii") for status in http.HTTPStatus
}


def encode_response_head(status: int, headers: Iterable[tuple[bytes, bytes]], *, reason: bytes | None = None) -> bytes:
    """A response head with its blank line. `reason` None: the registered phrase. LocalProtocolError on injection."""
    line = _STATUS_LINES.get(status) if reason is None else None
    if line is None:
        if not 100 <= status <= 599 or not _FIELD_VALUE.fullmatch(reason or b""):
            raise LocalProtocolError(f"no status line can be made of {status} {reason!r}")
        line = b"HTTP/1.1 %d %b\r\n" % (status, reason or b"")
    return line + _encode_fields(headers)


def encode_request_head(method: str, target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """A request head with its blank line, written anew from parsed parts. Raises LocalProtocolError on injection."""
    line = b"%b %b HTTP/1.1\r\n" % (method.encode("ascii", "replace"), target)
    if not _REQUEST_LINE.fullmatch(line):
        raise LocalProtocolError(f"no request line can be made of {method!r} {target!r}")
    return line + _encode_fields(headers)


def _encode_fields(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    headers = tuple(headers)
    if not headers:
        return b"\r\n"
    # All names at once, and all values: no name holds a colon and no value an LF, so each separator is one that was put
    # between two of them.
    names, values = zip(*headers, strict=True)
    between = len(headers) - 1
    if (
        b":".join(names).translate(None, _TOKEN_BYTES) != b":" * between
        or b"\n".join(values).translate(None, _VALUE_BYTES) != b"\n" * between
        or not all(names)
    ):
        _refuse_field(headers)
    return b"".join([b"%b: %b\r\n" % field for field in headers]) + b"\r\n"


def _refuse_field(headers: Headers) -> NoReturn:
    name, value = next(
        field for field in headers if not _TOKEN.fullmatch(field[0]) or not _FIELD_VALUE.fullmatch(field[1])
    )
    raise LocalProtocolError(f"no header field can be made of {name!r}: {value!r}")
