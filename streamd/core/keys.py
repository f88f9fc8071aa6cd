"""The key file: API keys as salted hashes, one JSON object a line.

    # keys of people
    {"id": "q7Xw2LzP", "name": "alice", "hash": "sha256:<salt, hex>:<digest, hex>", "models": ["llama-*"]}
    {"id": "b3Kd9TsR", "name": "batch", "hash": "sha256:<salt, hex>:<digest, hex>", "streams_max": 8}

Blank lines and lines beginning with `#` are kept as they are. JSON lines rather than TOML: each error has a line by
nature, adding a key appends a line, revoking a key removes its line, and both keep everything else byte for byte.

A key is `sk-<id>-<secret>`. The id finds the row, so a check is a single hash however many keys there are: SHA-256 over
salt and key. Why no slow KDF: the secret has 190 random bits, so guessing is hopeless anyway, and a KDF would block the
loop for all connections. An unknown id costs the same hash and the same comparison as a wrong secret, and gets the same
answer.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from streamd.core.auth import RESERVED_IDS, Key, Principal
from streamd.core.refusal import Refusal
from streamd.reasons import CloseReason

# Most keys in a file: ten times those of the largest gateway we know of. 10,000 rows of 220 B take 0.23 s to parse, at
# start and on reload only.
KEYS_MAX: Final = 10_000
KEYS_FILE_BYTES_MAX: Final = 8 * 1024 * 1024  # KEYS_MAX rows of 400 B, doubled
PATTERNS_MAX: Final = 64  # each is tried on each request
PATTERN_CHARS_MAX: Final = 256
NAME_CHARS_MAX: Final = 128
SALT_BYTES: Final = 16
LIMIT_MAX: Final = 1_000_000_000
EXPIRES_UNIX_MAX: Final = 253_402_300_799  # the last second of 9999

ID = re.compile(r"[A-Za-z0-9]{1,32}")
SHAPE = re.compile(rb"sk-([A-Za-z0-9]{1,32})-([!-~]{16,128})")
HASH = re.compile(r"sha256:([0-9a-f]{16,64}):([0-9a-f]{64})")

# An unknown id, a wrong secret and a string that is no key get the same text: a client can't tell them apart.
INVALID: Final = Refusal(CloseReason.UNAUTHORIZED, "invalid_api_key", "This API key is not valid.")
EXPIRED: Final = Refusal(CloseReason.UNAUTHORIZED, "expired_api_key", "This API key has expired.")
REQUIRED: Final = Refusal(
    CloseReason.UNAUTHORIZED, "api_key_required", "Send an API key: `Authorization: Bearer sk-…` or `x-api-key: sk-…`."
)


class KeyFileError(ValueError):
    """A key file that can't be used: the line (from 1), the field if a field is wrong, and the allowed values."""

    def __init__(self, line: int, field: str, text: str) -> None:
        super().__init__(f"line {line}: {field}: {text}" if field else f"line {line}: {text}")
        self.line = line
        self.field = field


# Lines parsed at a time by a daemon that serves: 50 lines of 50 us (20 patterns each) are 2.5 ms.
SLICE_LINES: Final = 50


