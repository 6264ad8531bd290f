"""A checkpoint with MAIRA-2's real widths and two decoder layers, in the published layout, loads exactly.

It is written here with the published key names, as six bfloat16 shards of 1.6 GB in all, and compared with
the same weights set straight into a live model. Slow: it needs about 8 GB of memory.
"""

import gc
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_maira.maira2 import Maira2ForConditionalGeneration, load_maira2, make_config, save_processor

pytestmark = [pytest.mark.compat, pytest.mark.slow]

SHARDS = 6
LIVE_TO_PUBLISHED = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.": "",
    # transformers 5 calls the parts of a Dinov2 block differently
    "attention.q_proj.": "attention.attention.query.",
    "attention.k_proj.": "attention.attention.key.",
    "attention.v_proj.": "attention.attention.value.",
    "attention.o_proj.": "attention.output.dense.",
}


def published(name: str) -> str:
    """The published name of a live parameter."""
    for live, old in list(LIVE_TO_PUBLISHED.items())[:3]:
        if name.startswith(live):
            name = old + name[len(live) :]
            break
    if name.startswith("vision_tower."):
        for live, old in list(LIVE_TO_PUBLISHED.items())[3:]:
            name = name.replace(f".{live}", f".{old}")
    return name


def fill(model: torch.nn.Module) -> None:
    """Quick deterministic weights that bfloat16 holds exactly, of a size that keeps activations tame."""
    block = torch.randn(1_000_003).to(torch.bfloat16).float()
    start = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        flat = block.roll(start).repeat(size // len(block) + 1)[:size].view(parameter.shape)
        norm = "norm" in name or "lambda" in name
        scale = 2.0**-5 if parameter.ndim > 1 else 2.0**-3
        parameter.copy_(flat * scale + (1.0 if norm and not name.endswith("bias") else 0.0))
        parameter.copy_(parameter.to(torch.bfloat16))
        start += 7919


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path
    shutil.rmtree(tmp_path)


@torch.no_grad()
def test_a_checkpoint_of_real_widths_loads_exactly(
    folder: Path, make_processor: Any, tokenizers: Any, make_study: Any, make_picture: Any
) -> None:
    processor = make_processor(tokenizers["llama_first"], 518)
    config = make_config(text_config={"num_hidden_layers": 2}, image_token_index=processor.image_token_id)
    with torch.device("meta"):
        live = Maira2ForConditionalGeneration(config)
    rotary: Any = live.model.language_model.rotary_emb
    live = live.to_empty(device="cpu").eval()
    live.model.language_model.rotary_emb = type(rotary)(config.text_config)
    fill(live)

    names = {name: published(name) for name, _ in live.named_parameters()}
    assert len(set(names.values())) == 522 - 30 * 9
    written = [(names[name], parameter.to(torch.bfloat16)) for name, parameter in live.named_parameters()]
    index = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        tensors = dict(written[shard::SHARDS])
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    del written
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    save_processor(processor, folder)

    loaded = load_maira2(folder, dtype=torch.float32)
    for (name, ours), (other, wanted) in zip(
        loaded.model.named_parameters(), live.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours, wanted), name
    inputs = processor.encode(
        make_study(frontal=make_picture(0, 560, 520), indication="Fever.")
    ).model_inputs()
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == 1369
    ours = loaded.model(**inputs, logits_to_keep=8).logits
    del loaded
    gc.collect()
    wanted = live(**inputs, logits_to_keep=8).logits
    assert wanted.std() > 1e-2
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
