"""Objects that an upstream keeps, in paths, bodies and answers."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.json_scan import scan
from streamd.wire.kept_objects import READ_BYTES_MAX, WATCHED, IdReader, InPath, ids_in, in_path


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("POST", "/v1/chat/completions", InPath(stores=True)),
        ("POST", "/v1/embeddings", InPath()),
        ("GET", "/v1/files/responses", InPath(lists=True)),  # read as a collection: refused rather than granted
        ("POST", "/v1/responses", InPath(makes=True)),
        ("POST", "/v1/responses/", InPath(makes=True)),
        ("POST", "/v1/openai/Responses", InPath(makes=True)),
        ("POST", "/v1/conversations", InPath(makes=True)),
        ("GET", "/v1/responses", InPath(lists=True)),
        ("GET", "/v1/chat/completions", InPath(lists=True)),
        ("POST", "/v1/responses/compact", InPath()),
        ("POST", "/v1/responses/input_tokens/", InPath()),
        ("GET", "/v1/responses/compact", InPath(("compact",))),
        ("GET", "/v1/responses/r1", InPath(("r1",))),
        ("GET", "/v1/RESPONSES/r1/", InPath(("r1",))),
        ("DELETE", "/v1/responses/r1", InPath(("r1",))),
        ("POST", "/v1/responses/r1/cancel", InPath(("r1",))),
        ("GET", "/v1/responses/r1/input_items", InPath(("r1",))),
        ("GET", "/v1beta/openai/responses/r1", InPath(("r1",))),
        ("POST", "/v1/conversations/c1/items", InPath(("c1",))),
        ("GET", "/v1/chat/completions/c1/messages", InPath(("c1",))),
        ("GET", "/v1/responses/r%253A1", InPath(("r%253A1", "r%3A1", "r:1"))),
    ],
)
def test_a_path_names_makes_or_lists_objects(method: str, path: str, said: InPath) -> None:
    assert in_path(method, path) == said


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({}, []),
        ({"previous_response_id": None, "conversation": None}, []),
        ({"previous_response_id": "r1"}, ["r1"]),
        ({"previous_response_id": 7}, [None]),
        ({"conversation": "c1"}, ["c1"]),
        ({"conversation": {"id": "c1", "more": [{"id": "x"}]}}, ["c1"]),
        ({"previous_response_id": "r1", "conversation": {"id": "c1"}}, ["r1", "c1"]),
        ({"input": [{"previous_response_id": "r1"}]}, []),
    ],
)
def test_a_body_names_the_objects_that_it_goes_on_with(body: dict[str, Any], named: list[str | None]) -> None:
    data = json.dumps(body).encode()
    assert ids_in(scan(data, WATCHED).fields(data)) == named


ANSWERS = [
    (b'{"id": "r1", "object": "response", "output": [{"id": "m1"}]}', "r1"),
    (b'{"output": [{"id": "m1"}], "error": null, "id": "r\\u0031"}', "r1"),
    (b'{"output": {"id": "m1"}}', None),
    (b'{"id": 7}', None),
    (b'["r1"]', None),
    (b"event: x\ndata: {}\n\n", None),
    (b"", None),
]


@given(st.sampled_from(ANSWERS), st.data())
def test_the_id_of_an_answer_is_found_however_it_is_cut(answer: tuple[bytes, str | None], data: st.DataObject) -> None:
    whole, object_id = answer
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)))))
    reader = IdReader()
    pieces = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    found = [each for piece in pieces if (each := reader.feed(piece)) is not None]
    assert found == ([] if object_id is None else [object_id])


def test_an_answer_is_read_to_a_bound() -> None:
    reader = IdReader()
    long = b'{"output": "' + b"x" * READ_BYTES_MAX
    assert reader.feed(long) is None and reader.feed(b'", "id": "r1"}') is None
    assert reader._scan is None and not reader._data
