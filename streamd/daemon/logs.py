"""The log: a line per event on standard error, as `key=value` for people and journald, or as JSON.

No peer can forge a line: a value with anything but plain visible ASCII is quoted and escaped, so a header with a
newline stays within its field. In JSON, control, format and separator characters are escaped, and letters stay. A line
leaves in a single write(2), alone or with its neighbours, so that the lines of several workers don't mix. Logging never
raises and never waits (daemon/log_outlet.py). It costs some microseconds, once per request: no token is worth a line.

Under journald (JOURNAL_STREAM names the process's standard error, systemd.exec(5)) a line begins with its priority,
`<6>`, and journald adds the time; elsewhere a line begins with the time and the level.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import json
import logging
import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping

from streamd.daemon.log_outlet import LogOutlet

DEBUG, INFO, WARNING, ERROR = logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR
LEVELS = {"debug": DEBUG, "info": INFO, "warning": WARNING, "error": ERROR}

# Longest value: a traceback of 20 frames. With 30 short fields beside it a line is below 4,096 bytes, which a pipe
# takes in one piece.
VALUE_CHARS_MAX = 2000

_PRIORITIES = {DEBUG: 7, INFO: 6, WARNING: 4, ERROR: 3}  # syslog(3)
_WORDS = {number: word for word, number in LEVELS.items()}
_plain_text = re.compile(r"[!#-<>-\[\]-~]+", re.A).fullmatch  # visible ASCII without quote, equals sign and backslash

_ODD = re.compile(r"[\x7f-\U0010ffff]")

Value = str | int | float | bool | bytes | enum.Enum | tuple[str, ...] | None


class _Sink:
    """The destination of the lines, and their format."""

    def __init__(self, level: int, as_json: bool, fd: int, journal: bool) -> None:
        self.level = level
        self.as_json = as_json
        self._fd = fd
        self._journal = journal
        self.outlet = LogOutlet(fd, lambda count: self._line(WARNING, "log lines lost", {"count": count}))

    def write(self, level: int, name: str, fields: Mapping[str, Value]) -> None:
        level = min(max(level // 10 * 10, DEBUG), ERROR)  # CRITICAL counts as an error, odd numbers as the level below
        try:
            self.outlet.write(self._line(level, name, fields))
        except Exception:  # Why: a field is of no known type, or no memory; a daemon goes on without the line
            self.outlet.lose()

    def _line(self, level: int, name: str, fields: Mapping[str, Value]) -> bytes:
        return self._json(level, name, fields) if self.as_json else self._text(level, name, fields)

    def _text(self, level: int, name: str, fields: Mapping[str, Value]) -> bytes:
        parts = [f"<{_PRIORITIES[level]}>{name}" if self._journal else f"{_now()} {_WORDS[level].upper()} {name}"]
        for key, value in fields.items():
            if value is None:
                continue
            if type(value) is str and len(value) <= VALUE_CHARS_MAX and _plain_text(value):  # most values
                parts.append(key + "=" + value)
            elif type(value) is int:
                parts.append(f"{key}={value}")
            elif type(value) is float:
                parts.append(f"{key}={round(value, 6)}")
            else:
                parts.append(f"{key}={_quoted(value)}")
        return (" ".join(parts) + "\n").encode()

    def _json(self, level: int, name: str, fields: Mapping[str, Value]) -> bytes:
        head = {"time": _now(), "level": _WORDS[level], "event": name}
        row = head | {key: _plain(value) for key, value in fields.items() if value is not None and key not in head}
        prefix = b"<%d>" % _PRIORITIES[level] if self._journal else b""
        import orjson  # Why here: the parent needs it only if log_format is json

        try:
            return prefix + _visible(orjson.dumps(row)) + b"\n"
        except TypeError:  # a lone surrogate half, or an int of more than 64 bits: the slow encoder takes both
            return prefix + _visible(json.dumps(row, separators=(",", ":")).encode()) + b"\n"


def _visible(made: bytes) -> bytes:
    """JSON with every control, format and separator character escaped: some readers split lines at them, terminals
    obey them, and an override of the direction shows another text.
    """
    if made.isascii() and b"\x7f" not in made:
        return made
    return _ODD.sub(_escaped, made.decode()).encode()


def _escaped(found: re.Match[str]) -> str:
    import unicodedata  # Why here: only odd lines need it, and the parent is small

    char = found[0]
    if char != "\x7f" and unicodedata.category(char)[0] not in "CZ":
        return char
    return json.dumps(char)[1:-1] if char != "\x7f" else "\\u007f"


def _now() -> str:
    second, ms = divmod(time.time_ns() // 1_000_000, 1000)
    return f"{_second_shown(second)}.{ms:03}Z"


@functools.lru_cache(maxsize=1)
def _second_shown(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def _plain(value: Value) -> str | int | float | bool | list[str] | None:
    """A field's value as a type of JSON."""
    if isinstance(value, enum.Enum):
        return str(getattr(value, "word", value.value))
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if isinstance(value, str):
        return value if len(value) <= VALUE_CHARS_MAX else value[:VALUE_CHARS_MAX] + "…"
    if isinstance(value, float):
        return round(value, 6)
    return list(value) if isinstance(value, tuple) else value


