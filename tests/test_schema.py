"""The JSON Schema of the settings: it accepts the same files as the daemon.

The check of a file against the schema knows the keywords that the schema uses, and fails on any other.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamd import cli, reference
from streamd.config import ROUTE_ROWS, ROWS, UPSTREAM_ROWS
from streamd.schema import DRAFT, schema

PROJECT = Path(__file__).parents[1]
SCHEMA = schema()
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "integer": (int,),
    "number": (int, float),
}
NOTES = {"$schema", "title", "description", "default", "deprecated"}


def faults(schema: dict[str, Any], value: Any, path: str = "") -> Iterator[str]:
    """The places of a value that the schema refuses."""
    for keyword, wanted in schema.items():
        if keyword not in NOTES:
            yield from faults_of(keyword, wanted, schema, value, path)


def faults_of(keyword: str, wanted: Any, schema: dict[str, Any], value: Any, path: str) -> Iterator[str]:
    match keyword:
        case "type":
            taken = isinstance(value, TYPES[wanted]) and (wanted == "boolean" or not isinstance(value, bool))
        case "anyOf":
            taken = any(not list(faults(choice, value)) for choice in wanted)
        case "enum":
            taken = value in wanted
        case "const":
            taken = value == wanted and not isinstance(value, bool)
        case "minimum" | "maximum":
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            taken = not is_number or (value >= wanted if keyword == "minimum" else value <= wanted)
        case "pattern":
            taken = not isinstance(value, str) or re.search(wanted, value) is not None
        case "minLength":
            taken = not isinstance(value, str) or len(value) >= wanted
        case "required":
            taken = not isinstance(value, dict) or set(wanted) <= set(value)
        case "items":
            for index, each in enumerate(value if isinstance(value, list) else ()):
                yield from faults(wanted, each, f"{path}[{index}]")
            return
        case "properties":
            for key in wanted.keys() & (value.keys() if isinstance(value, dict) else ()):
                yield from faults(wanted[key], value[key], f"{path}.{key}")
            return
        case "additionalProperties":
            others = value.keys() - schema.get("properties", {}).keys() if isinstance(value, dict) else set()
            for key in others:
                yield from faults(wanted, value[key], f"{path}.{key}") if wanted else [f"{path}.{key}"]
            return
        case _:
            raise AssertionError(f"the check knows no {keyword}")
    if not taken:
        yield path


def of_file(text: str) -> list[str]:
    return list(faults(SCHEMA, tomllib.loads(text)))


def test_the_command_writes_the_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config-reference", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA
    assert SCHEMA["$schema"] == DRAFT


def test_every_setting_is_in_the_schema_with_its_text() -> None:
    for rows, table in (
        (ROWS, SCHEMA),
        (UPSTREAM_ROWS, SCHEMA["properties"]["upstream"]["items"]),
        (ROUTE_ROWS, SCHEMA["properties"]["route"]["items"]),
    ):
        for row in rows:
            section, _, key = row.key.rpartition(".")
            found = (table["properties"][section] if section else table)["properties"][key]
            assert found["description"].startswith(row.text)


def test_an_earlier_name_of_a_setting_is_accepted_and_marked() -> None:
    assert of_file('flush_interval = "50ms"') == [] and of_file('write_interval = "adaptive"') == []
    assert of_file('write_interval = "adaptively"') != []
    assert SCHEMA["properties"]["flush_interval"]["deprecated"] is True


def test_every_default_is_accepted() -> None:
    lines = [line[1:] for line in reference.toml().splitlines() if re.match(r"#\S", line)]
    assert of_file("\n".join(lines)) == []


@pytest.mark.parametrize("file", ["systemd/streamd.toml"])
def test_files_of_the_project_are_accepted(file: str) -> None:
    assert of_file((PROJECT / file).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "commit_after = 5",
        'commit_after = "1.5 S"',
        'head_bytes_max = "16kib"',
        'workers = "auto"',
        "heartbeat = 0",
        'listen = ["127.0.0.1:1", "unix:/run/x"]',
        "ops_public = true",
        '[streams]\nauth = "token"',
        '[[upstream]]\nurl = "http://a"\nheaders = { "X-A" = "b" }',
        '[[route]]\npath = "/v1/*"\npolicy = "close"',
    ],
)
def test_a_good_file_is_accepted(text: str) -> None:
    assert of_file(text) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("comit_after = 5", ".comit_after"),
        ('commit_after = "5 minutes"', ".commit_after"),
        ("commit_after = -1", ".commit_after"),
        ("heartbeat = 0.5", ".heartbeat"),
        ("head_bytes_max = 1.5", ".head_bytes_max"),
        ("workers = 65", ".workers"),
        ('workers = "many"', ".workers"),
        ("ring_slots = true", ".ring_slots"),
        ('policy = "skip"', ".policy"),
        ('ops_public = "yes"', ".ops_public"),
        ('listen = "127.0.0.1:1"', ".listen"),
        ('[streams]\nauth = "none"', ".streams.auth"),
        ('[[upstream]]\nname = "a"', ".upstream[0]"),
        ("[[upstream]]\nurl = 1", ".upstream[0].url"),
        ('[[upstream]]\nurl = "http://a"\nheaders = { a = 1 }', ".upstream[0].headers.a"),
        ('[[route]]\npath = "/a"\nretention = "1s"', ".route[0].retention"),
    ],
)
def test_a_mistake_is_marked_at_its_place(text: str, where: str) -> None:
    assert of_file(text) == [where]
