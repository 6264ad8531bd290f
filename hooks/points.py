"""The one table of MAIRA-2's hook points, in TransformerLens' vocabulary.

A point is a place in the module graph where one tensor can be read or replaced: a module's output, its
input, a backbone's last feature map, or the attention pattern. Every interface of this package (HookedMaira2, the
bridge, nnsight, SAELens) looks names up here, so a name means the same tensor everywhere. Letters in the
shapes: B rows, L positions, N images, P patches of an image.
"""

from dataclasses import dataclass
from typing import Any, Literal

Tap = Literal["output", "input", "feature_map", "pattern"]
Fires = Literal["prefill only", "every step"]

_LLM = "model.language_model"
_VISION = "model.vision_tower"
_PROJECTOR = "model.multi_modal_projector"


@dataclass(frozen=True)
class PointSpec:
    """One row of the table; `{i}` is a layer's number."""

    name: str
    """Canonical name, for instance `blocks.{i}.hook_resid_post`."""
    module: str
    """Path of the torch module whose value it is, in the transformers model."""
    shape: str
    """Shape in words."""
    meaning: str
    """What the tensor is."""
    tap: Tap = "output"
    """Which value of the module: its output, its input, its last feature map, or its attention pattern."""
    aliases: tuple[str, ...] = ()
    """Other names, mostly TransformerLens' own."""
    heads: Literal["", "query", "key"] = ""
    """Whether the last axis is shown as (heads, d_head), and with which number of heads."""
    counted_by: Literal["", "block", "vision block", "projector layer"] = ""
    """What `{i}` counts."""
    fires: Fires = "every step"
    """During `generate`: once with the prompt, or again for every new token."""


def _block(suffix: str, module: str, shape: str, meaning: str, *aliases: str, **more: Any) -> PointSpec:
    prefix = "blocks.{i}."
    path = f"{_LLM}.layers.{{i}}{module}"
    return PointSpec(
        prefix + suffix,
        path,
        shape,
        meaning,
        aliases=tuple(prefix + a for a in aliases),
        counted_by="block",
        **more,
    )


def _vision_block(suffix: str, module: str, meaning: str, *aliases: str, **more: Any) -> PointSpec:
    prefix = "vision_encoder.blocks.{i}."
    path = f"{_VISION}.encoder.layer.{{i}}{module}"
    return PointSpec(
        prefix + suffix,
        path,
        "(N, 1 + P, d_vision)",
        meaning,
        aliases=tuple(prefix + a for a in aliases),
        counted_by="vision block",
        fires="prefill only",
        **more,
    )


_D = "(B, L, d_model)"
_HEADS = "(B, L, heads, d_head)"

