import urllib.parse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire.query import FIELDS_MAX, fields, has_too_many_fields, parameter


@pytest.mark.parametrize(
    ("query", "values"),
    [
        ("", ()),
        ("access_token=a", ("a",)),
        ("x=1&access_token=a&y=2", ("a",)),
        ("access_token=a&access_token=b", ("a", "b")),
        ("access_token", ("",)),
        ("access%5ftoken=%61=b", ("a=b",)),
        ("access_token=a+b", ("a b",)),
        ("access_token2=a&xaccess_token=b&ACCESS_TOKEN=c", ()),
        ("x=;access_token=a", ()),
    ],
)
def test_a_parameter_of_a_query_is_found_with_all_its_values(query: str, values: tuple[str, ...]) -> None:
    assert parameter(query, "access_token") == values


@given(st.lists(st.sampled_from(["a", "b=1", "b=2", "%62=3", "=", "", "c=%ff", "+=+", "d=e=f"]), max_size=8))
def test_fields_are_those_of_the_standard_library(parts: list[str]) -> None:
    query = "&".join(parts)
    assert list(fields(query)) == urllib.parse.parse_qsl(query, keep_blank_values=True)


def test_a_query_is_taken_apart_once() -> None:
    fields.cache_clear()
    for name in ("a", "b", "access_token"):
        parameter("a=1&b=2", name)
    assert fields.cache_info().misses == 1


@pytest.mark.parametrize("count", [FIELDS_MAX, FIELDS_MAX + 1])
def test_the_number_of_fields_is_bounded(count: int) -> None:
    query = "&".join(["x"] * (count - 1) + ["name=1"])
    assert has_too_many_fields(query) == (count > FIELDS_MAX)
    assert parameter(query, "name") == (() if count > FIELDS_MAX else ("1",))
