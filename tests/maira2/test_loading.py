"""Checkpoints: exact round trips, published file layouts, pinned revision, and every kind of bad folder."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

from sae_lens_maira.errors import CheckpointError, ConfigError
from sae_lens_maira.maira2 import (
    PUBLISHED_REVISION,
    Maira2,
    Maira2ForConditionalGeneration,
    Maira2Processor,
    load_maira2,
    load_processor,
    save_processor,
)

pytestmark = pytest.mark.compat


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.no_grad()
def test_a_saved_model_loads_bit_for_bit(tiny: Maira2, saved: Path, study: Any) -> None:
    assert len(shards(saved)) > 2
    loaded = load_maira2(saved, dtype=torch.float32)
    inputs = tiny.processor.encode(study).model_inputs()
    again = loaded.processor.encode(study).model_inputs()
    for name, value in inputs.items():
        assert torch.equal(again[name], value)
    assert torch.equal(loaded.model(**again).logits, tiny.model(**inputs).logits)
    assert not loaded.model.training


def test_written_keys_are_published_keys(saved: Path) -> None:
    written = {key for shard in shards(saved) for key in load_file(shard)}
    assert all(
        key.startswith(("language_model.", "vision_tower.", "multi_modal_projector.")) for key in written
    )


def test_weights_arrive_in_the_asked_precision(saved: Path) -> None:
    assert {p.dtype for p in load_maira2(saved).model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in load_maira2(saved, dtype="auto").model.parameters()} == {torch.float32}
    half = load_maira2(saved, dtype=torch.float16, device="cpu").model
    assert {p.dtype for p in half.parameters()} == {torch.float16}


@torch.no_grad()
@pytest.mark.parametrize("device_map", ["auto", {"model": "cpu", "lm_head": "disk"}], ids=["auto", "by hand"])
def test_a_device_map_spreads_the_model_without_changing_it(
    tiny: Maira2, saved: Path, tmp_path: Path, study: Any, device_map: Any
) -> None:
    """With too little memory for all of it, a part is left on disk and fetched in time."""
    memory: dict[str, Any] = {"max_memory": {"cpu": "500KB"}} if device_map == "auto" else {}
    loaded = load_maira2(
        saved, dtype=torch.float32, device_map=device_map, offload_folder=str(tmp_path), **memory
    )
    places: dict[str, Any] = loaded.model.hf_device_map  # pyright: ignore[reportAssignmentType] - set by accelerate
    assert {str(place) for place in places.values()} == {"cpu", "disk"}
    inputs = tiny.processor.encode(study).model_inputs()
    assert torch.equal(loaded.model(**inputs).logits, tiny.model(**inputs).logits)
    with pytest.raises(ConfigError, match="device_map"):
        load_maira2(saved, device="cpu", device_map="auto")


@torch.no_grad()
def test_a_model_in_half_precision_reads_float_pixels(saved: Path, study: Any) -> None:
    model, processor = load_maira2(saved)
    assert model(**processor.encode(study).model_inputs()).logits.dtype == torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("auto_class", [AutoModelForCausalLM, AutoModelForImageTextToText])
def test_the_auto_classes_load_the_same_model(tiny: Maira2, saved: Path, study: Any, auto_class: Any) -> None:
    model, info = auto_class.from_pretrained(saved, output_loading_info=True)
    assert type(model) is Maira2ForConditionalGeneration
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    inputs = tiny.processor.encode(study).model_inputs()
    assert torch.equal(model(**inputs).logits, tiny.model(**inputs).logits)


def test_auto_processor_reads_the_published_file_layout(
    saved: Path, study: Any, processor: Maira2Processor
) -> None:
    loaded = AutoProcessor.from_pretrained(saved)
    assert type(loaded) is Maira2Processor
    assert torch.equal(loaded.encode(study).input_ids, processor.encode(study).input_ids)


def test_the_published_model_is_loaded_at_its_pinned_revision(saved: Path, tmp_path: Path) -> None:
    """A hub cache that holds that one snapshot, without a branch, is enough."""
    snapshot = tmp_path / "models--microsoft--maira-2" / "snapshots" / PUBLISHED_REVISION
    shutil.copytree(saved, snapshot)
    model = load_maira2(cache_dir=str(tmp_path), local_files_only=True).model
    assert model.dtype == torch.bfloat16
    with pytest.raises(CheckpointError, match="No configuration"):
        load_maira2(revision="main", cache_dir=str(tmp_path), local_files_only=True)


def test_processor_files_name_only_what_both_versions_know(saved: Path) -> None:
    assert (
        json.loads((saved / "tokenizer_config.json").read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    image = json.loads((saved / "preprocessor_config.json").read_text())
    assert image["image_processor_type"] == "BitImageProcessor"
    assert json.loads((saved / "special_tokens_map.json").read_text())["pad_token"] == "<unk>"


def test_every_argument_of_the_processor_survives_saving(
    any_processor: Maira2Processor, tmp_path: Path
) -> None:
    save_processor(any_processor, tmp_path)
    loaded = load_processor(tmp_path)
    names = ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens", "image_token")
    for name in (*names, "image_token_id", "recipe", "model_input_names"):
        assert getattr(loaded, name) == getattr(any_processor, name)
    with pytest.raises(ConfigError, match="push_to_hub"):
        any_processor.save_pretrained(tmp_path, push_to_hub=True)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_llama_tokenizer_is_read_as_its_file_says(
    legacy: bool, processor: Maira2Processor, tmp_path: Path, study: Any
) -> None:
    """Vicuna's file puts a space marker behind every added token; transformers 5's own class does not."""
    from tokenizers import Tokenizer, normalizers

    save_processor(processor, tmp_path)
    filed = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    filed.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw = json.loads(filed.to_str()) | {"pre_tokenizer": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    edit(
        tmp_path / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        legacy=legacy,
        add_bos_token=True,
    )
    loaded = load_processor(tmp_path)
    text = loaded.build_prompt(study).text
    wanted = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids
    assert loaded.tokenizer(text)["input_ids"] == wanted
    assert loaded.tokenizer.convert_ids_to_tokens(wanted).count("▁") > 4
    encoding = loaded.encode(study)
    assert torch.equal(encoding.roles == 3, encoding.input_ids == loaded.image_token_id)


def test_a_missing_shard_is_named(copy: Path) -> None:
    lost = shards(copy)[1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of the \d shards that its index names: {lost.name}"):
        load_maira2(copy)


def test_a_damaged_shard_or_index_is_refused(copy: Path) -> None:
    whole = shards(copy)[0].read_bytes()
    shards(copy)[0].write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_maira2(copy)
    (copy / "model.safetensors.index.json").write_text("{")
    with pytest.raises(CheckpointError, match="shard index"):
        load_maira2(copy)


def test_a_folder_without_weights_is_refused(copy: Path) -> None:
    for path in (*shards(copy), copy / "model.safetensors.index.json"):
        path.unlink()
    with pytest.raises(CheckpointError, match="could not be loaded"):
        load_maira2(copy)


@pytest.mark.parametrize("lost", ["all", "preprocessor_config.json", "tokenizer.json"])
def test_a_folder_without_a_processor_is_refused(copy: Path, lost: str) -> None:
    for path in list(copy.glob("*token*")) + list(copy.glob("*processor*")):
        if lost in ("all", path.name):
            path.unlink()
    with pytest.raises(CheckpointError, match="No processor"):
        load_maira2(copy)


def test_a_tokenizer_without_the_added_tokens_is_refused(copy: Path) -> None:
    raw = json.loads((copy / "tokenizer.json").read_text())
    raw["added_tokens"] = [token for token in raw["added_tokens"] if token["content"] != "<image>"]
    (copy / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="does not know '<image>'"):
        load_processor(copy)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_tensors_must_match_exactly(copy: Path, change: str) -> None:
    shard = next(path for path in shards(copy) if any("multi_modal" in key for key in load_file(path)))
    tensors = load_file(shard)
    key = next(key for key in tensors if "multi_modal" in key)
    if change == "missing":
        del tensors[key]
    elif change == "unexpected":
        tensors["language_model.model.layers.9.mlp.up_proj.weight"] = torch.zeros(2, 2)
    else:
        tensors[key] = torch.zeros(3)
    save_file(tensors, shard, metadata={"format": "pt"})
    index = json.loads((copy / "model.safetensors.index.json").read_text())
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file != shard.name}
    index["weight_map"] |= dict.fromkeys(tensors, shard.name)
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"(missing|unexpected|mismatched) keys|could not be loaded"):
        load_maira2(copy)


def test_a_checkpoint_of_another_model_type_is_refused(copy: Path) -> None:
    edit(copy / "config.json", model_type="llava")
    with pytest.raises(CheckpointError, match="'llava', not 'maira2'"):
        load_maira2(copy)


def test_a_folder_or_id_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No configuration"):
        load_maira2(tmp_path)
    for absent in (tmp_path / "absent", "./absent", "~/absent/of/all"):
        with pytest.raises(CheckpointError, match="There is no folder"):
            load_maira2(absent, local_files_only=True)


def test_a_tokenizer_with_code_of_its_own_runs_nothing(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its file names a class in `remote.py`: nothing of it runs, and nobody is asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether custom code may run"))
    auto = {"AutoTokenizer": ["remote.Slow", "remote.Fast"]}
    edit(copy / "tokenizer_config.json", auto_map=auto, tokenizer_class="Remote")
    with pytest.raises(CheckpointError, match="custom code"):
        load_maira2(copy)
    assert "remote code ran" not in "".join(capsys.readouterr())


def test_remote_code_and_unknown_keywords_are_refused(saved: Path) -> None:
    with pytest.raises(ConfigError, match="without remote code"):
        load_maira2(saved, trust_remote_code=True)
    with pytest.raises(ConfigError, match="remote code"):
        Maira2Processor.from_pretrained(saved, trust_remote_code=True)
    with pytest.raises(ConfigError, match="did you mean 'attn_implementation'"):
        load_maira2(saved, attn_implementations="eager")


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"torch_dtype": torch.float32}, "Pass it as dtype"),
        ({"dtype": "float33"}, "'float33'; use float32"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"device": "mps"}, "torch finds no such device"),
        ({"device": "cuda:97"}, "'cuda:97', but torch finds"),
        ({"device_map": {"": "mps"}}, "torch finds no such device"),
        ({"device_map": "everywhere"}, "cannot be loaded"),
        ({"attn_implementation": "flash_attention_2"}, "(?i)package is missing: Flash"),
        ({"attn_implementation": "slow"}, "cannot be loaded"),
        (
            {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            "(?i)package is missing: .*bitsandbytes",
        ),
    ],
)
def test_what_this_machine_lacks_is_not_blamed_on_the_checkpoint(
    saved: Path, asked: dict[str, Any], words: str
) -> None:
    """Neither a device nor a package is there: the message says which, and never to fetch the weights again."""
    package = {"attn_implementation": "flash_attn", "quantization_config": "bitsandbytes"}.get(
        next(iter(asked))
    )
    if (package and importlib.util.find_spec(package)) or ("mps" in str(asked) and torch.mps.is_available()):
        pytest.skip("this machine has it")
    with pytest.raises(ConfigError, match=words) as refused:
        load_maira2(saved, **asked)
    assert "fetch it again" not in str(refused.value)
