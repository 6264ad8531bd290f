"""Sizes from which memory, disk and time are estimated: of a model, by its configuration, and of a table's studies.

    tokens      counted: every prompt is built and tokenized (or a sample of them), no image is opened
    bytes       of tensors that the code allocates: weights, one layer's work, keys and values
    FLOPs       2 per weight and token, plus attention

Bytes follow from shapes. A test compares the memory of one layer and of a gradient with the tensors that the published
decoder allocates. `costs` adds them up for each command.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_lens_maira.activations.sampling import role_rates
from sae_lens_maira.maira2 import Maira2Config, TokenRole
from sae_lens_maira.maira2.tokenization import append_reports, tokenize_prompts
from sae_lens_maira.token_roles import LAST_IMAGE_PRESET

SAMPLE = 200
"""Number of studies that are tokenized, as a sample of all."""


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, from its configuration.

    Attributes:
        config: Configuration of the model.
        bytes_per_number: 2 for bfloat16 and float16, 4 for float32.
    """

    config: Maira2Config
    bytes_per_number: int = 2

    @property
    def _text(self) -> Any:
        return self.config.text_config

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self._text.num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self._text.hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one decoder layer."""
        d, heads = self.width, self._text.num_attention_heads
        kv = d // heads * (self._text.num_key_value_heads or heads)
        return 2 * d * d + 2 * d * kv + 3 * d * self._text.intermediate_size + 2 * d

    @property
    def image_parameters(self) -> int:
        """Number of parameters of the vision tower and the projector."""
        vision = self.config.vision_config
        v, n = vision.hidden_size, vision.num_hidden_layers
        ratio = int(vision.mlp_ratio)
        tower = n * ((4 + 2 * ratio) * v * v + (11 + ratio) * v)
        embeddings = v * (self.patches + 6 + 3 * vision.patch_size**2)
        linears = self.config.projector_n_layers
        projector = v * self.width + (linears - 1) * self.width**2 + linears * self.width
        return tower + embeddings + projector

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return self.config.patches_per_side**2

    def weights(self, layers: int | None = None) -> int:
        """Bytes of the weights with the first `layers` decoder layers; None for all."""
        layers = self.layers if layers is None else layers
        numbers = layers * self.layer_parameters + self.image_parameters + self.width
        return (numbers + 2 * self._text.vocab_size * self.width) * self.bytes_per_number

    def work(self, tokens: int) -> int:
        """Bytes that one layer needs for a batch with this number of positions: residual stream, its copies and the
        MLP.
        """
        return tokens * (6 * self.width + 3 * self._text.intermediate_size) * self.bytes_per_number

    def graph(self, tokens: int, layers: int) -> int:
        """Bytes that autograd keeps for some layers with frozen weights, and for the last layer's backward pass."""
        mlp = 3 * self._text.intermediate_size
        return tokens * (layers * (9 * self.width + mlp) + 5 * self.width + mlp) * self.bytes_per_number

    def readout(self) -> int:
        """Bytes of the unembedding in float32, and of its copy while it is scaled."""
        return 2 * self._text.vocab_size * self.width * 4

    def cache(self, tokens: int) -> int:
        """Bytes of the keys and values of all layers for this number of positions."""
        heads = self._text.num_attention_heads
        kv = self.width // heads * (self._text.num_key_value_heads or heads)
        return 2 * tokens * self.layers * kv * self.bytes_per_number

    def flops(self, tokens: float, images: float, squares: float, layers: int, logits: float = 0) -> float:
        """Number of floating-point operations of a forward.

        Args:
            tokens: Total number of positions.
            images: Total number of images.
            squares: Sum over studies of the squared number of positions.
            layers: Number of decoder layers that run.
            logits: Number of positions whose logits are computed.
        """
        vision = self.config.vision_config
        tower = 2 * self.image_parameters * self.patches + 4 * vision.num_hidden_layers * (
            self.patches**2 * vision.hidden_size
        )
        decoder = layers * (2 * self.layer_parameters * tokens + 2 * squares * self.width)
        return images * tower + decoder + 2 * logits * self._text.vocab_size * self.width


@dataclass(frozen=True)
class StudySizes:
    """Sizes of a table's studies.

    Attributes:
        studies: Number of studies in the table.
        images: (n,) number of images of each sampled study.
        roles: (n, roles) number of tokens by role of each sampled study, including the report.
    """

    studies: int
    images: np.ndarray
    roles: np.ndarray

    @classmethod
    def count(cls, processor: Any, config: Maira2Config, studies: Sequence[Any]) -> "StudySizes":
        """Build and tokenize the prompts of an even sample of studies; images are not opened."""
        chosen = np.linspace(0, len(studies) - 1, min(len(studies), SAMPLE)).round().astype(int)
        images, roles = [], []
        for number in chosen:
            study = studies[int(number)]
            prompt = processor.build_prompt(study)
            rows = tokenize_prompts(
                processor.tokenizer, [prompt], processor.image_token_id, config.patches_per_side
            )
            if study.report:
                rows = append_reports(processor.tokenizer, rows, [study.report])
            images.append(len(prompt.images))
            roles.append(np.bincount(rows[0].roles, minlength=len(TokenRole)))
        return cls(len(studies), np.array(images), np.array(roles))

    @property
    def scale(self) -> float:
        """Number of studies in the table per sampled study."""
        return self.studies / len(self.images)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) number of positions of each sampled study."""
        return self.roles.sum(1)

    def sources(self, reports: str, max_new_tokens: int) -> dict[str, "StudySizes"]:
        """Make the sizes of each source of rows, which differ in the text after the prompt.

        Args:
            reports: As in `RowSettings`: "teacher", "generated", "both" or "prompt".
            max_new_tokens: Assumed length of a generated report.
        """
        names = ("teacher", "generated") if reports == "both" else (reports,)
        lengths = {"generated": max_new_tokens, "prompt": 0}
        found = {}
        for name in names:
            roles = self.roles.copy()
            if name in lengths:
                roles[:, TokenRole.REPORT] = lengths[name]
            found[name] = replace(self, roles=roles)
        return found

    def rows(self, roles: Any, rates: Mapping[str, float] | None = None) -> float:
        """Expected number of rows of the whole table that a filter keeps."""
        kept = role_rates(roles, rates)
        counted = sum(self.roles[:, role].sum() * rate for role, rate in kept.items())
        if roles == LAST_IMAGE_PRESET:  # the last token of each image, regardless of sampling
            counted += self.images.sum() * (1 - kept.get(TokenRole.IMAGE, 0.0))
        return float(counted * self.scale)
