"""JsonScan (streamd/wire/json_scan.py): against the standard library, whole and in pieces."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from streamd.wire import json_scan
from streamd.wire.json_scan import (
    DEPTH_MAX,
    Found,
    JsonError,
    JsonScan,
    Watched,
    folded,
    loaded,
    scan,
    scan_slowly,
    spliced,
)

MODEL = Watched({"model": None})
WATCHED = Watched(
    {
        "model": None,
        "stream": None,
        "stream_options": None,
        "requests": Watched(elements=Watched({"model": None})),
        "inner": Watched({"model": None}),
    }
)

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=12)
    | st.sampled_from(['"', "\\", '\\"', ',[{"', "}],:", "\\\\", "é\u2028", "\ud83d", "a" * 100 + '\\"' * 3])
)
names = st.sampled_from(["model", "stream", "requests", "inner", "a", "mod", "models", "_", "x\\y", "é", ""]) | st.text(
    max_size=5
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=25
)
documents = st.dictionaries(names, values, max_size=6) | values
layouts = st.sampled_from([None, 0, 1, "\t"])


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """JSON with and without white space, with names and texts escaped and not."""
    value = draw(documents)
    ascii_only = draw(st.booleans())
    text = json.dumps(value, indent=draw(layouts), ensure_ascii=ascii_only)
    return text.encode("utf-8", "surrogatepass")


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """JSON with some bytes taken out, put in or doubled."""
    text = bytearray(draw(texts()))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(text)))
        put = draw(
            st.binary(max_size=2)
            | st.sampled_from([b"", b",", b'"', b"\\", b"[", b"}", b"0", b"-", b".", b"e", b"NaN"])
        )
        text[at : at + draw(st.integers(0, 2))] = put
    return bytes(text)


# Any order of tokens: near misses of the grammar that damage to JSON seldom makes.
tokens = st.lists(
    st.sampled_from([*(bytes([byte]) for byte in b"{}[],: "), b'"a"', b'"model"', b'"\\""', b"1", b"null", b'"']),
    max_size=14,
).map(b"".join)


def is_json(text: bytes) -> bool:
    """Whether the grammar holds, by the standard library; escapes and bytes in strings may be anything. A byte order
    mark in front is no part of the text.
    """

    def refuse(word: str) -> NoReturn:
        raise ValueError(word)

    plain = re.sub(r"\\.", "__", text.removeprefix(b"\xef\xbb\xbf").decode("latin-1"), flags=re.DOTALL)
    try:
        json.loads(plain, strict=False, parse_constant=refuse)
    except ValueError:
        return False
    return True


def in_pieces(text: bytes, step: int, watched: Watched | None = None) -> JsonScan:
    """Scanned as it would come in pieces of `step` bytes, in a buffer that grows."""
    found, held = JsonScan(watched), bytearray()
    for start in range(0, len(text), step):
        held += text[start : start + step]
        found.feed(held)
    found.feed(held, last=True)
    return found


def outcome(text: bytes, watched: Watched | None, step: int = 0) -> Any:
    try:
        found = in_pieces(text, step, watched) if step else scan(text, watched)
    except JsonError as error:
        return error.code, error.param
    return found.found, found.values, found.containers


@given(texts() | damaged() | tokens)
@settings(max_examples=400)
@example(b"")
@example(b" ")
@example(b"01")
@example(b"-")
@example(b"1.e5")
@example(b"[1,]")
@example(b'{"a":1,}')
@example(b'{"a" 1}')
@example(b'["\\\\\\"]')
@example(b'["a\\\\\\\\\\\\",1]')
@example(b"[[1,2],[3,[4,]]]")
@example(b"{}{}")
@example(b'{"a""b":1}')
@example(b'[{"a" "b":[]}]')
@example(b'{"a":"b":1}')
@example(b'{"a":1"b":1}')
@example(b"\xef\xbb\xbf{}")
@example(b"\xef\xbb{}")
@example(b"\xef\xbb\xbf")
@example(b"\xef\xbb\xbf\xef\xbb\xbf{}")
@example(b"{}\xef\xbb\xbf")
def test_what_is_json_is_taken_and_nothing_else(text: bytes) -> None:
    taken = outcome(text, None)
    assert (taken == ("bad_json", None)) is not is_json(text)


@given(texts() | damaged() | tokens, st.integers(1, 9))
@settings(max_examples=300)
def test_it_makes_no_difference_how_a_text_is_cut(text: bytes, step: int) -> None:
    assert outcome(text, WATCHED, step) == outcome(text, WATCHED)


def places(text: bytes) -> dict[str, Any]:
    found = scan_slowly(text, MODEL)
    return {each.name: json.loads(text[each.start : each.end]) for each in found.found}


@given(texts())
def test_a_watched_member_is_found_where_a_parser_finds_it(text: bytes) -> None:
    pairs = json.loads(text, object_pairs_hook=lambda pairs: pairs) if text.lstrip()[:1] == b"{" else []
    if sum(folded(name) == "model" for name, _ in pairs) > 1:
        return
    parsed = json.loads(text)
    expected = {"model": parsed["model"]} if isinstance(parsed, dict) and "model" in parsed else {}
    assert places(text) == expected


@given(st.dictionaries(st.text(max_size=6), values, max_size=5), st.text(max_size=8), st.booleans())
def test_splicing_changes_one_value_and_no_other_byte(others: dict[str, Any], model: str, ascii_only: bool) -> None:
    others = {name: value for name, value in others.items() if folded(name) != "model"}
    text = json.dumps({**others, "model": model, "z": 1e2}, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    [place] = scan_slowly(text, MODEL).found
    after = spliced(text, [(place.start, place.end, b'"own"')])
    assert after[: place.start] == text[: place.start]
    assert after[place.start + 5 :] == text[place.end :]
    assert json.loads(after) == {**json.loads(text), "model": "own"}


def test_digits_order_surrogates_and_doubled_members_stay_as_they_are() -> None:
    text = (
        b'{"seed":123456789012345678901234567890, "x":-0.0,"x":1e2,"t":"\\ud83d\\/","model" : "m" ,"b":[{"model":"m"}]}'
    )
    [place] = scan_slowly(text, MODEL).found
    assert spliced(text, [(place.start, place.end, b'"own"')]) == text.replace(b': "m" ', b': "own" ')


def test_several_places_are_spliced_at_once() -> None:
    assert spliced(b"abcdef", [(4, 5, b"55"), (0, 1, b""), (2, 2, b"__")]) == b"b__cd55f"


@pytest.mark.parametrize(
    "members",
    [
        b'"model":"a","model":"b"',
        b'"model":"a","model":"a"',
        b'"model":"a","x":[[[1]]],"mod\\u0065l":"b"',
        b'"model":"a","Model":"b"',
        b'"MODEL":"b"',
        b'"x":1,"mOdel":"b","y":2',
        b'"_model":"b"',
        b'"mo_del":"b"',
        b'"model\\u0000x":"b"',
        b'"model\x00":"b"',
        b'"model":"a","\\u004dodel":"b"',
        b'"inner":{"model":"a","Model":"b"}',
        b'"requests":[{"model":"a"},{"model":"a","model":"b"}]',
        b'"requests":[{"a":[[]],"MODEL":"a"}]',
    ],
)
@pytest.mark.parametrize("step", [0, 1, 5])
def test_a_member_that_parsers_could_read_differently_is_refused(members: bytes, step: int) -> None:
    assert outcome(b"{" + members + b"}", WATCHED, step) == ("ambiguous_member", "model")


def test_letters_that_fold_to_ascii_count_too() -> None:
    """Go's encoding/json folds U+017F to s and U+212A to k."""
    assert outcome('{"stream":false,"ſtream":true}'.encode(), WATCHED) == ("ambiguous_member", "stream")
    assert outcome('{"\u212aey":1}'.encode(), Watched({"key": None})) == ("ambiguous_member", "key")
    assert outcome(b'{"\\u017fTREAM":true}', WATCHED) == ("ambiguous_member", "stream")


