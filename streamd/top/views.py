"""The tables of `streamd top`: their columns in the order of their use, their sorts, and what a row's ids end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

from streamd.daemon.admin_cli import (
    KEY_COLUMNS,
    READER_COLUMNS,
    STREAM_COLUMNS,
    TABLES,
    Column,
    seconds,
    shown,
    upstream_word,
)

# Columns of words: on the left of their cell, the first of the alphabet first. Of all others the highest comes first.
_WORDS: Final = {"ID", "KEY", "NAME", "PEER", "STREAM", "MODEL", "UPSTREAM", "STATE", "LAST ERROR"}

# Widest cell of a column of words. Ids are whole in a row's details.
_WIDTH_MAX: Final = {"MODEL": 24, "UPSTREAM": 22, "KEY": 18, "NAME": 22, "LAST ERROR": 60, "STREAM": 29, "PEER": 24}

# States that a person looks for. Their cells are bold and marked, because not all people see a colour.
ALARMING: Final = {"out", "failing", "probing", "paused", "behind"}


class ViewColumn(NamedTuple):
    """A column of a view."""

    head: str
    cell: Callable[[Mapping[str, Any]], str]
    member: str
    is_word: bool
    width_max: int

    def rank(self, row: Mapping[str, Any]) -> tuple[bool, Any]:
        """The key to sort rows by, lowest first: words as they are shown, numbers from the highest; nothing last."""
        value = row.get(self.member)
        if self.is_word:
            cell = self.cell(row)
            return cell == "-", cell.lower()
        return value is None, -float(value or 0)


class Target(NamedTuple):
    """Something that can be ended: its kind as admin_cli names it, its id, and the words of the choice."""

    kind: str
    id: str
    text: str


class View(NamedTuple):
    """A table."""

    name: str
    title: str
    path: str  # of the admin surface; "": the table comes from /status
    columns: tuple[ViewColumn, ...]
    sorted_by: str  # head of the first sort
    sorts: Mapping[str, str]  # heads of columns that the daemon can sort all its rows by, and its word
    filters: tuple[str, ...]  # names of exact filters that the daemon applies
    targets: Callable[[Mapping[str, Any]], list[Target]]
    id_of: Callable[[Mapping[str, Any]], str]

    def column(self, head: str) -> ViewColumn:
        """The column with this head."""
        return next(column for column in self.columns if column.head == head)

    def arranged(self, rows: Sequence[Mapping[str, Any]], head: str, *, is_reversed: bool) -> list[Mapping[str, Any]]:
        """The rows sorted by a column, equal rows by their ids; rows without a value there come last either way."""
        column = self.column(head)
        in_order = sorted(rows, key=self.id_of)
        present = [row for row in in_order if not column.rank(row)[0]]
        absent = [row for row in in_order if column.rank(row)[0]]
        return sorted(present, key=column.rank, reverse=is_reversed) + absent


def _columns(columns: Sequence[Column], *heads: str) -> tuple[ViewColumn, ...]:
    by_head = {column.head: column for column in columns}
    found = [by_head[head] for head in heads]
    return tuple(
        ViewColumn(head, cell, member, head in _WORDS, _WIDTH_MAX.get(head, 29)) for head, cell, member in found
    )


_UPSTREAM_COLUMNS: Final = (
    Column("NAME", lambda row: shown(row.get("name")), "name"),
    Column("STATE", upstream_word, "state"),
    Column("SINCE", lambda row: seconds(row.get("since_s")), "since_s"),
    Column("REQUESTS", lambda row: shown(row.get("in_flight")), "in_flight"),
    Column("FAILURES", lambda row: shown(row.get("failures")), "failures"),
    Column("IDLE", lambda row: shown(row.get("idle")), "idle"),
    Column("LAST ERROR", lambda row: shown(row.get("last_error")), "last_error"),
)


def _key_target(row: Mapping[str, Any]) -> list[Target]:
    key, name = row.get("key"), row.get("key_name")
    if not key:
        return []
    named = f"{shown(name)} ({shown(key)})" if name else shown(key)
    return [Target("key", str(key), f"End everything of the key {named}")]


def _stream_target(stream: object) -> list[Target]:
    return [Target("stream", str(stream), f"End the stream {shown(stream)}")] if stream else []


def _of_reader(row: Mapping[str, Any]) -> list[Target]:
    reader = Target("reader", str(row["id"]), f"End the reader at {shown(row.get('peer'))} ({shown(row['id'])})")
    return [reader, *_stream_target(row.get("stream")), *_key_target(row)]


def _of_stream(row: Mapping[str, Any]) -> list[Target]:
    return [*_stream_target(row.get("id")), *_key_target(row)]


def _id(row: Mapping[str, Any]) -> str:
    return str(row["id"])


VIEWS: Final = {
    view.name: view
    for view in (
        View(
            "upstreams",
            "Upstreams",
            "",
            _columns(_UPSTREAM_COLUMNS, "NAME", "STATE", "SINCE", "REQUESTS", "FAILURES", "LAST ERROR", "IDLE"),
            "STATE",
            {},
            (),
            lambda row: [],
            lambda row: str(row["name"]),
        ),
        View(
            "streams",
            "Streams",
            TABLES["streams"].path,
            _columns(
                STREAM_COLUMNS,
                *("KEY", "MODEL", "STATE", "LAG", "READERS", "TOKENS/S", "IDLE", "AGE"),
                *("UPSTREAM", "TOKENS", "FIRST", "EVENTS", "ID"),
            ),
            "LAG",
            {"LAG": "lag", "AGE": "age", "IDLE": "idle", "TOKENS": "tokens", "READERS": "readers"},
            TABLES["streams"].filters,
            _of_stream,
            _id,
        ),
        View(
            "readers",
            "Readers",
            TABLES["readers"].path,
            _columns(
                READER_COLUMNS,
                *("KEY", "PEER", "STATE", "LAG", "BEHIND", "PAUSED", "UNSENT", "AGE"),
                *("MODEL", "UPSTREAM", "POSITION", "FIRST", "STREAM", "ID"),
            ),
            "LAG",
            {"LAG": "lag", "PAUSED": "paused", "AGE": "age"},
            TABLES["readers"].filters,
            _of_reader,
            _id,
        ),
        View(
            "keys",
            "Keys",
            TABLES["usage"].path,
            _columns(
                KEY_COLUMNS,
                *("KEY", "NAME", "TOKENS/S", "STREAMS", "READERS", "REQUESTS", "WAIT"),
                *("RPM LEFT", "TPM LEFT", "TOKENS EVER", "REQUESTS EVER"),
            ),
            "TOKENS/S",
            {"TOKENS/S": "tokens", "STREAMS": "streams", "READERS": "readers", "REQUESTS": "requests"},
            TABLES["usage"].filters,
            _key_target,
            lambda row: str(row["key"]),
        ),
    )
}
DEFAULT_VIEW: Final = "readers"