class Keys:
    """The parsed key file: ids to keys. Immutable; a changed file is parsed anew, and this one dropped."""

    __slots__ = ("_by_id",)

    def __init__(self, by_id: Mapping[str, Key]) -> None:
        self._by_id = dict(by_id)

    @classmethod
    def parse(cls, content: bytes) -> Keys:
        """The keys of a file's content; KeyFileError at the first invalid line, so no row is ever skipped."""
        steps = cls.parse_in_slices(content)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                keys: Keys = end.value
                return keys

    @classmethod
    def parse_in_slices(cls, content: bytes) -> Generator[None, None, Keys]:
        """The work of parse(), yielding after every SLICE_LINES lines."""
        if len(content) > KEYS_FILE_BYTES_MAX:
            raise KeyFileError(1, "", f"the file is over {KEYS_FILE_BYTES_MAX} bytes")
        by_id: dict[str, Key] = {}
        for number, (line, row) in enumerate(_rows(content), 1):
            if number % SLICE_LINES == 0:
                yield
            key = _key(line, row)
            if key.id in by_id:
                raise KeyFileError(line, "id", f'"{key.id}" is the id of an earlier line too; give each key its own')
            if len(by_id) == KEYS_MAX:
                raise KeyFileError(line, "", f"more than {KEYS_MAX} keys")
            by_id[key.id] = key
        return cls(by_id)

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._by_id.values())

    def __contains__(self, key_id: object) -> bool:
        return key_id in self._by_id

    def get(self, key_id: str) -> Key | None:
        """The key of this id."""
        return self._by_id.get(key_id)

    def refuse_later(self, key: Key, now_unix: float) -> Refusal | None:
        """None if a key that was authenticated earlier still holds: its line is there, and it has not expired."""
        present = self._by_id.get(key.id)
        if present is None or present.digest != key.digest:
            return INVALID
        return EXPIRED if present.expires_unix is not None and now_unix >= present.expires_unix else None

    def authenticate(self, presented: bytes, now_unix: float) -> Principal | Refusal:
        """The principal of a presented key at `now_unix` (seconds since 1970), or a refusal with status 401.

        Only a client that knows the secret is told that the key has expired.
        """
        shape = SHAPE.fullmatch(presented)
        if shape is None:
            return INVALID
        key = self._by_id.get(shape[1].decode(), DECOY)
        same = hmac.compare_digest(digest(key.salt, presented), key.digest)
        if not same or key is DECOY:
            return INVALID
        if key.expires_unix is not None and now_unix >= key.expires_unix:
            return EXPIRED
        return Principal(key.id, key)


def digest(salt: bytes, presented: bytes) -> bytes:
    """The digest of a key in the file: that of `sha256sum` over the salt's bytes and the key."""
    return hashlib.sha256(salt + presented).digest()


# Stands in for an unknown id, so that its check takes as much work as a known id's. `authenticate` never accepts this
# key, whatever its digest.
DECOY: Final = Key(id="", name="", salt=bytes(SALT_BYTES), digest=bytes(32))


def with_key(content: bytes, key: Key) -> bytes:
    """The content with `key` as its last line, all else byte for byte. KeyFileError if the result isn't valid."""
    joint = b"" if not content or content.endswith(b"\n") else b"\n"
    changed = content + joint + encode(key) + b"\n"
    Keys.parse(changed)
    return changed


def without_key(content: bytes, key_id: str) -> bytes:
    """The content without the line of that id, all else byte for byte. KeyError if no line has it."""
    lines = content.split(b"\n")
    for line, row in _rows(content):
        if row.get("id") == key_id:
            del lines[line - 1]
            return b"\n".join(lines)
    raise KeyError(key_id)


def encode(key: Key) -> bytes:
    """The key's line, without its line end; a right or limit that is the default is left out."""
    row: dict[str, object] = {"id": key.id, "name": key.name, "hash": f"sha256:{key.salt.hex()}:{key.digest.hex()}"}
    for field in ("routes", "models"):
        if getattr(key, field) != ("*",):
            row[field] = list(getattr(key, field))
    for field in LIMITS:
        if getattr(key, field) is not None:
            row[field] = getattr(key, field)
    if key.expires_unix is not None:
        row["expires"] = format_expiry(key.expires_unix)
    return json.dumps(row, ensure_ascii=False).encode()


def parse_expiry(text: str) -> float:
    """Seconds since 1970 of a date (its first second, UTC) or an RFC 3339 time with its zone; else ValueError."""
    when = datetime.fromisoformat(text)
    if when.tzinfo is None:
        if "T" in text or " " in text:
            raise ValueError("a time needs its zone")
        when = when.replace(tzinfo=UTC)
    expires_unix = when.timestamp()
    if not 0 <= expires_unix <= EXPIRES_UNIX_MAX:
        raise ValueError("a time from 1970 to 9999")
    return expires_unix


