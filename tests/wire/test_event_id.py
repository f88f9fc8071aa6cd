from __future__ import annotations

import pytest

from streamd.wire.event_id import (
    SEQ_MAX,
    EventId,
    valid_last_event_id,
    valid_name,
    valid_stream_id,
)

STREAM = "s_" + "0aB_-" * 5 + "zz"


def test_an_id_of_a_stream_named_by_streamd_has_no_epoch() -> None:
    assert valid_last_event_id(f"{STREAM}:12".encode()) == EventId(STREAM, None, 12)


@pytest.mark.parametrize("name", ["a", "chat-1", "a.b~c_d", "...", "..a", "s", "sa_b", "S_upper", "x" * 128])
def test_an_id_of_a_chosen_name_carries_its_epoch(name: str) -> None:
    assert valid_last_event_id(f"{name}:aB3_-9:7".encode()) == EventId(name, "aB3_-9", 7)
    assert valid_name(name.encode())


@pytest.mark.parametrize("seq", [0, 1, 9, 10, SEQ_MAX])
def test_seqs_are_canonical_decimal(seq: int) -> None:
    assert valid_last_event_id(f"{STREAM}:{seq}".encode()) == EventId(STREAM, None, seq)


@pytest.mark.parametrize(
    "seq",
    [
        "",
        "-1",
        "+1",
        "01",
        "00",
        "1.0",
        "1e3",
        " 1",
        "1 ",
        "1_0",
        "٣",
        str(SEQ_MAX + 1),
        "9" * 400,
    ],
)
def test_other_spellings_of_a_seq_are_refused(seq: str) -> None:
    assert valid_last_event_id(f"{STREAM}:{seq}".encode()) is None
    assert valid_last_event_id(f"name:abcdef:{seq}".encode()) is None


@pytest.mark.parametrize("name", ["", ".", "..", "s_", "s_x", "a b", "a/b", "a:b", "é", "x" * 129, STREAM])
def test_bad_names_are_refused(name: str) -> None:
    assert not valid_name(name.encode())
    assert valid_last_event_id(f"{name}:abcdef:1".encode()) is None


@pytest.mark.parametrize("bad", [STREAM[:-1], STREAM + "x", "s_", "s_" + "!" * 27, "x_" + "a" * 27])
def test_stream_ids_have_one_form(bad: str) -> None:
    assert valid_stream_id(STREAM.encode())
    assert not valid_stream_id(bad.encode())
    assert valid_last_event_id(f"{bad}:1".encode()) is None


@pytest.mark.parametrize("byte", [b"\r", b"\n", b"\0", b" ", b"\t", b"\x7f", b"\xff"])
@pytest.mark.parametrize("good", [f"{STREAM}:12".encode(), b"name:abcdef:3"])
def test_a_control_byte_anywhere_is_refused(good: bytes, byte: bytes) -> None:
    for at in range(len(good) + 1):
        assert valid_last_event_id(good[:at] + byte + good[at:]) is None


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b":",
        b"12",
        b"name:12",
        b"name:abcde:1",
        b"name:abcdefg:1",
        b"a:abcdef:1:2",
        b"a:abc=ef:1",
    ],
)
def test_an_id_that_streamd_never_writes_is_refused(raw: bytes) -> None:
    assert valid_last_event_id(raw) is None
