"""Values: how each kind of fact is written into a record, read from it, and checked.

A value stands in the record's JSON; bytes stand behind the JSON, one after the other, and the JSON has their numbers.
Both ways check: what can't be read isn't written, so the giver finds out before anything has moved. Reading takes no
more work or memory than the record has bytes.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Sized
from typing import Any, Final, Protocol

# Bound of times and durations, in seconds: a process that runs for a thousand years.
SECONDS_MAX: Final = 3.2e10

# Bound of counts that nothing else bounds. JSON's readers take integers up to here.
COUNT_MAX: Final = 2**53


def told(value: object) -> str:
    """The kind of a value, and its length or itself, for an error: texts and bytes may be a client's, or megabytes."""
    if isinstance(value, (bool, int, float)) or value is None:
        return f"{value!r:.40}"
    return f"{type(value).__name__} of {len(value)}" if isinstance(value, Sized) else type(value).__name__


class RecordError(ValueError):
    """The record can't be read, or the object can't be written: its unit is refused. The text says why."""


class Blobs:
    """The bytes of a record that is read. Each is used once, in their order, or the record is refused."""

    __slots__ = ("_blobs", "_next")

    def __init__(self, blobs: list[bytes]) -> None:
        self._blobs = blobs
        self._next = 0

    def take(self, number: object) -> bytes:
        """The bytes with this number, which has to be the next."""
        if type(number) is not int or number != self._next or number >= len(self._blobs):
            raise RecordError(f"bytes number {number!r} where {self._next} of {len(self._blobs)} are next")
        self._next += 1
        return self._blobs[number]

    @property
    def are_used(self) -> bool:
        """Whether all bytes were taken."""
        return self._next == len(self._blobs)


class Value(Protocol):
    """A kind of value."""

    def put(self, value: Any, blobs: list[bytes], version: int) -> Any:
        """The value as JSON has it; bytes go to the end of `blobs`. Raises RecordError for a value of another kind."""

    def get(self, given: Any, blobs: Blobs, version: int) -> Any:
        """The value that put() wrote. Raises RecordError for anything else."""


class PlainValue:
    """A value that JSON has as it is."""

    __slots__ = ()

    def put(self, value: Any, blobs: list[bytes], version: int) -> Any:
        """As in Value."""
        self.check(value)
        return value

    def get(self, given: Any, blobs: Blobs, version: int) -> Any:
        """As in Value."""
        self.check(given)
        return given

    def check(self, value: Any) -> None:
        """Raises RecordError for a value of another kind."""
        raise NotImplementedError


class Flag(PlainValue):
    """True or false."""

    __slots__ = ()

    def check(self, value: Any) -> None:
        if type(value) is not bool:
            raise RecordError(f"{told(value)} where true or false should be")


class WholeNumber(PlainValue):
    """A whole number, least <= value <= most."""

    __slots__ = ("_least", "_most")

    def __init__(self, least: int = 0, most: int = COUNT_MAX) -> None:
        self._least = least
        self._most = most

    def check(self, value: Any) -> None:
        if type(value) is not int or not self._least <= value <= self._most:
            raise RecordError(f"{told(value)} is no whole number from {self._least} to {self._most}")


