"""Token roles of positions, presets of roles, image views, and the tokens that MAIRA-2 adds to Vicuna's vocabulary.

    PAD · BOS · TEMPLATE · IMAGE · INDICATION · TECHNIQUE · COMPARISON · PRIOR_REPORT · PHRASE
    SEPARATOR · REPORT

Every position has exactly one role. TEMPLATE is the fixed text of the prompt, SEPARATOR the turn markers and section
labels (`USER:`, `INDICATION:`, ...). The role of a section covers its text or its `N/A`, and REPORT covers generated or
teacher-forced text with the final `</s>`. `prompts.py` and `tokenization.py` assign the roles.

    <obj> </obj> <x0>..<x99> <y0>..<y99> <box> </box> <image> <prev_im> <lat_image>

The 207 added tokens have the ids 32000 to 32206 in the published tokenizer; in a smaller tokenizer they follow its
vocabulary in the same order. They are not "special" tokens: `skip_special_tokens=True` keeps them in decoded text, so
that boxes can be parsed.
"""

from collections.abc import Iterable
from enum import IntEnum

from sae_lens_maira.errors import ConfigError

VIEWS = ("frontal", "lateral", "prior")
"""Names of a study's images; files store their numbers."""


class TokenRole(IntEnum):
    """Role of one position. The numbers are stored in files and must not change."""

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
"""Preset that keeps one position of each image: the last one."""

ROLE_PRESETS: dict[str, frozenset[TokenRole]] = {
    # All content that a report is written from, and the report, without the fixed text of the prompt.
    "content": SECTIONS | {TokenRole.IMAGE, TokenRole.REPORT},
    # arXiv 2507.12950 drops "intermediate image tokens" and boilerplate. Whether it keeps the last token of each image
    # is not published: "paper" drops all image tokens, "paper_last_image" keeps the last one of each image.
    "paper": SECTIONS | {TokenRole.REPORT},
    LAST_IMAGE_PRESET: SECTIONS | {TokenRole.IMAGE, TokenRole.REPORT},
    "text_only": frozenset(TokenRole) - {TokenRole.PAD, TokenRole.BOS, TokenRole.IMAGE},
    "image_only": frozenset({TokenRole.IMAGE}),
    "generated_only": frozenset({TokenRole.REPORT}),
    "all": frozenset(TokenRole) - {TokenRole.PAD},
}

DEFAULT_ROLES = "content"
"""Default preset of harvest, latents and quickstart."""

RoleFilter = str | TokenRole | Iterable[TokenRole | str]


def resolve_roles(roles: RoleFilter) -> frozenset[TokenRole]:
    """Convert a preset's name, a role, or role names to a set of roles.

    For "paper_last_image" the set contains IMAGE; `role_mask` selects the last position of each image.

    Raises:
        ConfigError: A name is neither a preset nor a role.
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


OBJECT_START, OBJECT_END = "<obj>", "</obj>"
BOX_START, BOX_END = "<box>", "</box>"
IMAGE_TOKEN, PRIOR_IMAGE_TOKEN, LATERAL_IMAGE_TOKEN = "<image>", "<prev_im>", "<lat_image>"
COORDINATE_BINS = 100

ADDED_TOKENS: tuple[str, ...] = (
    OBJECT_START,
    OBJECT_END,
    *(f"<x{i}>" for i in range(COORDINATE_BINS)),
    *(f"<y{i}>" for i in range(COORDINATE_BINS)),
    BOX_START,
    BOX_END,
    IMAGE_TOKEN,
    PRIOR_IMAGE_TOKEN,
    LATERAL_IMAGE_TOKEN,
)

GROUNDING_TOKENS = frozenset(ADDED_TOKENS[: 2 + 2 * COORDINATE_BINS + 2])
"""Tokens that can occur in a grounded report: all added tokens except the three image tokens."""
