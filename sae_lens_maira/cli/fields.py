"""Check the values of a part of a configuration, such as `trainer`, against the types of the fields that it sets.

Libraries check few of their own fields, and a word where a number belongs fails far from where it was written. Here
the message names the field, the value and the type.
"""

import types
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import (
    Any,
    Literal,
    Union,  # noqa: TID251 - the origin of hints of other libraries
    get_args,
    get_origin,
    get_type_hints,
)

from sae_lens_maira.errors import ConfigError

_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Collection)


def checked_fields(part: str, given: Mapping[str, Any], source: Callable[..., Any]) -> dict[str, Any]:
    """The values of a part, each of the type of its field; whole numbers written as 1e3 become integers.

    Args:
        part: Name of the part, for the message.
        given: Value per field; fields that `source` does not have are returned as they are.
        source: Dataclass or function whose fields or arguments the part sets.

    Raises:
        ConfigError: A value has another type than its field.
    """
    hints = get_type_hints(source.__init__ if isinstance(source, type) else source)
    checked = {}
    for name, value in given.items():
        fits, checked[name] = _converted(value, hints.get(name, Any))
        if not fits:
            raise ConfigError(f"{part}.{name} is {value!r}; expected {_described(hints[name])}.")
    return checked


def _converted(value: Any, hint: Any) -> tuple[bool, Any]:
    """Whether a value has a type, and the value in that type."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        results = [_converted(value, one) for one in inner]
        return next(((True, made) for fits, made in results if fits), (False, value))
    if origin is Literal:
        return value in inner, value
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        whole = number and value == value // 1
        return whole, int(value) if whole else value
    if hint is float:
        return number, value
    if hint in (bool, str):
        return isinstance(value, hint), value
    if hint is type(None) or hint is None:
        return value is None, value
    if (origin or hint) in _SEQUENCES:
        listed = isinstance(value, (list, tuple, set, frozenset))
        if not listed or not inner:
            return listed, value
        parts = [_converted(one, inner[0]) for one in value]
        return all(fits for fits, _ in parts), type(value)(made for _, made in parts)
    if (origin or hint) in (dict, Mapping):
        return isinstance(value, Mapping), value
    # A nested configuration is given as a mapping.
    return hint is Any or not isinstance(hint, type) or isinstance(value, (hint, Mapping)), value


def _described(hint: Any) -> str:
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_described(one) for one in inner)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if (origin or hint) in _SEQUENCES:
        return f"a list of {_described(inner[0])}" if inner else "a list"
    if (origin or hint) in (dict, Mapping):
        return "a mapping"
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


__all__ = ["checked_fields"]