class Text(PlainValue):
    """A text of at most `chars_max` characters; `fits`: whether it may have this value."""

    __slots__ = ("_chars_max", "_fits")

    def __init__(self, chars_max: int, fits: Callable[[str], object] = lambda text: True) -> None:
        self._chars_max = chars_max
        self._fits = fits

    def check(self, value: Any) -> None:
        if type(value) is not str or len(value) > self._chars_max or not self._fits(value):
            raise RecordError(f"{told(value)} isn't a right text of at most {self._chars_max} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise RecordError("a text with half of a surrogate pair") from None


class Seconds:
    """A time or a duration, in seconds. `or_never`: infinity, too, which JSON has as null."""

    __slots__ = ("_or_never",)

    def __init__(self, *, or_never: bool = False) -> None:
        self._or_never = or_never

    def put(self, value: Any, blobs: list[bytes], version: int) -> Any:
        """As in Value."""
        given = None if value == math.inf else value
        self.get(given, Blobs([]), version)
        return given

    def get(self, given: Any, blobs: Blobs, version: int) -> float:
        """As in Value."""
        if given is None and self._or_never:
            return math.inf
        if type(given) not in (int, float) or not abs(given) <= SECONDS_MAX:
            raise RecordError(f"{told(given)} is no time in seconds")
        return float(given)


class Decimal(PlainValue):
    """A number with a fraction."""

    __slots__ = ()

    def check(self, value: Any) -> None:
        if type(value) not in (int, float) or not abs(value) <= COUNT_MAX:
            raise RecordError(f"{told(value)} is no number")


class Bytes:
    """At most `bytes_max` bytes."""

    __slots__ = ("_bytes_max",)

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max

    def put(self, value: Any, blobs: list[bytes], version: int) -> int:
        """As in Value."""
        if type(value) is not bytes or len(value) > self._bytes_max:
            raise RecordError(f"{told(value)} isn't at most {self._bytes_max} bytes")
        blobs.append(value)
        return len(blobs) - 1

    def get(self, given: Any, blobs: Blobs, version: int) -> bytes:
        """As in Value."""
        taken = blobs.take(given)
        if len(taken) > self._bytes_max:
            raise RecordError(f"{len(taken)} bytes where at most {self._bytes_max} may be")
        return taken


class Mask:
    """A whole number of at most `bits_max` bits, as hexadecimal digits: JSON has no numbers of that size."""

    __slots__ = ("_bits_max",)

    def __init__(self, bits_max: int) -> None:
        self._bits_max = bits_max

    def put(self, value: Any, blobs: list[bytes], version: int) -> str:
        """As in Value."""
        if type(value) is not int or value < 0 or value.bit_length() > self._bits_max:
            raise RecordError(f"a number of more than {self._bits_max} bits, or below 0")
        return f"{value:x}"

    def get(self, given: Any, blobs: Blobs, version: int) -> int:
        """As in Value."""
        if type(given) is not str or not 0 < len(given) <= self._bits_max // 4 + 1 or set(given) - set(_HEX):
            raise RecordError(f"{told(given)} where hexadecimal digits should be")
        value = int(given, 16)
        if f"{value:x}" != given or value.bit_length() > self._bits_max:
            raise RecordError(f"{told(given)} where at most {self._bits_max} bits should be")
        return value


_HEX: Final = "0123456789abcdef"


class Word:
    """A member of an enumeration, by its value, which is a word, or by another attribute."""

    __slots__ = ("_attribute", "_by_word")

    def __init__(self, members: type[enum.Enum], attribute: str = "value") -> None:
        self._attribute = attribute
        self._by_word = {str(getattr(member, attribute)): member for member in members}

    def put(self, value: Any, blobs: list[bytes], version: int) -> str:
        """As in Value."""
        word = str(getattr(value, self._attribute, ""))
        if value is None or self._by_word.get(word) is not value:
            raise RecordError(f"{told(value)} is none of {', '.join(self._by_word)}")
        return word

    def get(self, given: Any, blobs: Blobs, version: int) -> enum.Enum:
        """As in Value."""
        found = self._by_word.get(given) if type(given) is str else None
        if found is None:
            raise RecordError(f"{told(given)} is none of {', '.join(self._by_word)}")
        return found


class Maybe:
    """A value, or None."""

    __slots__ = ("_inner",)

    def __init__(self, inner: Value) -> None:
        self._inner = inner

    def put(self, value: Any, blobs: list[bytes], version: int) -> Any:
        """As in Value."""
        return None if value is None else self._inner.put(value, blobs, version)

    def get(self, given: Any, blobs: Blobs, version: int) -> Any:
        """As in Value."""
        return None if given is None else self._inner.get(given, blobs, version)


class Many:
    """A tuple of at most `count_max` values of a kind."""

    __slots__ = ("_count_max", "_inner")

    def __init__(self, inner: Value, count_max: int = COUNT_MAX) -> None:
        self._inner = inner
        self._count_max = count_max

    def put(self, value: Any, blobs: list[bytes], version: int) -> list[Any]:
        """As in Value."""
        if not isinstance(value, tuple) or len(value) > self._count_max:
            raise RecordError(f"{told(value)} where at most {self._count_max} values should be")
        return [self._inner.put(each, blobs, version) for each in value]

    def get(self, given: Any, blobs: Blobs, version: int) -> tuple[Any, ...]:
        """As in Value."""
        if type(given) is not list or len(given) > self._count_max:
            raise RecordError(f"{told(given)} where at most {self._count_max} values should be")
        return tuple([self._inner.get(each, blobs, version) for each in given])


class TupleOf:
    """A tuple with a kind for each place."""

    __slots__ = ("_inner",)

    def __init__(self, *inner: Value) -> None:
        self._inner = inner

    def put(self, value: Any, blobs: list[bytes], version: int) -> list[Any]:
        """As in Value."""
        if not isinstance(value, tuple) or len(value) != len(self._inner):
            raise RecordError(f"{told(value)} where {len(self._inner)} values should be")
        return [inner.put(each, blobs, version) for inner, each in zip(self._inner, value, strict=True)]

    def get(self, given: Any, blobs: Blobs, version: int) -> tuple[Any, ...]:
        """As in Value."""
        if type(given) is not list or len(given) != len(self._inner):
            raise RecordError(f"{told(given)} where {len(self._inner)} values should be")
        return tuple([inner.get(each, blobs, version) for inner, each in zip(self._inner, given, strict=True)])
