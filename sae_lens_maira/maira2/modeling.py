"""MAIRA-2 as a transformers model: Dinov2 features, four linear layers, a Llama.

    image features  p = W4 gelu(W3 gelu(W2 gelu(W1 f + b1) + b2) + b3) + b4,   f = LayerNorm(backbone)[1:]
    sequence        every `<image>` position is one row of p, in image order; the others are embeddings

The model is a `LlavaForConditionalGeneration` with two differences: the vision tower is a backbone, whose
*layer-normed* feature map is used and not `hidden_states[-1]`, and the projector is deeper. Unlike LLaVA it refuses
image placeholders without images, which would silently give wrong numbers.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoBackbone, AutoModel, LlavaForConditionalGeneration, LlavaModel
from transformers.activations import ACT2FN

from sae_lens_maira.errors import PromptError
from sae_lens_maira.maira2.configuration import Maira2Config
from sae_lens_maira.maira2.versions import KEY_RENAMES, image_features_result

_ON_ONE_DEVICE = ["LlamaDecoderLayer", "Dinov2Layer", "Dinov2Embeddings"]


class Maira2Projector(nn.Module):
    """`projector_n_layers` linear layers with an activation between them: `(..., d_vision) -> (..., d_text)`.

    The linear layers are `layers.0`, `layers.2`, `layers.4`, `layers.6`, as in the published checkpoint.
    """

    def __init__(self, config: Maira2Config) -> None:
        super().__init__()
        vision, text = _width(config.vision_config), _width(config.text_config)
        bias = config.multimodal_projector_bias
        layers: list[nn.Module] = [nn.Linear(vision, text, bias=bias)]
        for _ in range(config.projector_n_layers - 1):
            layers += [ACT2FN[config.projector_hidden_act], nn.Linear(text, text, bias=bias)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Map vision features `(images, patches, d_vision)` to `(images, patches, d_text)`."""
        return self.layers(features)


class Maira2Model(LlavaModel):
    """Vision tower, projector and language model, without the output head."""

    config_class = Maira2Config
    _no_split_modules = _ON_ONE_DEVICE

    if TYPE_CHECKING:  # transformers declares the parts of a configuration as dicts
        config: Any

    def __init__(self, config: Maira2Config) -> None:
        super(LlavaModel, self).__init__(
            config
        )  # the parts that LlavaModel makes do not fit: skip its __init__
        self.vision_tower = AutoBackbone.from_config(config.vision_config, trust_remote_code=False)
        self.multi_modal_projector = Maira2Projector(config)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.post_init()

    def get_image_features(  # pyright: ignore[reportIncompatibleMethodOverride] - differs between versions
        self,
        pixel_values: torch.Tensor,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        **_: Any,
    ) -> Any:
        """Project images to the language model's width.

        Args:
            pixel_values: `(images, 3, side, side)`.
            vision_feature_layer: Index into the backbone's feature maps; None for the configuration's.
            vision_feature_select_strategy: "default" (CLS dropped) or "full"; None for the configuration's.

        Returns:
            One `(patches, d_text)` tensor per image: a list on transformers 4, an output object whose `pooler_output`
            is that list on transformers 5.
        """
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        strategy = vision_feature_select_strategy or self.config.vision_feature_select_strategy
        backbone = self.vision_tower(pixel_values.to(self.vision_tower.dtype))
        features = backbone.feature_maps[layer]
        if strategy == "default":
            features = features[:, 1:]
        return image_features_result(list(self.multi_modal_projector(features)), backbone)

    @functools.wraps(LlavaModel.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride] - wraps
        """Run the model; see `LlavaModel.forward`.

        Raises:
            PromptError: There are placeholders without images or images without placeholders, or their numbers differ.
        """
        given = dict(zip(("input_ids", "pixel_values"), args, strict=False)) | kwargs
        self._check_images(given)
        return super().forward(*args, **kwargs)

    def _check_images(self, given: dict[str, Any]) -> None:
        input_ids, pixel_values = given.get("input_ids"), given.get("pixel_values")
        encoded: Any = (given.get("mm_encoder_outputs") or {}).get("image")
        if input_ids is None or torch.compiler.is_compiling():
            return
        cache = given.get("cache", given.get("past_key_values"))
        if pixel_values is None and encoded is None:
            # In a step that continues a cache, a placeholder was generated by the model and is text.
            continues = cache is not None and cache.get_seq_length() > 0
            if not continues and bool((input_ids == self.config.image_token_index).any()):
                count = int((input_ids == self.config.image_token_index).sum())
                raise PromptError(
                    f"The input has {count} image placeholders (id {self.config.image_token_index}) but no"
                    " pixel_values. Without images the model would run on meaningless embeddings; pass"
                    " pixel_values, as `encoding.model_inputs()` does, or build the prompt without images."
                )
            return
        per_row = (input_ids == self.config.image_token_index).sum(dim=1).tolist()
        if pixel_values is not None:
            n_images, patches = pixel_values.shape[0], self._patches(pixel_values, given)
        else:
            n_images, patches = len(encoded.pooler_output), len(encoded.pooler_output[0])
        if sum(per_row) != n_images * patches or any(n % patches for n in per_row):
            raise PromptError(
                f"{n_images} images of {patches} patches need {n_images * patches} image placeholders (id"
                f" {self.config.image_token_index}), whole images in every row, but the rows have {per_row}."
                " Encode images and text together with `Maira2Processor.encode`, with this"
                " model's own processor: same image size, same id of <image>."
            )

    def _patches(self, pixel_values: torch.Tensor, given: dict[str, Any]) -> int:
        patch = self.config.vision_config.patch_size
        strategy = given.get("vision_feature_select_strategy") or self.config.vision_feature_select_strategy
        return (pixel_values.shape[-2] // patch) * (pixel_values.shape[-1] // patch) + (strategy == "full")


class Maira2ForConditionalGeneration(LlavaForConditionalGeneration):
    """MAIRA-2 with its language-model head.

    Module paths on every supported transformers: `model.language_model.layers[i]`, `model.vision_tower`,
    `model.multi_modal_projector.layers.{0,2,4,6}`, `lm_head`. The published names of the weights are converted by
    loading and by `save_pretrained`.
    """

    config_class = Maira2Config
    _no_split_modules = _ON_ONE_DEVICE
    _checkpoint_conversion_mapping = KEY_RENAMES

    if TYPE_CHECKING:  # transformers declares generate for a protocol that its models do not meet
        config: Any

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

    def __init__(self, config: Maira2Config) -> None:
        super(LlavaForConditionalGeneration, self).__init__(config)
        self.model = Maira2Model(config)
        self.lm_head = nn.Linear(_width(config.text_config), config.text_config.vocab_size, bias=False)
        self.post_init()

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """Repeat rows for beams or several samples, keeping each row's images together.

        transformers repeats image by image (A A B B), so that a row with two images would receive the first one twice.
        """
        pixel_values = kwargs.pop("pixel_values", None)
        rows = input_ids
        library: Any = super()
        input_ids, kwargs = library._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **kwargs
        )
        if pixel_values is not None and expand_size > 1 and rows is not None:
            patches = self.model._patches(pixel_values, kwargs)
            counts = ((rows == self.config.image_token_index).sum(dim=1) // patches).tolist()
            pixel_values = torch.cat(
                [part.repeat(expand_size, 1, 1, 1) for part in pixel_values.split(counts)]
            )
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        return input_ids, kwargs


def _width(config: Any) -> int:
    return int(config.hidden_size)
