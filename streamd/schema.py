"""The JSON Schema of the file of settings, for editors: they complete keys, show their meaning, and mark mistakes.

It is made from the table of settings. It describes the usual ways of writing: the daemon takes a few more (numbers as
texts), and checks more (relations between settings, files that have to exist). Draft 2020-12.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from streamd.config import ROUTE_ROWS, ROWS, UPSTREAM_ROWS
from streamd.rows import UNITS_BYTES, UNITS_S, Kind, Row

DRAFT = "https://json-schema.org/draft/2020-12/schema"


def schema() -> dict[str, Any]:
    """The schema as a dict for json.dumps."""
    tables = {
        "upstream": _table_of(UPSTREAM_ROWS, ["url"], "One inference server."),
        "route": _table_of(ROUTE_ROWS, ["path"], "Settings that differ for one path."),
    }
    top = [row for row in ROWS if "." not in row.key]
    nested: dict[str, list[Row]] = {}
    for row in ROWS:
        if "." in row.key:
            nested.setdefault(row.key.partition(".")[0], []).append(row)
    return {
        "$schema": DRAFT,
        "title": "Settings of streamd",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **{row.key: _setting(row) for row in top},
            **{row.old_key: _renamed(row) for row in top if row.old_key},
            **{table: _table_of(rows, [], f"Settings of {table}.") for table, rows in nested.items()},
            **{name: {"type": "array", "items": table} for name, table in tables.items()},
        },
    }


def _table_of(rows: Sequence[Row], required: list[str], description: str) -> dict[str, Any]:
    return {
        "description": description,
        "type": "object",
        "additionalProperties": False,
        "required": required,
        "properties": {row.key.rpartition(".")[2]: _setting(row) for row in rows},
    }


def _setting(row: Row) -> dict[str, Any]:
    restart = " Needs a restart." if row.restart else ""
    described = {"description": f"{row.text} Takes {row.allowed()}.{restart}", **_taken(row)}
    return {**described, "default": _default(row)} if row.written else described


def _renamed(row: Row) -> dict[str, Any]:
    return {"description": f"An earlier name of {row.key}.", "deprecated": True, **_taken(row)}


def _taken(row: Row) -> dict[str, Any]:
    match row.kind:
        case Kind.DURATION:
            quantity = _quantity(row, "number", list(UNITS_S))
            return {"anyOf": [*quantity["anyOf"], {"enum": list(row.words)}]} if row.words else quantity
        case Kind.BYTES:
            return _quantity(row, "integer", list(UNITS_BYTES))
        case Kind.COUNT:
            words = [{"enum": list(row.words)}] if row.words else []
            return _any_of([*_number(row, "integer"), *words])
        case Kind.RATIO:
            return _any_of(_number(row, "number"))
        case Kind.WORD:
            return {"enum": list(row.words)}
        case Kind.FLAG:
            return {"type": "boolean"}
        case Kind.LIST:
            return {"type": "array", "items": {"type": "string", "minLength": 1}}
        case Kind.TABLE:
            return {"type": "object", "additionalProperties": {"type": "string"}}
        case Kind.TEXT | Kind.PATH:
            return {"type": "string"}


def _quantity(row: Row, number: str, units: list[str]) -> dict[str, Any]:
    """A bare number within the bounds, or a number with a unit in either case."""
    unit = "|".join("".join(f"[{letter.upper()}{letter}]" for letter in each) for each in units)
    text = {"type": "string", "pattern": rf"^ *[0-9]{{1,15}}(\.[0-9]{{1,9}})? ?({unit})? *$"}
    return _any_of([*_number(row, number), text])


def _number(row: Row, number: str) -> list[dict[str, Any]]:
    bounded: dict[str, Any] = {"type": number, "minimum": row.low}
    if row.high < math.inf:
        bounded["maximum"] = row.high
    return [bounded, {"const": 0}] if row.zero and row.low > 0 else [bounded]


def _any_of(choices: list[dict[str, Any]]) -> dict[str, Any]:
    return choices[0] if len(choices) == 1 else {"anyOf": choices}


def _default(row: Row) -> object:
    if row.kind is Kind.LIST:
        return row.written.split(", ")
    if row.kind is Kind.FLAG:
        return row.written == "true"
    if row.kind is Kind.RATIO:
        return float(row.written)
    return int(row.written) if row.kind is Kind.COUNT else row.written
