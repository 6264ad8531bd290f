"""Make MAIRA-2 known to transformers' Auto classes, once.

After `register()`, `AutoConfig`, `AutoModel`, `AutoModelForImageTextToText`, `AutoModelForCausalLM` (SAELens'
way in) and `AutoProcessor` build this package's classes for model type `maira2`, and transformers 5 knows how
published keys are called in the live module. No remote code is involved. This module knows nothing about
files.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from sae_lens_maira.maira2.configuration import Maira2Config
from sae_lens_maira.maira2.modeling import Maira2ForConditionalGeneration, Maira2Model
from sae_lens_maira.maira2.processing import Maira2Processor
from sae_lens_maira.maira2.versions import register_key_renames


def register() -> None:
    """Register the classes; calling it again changes nothing."""
    AutoConfig.register(Maira2Config.model_type, Maira2Config, exist_ok=True)
    AutoModel.register(Maira2Config, Maira2Model, exist_ok=True)
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        auto_class.register(Maira2Config, Maira2ForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(Maira2Config, Maira2Processor, exist_ok=True)
    register_key_renames(Maira2Config.model_type)
