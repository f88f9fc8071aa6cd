from __future__ import annotations

import json
from typing import Any

import pytest

from streamd.wire.model_names import MODELS_MAX, NAME_CHARS_MAX, names_listed


@pytest.mark.parametrize(
    ("body", "names"),
    [
        ({"object": "list", "data": [{"id": "a"}, {"id": "org/b"}]}, {"a", "org/b"}),
        ({"models": [{"name": "models/gemini"}, {"name": "tunedModels/x"}]}, {"gemini", "tunedModels/x"}),
        ({"models": [{"name": "llama3:latest", "model": "llama3:latest"}]}, {"llama3:latest", "llama3"}),
        ({"data": None, "models": [{"model": "a"}]}, {"a"}),
        ([{"id": "a"}, "b", 7, None, {"id": 5}], {"a", "b"}),
        ({"data": []}, set()),
        ({"data": {"id": "a"}}, set()),
        ({"error": "no"}, set()),
        ("a", set()),
        (None, set()),
    ],
)
def test_the_names_of_a_list_are_read_in_every_known_shape(body: Any, names: set[str]) -> None:
    assert names_listed(json.dumps(body).encode()) == names


def test_a_list_is_read_to_a_bound() -> None:
    assert names_listed(b"not JSON") == frozenset()
    many = [{"id": f"{k}".rjust(NAME_CHARS_MAX + 9, "x")} for k in range(MODELS_MAX + 9)]
    assert all(len(name) == NAME_CHARS_MAX for name in names_listed(json.dumps(many).encode()))
    assert len(names_listed(json.dumps([f"{k}" for k in range(MODELS_MAX + 9)]).encode())) == MODELS_MAX
