"""The model equals a composition by hand, refuses images that do not fit, and generates what it predicts."""

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoBackbone,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaForCausalLM,
)

from sae_lens_maira.errors import PromptError
from sae_lens_maira.maira2 import (
    Maira2,
    Maira2ForConditionalGeneration,
    Maira2Model,
    generate_reports,
    register,
)
from sae_lens_maira.maira2.versions import cache_keyword

pytestmark = pytest.mark.compat


@pytest.fixture
def pair(study: Any, make_study: Any, make_picture: Any) -> list[Any]:
    return [study, make_study(frontal=make_picture(8), indication="Fever.")]


def by_hand(model: Maira2ForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits from the library's Dinov2 backbone and Llama; projector and splice are written out here."""
    config: Any = model.config
    backbone = AutoBackbone.from_config(config.vision_config).eval()
    backbone.load_state_dict(model.model.vision_tower.state_dict())
    llama = LlamaForCausalLM(config.text_config).eval()
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    hidden = backbone(inputs["pixel_values"], output_hidden_states=True).hidden_states[-1]
    features = backbone.layernorm(hidden)[:, 1:]
    weights = model.model.multi_modal_projector.state_dict()
    for layer in (0, 2, 4, 6):
        features = functional.linear(
            features, weights[f"layers.{layer}.weight"], weights[f"layers.{layer}.bias"]
        )
        features = functional.gelu(features) if layer < 6 else features
    embeddings = llama.model.embed_tokens(inputs["input_ids"])
    embeddings[inputs["input_ids"] == config.image_token_index] = features.flatten(0, 1)
    return llama(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"]).logits


@torch.no_grad()
def test_logits_equal_a_composition_by_hand(tiny: Maira2, pair: list[Any]) -> None:
    encoding = tiny.processor.encode(pair, report=["Heart.", "No effusion."], padding_side="right")
    real = encoding.attention_mask.bool()
    ours = tiny.model(**encoding.model_inputs()).logits[real]
    torch.testing.assert_close(ours, by_hand(tiny.model, encoding.model_inputs())[real], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_every_image_reaches_its_own_positions(tiny: Maira2, study: Any, make_picture: Any) -> None:
    """Changing the lateral image leaves the embeddings at the frontal and prior positions alone."""
    encoding = tiny.processor.encode(study)
    assert encoding.pixel_values is not None
    pixels = encoding.pixel_values.clone()
    pixels[1] = tiny.processor.image_to_pixels(make_picture(99))
    seen: list[torch.Tensor] = []
    layer: Any = tiny.model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    tiny.model(**encoding.model_inputs())
    tiny.model(**(encoding.model_inputs() | {"pixel_values": pixels}))
    handle.remove()
    changed = (seen[0] != seen[1]).any(dim=-1)
    assert torch.equal(changed, encoding.view == 1)


@torch.no_grad()
def test_a_left_padded_row_predicts_what_it_predicts_alone(tiny: Maira2, pair: list[Any]) -> None:
    batch = tiny.model(**tiny.processor.encode(pair).model_inputs()).logits[:, -1]
    for number, study in enumerate(pair):
        alone = tiny.model(**tiny.processor.encode(study).model_inputs()).logits[0, -1]
        torch.testing.assert_close(batch[number], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_generation_follows_the_logits(tiny: Maira2, study: Any) -> None:
    """Each generated token is the argmax of a cache-free forward over everything before it."""
    encoding = tiny.processor.encode(study)
    out = tiny.model.generate(**encoding.model_inputs(), max_new_tokens=6, do_sample=False, eos_token_id=None)
    new = out[:, encoding.input_ids.shape[1] :]
    longer = encoding.extend(new)
    logits = tiny.model(**longer.model_inputs()).logits[0, -7:-1]
    assert logits.argmax(dim=-1).tolist() == new[0].tolist()


@torch.no_grad()
@pytest.mark.parametrize("keywords", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_beams_keep_the_images_of_a_row_together(
    tiny: Maira2, study: Any, make_study: Any, make_picture: Any, keywords: dict[str, int]
) -> None:
    """Repeating image by image would show every beam of a three-image row the first image three times."""
    other = make_study(frontal=make_picture(11), lateral=make_picture(12))
    arguments = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **keywords}

    def run(studies: list[Any]) -> list[list[int]]:
        encoding = tiny.processor.encode(studies)
        out: Any = tiny.model.generate(**encoding.model_inputs(), **arguments)
        return out[:, encoding.input_ids.shape[1] :].tolist()

    assert run([study, other]) == run([study]) + run([other])


def test_expanded_rows_repeat_whole_image_groups(tiny: Maira2, pair: list[Any]) -> None:
    inputs: dict[str, Any] = tiny.processor.encode(pair).model_inputs()
    pixels = inputs["pixel_values"]
    ids, more = tiny.model._expand_inputs_for_generation(expand_size=2, **inputs)
    assert torch.equal(ids, inputs["input_ids"].repeat_interleave(2, dim=0))
    assert torch.equal(more["pixel_values"], pixels[[0, 1, 2, 0, 1, 2, 3, 3]])


def test_reports_are_generated_for_one_study_and_for_several(tiny: Maira2, pair: list[Any]) -> None:
    assert len(generate_reports(*tiny, pair[0], max_new_tokens=3)) == 1
    assert len(generate_reports(*tiny, pair, max_new_tokens=3)) == 2
    assert len(generate_reports(*tiny, pair, task="phrase", phrase="Nodule.", max_new_tokens=3)) == 2


@pytest.mark.parametrize("call", ["forward", "generate", "inner"])
def test_placeholders_without_images_are_refused(tiny: Maira2, study: Any, call: str) -> None:
    inputs = tiny.processor.encode(study).model_inputs()
    del inputs["pixel_values"]
    calls: dict[str, Any] = {
        "forward": tiny.model,
        "generate": lambda **kw: tiny.model.generate(**kw, max_new_tokens=2),
        "inner": lambda input_ids, attention_mask: tiny.model.model(input_ids),
    }
    with pytest.raises(PromptError, match=r"48 image placeholders .* but no pixel_values"):
        calls[call](**inputs)


@pytest.mark.parametrize("call", ["forward", "generate"])
def test_images_and_placeholders_must_match(tiny: Maira2, pair: list[Any], call: str) -> None:
    inputs = tiny.processor.encode(pair).model_inputs()
    run: Any = tiny.model if call == "forward" else tiny.model.generate
    ids, mask, pixels = inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"]
    text = torch.full_like(ids[:, :5], 10)
    wrong = {
        "no placeholder": {"input_ids": text, "pixel_values": pixels},
        "too few images": {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels[:3]},
        "too many images": {"input_ids": ids[:1], "attention_mask": mask[:1], "pixel_values": pixels},
        "half an image": {"input_ids": ids[:, :40], "attention_mask": mask[:, :40], "pixel_values": pixels},
    }
    for name, bad in wrong.items():
        with pytest.raises(PromptError, match="image placeholders"):
            run(**bad, **({"max_new_tokens": 2} if call == "generate" else {}))
        assert name


def test_images_may_not_be_split_between_rows(tiny: Maira2, make_study: Any, make_picture: Any) -> None:
    """Twelve and twenty placeholders add up to two images, but one row would borrow from the other."""
    encoding = tiny.processor.encode([make_study(frontal=make_picture(i)) for i in range(2)])
    ids = encoding.input_ids.clone()
    image = tiny.processor.image_token_id
    where = torch.where(ids[0] == image)[0]
    ids[0, where[:4]] = 10
    ids[1, 1:5] = image
    with pytest.raises(PromptError, match=r"\[12, 20\]"):
        tiny.model(input_ids=ids, pixel_values=encoding.pixel_values)


@torch.no_grad()
def test_text_alone_and_decode_steps_need_no_images(tiny: Maira2, study: Any) -> None:
    """Text without placeholders runs; so does a step that continues a cache, even on a written `<image>`."""
    tiny.model(input_ids=torch.tensor([[1, 10, 11]]))
    inputs = tiny.processor.encode(study).model_inputs()
    out = tiny.model(**inputs, use_cache=True)
    step = torch.tensor([[tiny.processor.image_token_id]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(1, 1, dtype=torch.long)], dim=1)
    tiny.model(input_ids=step, attention_mask=mask, **{cache_keyword(): out.past_key_values})


def test_gradients_reach_every_part(tiny: Maira2, study: Any) -> None:
    encoding = tiny.processor.encode(study, report="teacher", padding_side="right")
    labels = torch.where(encoding.roles == 10, encoding.input_ids, -100)
    tiny.model(**encoding.model_inputs(), labels=labels).loss.backward()
    for name in ("model.vision_tower", "model.multi_modal_projector", "model.language_model", "lm_head"):
        gradients = [p.grad for p in tiny.model.get_submodule(name).parameters() if p.grad is not None]
        assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0, name
    tiny.model.zero_grad()


def test_registration_reaches_every_auto_class_and_may_be_repeated(tiny: Maira2) -> None:
    register()
    register()
    for auto_class in (AutoModelForImageTextToText, AutoModelForCausalLM):
        assert type(auto_class.from_config(tiny.model.config)) is Maira2ForConditionalGeneration
    assert type(AutoModel.from_config(tiny.model.config)) is Maira2Model
