"""Processor of MAIRA-2: encode studies, and parse generated ids into reports.

A ProcessorMixin with the checkpoint's image processor (whose parameters it uses) and its fast tokenizer, registered
with AutoProcessor. `encode` takes studies. Calling the processor with `text` and `images`, as in transformers, takes
prompts that already contain their placeholders. The published processor's methods are in `published.py`.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import BatchFeature, ProcessorMixin

from sae_lens_maira.errors import ConfigError, ImageError, PromptError
from sae_lens_maira.maira2.encoding import Maira2Encoding
from sae_lens_maira.maira2.images import ImageRecipe, ImageSource
from sae_lens_maira.maira2.prompts import Prompt, StudyLike, build_prompt, check_text, raw_prompt
from sae_lens_maira.maira2.published import PublishedMethods
from sae_lens_maira.maira2.reports import ParsedReport, parse_report, teacher_text
from sae_lens_maira.maira2.tokenization import append_reports, pad_rows, tokenize_prompts
from sae_lens_maira.maira2.tokenizer_files import tokenizer_as_filed, write_portable_files
from sae_lens_maira.maira2.versions import declare_processor_parts
from sae_lens_maira.token_roles import GROUNDING_TOKENS, TokenRole

Task = Literal["findings", "grounded", "phrase"]


class Maira2Processor(PublishedMethods, ProcessorMixin):
    """Builds prompts, pixels and token roles of studies, and parses reports.

    Args:
        image_processor: Image processor of the checkpoint; its size, crop, mean, std and filter are used.
        tokenizer: Fast tokenizer with the added tokens.
        patch_size: Side of a patch in pixels.
        vision_feature_select_strategy: As in the model's configuration; only written to the file.
        num_additional_image_tokens: Number of positions of the vision tower that are not patches (CLS); only written to
            the file.
        image_token: Placeholder of an image in a prompt.
        chat_template: Unused; only written to the file.
    """

    attributes = ["image_processor", "tokenizer"]  # noqa: RUF012 - read by transformers 4

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int | None = 14,
        vision_feature_select_strategy: str | None = "default",
        num_additional_image_tokens: int | None = 1,
        image_token: str | None = "<image>",
        chat_template: Any = None,
    ) -> None:
        self.patch_size = patch_size or 14
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.image_token = image_token or "<image>"
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"The tokenizer {type(tokenizer).__name__} is not a fast tokenizer. Token roles need its character"
                " offsets; load it from a folder with a tokenizer.json."
            )
        self.image_token_id = int(tokenizer.convert_tokens_to_ids(self.image_token))

    @classmethod
    def from_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest are keywords
        cls, pretrained_model_name_or_path: Any, **keywords: Any
    ) -> Any:
        """Load from a folder or hub id, with the tokenizer exactly as in `tokenizer.json`.

        Raises:
            ConfigError: `trust_remote_code=True`.
        """
        if keywords.get("trust_remote_code"):
            raise ConfigError(
                "trust_remote_code=True was given, but MAIRA-2's processor runs here without remote code."
                " Leave the keyword out."
            )
        source = str(pretrained_model_name_or_path)
        loaded: Any = super().from_pretrained(source, **{**keywords, "trust_remote_code": False})
        processor = loaded[0] if isinstance(loaded, tuple) else loaded
        processor.tokenizer = tokenizer_as_filed(processor.tokenizer, source, **keywords)
        return loaded

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **keywords: Any) -> list[str]:
        """Write files that every supported version of transformers can read.

        Raises:
            ConfigError: `push_to_hub=True` was given; call the method `push_to_hub` instead.
        """
        if push_to_hub:
            raise ConfigError(
                "push_to_hub=True was given to save_pretrained; call processor.push_to_hub(repo_id)."
            )
        folder = Path(save_directory)
        write_portable_files(self, folder)
        return [str(folder / "processor_config.json")]

    @cached_property
    def recipe(self) -> ImageRecipe:
        """Parameters of image preprocessing, from the image processor."""
        source = self.image_processor
        size, crop = dict(source.size), dict(source.crop_size)
        mean, std = (_three(getattr(source, name)) for name in ("image_mean", "image_std"))
        return ImageRecipe(
            size=int(size["shortest_edge"]),
            crop=int(crop["height"]),
            mean=mean,
            std=std,
            resample=int(source.resample),
        )

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of an image, 37 at 518 px."""
        return self.recipe.crop // self.patch_size

    def image_to_pixels(self, image: ImageSource) -> torch.Tensor:
        """Convert one image to the model's pixels, `(3, S, S)` float32; see `images.py` for the steps and errors."""
        return self.recipe.to_pixels(image)

    def encode(
        self,
        studies: StudyLike | Iterable[StudyLike],
        task: Task = "findings",
        phrase: str | Sequence[str] | None = None,
        report: Literal["teacher"] | Sequence[str] | None = None,
        padding_side: Literal["left", "right"] = "left",
    ) -> Maira2Encoding:
        """Encode one study or a batch of studies.

        Args:
            studies: Studies, one per row.
            task: "findings", "grounded" (findings with boxes) or "phrase" (one phrase with boxes).
            phrase: Phrase for task "phrase": one for all rows or one per row.
            report: None for a prompt to generate from; "teacher" to append the study's report (its grounded report for
                "grounded", the grounded finding whose text is the phrase for "phrase"); or one text per row.
            padding_side: "left" to generate, "right" to train.

        Raises:
            PromptError: No study, no frontal image, a missing report, or a text that contains one of the added tokens.
            ImageError: An image cannot be read or has no contrast.
        """
        rows: list[Any] = [studies] if hasattr(studies, "frontal") else list(studies)  # pyright: ignore[reportArgumentType] - not a StudyLike then
        if not rows:
            raise PromptError("No study was given to encode; give at least one.")
        if padding_side not in ("left", "right"):
            raise ConfigError(
                f'padding_side was {padding_side!r}; use "left" to generate or "right" to train.'
            )
        phrases: list[Any] = list(phrase) if isinstance(phrase, list | tuple) else [phrase] * len(rows)
        if len(phrases) != len(rows):
            raise PromptError(
                f"{len(phrases)} phrases were given for {len(rows)} studies; give one, or one per study."
            )
        prompts = [self.build_prompt(study, task, words) for study, words in zip(rows, phrases, strict=True)]
        encoded = tokenize_prompts(self.tokenizer, prompts, self.image_token_id, self.patches_per_side)
        if report is not None:
            encoded = append_reports(self.tokenizer, encoded, self._reports(rows, task, phrases, report))
        pixels = []
        for study, prompt in zip(rows, prompts, strict=True):
            with _named(study):
                pixels += [self.image_to_pixels(image) for _, image in prompt.images]
        return Maira2Encoding(
            **pad_rows(encoded, self.tokenizer.pad_token_id, padding_side),
            pixel_values=torch.stack(pixels),
            images_per_row=tuple(len(prompt.images) for prompt in prompts),
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )

    def build_prompt(self, study: StudyLike, task: Task = "findings", phrase: str | None = None) -> Prompt:
        """Build the prompt of one study; its texts must not contain the tokenizer's added tokens."""
        with _named(study):
            prompt = build_prompt(study, task, phrase)
            for segment in prompt.segments:
                if segment.role not in (TokenRole.IMAGE, TokenRole.TEMPLATE, TokenRole.SEPARATOR):
                    self._refuse_tokens(segment.text, segment.role.name.lower())
        return prompt

    def decode_report(self, ids: torch.Tensor | Sequence[int]) -> ParsedReport:
        """Parse the generated ids of one row (without the prompt), up to its first `</s>`."""
        numbers = torch.as_tensor(ids).reshape(-1).tolist()
        closed = self.tokenizer.eos_token_id in numbers
        if closed:
            numbers = numbers[: numbers.index(self.tokenizer.eos_token_id)]
        text = self.tokenizer.decode(numbers, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return parse_report(text, closed)

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride] - no video, no audio
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        return_tensors: str | None = "pt",
        padding_side: Literal["left", "right"] = "left",
        **_: Any,
    ) -> BatchFeature:
        """Encode prompts that already contain their `<image>` placeholders.

        Args:
            images: Images of all prompts in order, as one list or one list per prompt.
            text: One prompt or several.
            return_tensors: Only "pt".
            padding_side: "left" to generate, "right" to train.

        Raises:
            PromptError: There is no text, or the numbers of placeholders and images differ.
        """
        texts = [text] if isinstance(text, str) else list(text or [])
        flat = _flatten(images)
        wanted = sum(prompt.count(self.image_token) for prompt in texts)
        if not texts or wanted != len(flat):
            raise PromptError(
                f"{len(texts)} prompts with {wanted} {self.image_token} placeholders were given with"
                f" {len(flat)} images. Give at least one prompt, and one image for every placeholder."
            )
        for prompt in texts:
            check_text(prompt, "prompt")
        prompts = [raw_prompt(prompt, self.image_token) for prompt in texts]
        rows = tokenize_prompts(self.tokenizer, prompts, self.image_token_id, self.patches_per_side)
        columns = pad_rows(rows, self.tokenizer.pad_token_id, padding_side)
        data = {name: columns[name] for name in ("input_ids", "attention_mask")}
        if flat:
            data["pixel_values"] = torch.stack([self.image_to_pixels(image) for image in flat])
        return BatchFeature(data=data, tensor_type=return_tensors)

    @property
    def model_input_names(self) -> list[str]:
        """Names of the model's inputs."""
        return ["input_ids", "attention_mask", "pixel_values"]

    @cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        tokens = sorted(
            {*self.tokenizer.get_added_vocab(), *self.tokenizer.all_special_tokens}, key=len, reverse=True
        )
        return re.compile("|".join(re.escape(token) for token in tokens))

    def _refuse_tokens(self, text: str, field: str, allowed: frozenset[str] = frozenset()) -> None:
        check_text(text, field)
        for found in self._added_tokens.finditer(text):
            if found.group() not in allowed:
                raise PromptError(
                    f"The {field} contains {found.group()!r}, which is a token of MAIRA-2's own vocabulary and"
                    " would be read as such, not as text. Remove it from the text."
                )

    def _reports(
        self, studies: Sequence[Any], task: str, phrases: Sequence[str | None], given: Any
    ) -> list[str]:
        if given == "teacher":
            texts = [teacher_text(study, task, words) for study, words in zip(studies, phrases, strict=True)]
        elif isinstance(given, str) or len(given) != len(studies):
            raise PromptError(
                f"report was {given!r:.80} for {len(studies)} studies; expected 'teacher', None, or one text"
                " per study."
            )
        else:
            texts = [str(text) for text in given]
        allowed = frozenset() if task == "findings" else GROUNDING_TOKENS
        for study, text in zip(studies, texts, strict=True):
            with _named(study):
                self._refuse_tokens(text, "report", allowed)
        return texts


declare_processor_parts(Maira2Processor)


@contextmanager
def _named(study: Any) -> Iterator[None]:
    """Context in which errors about a study's texts and images begin with its id."""
    try:
        yield
    except (PromptError, ImageError) as error:
        name = getattr(study, "study_id", None)
        if not name:
            raise
        raise type(error)(f"Study {name}: {error}") from error


def _flatten(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [image for part in images for image in _flatten(part)]
    return [images]


def _three(values: Any) -> tuple[float, float, float]:
    channels = np.broadcast_to(np.asarray(values, dtype=np.float64), 3)
    return float(channels[0]), float(channels[1]), float(channels[2])
