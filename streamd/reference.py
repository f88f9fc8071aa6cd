"""The reference of all settings, written from the table: Markdown for people, with a TOML example to start from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streamd.config import ROUTE_ROWS, ROWS, SECTIONS, UPSTREAM_ROWS
from streamd.rows import Kind, Row

_INTRODUCTION = """\
# Settings

Flags win over the environment, the environment over the file (`--config FILE`, or `STREAMD_CONFIG`), the file over
the default. `commit_after` in the file is `--commit-after` as a flag and `STREAMD_COMMIT_AFTER` in the environment.
Durations take `ms`, `s`, `m`, `h`; sizes `B`, `KiB`, `MiB`, `GiB` and `kB`, `MB`, `GB`; a bare number is seconds or
bytes. Lists are TOML arrays in the file, repeated flags, and separated by commas in the environment. A path in the file
starts beside the file; `credential:NAME` is one that systemd passes with `LoadCredential=`. `streamd check-config FILE`
says all that is wrong with a file, with line numbers. Settings marked * need a restart; the others change with a
reload.
"""

_UPSTREAM_INTRODUCTION = """\
One table for each inference server. `--upstream URL`, which repeats, and `STREAMD_UPSTREAM=URL,URL` stand for tables
that have nothing but a `url`, and replace those of the file."""

_ROUTE_INTRODUCTION = "What differs for one path. Whatever a table leaves out is as everywhere else."


def markdown() -> str:
    """The whole reference."""
    parts = [_INTRODUCTION]
    for section in SECTIONS:
        parts += [f"## {section}\n", _table([row for row in ROWS if row.section == section])]
    parts += ["## `[[upstream]]`\n", _UPSTREAM_INTRODUCTION + "\n", _table(UPSTREAM_ROWS)]
    parts += ["## `[[route]]`\n", _ROUTE_INTRODUCTION + "\n", _table(ROUTE_ROWS)]
    parts += ["## A file with every default\n", f"```toml\n{toml()}```\n"]
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    lines = ["| key | default | allowed | why |", "| --- | --- | --- | --- |"]
    for row in rows:
        cells = (f"`{row.key}`{' *' if row.restart else ''}", _default(row), row.allowed(), row.why)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def _default(row: Row) -> str:
    return f"`{row.written}`" if row.written else ""


def toml() -> str:
    """A file in which every setting stands as a comment with its default, ready to be edited."""
    return "\n".join(_toml_lines()) + "\n"


def _toml_lines() -> Iterator[str]:
    tables: dict[str, list[Row]] = {}
    for section in SECTIONS:
        rows = [row for row in ROWS if row.section == section]
        yield f"# {section}"
        for row in rows:
            table, _, key = row.key.rpartition(".")
            if table:
                tables.setdefault(table, []).append(row)
            else:
                yield f"# {key} = {_toml_value(row)}"
        yield ""
    for table, rows in tables.items():
        yield f"# [{table}]"
        yield from (f"# {row.key.rpartition('.')[2]} = {_toml_value(row)}" for row in rows)
        yield ""
    yield from (
        "# [[upstream]]",
        '# name = "gpu1"',
        '# url = "http://127.0.0.1:8000/v1"',
        '# models = ["*"]',
        "# inflight_max = 256",
        "",
        "# [[route]]",
        '# path = "/v1/responses"',
        '# detach_grace = "60s"',
    )


def _toml_value(row: Row) -> str:
    """A row's default as TOML."""
    if row.kind in (Kind.COUNT, Kind.FLAG) or row.written == "0":
        return row.written
    if row.kind is Kind.LIST:
        return "[" + ", ".join(f'"{entry}"' for entry in row.written.split(", ") if entry) + "]"
    return f'"{row.written}"'