@pytest.mark.parametrize(
    "name", ["models", "mode", "modell", "x", "", "mod el", "xmodel", "user", "Modells", "méthode"]
)
def test_other_names_may_stand_as_often_as_they_like(name: str) -> None:
    text = json.dumps({name: 1})[1:-1]
    found = scan_slowly(f'{{{text},"model":"m",{text}}}'.encode(), MODEL)
    assert [each.name for each in found.found] == ["model"]


def test_members_of_a_place_that_is_not_watched_may_have_any_name() -> None:
    assert scan_slowly(b'{"tools":[{"model":1,"Model":2,"model":3}],"x":{"model":1,"model":2}}', MODEL).found == []
    assert scan_slowly(b'[{"model":1,"model":2}]', MODEL).found == []


def test_two_spellings_may_be_watched_together_but_stand_apart() -> None:
    both = Watched({"aB": None, "a_b": None})
    assert [each.name for each in scan(b'{"aB":1}', both).found] == ["aB"]
    assert [each.name for each in scan(b'{"a_b":1}', both).found] == ["a_b"]
    assert outcome(b'{"aB":1,"a_b":1}', both)[0] == "ambiguous_member"


def test_fields_are_the_watched_members_alone() -> None:
    text = (
        b'{"x":[1],"model":"m\\u0041","stream":true,"stream_options":{"include_usage":true},"inner":{"y":1,"model":"n"}'
    )
    text += b',"requests":[{"model":"a","z":[]},{},{"model":null}]}'
    assert scan(text, WATCHED).fields(text) == {
        "model": "mA",
        "stream": True,
        "stream_options": {"include_usage": True},
        "inner": {"model": "n"},
        "requests": [{"model": "a"}, {"model": None}],
    }


