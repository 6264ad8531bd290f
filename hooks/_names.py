"""Names of hook points for one model: canonical name, TransformerLens alias or module path -> point.

A `PointTable` unrolls the table of `points.py` for a configuration, finds points by any accepted name,
explains a wrong one with the nearest right ones, and checks that a model has every module the table speaks
of.
"""

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks.points import ABSENT, SPECS, PointSpec


@dataclass(frozen=True)
class Point:
    """One hook point of one model: a row of the table with its number filled in."""

    spec: PointSpec
    index: int | None = None

    def _fill(self, text: str) -> str:
        return text if self.index is None else text.replace("{i}", str(self.index))

    @property
    def name(self) -> str:
        """Canonical name."""
        return self._fill(self.spec.name)

    @property
    def module(self) -> str:
        """Path of the torch module in the transformers model."""
        return self._fill(self.spec.module)

    @property
    def prefill_only(self) -> bool:
        """Whether it fires once per `generate`, with the prompt, and only if there are images."""
        return self.spec.fires == "prefill only"

    @property
    def block(self) -> int | None:
        """Number of the decoder block that contains it; None for all other points."""
        return self.index if self.spec.counted_by == "block" else None

    @property
    def stop(self) -> int | None:
        """Smallest `stop_at_layer` with which it still fires; None if only a whole forward reaches it."""
        if self.block is not None:
            return self.block + 1
        return None if self.spec.name in ("ln_final.hook_out", "unembed.hook_out") else 0


