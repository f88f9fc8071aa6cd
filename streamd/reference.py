"""The reference of all settings, written from the table: Markdown for people, and a TOML file to start from."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from streamd.config import ROUTE_ROWS, ROWS, SECTIONS, UPSTREAM_ROWS
from streamd.rows import Kind, Row

_INTRODUCTION = """\
# Settings

Flags win over the environment, the environment over the file (`--config FILE`, or `STREAMD_CONFIG`), the file over
the default. `commit_after` in the file is `--commit-after` as a flag and `STREAMD_COMMIT_AFTER` in the environment.
Durations take `ms`, `s`, `m`, `h`; sizes `B`, `KiB`, `MiB`, `GiB` and `kB`, `MB`, `GB`; a bare number is seconds or
bytes. Lists are TOML arrays in the file, repeated flags, and separated by commas in the environment. A path in the file
starts beside the file; `credential:NAME` is a file that systemd passes with `LoadCredential=`. Settings marked * need a
restart; the others change with a reload.

`streamd check-config FILE` says all that is wrong with a file, with line numbers. `streamd config-reference --toml`
writes a file with every default as a comment, to start from. `streamd config-reference --schema` writes a JSON Schema,
with which editors complete and check the file.
"""

_UPSTREAM_INTRODUCTION = """\
One table for each inference server. `--upstream URL`, which repeats, and `STREAMD_UPSTREAM=URL,URL` stand for tables
that have nothing but a `url`, and replace those of the file."""

_ROUTE_INTRODUCTION = "Settings that differ for one path. A setting that a table leaves out is as everywhere else."

_TOML_INTRODUCTION = """\
# The settings of streamd, each with its default. A line without a blank behind its # is a setting: take the # away and
# change the value. `streamd check-config FILE` says all that is wrong.
"""

_TOML_WIDTH = 118

# Examples in place of these tables' defaults, which would say nothing.
_EXAMPLES = {
    "upstream": {"name": '"gpu1"', "url": '"http://127.0.0.1:8000/v1"', "inflight_max": "256"},
    "route": {"path": '"/v1/responses"', "detach_grace": '"60s"'},
}


def markdown() -> str:
    """The whole reference."""
    parts = [_INTRODUCTION]
    for section in SECTIONS:
        parts += [f"## {section}\n", _table([row for row in ROWS if row.section == section])]
    parts += ["## `[[upstream]]`\n", _UPSTREAM_INTRODUCTION + "\n", _table(UPSTREAM_ROWS)]
    parts += ["## `[[route]]`\n", _ROUTE_INTRODUCTION + "\n", _table(ROUTE_ROWS)]
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| key | default | allowed | what it sets, and why |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"`{row.key}`{' *' if row.restart else ''}", _default(row), row.allowed(), row.text)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(row: Row) -> str:
    return f"`{row.written}`" if row.written else ""


def toml() -> str:
    """A file in which every setting stands as a comment with its default, explained, ready to be edited."""
    parts = [_TOML_INTRODUCTION]
    tables: dict[str, list[Row]] = {}
    for section in SECTIONS:
        rows = [row for row in ROWS if row.section == section]
        parts.append(f"# -- {section}\n")
        for row in rows:
            table = row.key.rpartition(".")[0]
            if table:
                tables.setdefault(table, []).append(row)
            else:
                parts.append(_commented(row, row.key, _toml_value(row)))
    for table, rows in tables.items():
        parts.append(f"#[{table}]\n")
        parts += [_commented(row, row.key.rpartition(".")[2], _toml_value(row)) for row in rows]
    for table, introduction, table_rows in (
        ("upstream", _UPSTREAM_INTRODUCTION, UPSTREAM_ROWS),
        ("route", _ROUTE_INTRODUCTION, ROUTE_ROWS),
    ):
        parts.append("\n".join([*_comment(introduction), f"#[[{table}]]\n"]))
        examples = _EXAMPLES[table]
        parts += [_commented(row, row.key, examples.get(row.key) or _toml_value(row)) for row in table_rows]
    return "\n".join(parts)


def _commented(row: Row, key: str, value: str) -> str:
    restart = " Needs a restart." if row.restart else ""
    return "\n".join([*_comment(f"{row.text} Takes {row.allowed()}.{restart}"), f"#{key} = {value}\n"])


def _comment(text: str) -> Iterator[str]:
    # Why no breaks at hyphens: names and URLs stay whole.
    lines = textwrap.wrap(" ".join(text.split()), _TOML_WIDTH, break_on_hyphens=False, break_long_words=False)
    yield from (f"# {line}" for line in lines)


def _toml_value(row: Row) -> str:
    """A row's default as TOML."""
    if row.kind is Kind.TABLE:
        return "{}"
    if row.kind in (Kind.COUNT, Kind.RATIO, Kind.FLAG) or row.written == "0":
        return row.written
    if row.kind is Kind.LIST:
        return "[" + ", ".join(f'"{entry}"' for entry in row.written.split(", ") if entry) + "]"
    return f'"{row.written}"'
