"""Typed JSON: the values of a control message as JSON and back, by the type that the message's kind has.

Parent and worker may be of neighbouring versions while one takes over from the other. So named tuples and dataclasses
go by the names of their fields: a name that this version doesn't know is ignored, a missing one has its default. All
else is checked: a value of another type makes a FormError.

Types: None, bool, int, float, str, enums (by value), tuples, mappings from str, named tuples, dataclasses, and unions
of one of these with None.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import types
import typing
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Final, cast


class FormError(ValueError):
    """The facts don't have the type of their kind. The text names the type, never a value: settings hold secrets."""


def written(value: Any, form: Any) -> Any:
    """The value as JSON has it. Raises FormError for a value of another type."""
    return _translated(value, form, _write_object)


def read(given: Any, form: Any) -> Any:
    """The value that written() made JSON of. Raises FormError for anything else."""
    return _translated(given, form, _read_object)


_Objects = Callable[[Any, Any], Any]  # translates a value of a class that isn't plain

_PLAIN: Final = (bool, int, str, type(None))


def _translated(value: Any, form: Any, objects: _Objects) -> Any:
    """The value in its other form: containers item by item, plain values as they are, all else by `objects`."""
    origin, inner = typing.get_origin(form), typing.get_args(form)
    if form is None or form in _PLAIN:
        return _checked(value, form or type(None))
    if form is float:
        return float(_checked(value, float if isinstance(value, float) else int))
    if origin in (types.UnionType, typing.Union):
        (present,) = (each for each in inner if each is not type(None))
        return None if value is None else _translated(value, present, objects)
    if origin is tuple:
        return _tuple(value, form, inner, objects)
    if origin is Mapping:
        if not isinstance(value, Mapping):
            raise _wrong(form)
        return {_checked(name, str): _translated(each, inner[1], objects) for name, each in value.items()}
    return objects(value, form)


def _tuple(value: Any, form: Any, inner: tuple[Any, ...], objects: _Objects) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise _wrong(form)
    if inner[-1] is Ellipsis:
        return tuple([_translated(each, inner[0], objects) for each in value])
    if len(value) != len(inner):
        raise _wrong(form)
    return tuple([_translated(each, kind, objects) for each, kind in zip(value, inner, strict=True)])


def _checked(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise _wrong(kind)
    return value


def _write_object(value: Any, form: Any) -> Any:
    if type(value) is not form:
        raise _wrong(form)
    if isinstance(value, enum.Enum):
        return value.value
    return {name: written(getattr(value, name), kind) for name, kind in _fields(cast("Hashable", form)).items()}


def _read_object(given: Any, form: Any) -> Any:
    try:
        if isinstance(form, enum.EnumType):
            return form(given)
        if not isinstance(given, dict):
            raise _wrong(form)
        fields = _fields(form)
        return form(**{name: read(given[name], kind) for name, kind in fields.items() if name in given})
    except FormError:
        raise
    except (TypeError, ValueError) as error:  # a word that isn't in the enum; a name without a default is missing
        raise _wrong(form) from error


@functools.cache
def _fields(form: Hashable) -> dict[str, Any]:
    """The fields of a named tuple or a dataclass that its constructor takes, with their types."""
    hints = typing.get_type_hints(form)
    if dataclasses.is_dataclass(form):
        return {field.name: hints[field.name] for field in dataclasses.fields(form) if field.init}
    if not hasattr(form, "_fields"):
        raise _wrong(form)
    return {name: hints[name] for name in form._fields}


def _wrong(form: Any) -> FormError:
    return FormError(f"a value that is no {getattr(form, '__name__', form)}")
