"""Write a random MAIRA-2 checkpoint of any depth and image size in the published layout.

    write_checkpoint(folder, Size(layers=2))               full width: 1.6 GB in bfloat16
    write_checkpoint(folder, Size(), dtype="float32")      the published size: 27.5 GB in six shards

Tensor names and shapes are the published ones. The numbers are random, so that only time and memory are meaningful.
Every report is "lungs clear lungs clear ...", because rule labels must be able to read it (`FOLLOWS`). One tensor is in
memory at a time. The tokenizer has 32,000 entries and the 207 added tokens: the phantom's merges, and filler for the
rest of the vocabulary.
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sae_lens_maira.phantom import phantom_path

PATCH, VOCABULARY, SHARD_BYTES = 14, 32_000, 5_000_000_000
FOLLOWS = {"▁lungs": (":", "▁", "▁clear"), "▁clear": ("▁lungs",)}
"""Tokens, and those that they follow: their rows of `lm_head` are the sum of the others' embeddings."""
LOUD = 1 / 80
"""Factor of these embeddings per unit of width, so that the blocks' noise does not cover them."""
FORMATS = {"float32": (torch.float32, torch.int32, "F32"), "bfloat16": (torch.bfloat16, torch.int16, "BF16")}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of a checkpoint; the defaults are the published ones.

    Attributes:
        layers: Decoder layers.
        width: Residual width of the decoder.
        mlp: Width of the decoder's MLP.
        heads: Attention heads of the decoder.
        vision_layers: Blocks of the vision tower.
        vision_width: Residual width of the vision tower.
        image: Side of the square image, in pixels.
    """

    layers: int = 32
    width: int = 4096
    mlp: int = 11008
    heads: int = 32
    vision_layers: int = 12
    vision_width: int = 768
    image: int = 518

    @property
    def patches(self) -> int:
        """Patches per image."""
        return (self.image // PATCH) ** 2


def tensors(size: Size, vocabulary: int) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and kind of every tensor: standard deviation of the noise, or 0 for ones."""
    d, v, vision = size.width, size.vision_width, "vision_tower."
    noise, ones = 0.02, 0.0
    yield f"{vision}embeddings.cls_token", (1, 1, v), noise
    yield f"{vision}embeddings.mask_token", (1, v), noise
    yield f"{vision}embeddings.position_embeddings", (1, size.patches + 1, v), noise
    yield f"{vision}embeddings.patch_embeddings.projection.weight", (v, 3, PATCH, PATCH), noise
    yield f"{vision}embeddings.patch_embeddings.projection.bias", (v,), noise
    for n in range(size.vision_layers):
        block = f"{vision}encoder.layer.{n}."
        for part in ("query", "key", "value"):
            yield f"{block}attention.attention.{part}.weight", (v, v), noise
            yield f"{block}attention.attention.{part}.bias", (v,), noise
        for part, shape in (
            ("attention.output.dense", (v, v)),
            ("mlp.fc1", (4 * v, v)),
            ("mlp.fc2", (v, 4 * v)),
        ):
            yield f"{block}{part}.weight", shape, noise
            yield f"{block}{part}.bias", shape[:1], noise
        for part in ("norm1", "norm2"):
            yield f"{block}{part}.weight", (v,), ones
            yield f"{block}{part}.bias", (v,), noise
        yield f"{block}layer_scale1.lambda1", (v,), ones
        yield f"{block}layer_scale2.lambda1", (v,), ones
    yield f"{vision}layernorm.weight", (v,), ones
    yield f"{vision}layernorm.bias", (v,), noise
    for number, width in ((0, v), (2, d), (4, d), (6, d)):
        yield f"multi_modal_projector.layers.{number}.weight", (d, width), noise
        yield f"multi_modal_projector.layers.{number}.bias", (d,), noise
    yield "language_model.model.embed_tokens.weight", (vocabulary, d), noise
    for n in range(size.layers):
        block = f"language_model.model.layers.{n}."
        for part in "qkvo":
            yield f"{block}self_attn.{part}_proj.weight", (d, d), noise
        for part, shape in (
            ("gate_proj", (size.mlp, d)),
            ("up_proj", (size.mlp, d)),
            ("down_proj", (d, size.mlp)),
        ):
            yield f"{block}mlp.{part}.weight", shape, noise
        yield f"{block}input_layernorm.weight", (d,), ones
        yield f"{block}post_attention_layernorm.weight", (d,), ones
    yield "language_model.model.norm.weight", (d,), ones
    yield "language_model.lm_head.weight", (vocabulary, d), noise


