"""TransformerLens' ActivationCache for MAIRA-2: every accepted name, and decompositions that include the images.

    r_l = e + sum_{i<l} (attn_i + mlp_i)        e = blocks.0.hook_resid_pre
    logit(t) = W_U[:, t] . (g * r / rms(r))

e is the embedding that enters block 0, where image tokens have replaced the `<image>` placeholders; TransformerLens
takes `hook_embed`, which does not contain them. g is the gain of the final norm; TransformerLens leaves it out unless
it was folded into the weights.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from transformer_lens import ActivationCache

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._names import PointTable
from sae_lens_maira.maira2.versions import has_transformer_bridge

if TYPE_CHECKING or has_transformer_bridge():
    from transformer_lens.utilities.components_utils import get_act_name
else:
    from transformer_lens.utils import get_act_name

EMBEDDING = "blocks.0.hook_resid_pre"
SCALE = re.compile(r"(?:blocks\.(\d+)\.ln([12])|ln_final)\.hook_scale")


class Maira2Cache(ActivationCache):
    """An ActivationCache over MAIRA-2, for `HookedMaira2` and the bridge.

    Args:
        cache_dict: Name -> tensor.
        model: The hooked model or the bridge; it has `points`, `blocks` and the weights.
        has_batch_dim: Whether the tensors have a batch axis.
    """

    model: Any

    @property
    def _table(self) -> PointTable:
        return self.model.points

    def __getitem__(self, key: Any) -> torch.Tensor:
        """A cached value by any accepted name, or by TransformerLens' shorthand such as `("resid_post", 3)`.

        Raises:
            KeyError: The value is not in the cache.
        """
        if not isinstance(key, str):
            name, layer, *rest = (*key, None) if len(key) == 1 else key
            layer = layer + self.model.cfg.n_layers if layer is not None and layer < 0 else layer
            return self._value(get_act_name(name, layer, *rest))
        known = self._find(key)
        return self._value(get_act_name(key)) if known is None else self.cache_dict[known]

    def _value(self, name: str) -> torch.Tensor:
        known = self._find(name)
        if known is not None:
            return self.cache_dict[known]
        scale = SCALE.fullmatch(name)
        if scale is not None:
            return self._scale(scale.group(1), scale.group(2))
        raise KeyError(
            f"{name} is not in this cache of {len(self.cache_dict)} values. Cache it: names_filter=None keeps every "
            "hook point."
        )

    def _find(self, name: str) -> str | None:
        """The key under which a value is stored, from any of its names."""
        if name in self.cache_dict:
            return name
        canonical = self._table.aliases.get(name, name)
        return next((known for known in self._names_of(canonical) if known in self.cache_dict), None)

    def _names_of(self, canonical: str) -> list[str]:
        point = self._table.points.get(canonical)
        if point is None:
            return []
        return [canonical, *(point._fill(alias) for alias in point.spec.aliases)]

    def _scale(self, block: str | None, norm: str | None) -> torch.Tensor:
        """Root mean square of the stream that enters a norm: (..., 1); it never leaves transformers' RMSNorm."""
        stream = {"1": ("resid_pre", int(block or 0)), "2": ("resid_mid", int(block or 0))}
        x = self[stream[norm] if norm else ("resid_post", self.model.cfg.n_layers - 1)].float()
        return (x.pow(2).mean(-1, keepdim=True) + self._norm(block, norm).variance_epsilon).sqrt()

    def _norm(self, block: str | None, norm: str | None) -> Any:
        norms = self.model.norms
        return norms[-1] if norm is None else norms[2 * int(block or 0) + int(norm) - 1]

    def decompose_resid(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens', with the image tokens in the component "embed".

        Raises:
            HookError: `blocks.0.hook_resid_pre` is not in the cache.
        """
        return self._with_images(super().decompose_resid, *args, **kwargs)

    def get_full_resid_decomposition(self, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLens', with the image tokens in the component "embed".

        Raises:
            HookError: `blocks.0.hook_resid_pre` is not in the cache.
        """
        return self._with_images(super().get_full_resid_decomposition, *args, **kwargs)

    def _with_images(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._embedding():
            return method(*args, **kwargs)

    @contextmanager
    def _embedding(self) -> Iterator[None]:
        """Let `hook_embed` be the embedding that enters block 0."""
        if self._find(EMBEDDING) is None:
            raise HookError(
                f"The cache does not contain {EMBEDDING}, the embedding with the image tokens filled in. Add it to"
                " names_filter."
            )
        plain, embed = self.cache_dict.get("hook_embed"), self.has_embed
        self.cache_dict["hook_embed"], self.has_embed = self[EMBEDDING], True
        try:
            yield
        finally:
            self.has_embed = embed
            if plain is None:
                del self.cache_dict["hook_embed"]
            else:
                self.cache_dict["hook_embed"] = plain

    def apply_ln_to_stack(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest goes by keyword
        self, residual_stack: torch.Tensor, layer: int | None = None, mlp_input: bool = False, **kwargs: Any
    ) -> torch.Tensor:
        """As TransformerLens', times the norm's gain, so that components add up to the norm's output."""
        count = self.model.cfg.n_layers
        layer = count if layer in (None, -1) else layer
        scaled = super().apply_ln_to_stack(residual_stack, layer, mlp_input, **kwargs)
        if kwargs.get("recompute_ln") and layer == count:
            return scaled  # the norm itself ran, and has applied its gain
        return scaled * self._gain(layer, mlp_input).to(scaled)

    def _stack_neuron_results_apply_ln_projected(
        self, layer: int, pos_slice: Any, neuron_slice: Any, project_2d: torch.Tensor
    ) -> torch.Tensor:
        host: Any = super()
        projection = self._gain(layer, False).to(project_2d)[:, None] * project_2d
        return host._stack_neuron_results_apply_ln_projected(layer, pos_slice, neuron_slice, projection)

    def _gain(self, layer: int | None, mlp_input: bool) -> torch.Tensor:
        if layer is None or layer == self.model.cfg.n_layers:
            return self._norm(None, None).weight
        return self._norm(str(layer), "2" if mlp_input else "1").weight


class GeneratedValues:
    """Values at hook points of every token of one `generate` call, `(B, L + T - 1, ...)`.

    The first call of a hook sees the prompt, later ones one new token or, without a KV cache, the text so far. Vision
    and projector points have one value: without a KV cache transformers 4 computes it again for every token.

    Args:
        points: The table that the names come from.
        device: Device of the stored values; None keeps theirs.
    """

    def __init__(self, points: PointTable, device: torch.device | str | None = None) -> None:
        self.points, self.device = points, device
        self._parts: dict[str, list[torch.Tensor]] = {}

    def keep(self, value: torch.Tensor, hook: Any) -> None:
        """Hook function that keeps a value."""
        parts = self._parts.setdefault(hook.name, [])
        if parts and self.points.points[hook.name.partition(".hook_sae_")[0]].prefill_only:
            return
        new = value if not parts else value[:, -1:]
        parts.append(new.detach().to(self.device, copy=True))

    def cache(self) -> dict[str, torch.Tensor]:
        """Hook point -> its values, in the order of the tokens."""
        return {name: torch.cat(parts, dim=1) for name, parts in self._parts.items()}
