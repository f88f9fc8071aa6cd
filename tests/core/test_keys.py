import hashlib
import hmac
import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamd.core import keys as module
from streamd.core.auth import Key, Principal, Refusal
from streamd.core.keys import (
    EXPIRED,
    INVALID,
    KeyFileError,
    Keys,
    digest,
    encode,
    format_expiry,
    parse_expiry,
    with_key,
    without_key,
)

SALT = bytes(range(16))
SECRET = "A" * 32
PRESENTED = b"sk-k1-" + SECRET.encode()
HASH = f"sha256:{SALT.hex()}:{hashlib.sha256(SALT + PRESENTED).hexdigest()}"
NOW = 1_700_000_000.0


def row(**fields: object) -> bytes:
    full = {"id": "k1", "name": "alice", "hash": HASH} | fields
    return json.dumps({field: value for field, value in full.items() if value is not ...}).encode()


def make(key_id: str = "k1", **fields: object) -> Key:
    presented = f"sk-{key_id}-{SECRET}".encode()
    return Key(id=key_id, name="alice", salt=SALT, digest=digest(SALT, presented), **fields)  # type: ignore[arg-type]


def test_a_row_with_every_field_is_parsed() -> None:
    content = row(
        routes=["/v1/chat/*"],
        models=["llama-*", "mock"],
        streams_max=8,
        requests_per_minute=60,
        tokens_per_minute=100_000,
        expires="2030-01-31",
    )
    (key,) = Keys.parse(content)
    assert (key.id, key.name, key.salt, key.digest) == ("k1", "alice", SALT, digest(SALT, PRESENTED))
    assert (key.routes, key.models) == (("/v1/chat/*",), ("llama-*", "mock"))
    assert (key.streams_max, key.requests_per_minute, key.tokens_per_minute) == (8, 60, 100_000)
    assert key.expires_unix == datetime(2030, 1, 31, tzinfo=UTC).timestamp()


def test_a_row_with_the_required_fields_has_no_limits() -> None:
    (key,) = Keys.parse(row())
    assert (key.routes, key.models, key.expires_unix) == (("*",), ("*",), None)
    assert (key.streams_max, key.requests_per_minute, key.tokens_per_minute) == (None, None, None)


def test_the_example_of_a_key_file_parses() -> None:
    lines = [line.strip() for line in (module.__doc__ or "").splitlines() if line.startswith("    ")]
    example = "\n".join(lines).replace("<salt, hex>", SALT.hex()).replace("<digest, hex>", "ab" * 32)
    assert [key.name for key in Keys.parse(example.encode())] == ["alice", "batch"]


def test_comments_blank_lines_and_crlf_are_allowed() -> None:
    keys = Keys.parse(b"# people\r\n\r\n  " + row() + b"\r\n   # more\n" + row(id="k2"))
    assert len(keys) == 2
    assert "k1" in keys
    assert "k3" not in keys


@pytest.mark.parametrize("content", [b"", b"\n\n", b"# nobody\n"])
def test_an_empty_file_refuses_every_key(content: bytes) -> None:
    keys = Keys.parse(content)
    assert len(keys) == 0
    assert keys.authenticate(PRESENTED, NOW) is INVALID