def write_checkpoint(folder: Path, size: Size, dtype: str = "bfloat16", seed: int = 0) -> int:
    """Write weights, configuration, processor and tokenizer.

    Args:
        folder: Output folder.
        size: Sizes of the model.
        dtype: "bfloat16" or "float32".
        seed: Random seed of the weights.

    Returns:
        The number of parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(folder)
    _write_json(folder, size, vocabulary, dtype)
    kind, raw, label = FORMATS[dtype]
    shards: list[list[tuple[str, tuple[int, ...], float]]] = [[]]
    filled = 0
    for entry in tensors(size, vocabulary):
        bytes_ = torch.Size(entry[1]).numel() * kind.itemsize
        if filled + bytes_ > SHARD_BYTES and shards[-1]:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += bytes_
    generator = torch.Generator().manual_seed(seed)
    words: dict[str, int] = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"][
        "vocab"
    ]
    loud: dict[str, torch.Tensor] = {}
    files: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        at = 0
        for key, shape, _ in shard:
            end = at + torch.Size(shape).numel() * kind.itemsize
            head[key] = {"dtype": label, "shape": list(shape), "data_offsets": [at, end]}
            files[key], at = name, end
            total += torch.Size(shape).numel()
        text = json.dumps(head).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for key, shape, noise in shard:
                values = torch.randn(shape, generator=generator) * noise if noise else torch.ones(shape)
                if key.endswith("embed_tokens.weight"):
                    for word in {one for before in FOLLOWS.values() for one in before}:
                        values[words[word]] *= LOUD * size.width
                        loud[word] = values[words[word]].clone()
                elif key.endswith("lm_head.weight"):
                    for word, before in FOLLOWS.items():
                        values[words[word]] = torch.stack([loud[one] for one in before]).sum(0)
                file.write(memoryview(values.to(kind).view(raw).numpy()).cast("B"))
    index = {"metadata": {"total_size": total * kind.itemsize}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return total


def _write_tokenizer(folder: Path) -> int:
    """Write the phantom's tokenizer with a vocabulary of 32,000 and the added tokens after it; return the total."""
    source = phantom_path()
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    words: dict[str, int] = tokenizer["model"]["vocab"]
    added = [entry for entry in tokenizer["added_tokens"] if entry["id"] >= len(words)]
    kept = [entry for entry in tokenizer["added_tokens"] if entry["id"] < len(words)]
    filler = {f"▁filler{i}": i for i in range(len(words), VOCABULARY)}
    tokenizer["model"]["vocab"] = words | filler
    tokenizer["added_tokens"] = kept + [entry | {"id": VOCABULARY + i} for i, entry in enumerate(added)]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_text((source / name).read_text(encoding="utf-8"), encoding="utf-8")
    return VOCABULARY + len(added)


def _write_json(folder: Path, size: Size, vocabulary: int, dtype: str) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    image = next(entry["id"] for entry in tokenizer["added_tokens"] if entry["content"] == "<image>")
    stages = [f"stage{n}" for n in range(1, size.vision_layers + 1)]
    config = {
        "architectures": ["Maira2ForConditionalGeneration"],
        "model_type": "maira2",
        "image_token_index": image,
        "image_seq_length": size.patches,
        "multimodal_projector_bias": True,
        "pad_token_id": 0,
        "projector_hidden_act": "gelu",
        "projector_n_layers": 4,
        "text_config": {
            "model_type": "llama",
            "hidden_size": size.width,
            "intermediate_size": size.mlp,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {"factor": 1.5, "rope_type": "linear", "type": "linear"},
            "vocab_size": vocabulary,
        },
        "torch_dtype": dtype,
        "vision_config": {
            "model_type": "dinov2",
            "apply_layernorm": True,
            "hidden_size": size.vision_width,
            "image_size": size.image,
            "layerscale_value": 1.0,
            "mlp_ratio": 4,
            "num_attention_heads": size.vision_width // 64,
            "num_hidden_layers": size.vision_layers,
            "out_features": [stages[-1]],
            "out_indices": [size.vision_layers],
            "patch_size": PATCH,
            "reshape_hidden_states": False,
            "stage_names": ["stem", *stages],
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
    source = phantom_path()
    images = json.loads((source / "preprocessor_config.json").read_text(encoding="utf-8"))
    images |= {
        "size": {"shortest_edge": size.image},
        "crop_size": {"height": size.image, "width": size.image},
    }
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    processor = json.loads((source / "processor_config.json").read_text(encoding="utf-8"))
    for name, value in (
        ("config", config),
        ("preprocessor_config", images),
        ("processor_config", processor),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1))
