"""Encodings: padding, several images per study, teacher forcing, extension by generated tokens, refusals."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_lens_maira.errors import ConfigError, PromptError
from sae_lens_maira.maira2 import GroundedFinding, Maira2Processor, TokenRole, format_grounded

pytestmark = pytest.mark.compat


@pytest.fixture
def pair(study: Any, make_study: Any, make_picture: Any) -> list[Any]:
    return [study, make_study(frontal=make_picture(7), report="Heart.")]


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_in_a_batch_is_the_row_alone_plus_padding(
    processor: Maira2Processor, pair: list[Any], side: Any
) -> None:
    batch = processor.encode(pair, report="teacher", padding_side=side)
    assert batch.images_per_row == (3, 1)
    for number, study in enumerate(pair):
        alone = processor.encode(study, report="teacher")
        real = batch.attention_mask[number].bool()
        assert torch.equal(batch.input_ids[number][real], alone.input_ids[0])
        assert torch.equal(batch.roles[number][real], alone.roles[0])
        pixels: Any = batch.rows(number, number + 1).pixel_values
        assert torch.equal(pixels, alone.model_inputs()["pixel_values"])
        assert batch.input_ids[number][~real].unique().tolist() in ([], [processor.tokenizer.pad_token_id])
    assert batch.attention_mask[1, -1 if side == "left" else 0] == 1
    assert batch.attention_mask[1, 0 if side == "left" else -1] == 0


def test_padding_on_the_right_needs_no_mask(tiny: Any, processor: Maira2Processor, pair: list[Any]) -> None:
    """At real tokens the forward without the mask is the forward with it; padding on the left keeps the mask."""
    right = processor.encode(pair, report="teacher", padding_side="right")
    left = processor.encode(pair, report="teacher", padding_side="left")
    assert "attention_mask" not in right.forward_inputs()
    assert "attention_mask" in left.forward_inputs()
    with torch.no_grad():
        bare = tiny.model(**right.forward_inputs(), use_cache=False).logits
        masked = tiny.model(**right.model_inputs(), use_cache=False).logits
    real = right.attention_mask.bool()
    assert not bool(real.all())
    assert (bare - masked)[real].abs().max() <= 1e-5 * masked.abs().max()


def test_model_inputs_hold_nothing_the_model_refuses(processor: Maira2Processor, study: Any) -> None:
    assert set(processor.encode(study).model_inputs()) == {"input_ids", "attention_mask", "pixel_values"}


def test_dtype_of_to_applies_to_pixels_only(processor: Maira2Processor, study: Any) -> None:
    moved = processor.encode(study).to("cpu", torch.bfloat16)
    assert moved.pixel_values is not None
    assert moved.pixel_values.dtype == torch.bfloat16
    assert (moved.input_ids.dtype, moved.roles.dtype, moved.patch_row.dtype) == (
        torch.long,
        torch.int8,
        torch.int16,
    )


def test_teacher_text_of_every_task(processor: Maira2Processor, study: Any, make_study: Any) -> None:
    findings = (GroundedFinding("Nodule.", ((0.105, 0.205, 0.305, 0.405),)), GroundedFinding("Normal heart."))
    grounded = make_study(frontal=study.frontal, grounded_report=findings)

    def taught(**keywords: Any) -> str:
        encoding = processor.encode(grounded, report="teacher", **keywords)
        ids = encoding.input_ids[0][encoding.roles[0] == TokenRole.REPORT]
        return processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    def squeeze(text: str) -> str:
        return "".join(text.split())

    assert squeeze(taught(task="grounded")) == squeeze(format_grounded(findings) + "</s>")
    assert squeeze(taught(task="phrase", phrase="Nodule.")) == squeeze(format_grounded(findings[:1]) + "</s>")


def test_given_report_texts_are_appended_row_by_row(processor: Maira2Processor, pair: list[Any]) -> None:
    encoding = processor.encode(pair, report=["Heart.", "No effusion."])
    for number, text in enumerate(["Heart.", "No effusion."]):
        ids = encoding.input_ids[number][encoding.roles[number] == TokenRole.REPORT]
        assert processor.decode_report(ids).text == text


def test_extension_marks_new_tokens_as_report_and_pads_after_the_end(
    processor: Maira2Processor, pair: list[Any]
) -> None:
    encoding = processor.encode(pair)
    eos = processor.tokenizer.eos_token_id
    longer = encoding.extend(torch.tensor([[10, eos, 11], [10, 11, 12]]))
    assert longer.roles[:, -3:].tolist() == [[10, 10, 0], [10, 10, 10]]
    assert longer.attention_mask[:, -3:].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert longer.input_ids[0, -3:].tolist() == [10, eos, 0]
    assert longer.image_index[:, -3:].unique().tolist() == [-1]
    assert longer.images_per_row == encoding.images_per_row


def test_extension_behind_right_padding_is_refused(processor: Maira2Processor, pair: list[Any]) -> None:
    encoding = processor.encode(pair, padding_side="right")
    with pytest.raises(PromptError, match="padded on the right"):
        encoding.extend(torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(PromptError, match="do not fit"):
        processor.encode(pair).extend(torch.zeros(3, 1, dtype=torch.long))


@pytest.mark.parametrize("token", ["<image>", "<obj>", "</box>", "<x12>", "<lat_image>", "</s>", "<unk>"])
@pytest.mark.parametrize("field", ["indication", "technique", "comparison", "prior_report", "report"])
def test_text_with_an_added_token_is_refused(
    processor: Maira2Processor, make_study: Any, make_picture: Any, token: str, field: str
) -> None:
    study = make_study(
        **{"frontal": make_picture(0), "prior_frontal": make_picture(1), "report": "x", field: f"a{token}b"}
    )
    with pytest.raises(PromptError, match=f"{field} contains '{token}'"):
        processor.encode(study, report="teacher")


def test_a_phrase_with_an_added_token_is_refused(processor: Maira2Processor, study: Any) -> None:
    with pytest.raises(PromptError, match="phrase contains '<image>'"):
        processor.encode(study, task="phrase", phrase="a <image>")


def test_grounding_tokens_may_stand_in_grounded_reports_only(processor: Maira2Processor, study: Any) -> None:
    text = format_grounded([GroundedFinding("Nodule.", ((0.1, 0.2, 0.3, 0.4),))])
    processor.encode(study, task="grounded", report=[text])
    with pytest.raises(PromptError, match="report contains '<obj>'"):
        processor.encode(study, report=[text])
    with pytest.raises(PromptError, match="report contains '<image>'"):
        processor.encode(study, task="grounded", report=["<image>"])


def test_missing_reports_and_wrong_counts_are_refused(
    processor: Maira2Processor, study: Any, make_study: Any
) -> None:
    bare = make_study(frontal=study.frontal)
    with pytest.raises(PromptError, match="no report"):
        processor.encode(bare, report="teacher")
    with pytest.raises(PromptError, match="no grounded finding"):
        processor.encode(bare, task="grounded", report="teacher")
    with pytest.raises(PromptError, match="one text per study"):
        processor.encode(bare, report=["a", "b"])
    with pytest.raises(PromptError, match="phrases"):
        processor.encode([bare, bare], task="phrase", phrase=["a"])
    with pytest.raises(PromptError, match="No study"):
        processor.encode([])
    with pytest.raises(ConfigError, match="padding_side"):
        processor.encode(bare, padding_side="both")  # pyright: ignore[reportArgumentType]


def test_a_study_without_frontal_image_is_refused(processor: Maira2Processor, make_study: Any) -> None:
    with pytest.raises(PromptError, match="frontal"):
        processor.encode(make_study(indication="x"))


def test_calling_the_processor_encodes_a_written_prompt(
    processor: Maira2Processor, study: Any, make_picture: Any
) -> None:
    """The plain transformers door gives what `encode` gives for the same prompt and images."""
    prompt = processor.build_prompt(study)
    plain = processor(text=prompt.text, images=[image for _, image in prompt.images])
    encoding = processor.encode(study)
    for name, value in encoding.model_inputs().items():
        assert torch.equal(plain[name], value)
    with pytest.raises(PromptError, match="placeholders"):
        processor(text=prompt.text, images=make_picture(0))


def test_objects_with_the_right_attributes_are_studies(processor: Maira2Processor, make_picture: Any) -> None:
    names = ("lateral", "prior_frontal", "indication", "technique", "comparison", "prior_report", "report")
    study: Any = SimpleNamespace(frontal=make_picture(0), grounded_report=None, **dict.fromkeys(names))
    assert len(processor.encode((study, study))) == 2