@pytest.mark.parametrize(
    ("bad", "field", "allowed"),
    [
        (b"{", "", "JSON object on one line"),
        (b"k1 alice", "", "JSON object on one line"),
        (b"[1]", "", "not a JSON object"),
        (b"\xff", "", "JSON object on one line"),
        (b"[" * 100_000, "", "JSON object on one line"),
        (row() + row(), "", "JSON object on one line"),
        (b'{"id": "k1", "id": "k2"}', "", "twice"),
        (row(id=...), "id", "missing"),
        (row(name=...), "name", "missing"),
        (row(hash=...), "hash", "missing"),
        (row(secret="x"), "secret", "known are id, name, hash, routes"),
        (row(id=""), "id", "letters or digits"),
        (row(id="a-b"), "id", "letters or digits"),
        (row(id="é"), "id", "letters or digits"),
        (row(id="k1\n"), "id", "letters or digits"),
        (row(id=7), "id", "letters or digits"),
        (row(id="a" * 33), "id", "letters or digits"),
        (row(id="admin"), "id", "none of admin, anonymous"),
        (row(id="anonymous"), "id", "none of admin, anonymous"),
        (row(name=""), "name", "printable"),
        (row(name="a\nb"), "name", "printable"),
        (row(name="\x1b[31m"), "name", "printable"),
        (row(name=None), "name", "printable"),
        (row(hash="x"), "hash", "streamd keys add"),
        (row(hash=HASH.upper()), "hash", "streamd keys add"),
        (row(hash=HASH.replace("sha256", "md5")), "hash", "streamd keys add"),
        (row(hash=HASH[:-2]), "hash", "streamd keys add"),
        (row(hash="sha256::" + "0" * 64), "hash", "streamd keys add"),
        (row(hash="sha256:" + "0" * 17 + ":" + "0" * 64), "hash", "streamd keys add"),
        (row(routes="/v1/*"), "routes", "a list"),
        (row(routes=[]), "routes", "leave it out for all"),
        (row(routes=["v1"]), "routes", "beginning with / or *"),
        (row(routes=["/v1", 1]), "routes", "a list"),
        (row(models=[""]), "models", "a list"),
        (row(models=["a\x00"]), "models", "a list"),
        (row(models=["a"] * 65), "models", "1 to 64"),
        (row(models=["a" * 257]), "models", "a list"),
        (row(streams_max=0), "streams_max", "from 1"),
        (row(streams_max=-1), "streams_max", "from 1"),
        (row(streams_max=True), "streams_max", "whole number"),
        (row(streams_max=1.5), "streams_max", "whole number"),
        (row(streams_max="8"), "streams_max", "whole number"),
        (row(streams_max=None), "streams_max", "leave it out"),
        (row(requests_per_minute=10**10), "requests_per_minute", "to 1000000000"),
        (row(tokens_per_minute=[]), "tokens_per_minute", "whole number"),
        (row(expires="soon"), "expires", "2030-01-31"),
        (row(expires="2030-02-31"), "expires", "2030-01-31"),
        (row(expires="2030-01-31T12:00:00"), "expires", "with its zone"),
        (row(expires=1_900_000_000), "expires", "a date"),
        (row(expires="0001-01-01T00:00:00+23:00"), "expires", "a date"),
        (row(expires="9999-12-31T23:59:59-23:00"), "expires", "a date"),
    ],
)
def test_an_error_names_the_line_the_field_and_the_allowed_values(bad: bytes, field: str, allowed: str) -> None:
    with pytest.raises(KeyFileError) as error:
        Keys.parse(b"# a comment\n" + row(id="first") + b"\n" + bad + b"\n")
    assert (error.value.line, error.value.field) == (3, field)
    assert str(error.value).startswith("line 3: ")
    assert allowed in str(error.value)
    assert HASH not in str(error.value)


def test_an_id_is_unique() -> None:
    with pytest.raises(KeyFileError, match=r"line 3: id: .*earlier line"):
        Keys.parse(row() + b"\n\n" + row())


def test_the_number_of_keys_and_the_size_of_the_file_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEYS_MAX", 2)
    content = b"\n".join(row(id=f"k{number}") for number in range(3))
    with pytest.raises(KeyFileError, match="line 3: more than 2 keys"):
        Keys.parse(content)
    monkeypatch.setattr(module, "KEYS_FILE_BYTES_MAX", 10)
    with pytest.raises(KeyFileError, match="over 10 bytes"):
        Keys.parse(content)


def test_the_right_secret_authenticates_its_key() -> None:
    keys = Keys.parse(row() + b"\n" + row(id="k2"))
    principal = keys.authenticate(PRESENTED, NOW)
    assert isinstance(principal, Principal)
    assert (principal.id, principal.admin) == ("k1", False)
    assert principal.key is not None
    assert principal.key.name == "alice"


@pytest.mark.parametrize(
    "presented",
    [
        b"",
        b"sk-",
        b"sk-k1",
        b"sk-k1-",
        PRESENTED[:-1],
        PRESENTED + b"A",
        PRESENTED[:-1] + b"B",
        PRESENTED + b"\n",
        b" " + PRESENTED,
        PRESENTED.upper(),
        PRESENTED.replace(b"k1", b"k2"),  # another key's secret
        PRESENTED.replace(b"k1", b"k3"),  # no key has this id
        PRESENTED.replace(b"k1", b""),
        b"sk-k1-" + b"A" * 129,
        b"sk-k1-" + b"\xff" * 32,
        b"A" * 100_000,
        b"sk--" + bytes(32),
    ],
)
def test_every_wrong_key_gets_the_same_answer(presented: bytes) -> None:
    assert Keys.parse(row() + b"\n" + row(id="k2")).authenticate(presented, NOW) is INVALID


def test_an_unknown_id_costs_the_same_work_as_a_wrong_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys.parse(row())
    work: list[tuple[str, int, int]] = []

    def counted_digest(salt: bytes, presented: bytes) -> bytes:
        work.append(("hash", len(salt), len(presented)))
        return digest(salt, presented)

    def counted_compare(one: bytes, other: bytes) -> bool:
        work.append(("compare", len(one), len(other)))
        return hmac_compare(one, other)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(module, "digest", counted_digest)
    monkeypatch.setattr(hmac, "compare_digest", counted_compare)
    assert keys.authenticate(b"sk-k1-" + b"B" * 32, NOW) is INVALID
    wrong_secret, work = work, []
    assert keys.authenticate(b"sk-k9-" + b"B" * 32, NOW) is INVALID
    assert work == wrong_secret == [("hash", 16, 38), ("compare", 32, 32)]


