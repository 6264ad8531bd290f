"""What every position of an encoding is: its role, and named filters over roles.

    PAD · BOS · TEMPLATE · IMAGE · INDICATION · TECHNIQUE · COMPARISON · PRIOR_REPORT · PHRASE
    SEPARATOR · REPORT

Roles partition a sequence: every position has exactly one. TEMPLATE is boilerplate prose, SEPARATOR the turn
markers and section labels (`USER:`, `INDICATION:`, ...), a section's role covers its text or its `N/A`, and
REPORT covers generated or teacher-forced text with its closing `</s>`. Roles are assigned where the prompt is
built (`prompts.py`, `tokenization.py`); this module only names them and knows nothing about tokenizers.
"""

from collections.abc import Iterable
from enum import IntEnum

from sae_lens_maira.errors import ConfigError


class TokenRole(IntEnum):
    """The role of one position; the numbers are stored in files and never change."""

    PAD = 0
    BOS = 1
    TEMPLATE = 2
    IMAGE = 3
    INDICATION = 4
    TECHNIQUE = 5
    COMPARISON = 6
    PRIOR_REPORT = 7
    PHRASE = 8
    SEPARATOR = 9
    REPORT = 10


SECTIONS = frozenset(
    {
        TokenRole.INDICATION,
        TokenRole.TECHNIQUE,
        TokenRole.COMPARISON,
        TokenRole.PRIOR_REPORT,
        TokenRole.PHRASE,
    }
)

LAST_IMAGE_PRESET = "paper_last_image"
"""The preset that keeps one position of each image: its last one."""

ROLE_PRESETS: dict[str, frozenset[TokenRole]] = {
    # All that a report is written from, and the report; no boilerplate.
    "content": SECTIONS | {TokenRole.IMAGE, TokenRole.REPORT},
    # arXiv 2507.12950 drops "intermediate image tokens" and boilerplate. Whether that spares the last token of each
    # image is not published: "paper" drops all image tokens, "paper_last_image" keeps the last one of each image.
    "paper": SECTIONS | {TokenRole.REPORT},
    LAST_IMAGE_PRESET: SECTIONS | {TokenRole.IMAGE, TokenRole.REPORT},
    "text_only": frozenset(TokenRole) - {TokenRole.PAD, TokenRole.BOS, TokenRole.IMAGE},
    "image_only": frozenset({TokenRole.IMAGE}),
    "generated_only": frozenset({TokenRole.REPORT}),
    "all": frozenset(TokenRole) - {TokenRole.PAD},
}

DEFAULT_ROLES = "content"
"""The preset that harvest, latents and quickstart use unless told otherwise."""

RoleFilter = str | TokenRole | Iterable[TokenRole | str]


def resolve_roles(roles: RoleFilter) -> frozenset[TokenRole]:
    """Turn a preset's name, a role, or role names into a set of roles.

    "paper_last_image" gives the roles alone; which image positions it keeps is up to `role_mask`.

    Raises:
        ConfigError: the name is neither a preset nor a role.
    """
    if isinstance(roles, TokenRole):
        return frozenset({roles})
    if isinstance(roles, str):
        if roles in ROLE_PRESETS:
            return ROLE_PRESETS[roles]
        return frozenset({_role(roles)})
    return frozenset(_role(role) for role in roles)


def _role(role: TokenRole | str) -> TokenRole:
    if isinstance(role, TokenRole):
        return role
    try:
        return TokenRole[role.upper()]
    except (KeyError, AttributeError):
        names = ", ".join([*ROLE_PRESETS, *(r.name.lower() for r in TokenRole)])
        raise ConfigError(
            f"{role!r} is neither a preset of token roles nor a role; known are {names}. Use one of these."
        ) from None
