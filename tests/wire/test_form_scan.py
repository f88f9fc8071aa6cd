"""Forms are read for their model in a single plain way, whole and in every cut; any other way is told apart."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.wire import form_scan
from streamd.wire.form_scan import PART_HEAD_BYTES_MAX, VALUE_BYTES_MAX, FormScan

FILE = (
    b'--B\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\nRI\r\nFF\r\n"
)
MODEL = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
END = b"--B--\r\n"


def read(form: bytes, cuts: tuple[int, ...] = ()) -> tuple[list[str], bool]:
    scan = FormScan.of(b"multipart/form-data; boundary=B")
    assert scan is not None
    held = bytearray()
    for start, end in zip((0, *cuts), (*cuts, len(form)), strict=True):
        held += form[start:end]
        scan.feed(held)
    scan.feed(held, last=True)
    return scan.models(held), scan.is_plain


PLAIN = [
    FILE + MODEL + END,
    MODEL + FILE + END,
    MODEL + b"--B--",
    MODEL.replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain; charset=utf-8\r\n\r\n") + END,
    MODEL.replace(b"Content-Disposition: form-data; ", b"content-disposition:form-data;") + END,
    MODEL.replace(b'"model"', b"model") + END,
    FILE.replace(b'"a.wav"', b"\"a.wav\"; filename*=utf-8''%e2%82%ac.wav") + MODEL + END,
    MODEL + b'--B\r\nContent-Disposition: form-data; name="timestamp_granularities[]"\r\n\r\nword\r\n' + END,
    MODEL + b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n\r\n' + END,
    MODEL + b'--B\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n' + END,
]


@given(st.sampled_from(PLAIN), st.data())
def test_the_model_of_a_plain_form_is_found_however_it_is_cut(form: bytes, data: st.DataObject) -> None:
    cuts = tuple(sorted(data.draw(st.sets(st.integers(0, len(form)), max_size=9))))
    assert read(form, cuts) == (["whisper-1"], True)


def part(head: bytes, value: bytes = b"other") -> bytes:
    return b"--B\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


NAMED = b'Content-Disposition: form-data; name="model"'
ODD = {
    "twice": MODEL + MODEL,
    "a file": MODEL + part(NAMED + b'; filename="x"'),
    "two names": MODEL + part(NAMED + b'; name="x"'),
    "two dispositions": MODEL + part(NAMED + b'\r\nContent-Disposition: form-data; name="x"'),
    "no disposition": MODEL + part(b"Content-Type: text/plain"),
    "not of a form": MODEL + part(b'Content-Disposition: attachment; name="model"'),
    "another case": MODEL + part(NAMED.replace(b"model", b"Model")),
    "a list": MODEL + part(NAMED.replace(b"model", b"model[]")),
    "an escape": MODEL + part(NAMED.replace(b"model", b"mod\\el")),
    "a quote": MODEL + part(NAMED.replace(b"model", b"%22model")),
    "not ASCII": MODEL + part(NAMED.replace(b"model", "modél".encode())),
    "fallbacks": MODEL + part(NAMED.replace(b"model", b"fallbacks")),
    "a charset for all": MODEL + part(NAMED.replace(b"model", b"_charset_"), b"utf-16"),
    "a charset": part(NAMED + b"\r\nContent-Type: text/plain; charset=utf-16", b"whisper-1"),
    "an encoding": MODEL + part(NAMED.replace(b"model", b"x") + b"\r\nContent-Transfer-Encoding: base64"),
    "parts in a part": MODEL + part(NAMED.replace(b"model", b"x") + b"\r\nContent-Type: multipart/mixed; boundary=C"),
    "a folded line": MODEL + part(NAMED.replace(b"; name", b";\r\n name")),
    "a bare line end": MODEL
    + b"--B\r\n"
    + NAMED.replace(b"model", b"x")
    + b"\r\n\r\na\n--B\n"
    + NAMED
    + b"\n\nother\r\n",
    "a longer boundary": MODEL + b'--B\r\nContent-Disposition: form-data; name="x"\r\n\r\n--Bc\r\n',
    "bytes that are no name": MODEL.replace(b"whisper-1", b"\xff"),
    "no parts": b"",
}


@pytest.mark.parametrize("which", ODD)
def test_a_form_that_could_be_read_in_another_way_is_not_plain(which: str) -> None:
    models, is_plain = read(ODD[which] + END)
    assert not is_plain
    assert models[:1] in ([], ["whisper-1"], ["�"])


@pytest.mark.parametrize(
    "form",
    [
        b"\r\n" + MODEL + END,
        b"preamble\r\n" + MODEL + END,
        MODEL + END + MODEL + END,
        MODEL + END + b"x",
        MODEL,
        MODEL + b"--B",
        MODEL + b"--B \r\n" + END,
        b'{"model": "other"}',
        MODEL[:20],
        b"",
    ],
)
def test_bytes_around_the_parts_are_not_plain(form: bytes) -> None:
    for cuts in ((), tuple(range(len(form)))):
        models, is_plain = read(form, cuts)
        assert not is_plain and models in ([], ["whisper-1"])


def test_a_form_is_read_to_its_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(MODEL.replace(b"whisper-1", b"w" * VALUE_BYTES_MAX) + END)[1]
    assert read(MODEL.replace(b"whisper-1", b"w" * (VALUE_BYTES_MAX + 1)) + END) == ([], False)
    long = MODEL.replace(b"\r\n\r\n", b"\r\nX: " + b"x" * PART_HEAD_BYTES_MAX + b"\r\n\r\n") + END
    assert read(long) == read(long, (2000, 4200)) == ([], False)
    monkeypatch.setattr(form_scan, "PARTS_MAX", 3)
    assert read(MODEL + 2 * FILE + END)[1] and not read(MODEL + 3 * FILE + END)[1]


def test_another_name_takes_the_models_place_and_nothing_else_changes() -> None:
    form = FILE + MODEL + END
    scan = FormScan(b"B")
    scan.feed(form, last=True)
    assert scan.with_names(form, {"whisper-1": "org/large"}) == form.replace(b"whisper-1", b"org/large")
    assert scan.with_names(form, {"other": "x"}) == form


@pytest.mark.parametrize(
    ("content_type", "is_form"),
    [
        (b"multipart/form-data; boundary=B", True),
        (b'Multipart/Form-Data;boundary="a b"', True),
        (b"multipart/form-data", False),
        (b"multipart/form-data; boundary=a; boundary=b", False),
        (b"multipart/form-data; charset=utf-8; boundary=a", False),
        (b"multipart/form-data; boundary=" + b"x" * 71, False),
        (b'multipart/form-data; boundary="a\\"b"', False),
        (b"multipart/mixed; boundary=B", False),
        (b"application/json", False),
        (None, False),
    ],
)
def test_a_form_is_known_by_its_type_and_a_single_boundary(content_type: bytes | None, is_form: bool) -> None:
    assert (FormScan.of(content_type) is not None) is is_form