def format_expiry(expires_unix: float) -> str:
    """The inverse of `parse_expiry`, to the second (a fraction is dropped: earlier rather than later)."""
    return datetime.fromtimestamp(int(expires_unix), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _rows(content: bytes) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, object) of each line that is no comment and not blank."""
    for line, raw in enumerate(content.split(b"\n"), 1):
        text = raw.strip()
        if text and not text.startswith(b"#"):
            yield line, _row(line, text)


def _row(line: int, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            raise KeyFileError(line, "", "a field stands in the line twice; leave one of them out")
        return row

    try:
        row = json.loads(text, object_pairs_hook=unique)
    except KeyFileError:
        raise
    except (ValueError, RecursionError) as error:
        raise KeyFileError(line, "", f"not a JSON object on one line ({error})") from None
    if not isinstance(row, dict):
        raise KeyFileError(line, "", "not a JSON object")
    return row


def _key(line: int, row: dict[str, Any]) -> Key:
    for field in row:
        if field not in FIELDS:
            raise KeyFileError(line, field, f"unknown; known are {', '.join(FIELDS)}")
    for field in ("id", "name", "hash"):
        if field not in row:
            raise KeyFileError(line, field, "is missing")
    fields: dict[str, Any] = {}
    for field, value in row.items():
        parsed, allowed = FIELDS[field]
        try:
            fields |= parsed(field, value)
        except (TypeError, ValueError, OverflowError):
            raise KeyFileError(line, field, f"has to be {allowed}") from None
    return Key(**fields)


def _parse_id(field: str, value: str) -> dict[str, Any]:
    if not ID.fullmatch(value) or value in RESERVED_IDS:
        raise ValueError
    return {field: value}


def _parse_name(field: str, value: str) -> dict[str, Any]:
    if not 0 < len(value) <= NAME_CHARS_MAX or not value.isprintable():
        raise ValueError
    return {field: value}


def _parse_hash(field: str, value: str) -> dict[str, Any]:
    shape = HASH.fullmatch(value)
    if shape is None:
        raise ValueError
    return {"salt": bytes.fromhex(shape[1]), "digest": bytes.fromhex(shape[2])}


def _parse_limit(field: str, value: int) -> dict[str, Any]:
    if type(value) is not int or not 1 <= value <= LIMIT_MAX:
        raise ValueError
    return {field: value}


def _parse_expires(field: str, value: str) -> dict[str, Any]:
    return {"expires_unix": parse_expiry(value)}


def _parse_patterns(field: str, value: list[str]) -> dict[str, Any]:
    # An empty list could mean "none" or "no restriction", so it is refused.
    if not isinstance(value, list) or not 1 <= len(value) <= PATTERNS_MAX or not all(map(_is_pattern, value)):
        raise ValueError
    if field == "routes" and not all(pattern.startswith(("/", "*")) for pattern in value):
        raise ValueError
    return {field: tuple(value)}


def _is_pattern(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= PATTERN_CHARS_MAX and value.isprintable()


LIMITS: Final = ("streams_max", "requests_per_minute", "tokens_per_minute")
_COUNT: Final = f"a whole number from 1 to {LIMIT_MAX}; leave it out for no limit"
_PATTERNS: Final = f"a list of 1 to {PATTERNS_MAX} patterns (`*` is any run of characters); leave it out for all"

# field → (its parser, the allowed values in words)
FIELDS: Final[Mapping[str, tuple[Callable[[str, Any], dict[str, Any]], str]]] = {
    "id": (_parse_id, f"1 to 32 letters or digits, and none of {', '.join(sorted(RESERVED_IDS))}"),
    "name": (_parse_name, f"1 to {NAME_CHARS_MAX} printable characters"),
    "hash": (
        _parse_hash,
        "sha256:<salt, 8 to 32 bytes in hex>:<digest, 32 bytes in hex>, as `streamd keys add` writes it",
    ),
    "routes": (_parse_patterns, _PATTERNS + ", each beginning with / or *"),
    "models": (_parse_patterns, _PATTERNS),
    "streams_max": (_parse_limit, _COUNT),
    "requests_per_minute": (_parse_limit, _COUNT),
    "tokens_per_minute": (_parse_limit, _COUNT),
    "expires": (_parse_expires, "a date (2030-01-31) or a time with its zone (2030-01-31T12:00:00Z)"),
}
