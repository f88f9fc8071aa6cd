import pytest

from streamd.wire.query import parameter


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
