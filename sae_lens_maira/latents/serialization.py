"""Records as plain JSON values and back: dataclasses of numbers, strings and tuples, nothing else.

    from_plain(kind, to_plain(record)) == record

A field that is missing or unknown is an error, since it means another version or a file cut off. What to build is
worked out once per class. It knows nothing about which records there are.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from functools import cache
from typing import Any, TypeVar

from sae_lens_maira.errors import RecordError

T = TypeVar("T")


def to_plain(record: Any) -> dict[str, Any]:
    """A record as dicts, lists, numbers and strings, ready for `json.dumps(..., allow_nan=False)`."""
    return asdict(record)


def from_plain(kind: type[T], plain: dict[str, Any]) -> T:
    """The record that `to_plain` made `plain` from.

    Raises:
        RecordError: a field is missing or unknown.
    """
    builders = _builders(kind)
    if not plain.keys() <= builders.keys():
        raise RecordError(
            f"{kind.__name__} has no field {sorted(set(plain) - set(builders))}; the records were written by another "
            "version. Write them again with this one."
        )
    try:
        return kind(
            **{
                name: value if value is None or (build := builders[name]) is None else build(value)
                for name, value in plain.items()
            }
        )
    except TypeError as error:
        raise RecordError(
            f"A {kind.__name__} is incomplete ({error}); the file was cut off or written by another version. "
            "Write the records again."
        ) from None


@cache
def _builders(kind: type) -> dict[str, Callable[[Any], Any] | None]:
    """Per field what makes its value from the plain one; None where that is the value itself."""
    return {name: _builder(hint) for name, hint in typing.get_type_hints(kind).items()}


def _builder(hint: Any) -> Callable[[Any], Any] | None:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _builder(next(a for a in args if a is not type(None)))
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            inner = _builder(args[0])
            return tuple if inner is None else lambda value: tuple(inner(v) for v in value)
        each = [_builder(a) for a in args]
        if not any(each):
            return tuple
        return lambda value: tuple(v if b is None else b(v) for b, v in zip(each, value, strict=True))
    if is_dataclass(hint) and isinstance(hint, type):
        return lambda value: from_plain(hint, value)
    return None