def _quoted(value: Value) -> str:
    """A field's value as text: plain text as it is, anything else as a JSON string in ASCII."""
    if type(value) is int:
        return str(value)
    plain = _plain(value)
    if isinstance(plain, bool):
        return "true" if plain else "false"
    if isinstance(plain, (int, float)):
        return str(plain)
    text = ",".join(plain) if isinstance(plain, list) else str(plain)
    return text if _plain_text(text) else json.dumps(text).replace("\x7f", "\\u007f")


class _FromLogging(logging.Handler):
    """Writes the records of libraries that use `logging`, such as asyncio."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text, trace = record.getMessage(), None
            if record.exc_info and record.exc_info[1] is not None:
                trace = _trace(record.exc_info[1])
        except Exception as error:  # Why: any argument's __str__ may raise anything, and logging never does
            text, trace = f"{record.msg!s:.200}", repr(error)
        event(record.levelno, "log", logger=record.name, text=text, trace=trace)


def _trace(error: BaseException) -> str:
    """The end of a traceback, which has the innermost frames and the error."""
    return "".join(traceback.format_exception(error))[-VALUE_CHARS_MAX:]


_sink = _Sink(INFO, as_json=False, fd=2, journal=False)


def setup(level: str, format: str, *, fd: int = 2, journal_stream: str | None = None) -> None:
    """Choose the lowest level ("debug" … "error") and the format ("text", "json"), and take over `logging`.

    `journal_stream` is the value of the variable JOURNAL_STREAM, "device:inode" of journald's socket.
    """
    global _sink  # Why: a process has a single standard error
    _sink = _Sink(LEVELS[level], format == "json", fd, is_journal(fd, journal_stream))
    root = logging.getLogger()
    root.handlers[:] = [_FromLogging()]
    root.setLevel(WARNING)


def is_journal(fd: int, journal_stream: str | None) -> bool:
    """Whether the descriptor is journald's socket, which the variable JOURNAL_STREAM names."""
    if not journal_stream:
        return False
    try:
        stat = os.fstat(fd)
    except OSError:
        return False
    return journal_stream == f"{stat.st_dev}:{stat.st_ino}"


def lines_lost() -> int:
    """Lines of this process that nobody could read, since its start."""
    return _sink.outlet.lost


def flush() -> None:
    """Write the lines that wait for room, as far as there is room now."""
    _sink.outlet.flush()


def finish() -> None:
    """The process ends: give the lines that wait a moment."""
    _sink.outlet.finish()


def set_level(level: str) -> None:
    """Change the lowest level of a running daemon. Raises KeyError for an unknown level."""
    _sink.level = LEVELS[level]


def set_format(format: str) -> None:
    """Change the format of a running daemon's lines."""
    _sink.as_json = format == "json"


def event(level: int, name: str, /, **fields: Value) -> None:
    """Write a line: `name`, then the fields in the given order, without fields that are None. Never raises.

    Times are seconds; a CloseReason is written as its word.
    """
    if level >= _sink.level:
        _sink.write(level, name, fields)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Lines that are written meanwhile leave at the end, several of them in a single write(2)."""
    outlet = _sink.outlet
    outlet.corked = True
    try:
        yield
    finally:
        outlet.corked = False
        try:
            outlet.flush()
        except Exception:  # Why: no memory; a daemon goes on without the lines
            outlet.lose()


def always(level: int, name: str, /, **fields: Value) -> None:
    """As event(), whatever the lowest level is: a person has asked for this line."""
    _sink.write(level, name, fields)


def bug(name: str, error: BaseException, /, **fields: Value) -> None:
    """Write an unexpected error, with the end of its traceback. A lack of memory is no mistake: a single line."""
    if isinstance(error, MemoryError):
        event(WARNING, "no memory; its request or connection ended", where=name, **fields)
        return
    last = traceback.format_exception_only(error)[-1].strip()
    level = WARNING if isinstance(error, OSError) else ERROR  # the system refused a call, which may be its fault
    event(level, name, **(fields | {"error": last, "trace": _trace(error)}))
