"""MAIRA-2 as a native transformers model: configuration, model, processor, prompts, token roles.

Importing this package registers its classes with transformers. Without this, transformers 5 cannot map the published
keys to module names: it would load random weights with only a warning, and save other names.
"""

from sae_lens_maira.maira2.configuration import Maira2Config, make_config
from sae_lens_maira.maira2.encoding import Maira2Encoding, role_mask
from sae_lens_maira.maira2.generation import MAX_NEW_TOKENS, generate_reports
from sae_lens_maira.maira2.images import ImageRecipe, box_to_crop, box_to_image
from sae_lens_maira.maira2.loading import (
    PUBLISHED_ID,
    PUBLISHED_REVISION,
    Maira2,
    load_maira2,
    load_processor,
    register,
    save_processor,
)
from sae_lens_maira.maira2.modeling import Maira2ForConditionalGeneration, Maira2Model
from sae_lens_maira.maira2.output_head import OutputHead, load_output_head
from sae_lens_maira.maira2.processing import Maira2Processor
from sae_lens_maira.maira2.prompts import StudyLike, build_prompt
from sae_lens_maira.maira2.reports import GroundedFinding, ParsedReport, format_grounded, parse_report
from sae_lens_maira.token_roles import ADDED_TOKENS, DEFAULT_ROLES, ROLE_PRESETS, TokenRole, resolve_roles

__all__ = [
    "ADDED_TOKENS",
    "DEFAULT_ROLES",
    "MAX_NEW_TOKENS",
    "PUBLISHED_ID",
    "PUBLISHED_REVISION",
    "ROLE_PRESETS",
    "GroundedFinding",
    "ImageRecipe",
    "Maira2",
    "Maira2Config",
    "Maira2Encoding",
    "Maira2ForConditionalGeneration",
    "Maira2Model",
    "Maira2Processor",
    "OutputHead",
    "ParsedReport",
    "StudyLike",
    "TokenRole",
    "box_to_crop",
    "box_to_image",
    "build_prompt",
    "format_grounded",
    "generate_reports",
    "load_maira2",
    "load_output_head",
    "load_processor",
    "make_config",
    "parse_report",
    "register",
    "resolve_roles",
    "role_mask",
    "save_processor",
]

register()