@pytest.mark.parametrize(("value", "empty"), [(b"[%b1]" % (b"1," * 5000), []), (b'{"a":"%b"}' % (b"x" * 5000), {})])
def test_a_large_container_is_not_built(value: bytes, empty: object) -> None:
    text = b'{"stream_options":%b}' % value
    assert scan(text, WATCHED).fields(text) == {"stream_options": empty}


@pytest.mark.parametrize("value", [b'"%b"' % (b"m" * 5000), b'"\\ud83d"', b'"\\q"', b'"\xff"', b'"a\x01"', b"1" * 4000])
def test_a_watched_value_that_cannot_be_read_is_refused(value: bytes) -> None:
    text = b'{"model":%b}' % value
    with pytest.raises(JsonError) as refused:
        scan(text, MODEL).fields(text)
    assert refused.value.param == "model"


@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}"), (b'[ {"a": [1], "b" : ', b"}]")])
@pytest.mark.parametrize("step", [0, 7])
def test_depth_is_bounded(opening: bytes, closing: bytes, step: int) -> None:
    levels = len(re.findall(rb"[\[{](?!1)", opening))
    allowed = (DEPTH_MAX - 2) // levels
    text = b"[" + opening * allowed + b"0" + closing * allowed + b"]"
    assert outcome(text, None, step)[0] == []
    deeper = b"[" + opening * (DEPTH_MAX + 1) + b"0" + closing * (DEPTH_MAX + 1) + b"]"
    assert outcome(deeper, None, step) == ("json_too_deep", None)


@pytest.mark.parametrize("flat", [b"[]", b"{}", b"[1,2]", b'{"a":1}', b"[1,{}]", b'{"a":[]}'])
def test_the_last_level_counts_however_it_is_read(flat: bytes) -> None:
    deep = 2 if flat in (b"[1,{}]", b'{"a":[]}') else 1
    for others in (b"", b"1,", b"[],"):
        around = DEPTH_MAX - deep
        fits = (
            b"[" * (around - 1)
            + b"["
            + others * (around < DEPTH_MAX - 1 or not others.startswith(b"["))
            + flat
            + b"]" * around
        )
        assert outcome(fits, None)[0] == []
        assert outcome(b"[" + fits + b"]", None) == ("json_too_deep", None)


