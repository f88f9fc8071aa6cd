"""Row: a setting as data (its meaning, its reason, its bounds, its default as written), and the units of its values.

`streamd.config` has the rows themselves. A row parses the values of all sources: TOML's own types, or the text of a
variable or a flag.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ENV_PREFIX = "STREAMD_"
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
UNITS_BYTES = {
    "b": 1,
    "kb": 1000,
    "mb": 1000**2,
    "gb": 1000**3,
    "kib": 1024,
    "mib": 1024**2,
    "gib": 1024**3,
}
# Beyond any duration or size; a text has at most 15 digits.
QUANTITY_MAX = 10**18
# The value of a duration's word.
WORD_S = -1.0
_QUANTITY = re.compile(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)", re.A)
_DECIMAL = re.compile(r"\d{1,15}(?:\.\d{1,15})?", re.A)
_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Kind(enum.Enum):
    """The kind of a setting's value; the word is used in the reference."""

    DURATION = "duration"
    BYTES = "bytes"
    COUNT = "count"
    RATIO = "ratio"
    WORD = "word"
    TEXT = "text"
    PATH = "path"
    FLAG = "flag"
    LIST = "list"
    TABLE = "table"


class Refused(ValueError):
    """A value that a row doesn't take; the text names the allowed values."""


def parse_duration(raw: object) -> float:
    """Seconds of `30s`, `500ms`, `2m`, `1h`, or of a bare number. Raises Refused."""
    return _quantity(raw, UNITS_S, 1.0, "a duration such as 500ms, 30s, 2m or 1h")


def parse_bytes(raw: object) -> int:
    """Bytes of `16KiB`, `1MiB`, `1GiB`, `64kB`, or of a bare number. Raises Refused, for a fraction of a byte too."""
    wanted = "a size such as 16KiB, 1MiB or 64kB"
    size = _quantity(raw, UNITS_BYTES, 1, wanted)
    if size != int(size):
        raise Refused(wanted)
    return int(size)


def _quantity(raw: object, units: Mapping[str, float], bare: float, wanted: str) -> float:
    # One comparison refuses what is negative, infinite, no number (nan), or too large for a float.
    if isinstance(raw, (int, float)) and not isinstance(raw, bool) and 0 <= raw <= QUANTITY_MAX:
        return raw * bare
    if isinstance(raw, str):
        found = _QUANTITY.fullmatch(raw.strip())
        if found is not None and (unit := found[2].lower() or None) in (None, *units):
            number = float(found[1]) if "." in found[1] else int(found[1])
            return round(number * (bare if unit is None else units[unit]), 9)
    raise Refused(wanted)


def format_duration(seconds: float) -> str:
    """The shortest way to write a duration that is no word: 90.0 is `90s`, 120.0 is `2m`, 0.25 is `250ms`."""
    if seconds and seconds % 3600 == 0:
        return f"{seconds / 3600:.0f}h"
    if seconds and seconds % 60 == 0:
        return f"{seconds / 60:.0f}m"
    return f"{seconds:g}s" if seconds >= 1 or not seconds else f"{seconds * 1000:g}ms"


def format_bytes(size: int) -> str:
    """The shortest exact way to write a size: 16384 is `16KiB`, 1000 is `1000B`."""
    for unit, factor in (("GiB", 1024**3), ("MiB", 1024**2), ("KiB", 1024)):
        if size and size % factor == 0:
            return f"{size // factor}{unit}"
    return f"{size}B" if size else "0"


# Rows


