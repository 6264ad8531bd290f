"""Roles partition every encoding; ids are the tokenizer's own; role filters select what their names say."""

from typing import Any

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.maira2 import (
    ROLE_PRESETS,
    Maira2Processor,
    TokenRole,
    build_prompt,
    resolve_roles,
    role_mask,
)

pytestmark = pytest.mark.compat


def collapse(ids: list[int], image_token: int, patches: int) -> list[int]:
    """The ids with every run of image positions shortened to one placeholder per image."""
    kept, run = [], 0
    for token in ids:
        run = run + 1 if token == image_token else 0
        if token != image_token or run % patches == 1:
            kept.append(token)
    return kept


@pytest.mark.parametrize("task", ["findings", "grounded"])
def test_prompt_ids_are_the_tokenizers_ids_of_the_whole_string(
    any_processor: Maira2Processor, study: Any, task: Any
) -> None:
    encoding = any_processor.encode(study, task=task)
    whole = any_processor.tokenizer(build_prompt(study, task).text)["input_ids"]
    assert collapse(encoding.input_ids[0].tolist(), any_processor.image_token_id, 16) == whole


def test_every_position_has_one_role_and_image_roles_sit_on_placeholders(
    any_processor: Maira2Processor, study: Any, make_study: Any, make_picture: Any
) -> None:
    other = make_study(frontal=make_picture(5), comparison="x", report="Heart.")
    encoding = any_processor.encode([study, other], report="teacher")
    roles, ids = encoding.roles, encoding.input_ids
    assert set(roles.unique().tolist()) <= {int(role) for role in TokenRole}
    assert torch.equal(roles == TokenRole.IMAGE, ids == any_processor.image_token_id)
    assert torch.equal(roles == TokenRole.PAD, encoding.attention_mask == 0)
    assert (roles == TokenRole.BOS).sum(dim=1).tolist() == [1, 1]
    masks = torch.stack([role_mask(encoding, role) for role in TokenRole])
    assert torch.equal(masks.sum(dim=0), torch.ones_like(ids))


def test_the_tokens_of_a_role_spell_the_segments_of_that_role(
    any_processor: Maira2Processor, study: Any
) -> None:
    """Reading the tokens of each section back gives the section's words: no token went to a neighbour."""
    encoding = any_processor.encode(study, report="teacher")
    decode = any_processor.tokenizer.decode
    wanted = {
        TokenRole.INDICATION: study.indication,
        TokenRole.TECHNIQUE: study.technique,
        TokenRole.COMPARISON: "N/A",
        TokenRole.PRIOR_REPORT: study.prior_report,
        TokenRole.REPORT: study.report + "</s>",
        TokenRole.SEPARATOR: "USER: PRIOR_REPORT: INDICATION: TECHNIQUE: COMPARISON: ASSISTANT:",
    }
    for role, text in wanted.items():
        read = decode(encoding.input_ids[0][encoding.roles[0] == role], clean_up_tokenization_spaces=False)
        assert read.split() == text.split() or "".join(read.split()) == "".join(text.split())


def test_a_token_across_a_border_goes_to_its_first_visible_character(processor: Maira2Processor) -> None:
    """`▁N/A` holds the space of `INDICATION: ` and the text of the section: it belongs to the section."""

    class Study:
        frontal = np.arange(4900, dtype=np.uint16).reshape(70, 70)
        lateral = prior_frontal = indication = technique = comparison = prior_report = None

    encoding = processor.encode(Study())  # pyright: ignore[reportArgumentType] - reports are not read here
    tokens = processor.tokenizer.convert_ids_to_tokens(encoding.input_ids[0].tolist())
    roles = [role for token, role in zip(tokens, encoding.roles[0].tolist(), strict=True) if token == "▁N/A"]
    assert roles == [TokenRole.INDICATION, TokenRole.TECHNIQUE, TokenRole.COMPARISON]


def test_a_report_leaves_the_prompts_ids_as_generation_sees_them(
    any_processor: Maira2Processor, study: Any
) -> None:
    prompt = any_processor.encode(study).input_ids[0]
    taught = any_processor.encode(study, report="teacher")
    assert torch.equal(taught.input_ids[0, : len(prompt)], prompt)
    assert set(taught.roles[0, len(prompt) :].tolist()) == {int(TokenRole.REPORT)}
    assert taught.input_ids[0, -1] == any_processor.tokenizer.eos_token_id


def test_patches_are_numbered_row_by_row_within_every_image(processor: Maira2Processor, study: Any) -> None:
    encoding = processor.encode(study)
    for number, kind in enumerate((0, 1, 2)):
        here = encoding.image_index[0] == number
        assert int(here.sum()) == 16
        assert encoding.view[0][here].unique().tolist() == [kind]
        assert encoding.patch_row[0][here].tolist() == [i // 4 for i in range(16)]
        assert encoding.patch_col[0][here].tolist() == [i % 4 for i in range(16)]
    elsewhere = encoding.roles[0] != TokenRole.IMAGE
    for column in (encoding.image_index, encoding.view, encoding.patch_row, encoding.patch_col):
        assert column[0][elsewhere].unique().tolist() == [-1]


def test_kinds_follow_the_study_where_the_lateral_is_missing(
    processor: Maira2Processor, make_study: Any, make_picture: Any
) -> None:
    encoding = processor.encode(make_study(frontal=make_picture(0), prior_frontal=make_picture(1)))
    assert encoding.view[0][encoding.image_index[0] == 1].unique().tolist() == [2]


def test_presets_select_what_their_names_say(processor: Maira2Processor, study: Any) -> None:
    encoding = processor.encode(study, report="teacher")
    chosen = {name: set(encoding.roles[role_mask(encoding, name)].tolist()) for name in ROLE_PRESETS}
    sections = {TokenRole.INDICATION, TokenRole.TECHNIQUE, TokenRole.COMPARISON, TokenRole.PRIOR_REPORT}
    assert chosen["paper"] == sections | {TokenRole.REPORT}
    assert chosen["image_only"] == {TokenRole.IMAGE}
    assert chosen["generated_only"] == {TokenRole.REPORT}
    assert chosen["text_only"] == sections | {TokenRole.REPORT, TokenRole.TEMPLATE, TokenRole.SEPARATOR}
    assert chosen["all"] == chosen["text_only"] | {TokenRole.BOS, TokenRole.IMAGE}


def test_roles_can_be_named_one_by_one_and_unknown_names_are_refused() -> None:
    assert resolve_roles(["report", TokenRole.IMAGE]) == {TokenRole.REPORT, TokenRole.IMAGE}
    assert resolve_roles("indication") == {TokenRole.INDICATION}
    with pytest.raises(ConfigError, match="papers"):
        resolve_roles("papers")
