"""Collected: the bytes of an answer that isn't passed on as it comes, with their place in the budget.

A request for a stream is answered with something else, or its first bytes don't tell yet; or its reader has a stream's
head already (commit_after), and an error status comes. Such a body is held: until its kind is known, until JSON is
whole, or for the text of an error.
"""

from __future__ import annotations

import re
from dataclasses import replace

from streamd.core.admission import Admission
from streamd.reasons import CloseReason
from streamd.wire import content_coding
from streamd.wire.answer_fields import is_event_stream
from streamd.wire.dialects.api import Api
from streamd.wire.dialects.failure import TEXT_CHARS_MAX, Failure, failure_of
from streamd.wire.heads import Framing, ResponseHead, joined
from streamd.wire.json_lines import begins_lines
from streamd.wire.opening import OPENING_BYTES_MAX, BodyKind, kind_of

# Bound of an error text for an event: the error object of an OpenAI-compatible server takes a few hundred bytes.
ERROR_BYTES_MAX = 16 * 1024

# Longest name of a coding or a media type that an error repeats; registered names have 60 characters at most.
NAME_CHARS_MAX = 100

_title = re.compile(rb"<title[^>]*>([^<]{1,200})</title", re.IGNORECASE).search


class Collected:
    """A body, as far as it has come, and the head in front of it."""

    __slots__ = ("_admission", "_bytes_max", "_has_lines", "body", "head")

    def __init__(self, admission: Admission, head: ResponseHead, bytes_max: int) -> None:
        self._admission = admission
        self._bytes_max = bytes_max
        self.head = head
        self.body = bytearray()
        self._has_lines: bool | None = None  # None: more bytes decide

    def take(self, piece: bytes) -> bool:
        """Hold the next bytes, of a step of a read. False: as many as may be held are there, so this was the last."""
        self.body += piece
        self._admission.charge_held(len(piece))
        return len(self.body) < self._bytes_max

    def skip_blanks(self) -> None:
        """Let blank bytes in front go: servers send them as signs of life, and they mean nothing in either kind."""
        if not self.body[:1].isspace():
            return
        rest = self.body.lstrip()
        self._admission.charge_held(len(rest) - len(self.body))
        self.body = rest

    def let_go(self) -> bytes:
        """The bytes, which aren't held any more."""
        body, self.body = bytes(self.body), bytearray()
        self._admission.charge_held(-len(body))
        return body

    def kind(self, *, at_end: bool) -> BodyKind | None:
        """The kind of the body; None: more bytes decide."""
        return kind_of(bytes(self.body[: 2 * OPENING_BYTES_MAX]), is_typed=self.is_typed, at_end=at_end)

    def has_lines(self, api: Api) -> bool:
        """Whether the body is lines of JSON that are events of the API."""
        if self._has_lines is None and not self.is_error:
            self._has_lines = begins_lines(api, bytes(self.body))
        return self._has_lines or False

    @property
    def is_typed(self) -> bool:
        """Whether the head says that this is a stream."""
        return is_event_stream(self.head.get(b"content-type"))

    @property
    def is_error(self) -> bool:
        """Whether the head says already that this is no answer."""
        return not may_hold_events(self.head)

    @property
    def may_be_whole(self) -> bool:
        """Whether JSON can end where these bytes end."""
        return self.body[-64:].rstrip().endswith((b"}", b"]"))

    def failure(self, wait_s: int | None) -> Failure:
        """The error that the body tells, or else the fact that this is no stream. `wait_s`: the head's Retry-After."""
        head, code = self.head, CloseReason.UPSTREAM_REFUSED.word
        said = f"The upstream answered {head.status}"
        coding = coding_of(head)
        if coding is not None:
            text = f"{said} in the content coding {coding!r}, which can't be undone here: identity was asked for."
            return Failure(text, head.status, code=code, wait_s=wait_s)
        found = failure_of(bytes(self.body), head.status, code) if not 200 <= head.status < 300 else None
        return replace(found or Failure(said + self._text(), head.status, code=code), wait_s=wait_s)

    def _text(self) -> str:
        """The body's own words, as far as a person can read them."""
        kind = _shown(self.head.get(b"content-type") or b"")
        title = _title(self.body)
        text = title[1] if title is not None else b"" if b"html" in kind.encode() else bytes(self.body)
        shown = " ".join(text.decode("utf-8", "replace").split())[:TEXT_CHARS_MAX]
        if shown and shown.isprintable() and not shown.startswith(("{", "[", "<")):
            return f": {shown}"
        return ", not with a stream of events" + (f" (Content-Type: {kind})." if kind else ".")


def coding_of(head: ResponseHead) -> str | None:
    """The content coding of an answer, unless its bytes are the content itself."""
    coding = head.get(b"content-encoding")
    return None if coding is None or content_coding.is_plain(coding) else _shown(coding.strip().lower())


def undone(head: ResponseHead) -> tuple[ResponseHead, bytes | None]:
    """The head without a coding that can be undone, and this coding; else the head as it is, and None."""
    coding = content_coding.undone(head.get(b"content-encoding"))
    if coding is None:
        return head, None
    headers = tuple((name, value) for name, value in head.headers if name != b"content-encoding")
    return replace(head, headers=headers, by_name=joined(headers)), coding


def may_hold_events(head: ResponseHead) -> bool:
    """Whether the body of an answer to a request for a stream may be a stream, or say the same as one."""
    if not 200 <= head.status < 300 or head.framing is Framing.NONE:
        return False
    return b"content-encoding" not in head.by_name or coding_of(head) is None


def _shown(value: bytes) -> str:
    return value.decode("ascii", "replace")[:NAME_CHARS_MAX]