Check = Callable[[str], None]  # raises Refused


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """A setting: its meaning, its reason, and the values that it takes. Its field gives `attribute`, and `key`."""

    kind: Kind
    section: str
    meaning: str  # the meaning of the setting: a noun phrase
    why: str  # the reason of the default and the bounds; empty where it is plain
    written: str  # the default as people write it
    low: float = 0
    high: float = math.inf
    words: tuple[str, ...] = ()
    zero: str = ""  # the meaning of 0, where 0 is below `low` or has a special meaning
    check: Check | None = None  # of a text, or of each text in a list
    check_value: Check | None = None  # of each value in a table, whose names `check` is for
    wanted: str = ""  # the texts that `check` takes, in words
    restart: bool = False  # a reload can't change it
    exists: bool = False  # a path that has to be a readable file
    key: str = ""  # as the file has it; "streams.auth" is `auth` in the table [streams]
    attribute: str = ""
    old_key: str = ""  # an earlier name of the key, which is still taken

    @property
    def text(self) -> str:
        """The meaning of the setting, then the reason, as sentences."""
        return f"{self.meaning}. {self.why}." if self.why else f"{self.meaning}."

    @property
    def flag(self) -> str:
        return "--" + self.dest.replace("_", "-")

    @property
    def variable(self) -> str:
        return ENV_PREFIX + self.dest.upper()

    @property
    def old_flag(self) -> str:
        """The flag of the earlier name; empty without one."""
        return "--" + self.old_key.replace("_", "-") if self.old_key else ""

    @property
    def old_variable(self) -> str:
        """The variable of the earlier name; empty without one."""
        return ENV_PREFIX + self.old_key.upper() if self.old_key else ""

    @property
    def dest(self) -> str:
        """The key as an identifier, as `load` expects it in its `flags`."""
        return self.key.replace(".", "_")

    def allowed(self) -> str:
        """The values that the row takes, in words."""
        zero = f", or 0 ({self.zero})" if self.zero else ""
        match self.kind:
            case Kind.DURATION:
                word = "".join(f", or {word}" for word in self.words)
                return f"a duration from {format_duration(self.low)} to {format_duration(self.high)}{zero}{word}"
            case Kind.BYTES:
                return f"a size from {format_bytes(int(self.low))} to {format_bytes(int(self.high))}{zero}"
            case Kind.COUNT:
                auto = "".join(f", or {word}" for word in self.words)
                return f"a whole number from {self.low:g} to {self.high:.0f}{zero}{auto}"
            case Kind.RATIO:
                return f"a number from {self.low:g} to {self.high:g}"
            case Kind.WORD:
                return "one of " + ", ".join(self.words)
            case Kind.FLAG:
                return "true or false"
            case Kind.LIST:
                return f"a list of {self.wanted or 'texts'}"
            case Kind.TABLE:
                return f"a table of {self.wanted or 'texts'}"
            case Kind.TEXT | Kind.PATH:
                return self.wanted or ("a file's path" if self.kind is Kind.PATH else "a text")

    def parse(self, raw: object) -> object:
        """The attribute's value for a written value. Raises Refused with the allowed values."""
        try:
            return _PARSERS[self.kind](self, raw)
        except Refused:
            raise Refused(self.allowed()) from None


def _bounded(row: Row, number: float) -> float:
    if not row.low <= number <= row.high and not (row.zero and number == 0):
        raise Refused
    return number


def _parse_duration(row: Row, raw: object) -> float:
    return WORD_S if raw in row.words else float(_bounded(row, parse_duration(raw)))


def _parse_count(row: Row, raw: object) -> int:
    if raw == "auto" and "auto" in row.words:
        return max(1, min(len(os.sched_getaffinity(0)), int(row.high)))
    if isinstance(raw, str) and raw.strip().isascii() and raw.strip().isdigit():
        raw = int(raw[:20])
    if not isinstance(raw, int) or isinstance(raw, bool):
        raise Refused
    return int(_bounded(row, raw))


def _parse_ratio(row: Row, raw: object) -> float:
    if isinstance(raw, str) and _DECIMAL.fullmatch(raw.strip()):
        raw = float(raw)
    if not isinstance(raw, (int, float)) or isinstance(raw, bool):
        raise Refused
    return float(_bounded(row, raw))


def _parse_word(row: Row, raw: object) -> str:
    if not isinstance(raw, str) or raw not in row.words:
        raise Refused
    return raw


def _parse_text(row: Row, raw: object) -> str:
    # No setting has a use for control bytes, and a path or header with a NUL or CR is an attack.
    if not isinstance(raw, str) or any(ord(c) < 32 or ord(c) == 127 for c in raw):
        raise Refused
    if raw and row.check is not None:
        row.check(raw)
    return raw


def _parse_flag(row: Row, raw: object) -> bool:
    if isinstance(raw, str) and raw.lower() in _TRUTH:
        return _TRUTH[raw.lower()]
    if not isinstance(raw, bool):
        raise Refused
    return raw


def _parse_list(row: Row, raw: object) -> tuple[str, ...]:
    if not isinstance(raw, (list, tuple)) or "" in raw:
        raise Refused
    return tuple(_parse_text(row, entry) for entry in raw)


def _parse_table(row: Row, raw: object) -> dict[str, str]:
    if not isinstance(raw, dict) or "" in raw:
        raise Refused
    for name, value in raw.items():
        _parse_text(row, name)
        _parse_text(dataclasses.replace(row, check=row.check_value), value)
    return raw