SPECS: tuple[PointSpec, ...] = (
    # Execution order of one forward pass (ids are embedded before images are seen); blocks unroll in place.
    PointSpec(
        "hook_embed",
        f"{_LLM}.embed_tokens",
        _D,
        "token embeddings, before image tokens are filled in",
        aliases=("embed", "embed.hook_out"),
    ),
    PointSpec(
        "vision_encoder.hook_embed",
        f"{_VISION}.embeddings",
        "(N, 1 + P, d_vision)",
        "CLS and patch embeddings with positions added",
        aliases=("hook_vision_embed",),
        fires="prefill only",
    ),
    _vision_block("hook_resid_pre", "", "residual stream entering the vision block", "hook_in", tap="input"),
    _vision_block("hook_attn_out", ".layer_scale1", "what attention adds to the residual stream"),
    _vision_block("hook_mlp_out", ".layer_scale2", "what the MLP adds to the residual stream"),
    _vision_block("hook_resid_post", "", "residual stream leaving the vision block", "hook_out"),
    PointSpec(
        "vision_encoder.hook_out",
        _VISION,
        "(N, 1 + P, d_vision)",
        "layer-normed last feature map; position 0 is CLS, which MAIRA-2 drops",
        tap="feature_map",
        aliases=("hook_vision_out",),
        fires="prefill only",
    ),
    PointSpec(
        "vision_projector.hook_in",
        _PROJECTOR,
        "(N, P, d_vision)",
        "patch features entering the projector",
        tap="input",
        aliases=("hook_vision_proj_in",),
        fires="prefill only",
    ),
    PointSpec(
        "vision_projector.{i}.hook_out",
        f"{_PROJECTOR}.layers.{{i}}",
        "(N, P, d_model)",
        "output of projector layer i (0, 2, 4, 6 are linears, 1, 3, 5 GELUs)",
        counted_by="projector layer",
        fires="prefill only",
    ),
    PointSpec(
        "vision_projector.hook_out",
        _PROJECTOR,
        "(N, P, d_model)",
        "the image tokens that replace <image> placeholders",
        aliases=("hook_vision_proj_out", "vision_projector"),
        fires="prefill only",
    ),
    _block("hook_resid_pre", "", _D, "residual stream entering the block", "hook_in", tap="input"),
    _block("ln1.hook_out", ".input_layernorm", _D, "normalised input of attention, gain applied", "ln1"),
    _block(
        "attn.hook_q",
        ".self_attn.q_proj",
        _HEADS,
        "queries before rotary embedding",
        "attn.q.hook_out",
        heads="query",
    ),
    _block(
        "attn.hook_k",
        ".self_attn.k_proj",
        "(B, L, kv_heads, d_head)",
        "keys before rotary embedding",
        "attn.k.hook_out",
        heads="key",
    ),
    _block(
        "attn.hook_v",
        ".self_attn.v_proj",
        "(B, L, kv_heads, d_head)",
        "values",
        "attn.v.hook_out",
        heads="key",
    ),
    _block(
        "attn.hook_z",
        ".self_attn.o_proj",
        _HEADS,
        "weighted values, per head, before W_O",
        "attn.o.hook_in",
        tap="input",
        heads="query",
    ),
    # Formed before z, but returned with the attention's output, which is where nnsight can read it.
    _block(
        "attn.hook_pattern",
        ".self_attn",
        "(B, heads, L, L seen so far)",
        "attention pattern after softmax; eager attention only",
        tap="pattern",
    ),
    _block(
        "hook_attn_out",
        ".self_attn",
        _D,
        "what attention adds to the residual stream",
        "attn.hook_out",
        "attn",
    ),
    _block(
        "hook_resid_mid",
        ".post_attention_layernorm",
        _D,
        "residual stream between attention and MLP",
        "ln2.hook_in",
        tap="input",
    ),
    _block(
        "ln2.hook_out", ".post_attention_layernorm", _D, "normalised input of the MLP, gain applied", "ln2"
    ),
    _block(
        "mlp.hook_pre", ".mlp.gate_proj", "(B, L, d_mlp)", "gate before its activation", "mlp.gate.hook_out"
    ),
    _block(
        "mlp.hook_pre_linear", ".mlp.up_proj", "(B, L, d_mlp)", "linear branch of the MLP", "mlp.in.hook_out"
    ),
    _block(
        "mlp.hook_post",
        ".mlp.down_proj",
        "(B, L, d_mlp)",
        "activation(gate) x linear branch",
        "mlp.out.hook_in",
        tap="input",
    ),
    _block("hook_mlp_out", ".mlp", _D, "what the MLP adds to the residual stream", "mlp.hook_out", "mlp"),
    _block("hook_resid_post", "", _D, "residual stream leaving the block", "hook_out"),
    PointSpec(
        "ln_final.hook_out", f"{_LLM}.norm", _D, "normalised last residual stream", aliases=("ln_final",)
    ),
    PointSpec(
        "unembed.hook_out", "lm_head", "(B, L, d_vocab)", "logits", aliases=("unembed", "hook_unembed")
    ),
)

# Names that TransformerLens users try and transformers' module graph cannot give, with the reason.
ABSENT = {
    "hook_normalized": "the value before the norm's gain never leaves RMSNorm; `.hook_out` is after it",
    "hook_scale": "the norm's scale never leaves transformers' RMSNorm",
    "hook_attn_scores": "scores before softmax never leave the attention function; use attn.hook_pattern",
    "hook_result": "per-head outputs are summed inside o_proj; multiply attn.hook_z with W_O instead",
    "hook_rot_q": "rotated queries never leave attention; attn.hook_q is before rotation",
    "hook_rot_k": "rotated keys never leave attention; attn.hook_k is before rotation",
    "hook_pos_embed": "positions enter by rotation inside attention; there is nothing to read",
    "hook_attn_in": "heads share one input here; use ln1.hook_out",
    "hook_mlp_in": "use hook_resid_mid (before the norm) or ln2.hook_out (after it)",
}
