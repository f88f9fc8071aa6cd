"""A scan of multipart/form-data (RFC 7578) for its field `model`, which builds nothing: files pass as they came.

Programs read forms in many ways: bare line ends, names that are escaped or given twice, parts inside parts, encodings
of a part. So the scan knows a single, plain way to write a form, the way of browsers and SDKs, and says of any other
that it isn't `plain`: then the model may be another for the server. That decides where a request goes all the same, but
gives no right.

Bounds: PARTS_MAX, PART_HEAD_BYTES_MAX, VALUE_BYTES_MAX. Beyond them the rest isn't read, and the form isn't plain.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from streamd.choice import Choice
from streamd.wire.json_scan import Bytes, folded, spliced
from streamd.wire.other_models import MEMBERS

# OpenAI takes 16 images in a request, each a part, beside a dozen fields; some servers take a list as a part each.
PARTS_MAX: Final = 1_000
# A file's name of 255 characters, percent-encoded, twice, and as much again.
PART_HEAD_BYTES_MAX: Final = 4 * 1024
# Names of models take 512 bytes at most.
VALUE_BYTES_MAX: Final = 4 * 1024

_BOUNDARY: Final = re.compile(
    rb'multipart/form-data[ \t]*;[ \t]*boundary=(?:"([^"\\]{1,70})"|([^ \t";,\\]{1,70}))[ \t]*', re.IGNORECASE
)
_FIELD: Final = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n]*)")
_PARAMETER: Final = rb"""[ \t]*;[ \t]*(name|filename\*?)=("[^"\\\r\n]*"|[^ \t";,\\]+)"""
_DISPOSITION: Final = re.compile(rb"form-data((?:%b)+)[ \t]*" % _PARAMETER, re.IGNORECASE)
_parameters = re.compile(_PARAMETER, re.IGNORECASE).findall
_plain_name = re.compile(rb"[A-Za-z0-9_.\[\]-]{1,256}").fullmatch
_text_type = re.compile(rb"(?:text/plain(?:[ \t]*;[ \t]*charset=\"?utf-8\"?)?)?", re.IGNORECASE).fullmatch
_UNENCODED: Final = (b"", b"binary", b"8bit", b"7bit")
# Fields that a careless server takes for the model, or that change how it reads the others.
_MEANT: Final = frozenset({folded("model"), folded("_charset_"), *map(folded, MEMBERS)})


class _Next(Choice):
    """What comes next."""

    START = "start"
    HEAD = "head"
    BODY = "body"
    END = "end"  # the closing delimiter was read, or the rest isn't


class FormScan:
    """Reads a form that grows: call `feed` with all of its bytes so far, and with `last` when there are no more."""

    __slots__ = ("_at", "_delimiter", "_is_model", "_since", "_values", "is_plain", "parts", "position")

    def __init__(self, boundary: bytes) -> None:
        self._delimiter = b"--" + boundary
        self._at = _Next.START
        self._is_model = False  # the part that is being read
        self._since = 0  # where its value begins
        self._values: list[tuple[int, int]] = []  # places of the field `model`
        self.parts = 0
        self.is_plain = True  # as far as it was read
        self.position = 0  # everything in front of it has been read

    @classmethod
    def of(cls, content_type: bytes | None) -> FormScan | None:
        """The scan for a body of this type; None if it is no form."""
        found = _BOUNDARY.fullmatch((content_type or b"").strip())
        return cls(found[1] or found[2]) if found is not None else None

    def models(self, data: Bytes) -> list[str]:
        """The values of the field `model` in the whole form."""
        return [bytes(data[start:end]).decode("utf-8", "replace") for start, end in self._values]

    def with_names(self, data: bytes, others: Mapping[str, str]) -> bytes:
        """`data` with other names in the places of the models; every other byte stays as it is."""
        named = zip(self.models(data), self._values, strict=True)
        return spliced(data, [(*place, others[model].encode()) for model, place in named if model in others])

    def feed(self, data: Bytes, *, last: bool = False) -> None:
        """Read on in `data`, which begins as before."""
        steps = {_Next.START: self._start, _Next.HEAD: self._head, _Next.BODY: self._body, _Next.END: self._end}
        while steps[self._at](data):
            pass
        if last and self._at is not _Next.END:
            self._stop(data)

    # -- a step for what is next. Each returns whether it came on.

    def _start(self, data: Bytes) -> bool:
        opening = self._delimiter + b"\r\n"
        if len(data) < len(opening):
            return False
        if not data.startswith(opening):
            return self._stop(data)
        self._at, self.position = _Next.HEAD, len(opening)
        return True

    def _head(self, data: Bytes) -> bool:
        end = data.find(b"\r\n\r\n", self.position, self.position + PART_HEAD_BYTES_MAX)
        if end < 0:
            return self._stop(data) if len(data) - self.position >= PART_HEAD_BYTES_MAX else False
        self.parts += 1
        if self.parts > PARTS_MAX:
            return self._stop(data)
        self._read_head(bytes(data[self.position : end]).split(b"\r\n"))
        # The line end in front of a delimiter may be that of the head: the value is empty then.
        self._at, self._since, self.position = _Next.BODY, end + 4, end + 2
        return True

    def _body(self, data: Bytes) -> bool:
        delimiter = self._delimiter
        found = data.find(delimiter, self.position)
        if found < 0 or len(data) < found + len(delimiter) + 2:
            self.position = max(self.position, found if found >= 0 else len(data) - len(delimiter) + 1)
            return False
        after = found + len(delimiter)
        if data[found - 2 : found] != b"\r\n":  # a delimiter to a program that takes bare line ends
            self.is_plain, self.position = False, after
            return True
        if self._is_model:
            self._take_value(data, found - 2)
        following = data[after : after + 2]
        self.position = after + 2
        if following == b"\r\n":
            self._at = _Next.HEAD
        elif following == b"--":
            self._at = _Next.END
        else:
            return self._stop(data)
        return True

    def _end(self, data: Bytes) -> bool:
        """Behind the closing delimiter there may be a line end, and nothing else that a server could read."""
        if data[self.position :] not in (b"", b"\r", b"\r\n"):
            self.is_plain, self.position = False, len(data)
        return False

    def _stop(self, data: Bytes) -> bool:
        """The rest isn't read."""
        self._at, self.is_plain, self.position = _Next.END, False, len(data)
        return False

    def _take_value(self, data: Bytes, end: int) -> None:
        end = max(end, self._since)
        if end - self._since > VALUE_BYTES_MAX or self._values:
            self.is_plain = False
        if end - self._since <= VALUE_BYTES_MAX:
            self._values.append((self._since, end))
            self.is_plain &= data[self._since : end].isascii()

    def _read_head(self, lines: list[bytes]) -> None:
        self._is_model = False
        fields: dict[bytes, bytes] = {}
        for line in lines:
            field = _FIELD.fullmatch(line)
            if field is None or field[1].lower() in fields:
                self.is_plain = False
                continue
            fields[field[1].lower()] = field[2].strip()
        disposition = _DISPOSITION.fullmatch(fields.get(b"content-disposition", b""))
        given = _parameters(disposition[1]) if disposition is not None else []
        parameters = {name.lower(): value.strip(b'"') for name, value in given}
        name, media_type = parameters.get(b"name", b""), fields.get(b"content-type", b"")
        is_text = b"filename" not in parameters and b"filename*" not in parameters
        self._is_model = is_text and name == b"model"
        self.is_plain &= (
            len(parameters) == len(given)
            and _plain_name(name) is not None
            and fields.get(b"content-transfer-encoding", b"").lower() in _UNENCODED
            and not media_type.lower().startswith(b"multipart/")
            and (self._is_model or folded(name.decode().split("[")[0]) not in _MEANT)
            and (not self._is_model or _text_type(media_type) is not None)
        )