def test_the_decoys_digest_authenticates_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "digest", lambda salt, presented: module.DECOY.digest)
    assert Keys.parse(row()).authenticate(b"sk-k9-" + b"B" * 32, NOW) is INVALID


@pytest.mark.parametrize(("late_s", "is_in"), [(-1, True), (-0.001, True), (0, False), (1, False)])
def test_a_key_is_refused_from_its_expiry_on(late_s: float, is_in: bool) -> None:
    keys = Keys.parse(row(expires=format_expiry(NOW)))
    answer = keys.authenticate(PRESENTED, NOW + late_s)
    assert isinstance(answer, Principal) is is_in
    assert is_in or answer is EXPIRED


def test_only_the_holder_of_an_expired_key_learns_that_it_has_expired() -> None:
    keys = Keys.parse(row(expires="2001-01-01"))
    assert keys.authenticate(PRESENTED[:-1] + b"B", NOW) is INVALID
    assert keys.authenticate(PRESENTED, NOW) is EXPIRED


@pytest.mark.parametrize("refusal", [INVALID, EXPIRED, module.REQUIRED])
def test_refusals_are_401(refusal: Refusal) -> None:
    assert refusal.status == 401
    assert refusal.retry_after_s == 0


def test_adding_and_revoking_keep_every_other_byte() -> None:
    content = b"# people\n" + row(id="k1") + b"\n\n#" + row(id="k2") + b"\n  " + row(id="k3")
    added = with_key(content, make("k4", models=("mock",), streams_max=2))
    assert added.startswith(content + b"\n")
    assert added.endswith(b"\n")
    assert without_key(added, "k4") == content + b"\n"
    assert without_key(content, "k1") == b"# people\n\n#" + row(id="k2") + b"\n  " + row(id="k3")
    for absent in ("k2", "k9"):
        with pytest.raises(KeyError):
            without_key(content, absent)


def test_a_key_that_would_not_parse_is_not_added() -> None:
    with pytest.raises(KeyFileError, match="id"):
        with_key(row(), make("k1"))
    with pytest.raises(KeyFileError, match="streams_max"):
        with_key(b"", make(streams_max=0))
    with pytest.raises(KeyFileError, match="line 1"):
        with_key(b"rubbish\n", make())


COUNTS = st.none() | st.integers(1, 10**9)
PATTERNS = st.lists(st.text("abc*/é\\\"'", min_size=1, max_size=9).map("/{}".format), min_size=1, max_size=4).map(tuple)


@given(PATTERNS, PATTERNS, COUNTS, COUNTS, COUNTS, st.none() | st.integers(0, 4 * 10**9))
def test_an_encoded_key_parses_to_itself(
    routes: object,
    models: object,
    streams_max: int | None,
    requests: int | None,
    tokens: int | None,
    expires: int | None,
) -> None:
    key = make(
        routes=routes,
        models=models,
        streams_max=streams_max,
        requests_per_minute=requests,
        tokens_per_minute=tokens,
        expires_unix=expires,
    )
    assert b"\n" not in encode(key)
    assert list(Keys.parse(encode(key))) == [key]


@given(st.binary(max_size=200))
def test_any_bytes_parse_or_are_refused(content: bytes) -> None:
    try:
        keys = Keys.parse(content)
    except KeyFileError as error:
        assert 1 <= error.line <= content.count(b"\n") + 1
    else:
        assert len(keys) == 0  # random bytes never hold a valid hash


@given(st.binary(max_size=80))
def test_any_bytes_are_refused_as_a_key(presented: bytes) -> None:
    assert Keys.parse(row()).authenticate(presented, NOW) is INVALID


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("2030-01-31", "2030-01-31T00:00:00Z"),
        ("2030-01-31T12:00:00Z", "2030-01-31T12:00:00Z"),
        ("2030-01-31 12:00:00+00:00", "2030-01-31T12:00:00Z"),
        ("2030-01-31T12:00:00+02:00", "2030-01-31T10:00:00Z"),
        ("2030-01-31T12:00:00.9Z", "2030-01-31T12:00:00Z"),
    ],
)
def test_an_expiry_is_written_in_utc_to_the_second(text: str, same: str) -> None:
    assert format_expiry(parse_expiry(text)) == same


@pytest.mark.parametrize(
    ("lines", "slices"), [(0, 0), (module.SLICE_LINES - 1, 0), (module.SLICE_LINES, 1), (3 * module.SLICE_LINES + 1, 3)]
)
def test_a_file_is_parsed_in_slices(lines: int, slices: int) -> None:
    hashed = "sha256:" + "00" * 8 + ":" + "00" * 32
    rows = [json.dumps({"id": f"k{k}", "name": "n", "hash": hashed}).encode() for k in range(lines)]
    content = b"\n".join(rows)
    steps = Keys.parse_in_slices(content)
    assert sum(1 for _ in steps) == slices
    assert len(Keys.parse(content)) == lines