_PARSERS: dict[Kind, Callable[[Row, object], object]] = {
    Kind.DURATION: _parse_duration,
    Kind.BYTES: lambda row, raw: int(_bounded(row, parse_bytes(raw))),
    Kind.COUNT: _parse_count,
    Kind.RATIO: _parse_ratio,
    Kind.WORD: _parse_word,
    Kind.TEXT: _parse_text,
    Kind.PATH: _parse_text,
    Kind.FLAG: _parse_flag,
    Kind.LIST: _parse_list,
    Kind.TABLE: _parse_table,
}


# These put a row on its field. They return Any because dataclasses.field() stands for a value of the field's own type.


def _on_field(default: object, row: Row) -> Any:
    return dataclasses.field(default=default, metadata={"row": row})


def duration_row(section: str, default: str, low: str, high: str, meaning: str, why: str = "", **more: Any) -> Any:
    """A time, in units: seconds in the code; `words` takes a word too, which is WORD_S in the code."""
    row = Row(Kind.DURATION, section, meaning, why, default, parse_duration(low), parse_duration(high), **more)
    return _on_field(_parse_duration(row, default), row)


def bytes_row(section: str, default: str, low: str, high: str, meaning: str, why: str = "", **more: Any) -> Any:
    """A size, in units: bytes in the code."""
    bounds = (parse_bytes(low), parse_bytes(high))
    return _on_field(parse_bytes(default), Row(Kind.BYTES, section, meaning, why, default, *bounds, **more))


def count_row(section: str, default: int, low: int, high: int, meaning: str, why: str = "", **more: Any) -> Any:
    """A whole number; `words=("auto",)` takes that word too."""
    return _on_field(default, Row(Kind.COUNT, section, meaning, why, str(default), low, high, **more))


def ratio_row(section: str, default: str, meaning: str, why: str = "", **more: Any) -> Any:
    """A share, from 0 to 1."""
    return _on_field(float(default), Row(Kind.RATIO, section, meaning, why, default, 0, 1, **more))


def word_row(section: str, default: str, words: Sequence[str], meaning: str, why: str = "", **more: Any) -> Any:
    """A word from a short list."""
    return _on_field(default, Row(Kind.WORD, section, meaning, why, default, words=tuple(words), **more))


def text_row(section: str, default: str, meaning: str, why: str = "", **more: Any) -> Any:
    """A text, empty where there is no default; `check` and `wanted` narrow it."""
    return _on_field(default, Row(Kind.TEXT, section, meaning, why, default, **more))


def path_row(section: str, meaning: str, why: str = "", **more: Any) -> Any:
    """A path; `exists` asks for a readable file."""
    return _on_field("", Row(Kind.PATH, section, meaning, why, "", **more))


def flag_row(section: str, meaning: str, why: str = "") -> Any:
    """True or false, false by default."""
    return _on_field(False, Row(Kind.FLAG, section, meaning, why, "false"))


def list_row(
    section: str,
    default: Sequence[str],
    wanted: str,
    check: Check,
    meaning: str,
    why: str = "",
    *,
    restart: bool = False,
) -> Any:
    """A list of texts that `check` takes; a tuple in the code."""
    row = Row(Kind.LIST, section, meaning, why, ", ".join(default), check=check, wanted=wanted, restart=restart)
    return _on_field(tuple(default), row)


def table_row(section: str, wanted: str, meaning: str, why: str = "", *, shown: bool = True, **more: Any) -> Any:
    """A table of texts; `shown` False keeps it out of repr."""
    row = Row(Kind.TABLE, section, meaning, why, "", wanted=wanted, **more)
    return dataclasses.field(default_factory=dict, metadata={"row": row}, repr=shown)


def rows_of(cls: type) -> tuple[Row, ...]:
    """The rows on a dataclass's fields. A row without a key of its own gets the field's name without its unit."""
    rows = []
    for field in dataclasses.fields(cls):
        if (row := field.metadata.get("row")) is not None:
            key = field.name
            if row.kind is Kind.DURATION:
                key = key.removesuffix("_s")
            elif row.kind is Kind.BYTES and not key.endswith("_bytes_max"):
                key = key.removesuffix("_bytes")
            rows.append(dataclasses.replace(row, key=row.key or key, attribute=field.name))
    return tuple(rows)