@pytest.mark.parametrize("element", [b"1", b'"a,b"', b"[]", b'{"a":1}', b'"\\",["', b'{"a":[1,{}]}'])
def test_the_number_of_values_is_bounded_and_commas_in_strings_are_none(
    element: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = b"[" + b",".join([element] * 40) + b"]"
    marks = len(re.findall(rb"[,\[{]", re.sub(rb'"(?:\\.|[^"\\])*"', b"", text)))
    assert scan(text).values == in_pieces(text, 3).values == marks
    for name in ("VALUES_MAX", "CONTAINERS_MAX"):
        monkeypatch.setattr(json_scan, name, 30)
        allowed = name == "CONTAINERS_MAX" and element in (b"1", b'"a,b"', b'"\\",["')
        assert (outcome(text, None, 5) == ("json_too_large", None)) is not allowed
        monkeypatch.undo()


def test_names_that_must_be_decoded_and_finds_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_scan, "ODD_NAMES_MAX", 3)
    assert outcome(b"{" + b",".join([b'"\\u0061":1'] * 4) + b"}", MODEL) == ("json_too_large", None)
    assert outcome(b'{"x":{' + b",".join([b'"\\u0061":1'] * 4) + b"}}", MODEL)[0] == []
    monkeypatch.setattr(json_scan, "LOOKED_INTO_MAX", 5)
    for requests, code in ((b"{}," * 4, "json_too_large"), (b"1," * 4, []), (b'{"model":"m"},' * 2, [])):
        text = b'{"requests":[' + requests + b"1]}"
        assert outcome(text, WATCHED)[0] == code or not isinstance(code, str)


def test_a_bomb_is_refused_before_it_is_whole() -> None:
    found, held = JsonScan(), bytearray(b"[")
    with pytest.raises(JsonError, match="more than 50000 lists and objects"):
        for _ in range(1000):
            held += b"[]," * 1000
            found.feed(held)
    assert len(held) < 200_000


@pytest.mark.parametrize("inside", [b"x" + b'\\\\\\"', b"\\\\", b"x", b'\\"'])
def test_a_long_string_is_read_once_however_it_is_cut(inside: bytes) -> None:
    """Its bytes are looked at as often as there are pieces if it is read from its beginning each time."""
    text, looked = b'{"a":"' + inside * 20_000 + b'"}', 0
    found, held = JsonScan(), bytearray()
    for start in range(0, len(text), 1000):
        held += text[start : start + 1000]
        before = found.position
        found.feed(held)
        looked += len(held) - before
    found.feed(held, last=True)
    assert looked < 1.1 * len(text)


@pytest.mark.parametrize("element", [b"1,", b'"a",', b"[],", b'{"a":1},'])
def test_a_run_is_taken_at_once_wherever_it_is_cut(element: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    step, steps = JsonScan._step, 0

    def counted(*args: Any) -> bool:
        nonlocal steps
        steps += 1
        return step(*args)

    monkeypatch.setattr(JsonScan, "_step", counted)
    JsonScan().feed(b"[0," + element * 5_000)
    assert steps < 10


def test_where_it_went_wrong_is_told_by_line_and_column() -> None:
    with pytest.raises(JsonError, match="unexpected byte at line 2, column 7"):
        scan(b'{"a":1,\n "b": x}')
    with pytest.raises(JsonError, match="ends too early at line 1, column 7"):
        scan(b'{"a":1')


def test_a_place_says_how_deep_it_is() -> None:
    found = scan(b'{"requests":[{"model":1}],"model":2}', WATCHED).found
    assert found == [Found("model", 22, 23, 3), Found("requests", 12, 25, 1), Found("model", 34, 35, 1)]


@pytest.mark.parametrize("text", [b'{"model": "a"}', b'\xef\xbb\xbf{"model": "a"}', b' {"model": "a"}\n'])
def test_a_small_text_is_built_as_a_parser_builds_it(text: bytes) -> None:
    assert loaded(text, MODEL) == {"model": "a"}


@pytest.mark.parametrize("text", [b'{"model": "a", "MODEL": "b"}', b'{"model": "\xff"}', b"{", b""])
def test_a_text_is_built_only_if_the_scan_and_the_parser_take_it(text: bytes) -> None:
    with pytest.raises(JsonError):
        loaded(text, MODEL)
