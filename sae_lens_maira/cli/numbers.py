"""Numbers and ranges as users type them: "0-49,77". It knows nothing about what is numbered."""

from __future__ import annotations

from sae_lens_maira.errors import ConfigError


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """The numbers of a list such as "0-49,77", each once; None for None.

    Raises:
        ConfigError: the text is no such list; the message names the option.
    """
    if text is None:
        return None
    found: list[int] = []
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            found += range(int(first), int(last or first) + 1)
    except ValueError:
        raise ConfigError(
            f'{option} {text!r} is no list of numbers; write numbers and ranges as in "0-49,77".'
        ) from None
    return tuple(dict.fromkeys(found))
