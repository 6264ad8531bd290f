"""Prompts equal MAIRA-2's template character by character, and their segments carry the right roles."""

from typing import Any

import pytest

from sae_lens_maira.errors import ConfigError, PromptError
from sae_lens_maira.maira2 import TokenRole, build_prompt

pytestmark = pytest.mark.compat

HEAD = "You are an expert radiology assistant tasked with interpreting a chest X-ray study.  USER:  "
TAIL = "  ASSISTANT: "
DESCRIBE = (
    " Provide a structured description of the findings in the radiology study in comparison to the prior"
    " frontal image."
)
GROUND = (
    " Each finding should be described as a self-contained plain-text sentence. If the finding is"
    " groundable, locate the finding in the current frontal chest X-ray image, with bounding boxes"
    " indicating all locations where it can be seen in the current frontal image. Otherwise, generate just"
    " the ungrounded finding without bounding boxes."
)
NOTHING = " INDICATION: N/A TECHNIQUE: N/A COMPARISON: N/A"
ONE = "Given the current frontal image only<image>"
LATERAL = "Given the current frontal image<image> and the current lateral image<image>"
PRIOR = "Given the current frontal image<image> and the prior frontal image<image>"
ALL = (
    "Given the current frontal image<image> the current lateral image<image> and the prior frontal"
    " image<image>"
)


def test_findings_prompts_equal_the_template(make_study: Any) -> None:
    cases = {
        HEAD + ONE + DESCRIBE + NOTHING + TAIL: make_study(frontal=1),
        HEAD + LATERAL + DESCRIBE + NOTHING + TAIL: make_study(frontal=1, lateral=1),
        HEAD + PRIOR + " PRIOR_REPORT: N/A" + DESCRIBE + NOTHING + TAIL: make_study(
            frontal=1, prior_frontal=1
        ),
        HEAD + ALL + " PRIOR_REPORT: Old." + DESCRIBE + NOTHING + TAIL: make_study(
            frontal=1, lateral=1, prior_frontal=1, prior_report="Old."
        ),
        HEAD + ONE + DESCRIBE + " INDICATION: Cough TECHNIQUE: PA view. COMPARISON: None." + TAIL: make_study(
            frontal=1, indication="Cough", technique="PA view.", comparison="None."
        ),
        # blank sections are missing sections
        HEAD + LATERAL + DESCRIBE + " INDICATION: N/A TECHNIQUE: N/A COMPARISON: x" + TAIL: make_study(
            frontal=1, lateral=1, indication="", technique=" \n", comparison="x"
        ),
    }
    for wanted, study in cases.items():
        assert build_prompt(study).text == wanted


def test_grounded_prompts_equal_the_template(make_study: Any) -> None:
    assert (
        build_prompt(make_study(frontal=1), "grounded").text
        == HEAD + ONE + DESCRIBE + GROUND + NOTHING + TAIL
    )
    study = make_study(frontal=1, lateral=1, prior_frontal=1, prior_report="Old.", indication="Cough")
    assert build_prompt(study, "grounded").text == (
        HEAD + ALL + " PRIOR_REPORT: Old." + DESCRIBE + GROUND
        + " INDICATION: Cough TECHNIQUE: N/A COMPARISON: N/A" + TAIL
    )  # fmt: skip


def test_phrase_prompt_equals_the_template_and_reads_the_frontal_image_alone(make_study: Any) -> None:
    prompt = build_prompt(make_study(frontal="f", lateral="l", prior_frontal="p"), "phrase", "Small nodule.")
    assert prompt.text == (
        HEAD + "Given the current frontal image<image> Repeat the following finding as a grounded phrase with"
        " bounding boxes indicating all locations where it can be seen in the given chest X-ray image."
        " Finding: Small nodule." + TAIL
    )
    assert prompt.images == ((0, "f"),)


def test_images_come_in_prompt_order_with_their_kind(make_study: Any) -> None:
    prompt = build_prompt(make_study(frontal="f", lateral="l", prior_frontal="p"))
    assert prompt.images == ((0, "f"), (1, "l"), (2, "p"))
    assert [segment.view for segment in prompt.segments if segment.role == TokenRole.IMAGE] == [0, 1, 2]


def test_every_section_has_its_own_role(make_study: Any) -> None:
    study = make_study(
        frontal=1, prior_frontal=1, indication="i", technique="t", comparison="c", prior_report="p"
    )
    texts = {segment.role: segment.text for segment in build_prompt(study).segments}
    assert texts[TokenRole.INDICATION] == "i"
    assert texts[TokenRole.TECHNIQUE] == "t"
    assert texts[TokenRole.COMPARISON] == "c"
    assert texts[TokenRole.PRIOR_REPORT] == "p"


def test_no_frontal_image_is_refused(make_study: Any) -> None:
    with pytest.raises(PromptError, match="no frontal image"):
        build_prompt(make_study(lateral=1))


@pytest.mark.parametrize(
    ("task", "phrase"), [("phrase", None), ("phrase", "  "), ("findings", "x"), ("grounded", "x")]
)
def test_a_phrase_belongs_to_its_task_only(make_study: Any, task: str, phrase: str | None) -> None:
    with pytest.raises(PromptError, match="phrase"):
        build_prompt(make_study(frontal=1), task, phrase)


def test_an_unknown_task_is_refused(make_study: Any) -> None:
    with pytest.raises(ConfigError, match="findings, grounded, phrase"):
        build_prompt(make_study(frontal=1), "grounding")


def test_a_section_that_is_no_text_is_refused(make_study: Any) -> None:
    """An empty cell of a pandas table arrives as NaN."""
    with pytest.raises(PromptError, match="technique is nan of type float"):
        build_prompt(make_study(frontal=1, technique=float("nan")))


def test_a_prior_report_without_its_image_is_refused(make_study: Any) -> None:
    """The template has no place for it, and dropping it would go unnoticed."""
    study = make_study(frontal=1, prior_report="Old.")
    with pytest.raises(PromptError, match="no prior frontal image"):
        build_prompt(study)
    assert "Old." not in build_prompt(study, task="phrase", phrase="effusion").text
    assert "Old." in build_prompt(make_study(frontal=1, prior_frontal=1, prior_report="Old.")).text
