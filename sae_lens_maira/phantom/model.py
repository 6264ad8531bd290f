"""The phantom model: MAIRA-2's classes at about 2.5 million parameters, and the folder of its trained weights.

Everything but the size is MAIRA-2's: a Dinov2 backbone, four projector linears, a Llama decoder with linear
RoPE scaling, the same added tokens, prompts and checkpoint keys. It says nothing about medicine.
"""

from pathlib import Path

import torch
from transformers import BitImageProcessor, Dinov2Config, LlamaConfig, PreTrainedTokenizerFast

from sae_lens_maira.maira2 import Maira2, Maira2Config, Maira2Processor, load_maira2
from sae_lens_maira.maira2.loading import PHANTOM, source_of

IMAGE_SIZE = 112
PATCH_SIZE = 14
N_LAYERS = 8


def tiny_config(vocab_size: int = 1231, image_token: int = 1228) -> Maira2Config:
    """The phantom's configuration.

    Args:
        vocab_size: Ids of its tokenizer, the 207 added tokens included.
        image_token: Id of `<image>`.

    Returns:
        A `Maira2Config` with 8 decoder layers of width 128 and images of 112 px in 8 x 8 patches.
    """
    vision = Dinov2Config(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        mlp_ratio=3,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        layerscale_value=1.0,
        drop_path_rate=0.0,
        out_features=["stage4"],  # pyright: ignore[reportCallIssue] - set by a mixin
        apply_layernorm=True,
        reshape_hidden_states=False,
    )
    text = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_scaling={"rope_type": "linear", "factor": 1.5},  # pyright: ignore[reportCallIssue] - the name on 4.56
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    return Maira2Config(
        vision_config=vision,
        text_config=text,
        image_token_index=image_token,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        projector_n_layers=4,
        pad_token_id=0,
    )


def phantom_path() -> Path:
    """The folder of the trained phantom, in the published checkpoint's layout, inside the package."""
    return Path(source_of(PHANTOM))


def load_phantom(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Maira2:
    """Load the shipped phantom through `load_maira2`, as MAIRA-2 itself is loaded.

    Args:
        dtype: Dtype of the weights in memory (they ship as fp16).
        device: Device of the model.

    Returns:
        `Maira2(model, processor)`, the model in evaluation mode.
    """
    return load_maira2(phantom_path(), dtype=dtype, device=device)


def make_processor(tokenizer: PreTrainedTokenizerFast) -> Maira2Processor:
    """MAIRA-2's processor at the phantom's image size.

    Args:
        tokenizer: Result of `build_tokenizer`.
    """
    images = BitImageProcessor(
        do_resize=True,
        size={"shortest_edge": IMAGE_SIZE},
        resample=3,
        do_center_crop=True,
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=[0.5307] * 3,
        image_std=[0.2583] * 3,
        do_convert_rgb=True,
    )
    return Maira2Processor(image_processor=images, tokenizer=tokenizer, patch_size=PATCH_SIZE)