class PointTable:
    """All hook points of a model with a given configuration, in execution order.

    Args:
        config: A `Maira2Config` (anything with `text_config`, `vision_config` and `projector_n_layers`).
    """

    def __init__(self, config: Any) -> None:
        text, vision = config.text_config, config.vision_config
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._widths = {
            "d_model": text.hidden_size,
            "d_vision": vision.hidden_size,
            "d_mlp": text.intermediate_size,
            "d_vocab": text.vocab_size,
            "heads, d_head": text.num_attention_heads * head,
            "kv_heads, d_head": text.num_key_value_heads * head,
        }
        self._heads = {"": None, "query": text.num_attention_heads, "key": text.num_key_value_heads}
        self.counts = {
            "block": int(config.text_config.num_hidden_layers),
            "vision block": int(config.vision_config.num_hidden_layers),
            "projector layer": 2 * int(config.projector_n_layers) - 1,
        }
        self.points: dict[str, Point] = {point.name: point for point in self._unrolled()}

    def _unrolled(self) -> Iterable[Point]:
        pending: list[PointSpec] = []
        for spec in (*SPECS, None):
            if pending and (spec is None or spec.counted_by != pending[0].counted_by):
                for i in range(self.counts[pending[0].counted_by]):
                    yield from (Point(row, i) for row in pending)
                pending = []
            if spec is not None:
                if spec.counted_by:
                    pending.append(spec)
                else:
                    yield Point(spec)

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names in execution order."""
        return tuple(self.points)

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Every accepted other name -> canonical name: TransformerLens aliases and module paths."""
        found: dict[str, str] = {}
        for name, point in self.points.items():
            for alias in point.spec.aliases:
                found[point._fill(alias)] = name
            if point.spec.tap in ("output", "feature_map"):
                found[point.module] = name
        return found

    @cached_property
    def order(self) -> dict[str, int]:
        """Canonical name -> place in execution order."""
        return {name: place for place, name in enumerate(self.points)}

    def resolve(self, name: str) -> Point:
        """Find a point by canonical name, TransformerLens alias or transformers module path.

        Args:
            name: Hook point, for instance `blocks.3.hook_resid_post`, `blocks.3.hook_out` or
                `model.language_model.layers.3`. A module path means that module's output, in the shape of the
                point (projections of attention are shown per head).

        Returns:
            The point.

        Raises:
            HookError: The name is unknown, its number is out of range, or the model cannot give it.
        """
        point = self.points.get(self.aliases.get(name, name))
        if point is not None:
            return point
        raise HookError(self._explain(name))

    def shown(self, point: Point, x: torch.Tensor) -> torch.Tensor:
        """A module's tensor in the shape of the point: the last axis split into heads where it has any."""
        heads = self._heads[point.spec.heads]
        return x if heads is None else x.view(*x.shape[:-1], heads, x.shape[-1] // heads)

    def width(self, name: str) -> int | None:
        """Numbers per position at a point, heads taken together; None for attention patterns.

        Raises:
            HookError: The name is unknown.
        """
        axes = self.resolve(name).spec.shape.strip("()").split(", ", 2)[-1]
        return self._widths.get(axes)

    def stop_before(self, layer: int | None, named: Sequence[str] | None = None) -> int | None:
        """The decoder block before which a run ends.

        SAELens takes the first number of a hook's name for the layer, so a vision block's number arrives here
        too; images are seen before any decoder block, and the run then ends before block 0.

        Args:
            layer: Blocks to run; negative counts from the end, None runs everything.
            named: Names that the caller wants from the run, if it named any.

        Returns:
            A number from 0 to the number of blocks, or None.

        Raises:
            HookError: A number out of range, or a named point after the stop.
        """
        if layer is None:
            return None
        count = self.counts["block"]
        stops = {name: self.points[name.partition(".hook_sae_")[0]].stop for name in named or ()}
        if stops and all(stop == 0 for stop in stops.values()):
            return 0
        wanted = layer + count if layer < 0 else layer
        if 0 in stops.values():
            wanted = min(wanted, count)
        if not 0 <= wanted <= count:
            raise HookError(
                f"stop_at_layer={layer} was requested, but this model has {count} blocks. Use 0 to {count}, a"
                f" negative number from the end, or None."
            )
        after = [name for name, stop in stops.items() if stop is None or stop > wanted]
        if after:
            raise HookError(
                f"stop_at_layer={layer} ends the run before {', '.join(after)} could fire. Stop later,"
                f" or leave stop_at_layer out."
            )
        return wanted

    def heads(self, name: str) -> int | None:
        """Number of heads that a point's last axis is split into; None at points without heads.

        Raises:
            HookError: The name is unknown.
        """
        return self._heads[self.resolve(name).spec.heads]

    def _explain(self, name: str) -> str:
        reason = ABSENT.get(name.rsplit(".", 1)[-1])
        if reason is not None:
            return f"MAIRA-2 has no hook point {name!r}: {reason}."
        number = re.search(r"\.(\d+)(?=\.|$)", name)
        if number is not None:
            zeroed = name[: number.start(1)] + "0" + name[number.end(1) :]
            known = self.points.get(self.aliases.get(zeroed, zeroed))
            if known is not None:
                count = self.counts[known.spec.counted_by]
                return (
                    f"Hook point {name!r} asks for {known.spec.counted_by} {number.group(1)}, but this model "
                    f"has {count}. Use a number from 0 to {count - 1}."
                )
        near = difflib.get_close_matches(name, [*self.points, *self.aliases], n=3, cutoff=0.5)
        hint = f" Nearest: {', '.join(near)}." if near else ""
        return (
            f"Unknown hook point {name!r}; expected a name such as 'blocks.0.hook_resid_post', a"
            f" TransformerLens alias or a module path of the model.{hint} `.points.names` lists them all."
        )

    def validate(self, model: nn.Module) -> None:
        """Check that every point's module exists in a model.

        Raises:
            HookError: A module is missing; names it and what is at that level instead.
        """
        missing = next(((p, e) for p in self.points.values() if (e := _missing(model, p.module))), None)
        if missing is not None:
            point, (found, children) = missing
            raise HookError(
                f"{type(model).__name__} has no module {point.module!r}, where hook point {point.name!r}"
                f" is: below {found or 'the root'!r} there are {children}. Expected this package's"
                f" Maira2ForConditionalGeneration; load it with load_maira2."
            )


def _missing(model: nn.Module, path: str) -> tuple[str, str] | None:
    """Deepest existing parent and its children's names, or None when the whole path exists."""
    module, walked = model, []
    for part in path.split("."):
        child = module._modules.get(part)
        if child is None:
            return ".".join(walked), ", ".join(module._modules) or "no modules"
        module = child
        walked.append(part)
    return None
