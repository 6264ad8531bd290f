"""Numbers and ranges as users type them: "0-49,77"."""

from __future__ import annotations

from sae_lens_maira.errors import ConfigError

MOST = 10_000_000
"""Numbers that one option may list; no SAE has as many latents."""


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """The numbers of a list such as "0-49,77", each once; None for None.

    Args:
        text: the list.
        option: name of the option, for the error.

    Raises:
        ConfigError: the text is not such a list, or a range ends before it begins.
    """
    if text is None:
        return None
    found: dict[int, None] = {}
    for part in text.split(","):
        first, dash, last = (word.strip() for word in part.partition("-"))
        if not first.isdecimal() or not (last.isdecimal() if dash else not last):
            raise ConfigError(
                f'{option} {text!r} is not a list of numbers. Write numbers and ranges as in "0-49,77".'
            )
        span = range(int(first), int(last or first) + 1)
        if not span:
            raise ConfigError(
                f"{option} {text!r} holds the range {part.strip()}, which ends before it begins. Write "
                f"{last}-{first}."
            )
        if len(span) > MOST - len(found):
            raise ConfigError(
                f"{option} {text!r} lists more than {MOST:,} numbers. Write the latents you need."
            )
        found |= dict.fromkeys(span)
    return tuple(found)
