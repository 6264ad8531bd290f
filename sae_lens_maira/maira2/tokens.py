"""The 207 tokens that MAIRA-2 adds to Vicuna's vocabulary, in the order of their ids.

    <obj> </obj> <x0>..<x99> <y0>..<y99> <box> </box> <image> <prev_im> <lat_image>

In the published tokenizer they take the ids 32000 to 32206; a smaller tokenizer keeps the order behind its
own vocabulary. They are added tokens but not "special" ones: `skip_special_tokens=True` keeps them in decoded
text, which is how boxes survive decoding. This module knows nothing about prompts or models.
"""

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
"""The tokens that may stand in a grounded report: everything but the three image tokens."""
