"""A script for the published processor runs on this one: same names, prompts, tensors, results and boxes."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import PromptError
from sae_lens_maira.maira2 import GroundedFinding, Maira2, Maira2Processor, format_grounded, parse_report
from sae_lens_maira.studies import GroundedStatement

pytestmark = pytest.mark.compat


def published_script(model: Any, processor: Any, images: dict[str, Any], get_grounding: bool) -> Any:
    """The calls of the model card, as public scripts make them."""
    inputs = processor.format_and_preprocess_reporting_input(
        current_frontal=images["frontal"],
        current_lateral=images["lateral"],
        prior_frontal=images["prior"],
        indication="Dyspnoea.",
        comparison="None.",
        technique="PA and lateral views of the chest.",
        prior_report="No pleural effusion.",
        return_tensors="pt",
        get_grounding=get_grounding,
    )
    inputs = inputs.to("cpu")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, use_cache=True)
    prompt_length = inputs["input_ids"].shape[-1]
    text = processor.decode(output[0][prompt_length:], skip_special_tokens=True).lstrip()
    return inputs, processor.convert_output_to_plaintext_or_grounded_sequence(text)


@pytest.mark.filterwarnings("ignore:The output holds")  # random weights write no whole finding
@pytest.mark.parametrize("grounded", [False, True])
def test_the_published_script_runs(tiny: Maira2, make_picture: Any, make_study: Any, grounded: bool) -> None:
    images = {name: make_picture(seed) for seed, name in enumerate(("frontal", "lateral", "prior"))}
    inputs, prediction = published_script(tiny.model, tiny.processor, images, grounded)
    study = make_study(
        frontal=images["frontal"],
        lateral=images["lateral"],
        prior_frontal=images["prior"],
        indication="Dyspnoea.",
        technique="PA and lateral views of the chest.",
        comparison="None.",
        prior_report="No pleural effusion.",
    )
    wanted = tiny.processor.encode(study, "grounded" if grounded else "findings").model_inputs()
    assert set(inputs) == set(wanted) == {"input_ids", "attention_mask", "pixel_values"}
    assert all(torch.equal(inputs[name], wanted[name]) for name in wanted)
    assert isinstance(prediction, str | list)


def test_phrase_grounding(processor: Maira2Processor, make_picture: Any) -> None:
    """The prompt is the published template, and a prior report without its image is refused."""
    inputs = processor.format_and_preprocess_phrase_grounding_input(
        frontal_image=make_picture(), phrase="Pleural effusion.", return_tensors="pt"
    )
    text = processor.decode(inputs["input_ids"][0])
    assert "Repeat the following finding as a grounded phrase" in text
    assert "Finding: Pleural effusion." in text
    with pytest.raises(PromptError, match="prior report but no prior frontal"):
        processor.format_and_preprocess_reporting_input(make_picture(), prior_report="Clear.")


def test_published_order_of_positional_arguments() -> None:
    names = list(inspect.signature(Maira2Processor.format_and_preprocess_reporting_input).parameters)[1:9]
    assert names == [
        "current_frontal",
        "current_lateral",
        "prior_frontal",
        "indication",
        "technique",
        "comparison",
        "prior_report",
        "get_grounding",
    ]


def test_output_is_text_or_a_sequence_of_findings(processor: Maira2Processor) -> None:
    convert = processor.convert_output_to_plaintext_or_grounded_sequence
    assert convert(" The lungs are clear. ") == "The lungs are clear."
    assert convert("<obj>Nodule.<box><x10><y20><x30><y40></box></obj><obj>Clear.</obj>") == [
        ("Nodule.", [(0.105, 0.205, 0.305, 0.405)]),
        ("Clear.", None),
    ]
    with pytest.warns(UserWarning, match="outside of complete findings"):
        assert convert("<obj>Clear.</obj><obj>Small lef") == [("Clear.", None)]


@pytest.mark.parametrize(("width", "height"), [(64, 64), (90, 60), (60, 90), (200, 57)])
def test_a_box_comes_back_in_the_coordinates_of_the_whole_image(
    processor: Maira2Processor, width: int, height: int
) -> None:
    """A bright square at a known place of the radiograph: its box in the model's pixels, mapped back, is that place."""
    radiograph = np.random.default_rng(0).integers(0, 60, (height * 4, width * 4)).astype(np.uint8)
    side = min(radiograph.shape)
    left = (radiograph.shape[1] - side) // 2 + side // 4
    top = (radiograph.shape[0] - side) // 2 + side // 2
    radiograph[top : top + side // 4, left : left + side // 4] = 255
    grey = processor.image_to_pixels(radiograph)[0]
    lit = grey > (grey.max() + grey.min()) / 2
    rows, columns = (torch.nonzero(lit.any(dim)).flatten() for dim in (1, 0))
    size = grey.shape[0]
    box: Any = tuple(float(edge) / size for edge in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    whole = processor.adjust_box_for_original_image_size(box, radiograph.shape[1], radiograph.shape[0])
    scale = (radiograph.shape[1], radiograph.shape[0]) * 2
    wanted = (left, top, left + side // 4, top + side // 4)
    pixel = side / size  # one pixel of the model in pixels of the radiograph
    assert all(abs(edge * n - want) <= pixel for edge, n, want in zip(whole, scale, wanted, strict=True))


def test_a_box_without_area_obeys_one_rule() -> None:
    """The model writes a place smaller than a bin as four equal corners: parser, formatter and record keep it."""
    text = "<obj>Dot.<box><x10><y20><x10><y20></box></obj>"
    (finding,) = parse_report(text).findings
    assert finding.boxes == ((0.105, 0.205, 0.105, 0.205),)
    assert format_grounded([finding]) == text
    assert GroundedStatement(finding.text, finding.boxes).boxes == finding.boxes
    assert format_grounded([GroundedFinding("Dot.", ((0.102, 0.203, 0.104, 0.207),))]) == text


@pytest.mark.parametrize(
    "field", ["indication", "technique", "comparison", "prior_report", "report", "phrase", "text"]
)
def test_a_lone_surrogate_is_refused(
    processor: Maira2Processor, make_study: Any, make_picture: Any, field: str
) -> None:
    bad, radiograph = "Pain \ud83d in the chest", make_picture()
    calls = {
        "text": lambda: processor(text=bad),
        "phrase": lambda: processor.format_and_preprocess_phrase_grounding_input(radiograph, bad),
        "report": lambda: processor.encode(make_study(frontal=radiograph), report=[bad]),
    }

    def prompt() -> Any:
        return processor.encode(make_study(frontal=radiograph, prior_frontal=radiograph, **{field: bad}))

    with pytest.raises(PromptError, match=r"lone surrogate '\\ud83d' at character 5"):
        calls.get(field, prompt)()
