"""MAIRA-2 under nnsight: traces and traced generation with images, standard names, tuple-safe values.

    with m.trace(study):                      with m.generate(study, max_new_tokens=20) as tracer:
        h = m.resid_post[15].save()               m.resid_post[15] = m.resid_post[15] + v  # first token
        m.resid_post[15] = h + v              ids = m.generate_edited(study, {name: edit})  # every token

A study, an encoding or tensors go into a trace as they go into the other interfaces, and any name of the one
table of points can be read and written with `m.at[name]`.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from nnsight import NNsight
from nnsight.intervention.envoy import traceable

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._attach import never_fired
from sae_lens_maira.hooks._inputs import gather_inputs
from sae_lens_maira.hooks._names import Point, PointTable
from sae_lens_maira.hooks._pattern import require_eager
from sae_lens_maira.maira2 import MAX_NEW_TOKENS, Maira2, Maira2ForConditionalGeneration, Maira2Processor

NAMES: dict[str, str] = {
    "model.language_model.layers": "blocks",
    "model.language_model.norm": "ln_final",
    "model.language_model.embed_tokens": "embed",
    "model.vision_tower": "vision",
    "model.multi_modal_projector": "projector",
}
"""Module path -> name on the wrapped model; `lm_head` is called so already."""

_TENSORS = ("input_ids", "attention_mask", "pixel_values")
_ENCODE = ("task", "phrase", "report", "padding_side")

Edit = Callable[[torch.Tensor, int], torch.Tensor | None]
"""`edit(value, step)` gives a replacement, or None after editing in place; step 0 is the prompt."""


class Maira2NNsight(NNsight):
    """A MAIRA-2 that nnsight can trace.

    In addition to nnsight's own tree it has `.blocks[i]`, `.vision`, `.projector`, `.embed`, `.ln_final`, `.lm_head`;
    `resid_post[i]`, `resid_pre[i]`, `attn_out[i]`, `mlp_out[i]`, readable and assignable in a trace; and
    `at[name]` for every hook point. Values are read in execution order, as nnsight wants it.

    Args:
        model: The result of `load_maira2`, or the model.
        processor: Its processor; needed for studies and text, taken from `model` if that is a `Maira2`.

    Raises:
        HookError: The model is not MAIRA-2's module graph.
    """

    def __init__(
        self, model: Maira2 | Maira2ForConditionalGeneration, processor: Maira2Processor | None = None
    ) -> None:
        if isinstance(model, Maira2):
            model, processor = model.model, processor or model.processor
        points = PointTable(model.config)
        points.validate(model)
        with warnings.catch_warnings():
            # transformers 4 calls a part of Dinov2's attention `output`; it is not needed by that name here.
            warnings.filterwarnings("ignore", message=".*has a submodule named 'output'")
            super().__init__(model, rename={**NAMES})
        self.processor = processor
        self.points = points
        self.at = PointAccess(self, "{}")
        self.resid_pre = PointAccess(self, "blocks.{}.hook_resid_pre")
        self.attn_out = PointAccess(self, "blocks.{}.hook_attn_out")
        self.mlp_out = PointAccess(self, "blocks.{}.hook_mlp_out")
        self.resid_post = PointAccess(self, "blocks.{}.hook_resid_post")

    @traceable
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Greedy `generate` of transformers: a trace with `with`, a plain call without."""
        model: Any = self._module
        defaults = {"do_sample": False, "max_new_tokens": MAX_NEW_TOKENS["findings"]}
        return model.generate(*args, **defaults | kwargs)

    def read(self, input: Any, names: Sequence[str], **kwargs: Any) -> dict[str, torch.Tensor]:
        """Values at hook points in one forward pass, without writing a trace.

        Args:
            input: As in `generate_edited`.
            names: Hook points, in any order.
            **kwargs: How studies are encoded, tensors with token ids.

        Raises:
            HookError: An unknown name, or attention that never forms a pattern.
        """
        order = sorted(names, key=lambda name: self.points.order[self.points.resolve(name).name])
        found: dict[str, torch.Tensor] = {}
        with self.trace(input, **kwargs):
            for name in order:
                found[name] = self.at[name].save()
        return found

    def generate_edited(
        self, input: Any, edits: Mapping[str, Edit], max_new_tokens: int | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Generate with edits at the prompt and at every new token.

        It wraps nnsight's recipe for that: code after `tracer.iter[:]` never runs, so the result is saved
        in a second, empty invoke. Vision and projector points are edited once, with the prompt.

        Args:
            input: A study, a list of studies, an encoding, a mapping of tensors, or token ids.
            edits: Hook point -> `edit(value, step)`.
            max_new_tokens: Token budget; None for the task's budget.
            **kwargs: How studies are encoded, tensors with token ids, arguments of transformers'
                `generate`.

        Returns:
            Ids `(B, L + T)`, prompt included.

        Raises:
            HookError: An unknown name, a point that cannot be edited, or an edit that never ran.
        """
        plan = sorted(
            ((self.points.resolve(name), edit) for name, edit in edits.items()),
            key=lambda pair: self.points.order[pair[0].name],
        )
        # Apart, since `generate` may run the images before or after it embeds the tokens.
        with_prompt = [pair for pair in plan if pair[0].prefill_only]
        every_step = [pair for pair in plan if not pair[0].prefill_only]
        fired = {point.name: 0 for point, _ in plan}
        budget = (
            MAX_NEW_TOKENS[kwargs.get("task") or "findings"] if max_new_tokens is None else max_new_tokens
        )
        if with_prompt and self._gather((input,), kwargs)[0].get("pixel_values") is None:
            raise HookError(never_fired(self.points, with_prompt[0][0].name))
        with warnings.catch_warnings():
            # The loop over tokens ends when the model does, which nnsight reports each time.
            warnings.filterwarnings("ignore", module=r"nnsight\..*")
            with self.generate(max_new_tokens=budget) as tracer:
                with tracer.invoke(input, **kwargs):
                    self._edit_every_step(tracer, every_step, fired)
                with tracer.invoke():
                    self._edit(with_prompt, 0, fired)
                with tracer.invoke():
                    out = tracer.result.save()
        for name, times in fired.items():
            if times == 0:
                raise HookError(never_fired(self.points, name))
        return out

    def _edit_every_step(self, tracer: Any, plan: list[tuple[Point, Edit]], fired: dict[str, int]) -> None:
        if plan:  # a loop without a request would never end
            for step in tracer.iter[:]:
                self._edit(plan, step, fired)

    def _edit(self, plan: list[tuple[Point, Edit]], step: int, fired: dict[str, int]) -> None:
        for point, edit in plan:
            value = self.at[point.name]
            new = edit(value, step)
            fired[point.name] += 1
            if new is not None:
                self.at[point.name] = new

    # Overrides of nnsight: rows per invoke, and conversion of its input.

    def _batch_size(self, *inputs: Any, **kwargs: Any) -> int:
        return int(bool(inputs) or any(kwargs.get(name) is not None for name in _TENSORS))

    def _batch(self, invokes: list[tuple[Any, Any]], fn: Any) -> tuple[Any, Any]:
        if not invokes:
            return (), {}
        if len(invokes) > 1:
            raise HookError(
                f"{len(invokes)} invokes bring an input, but nnsight cannot join inputs with images."
                " Encode the studies as one batch and give it to one invoke; further invokes may be empty."
            )
        inputs, kwargs = invokes[0]
        if len(inputs) > 1:
            raise HookError(
                f"{len(inputs)} positional inputs were given to a trace; expected one (a study, a list of"
                " studies, an encoding, a mapping, token ids), other tensors by keyword."
            )
        tensors, rest = self._gather(inputs, kwargs)
        return (), {**tensors, **rest}

    def _gather(self, inputs: Any, kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        encode = {key: kwargs[key] for key in _ENCODE if kwargs.get(key) is not None}
        given = {key: kwargs[key] for key in _TENSORS if kwargs.get(key) is not None}
        rest = {key: value for key, value in kwargs.items() if key not in (*_ENCODE, *_TENSORS)}
        first, config = inputs[0] if inputs else None, cast(Any, self._module.config)
        found = gather_inputs(first, self.processor, self.device, encode, config.pad_token_id, **given)
        return dict(found.tensors), rest


class PointAccess:
    """Hook points as items: `access[key]` reads inside a trace, `access[key] = value` replaces.

    Args:
        root: The wrapped model.
        pattern: The points' names, with `{}` for the key.
    """

    def __init__(self, root: Maira2NNsight, pattern: str) -> None:
        self._root = root
        self._pattern = pattern

    def _find(self, key: Any) -> tuple[Point, Any]:
        if isinstance(key, int) and key < 0:
            key += self._root.points.counts["block"]
        point = self._root.points.resolve(self._pattern.format(key))
        return point, self._root.get(point.module)

    def __getitem__(self, key: Any) -> Any:  # a tensor, with the `save` that nnsight gives it
        point, envoy = self._find(key)
        if point.spec.tap == "pattern":
            return self._pattern_of(point, envoy)
        if point.spec.tap == "input":
            return self._root.points.shown(point, envoy.input)
        output = envoy.output
        if point.spec.tap == "feature_map":
            return output.feature_maps[self._layer()]
        return self._root.points.shown(point, output[0] if isinstance(output, tuple) else output)

    def __setitem__(self, key: Any, value: torch.Tensor) -> None:
        point, envoy = self._find(key)
        if point.spec.tap == "pattern" or point.spec.name == "blocks.{i}.hook_resid_mid":
            instead = "attn.hook_z" if point.spec.tap == "pattern" else "hook_attn_out"
            raise HookError(
                f"{point.name!r} can be read but not assigned under nnsight: the model uses the value"
                f" before it leaves its module. Assign blocks.{point.index}.{instead}, or use HookedMaira2."
            )
        if point.spec.tap == "input":
            envoy.input = self._flat(point, value)
            return
        output = envoy.output
        if point.spec.tap == "feature_map":
            maps = list(output.feature_maps)
            maps[self._layer()] = value
            output.feature_maps = tuple(maps)
            envoy.output = output
            return
        value = self._flat(point, value)
        envoy.output = (value, *output[1:]) if isinstance(output, tuple) else value

    def _layer(self) -> int:
        config: Any = self._root._module.config
        return int(config.vision_feature_layer)

    def _pattern_of(self, point: Point, envoy: Any) -> torch.Tensor:
        require_eager(envoy._module, point.name)
        return envoy.output[1]

    @staticmethod
    def _flat(point: Point, value: torch.Tensor) -> torch.Tensor:
        return value.flatten(-2) if point.spec.heads else value
