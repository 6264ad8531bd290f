"""Attribution of a report's sentences to latents and positions, checked by ablation."""

from sae_lens_maira.attribution.attribute import (
    Attribution,
    ReportAttribution,
    attribute,
    attribute_at_points,
)
from sae_lens_maira.attribution.faithfulness import Faithfulness
from sae_lens_maira.attribution.sentences import Sentence, split_sentences

__all__ = [
    "Attribution",
    "Faithfulness",
    "ReportAttribution",
    "Sentence",
    "attribute",
    "attribute_at_points",
    "split_sentences",
]
