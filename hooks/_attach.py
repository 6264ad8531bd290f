"""Live hook points: TransformerLens HookPoints that listen to a transformers model through torch hooks.

A `LivePoint` puts its torch hook on the module when the first hook is added to it and takes it off with the
last, so a model without hooks runs exactly as transformers wrote it. A hook that returns a new tensor
replaces the value; one that returns None, or its own argument, leaves it. Our torch hooks come before all
others, because transformers 5 collects `hidden_states` (and Dinov2 its feature maps) in hooks of its own, and
an edit after those would be lost.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformer_lens.hook_points import HookPoint

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._names import Point, PointTable
from sae_lens_maira.hooks._pattern import listen_to_pattern, require_eager

INPUT_NAMES = ("hidden_states", "pixel_values", "image_features", "input", "x")


class LivePoint(HookPoint):
    """One hook point of one model; an identity that every value with hooks passes through.

    Args:
        point: The point.
        tap: Adds the torch hooks to the model and returns their handles.
        check: Raises HookError if the point cannot be read in the model's current state.
        show: A view of the model's tensor in which hooks see it, if that differs.
    """

    def __init__(
        self,
        point: Point,
        tap: Callable[["LivePoint"], list[RemovableHandle]],
        check: Callable[[], None] | None = None,
        show: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.name = point.name
        self.point = point
        self.calls = 0
        """How often a value has passed since the point was made."""
        self.inside: tuple[nn.Module, ...] = ()
        """The modules that the point is inside of, from the model down."""
        self._tap = tap
        self._check = check
        self._show = show
        self._handles: list[RemovableHandle] = []

    @property
    def active(self) -> bool:
        """Whether it has a hook."""
        return bool(self._forward_hooks or self._backward_hooks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pass a value on, and count it."""
        self.calls += 1
        return x

    def register_forward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in torch; places the torch hook on the model if this is the first listener."""
        self._place()
        return super().register_forward_hook(*args, **kwargs)

    def register_full_backward_hook(self, *args: Any, **kwargs: Any) -> RemovableHandle:
        """As in torch; places the torch hook on the model if this is the first listener."""
        self._place()
        return super().register_full_backward_hook(*args, **kwargs)

    def remove_hooks(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens; takes the torch hook off the model with the last listener."""
        super().remove_hooks(*args, **kwargs)
        self.release()

    def release(self) -> None:
        """Remove the torch hook from the model if no hook is left."""
        if not self.active:
            for handle in self._handles:
                handle.remove()
            self._handles = []

    def _place(self) -> None:
        if self._handles:
            return
        if any(is_compiled(module) for module in self.inside):
            raise HookError(
                f"The model is compiled, and torch.compile does not run hooks that are added later, so a hook at"
                f" {self.name!r} would change nothing. Use the model as it was loaded, without compile()."
            )
        if self._check is not None:
            self._check()
        self._handles = self._tap(self)

    def pass_on(self, x: torch.Tensor) -> torch.Tensor:
        """Send a value through the hooks, in the shape of the point.

        Args:
            x: The model's tensor.

        Returns:
            `x` itself if no hook replaced it, else the replacement in `x`'s shape and dtype.

        Raises:
            HookError: A hook returned a tensor of another shape.
        """
        shown = x if self._show is None else self._show(x)
        y = self(shown)
        if y is shown:
            return x
        if not isinstance(y, torch.Tensor) or y.shape != shown.shape:
            what = tuple(y.shape) if isinstance(y, torch.Tensor) else type(y).__name__
            raise HookError(
                f"A hook at {self.name!r} returned {what}, but the value there has shape"
                f" {tuple(shown.shape)}. Return a tensor of that shape, or None to leave it as it is."
            )
        return y.to(x.dtype).reshape(x.shape)


class MidEdits:
    """Edits of the residual stream between attention and MLP, which no module returns.

    Inside a block the stream is a local variable: r = pre + attn;  post = r + mlp(ln2(r)). A new r reaches
    ln2 through its input, and the sum is made again from the new r when the block returns.
    """

    def __init__(self) -> None:
        self.stream: torch.Tensor | None = None
        self.mlp_out: torch.Tensor | None = None

    def settle(self, output: Any) -> Any:
        """The block's output with a pending edit built in; clears the edit."""
        stream, mlp_out, self.stream, self.mlp_out = self.stream, self.mlp_out, None, None
        if stream is None or mlp_out is None:
            return output
        return put_first(output, stream + mlp_out)


def first(output: Any) -> torch.Tensor:
    """The tensor of a module's output: itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


def put_first(output: Any, value: torch.Tensor) -> Any:
    """`output` with its first tensor replaced."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


def attach_points(model: nn.Module, table: PointTable) -> dict[str, LivePoint]:
    """Make a live point for every row of a table.

    Args:
        model: A `Maira2ForConditionalGeneration`.
        table: Its points.

    Returns:
        Canonical name -> live point, in execution order; none of them touches the model yet.

    Raises:
        HookError: The model lacks a module that the table names.
    """
    table.validate(model)
    mids = {i: MidEdits() for i in range(table.counts["block"])}
    live = {name: _live(point, model, table, mids) for name, point in table.points.items()}
    for point in live.values():
        parts = point.point.module.split(".")
        paths = [".".join(parts[:end]) for end in range(len(parts) + 1)]
        point.inside = tuple(model.get_submodule(path) for path in paths)
    return live


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called, or its forward replaced by `torch.compile(module.forward)`."""
    forward = getattr(module, "forward", None)
    return module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def _live(point: Point, model: nn.Module, table: PointTable, mids: dict[int, MidEdits]) -> LivePoint:
    module = model.get_submodule(point.module)
    config: Any = model.config
    if point.spec.tap == "pattern":
        return LivePoint(
            point,
            lambda live: [listen_to_pattern(module, live)],
            lambda: require_eager(module, point.name),
        )
    if point.spec.tap == "feature_map":
        return LivePoint(point, lambda live: [_tap_feature_map(module, live, config.vision_feature_layer)])
    if point.spec.name == "blocks.{i}.hook_resid_mid":
        block = model.get_submodule(f"model.language_model.layers.{point.index}")
        return LivePoint(point, lambda live: tap_mid(block, live, mids[point.index or 0]))
    show = partial(table.shown, point) if point.spec.heads else None
    if point.spec.tap == "input":
        return LivePoint(point, lambda live: [_tap_input(module, live)], show=show)
    settle = mids[point.index or 0].settle if point.spec.name == "blocks.{i}.hook_resid_post" else None
    return LivePoint(point, lambda live: [_tap_output(module, live, settle)], show=show)


def _tap_output(module: nn.Module, live: LivePoint, settle: Callable[[Any], Any] | None) -> RemovableHandle:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        settled = output if settle is None else settle(output)
        x = first(settled)
        y = live.pass_on(x)
        return None if y is x and settled is output else put_first(settled, y)

    return module.register_forward_hook(hook, prepend=True)


def _tap_input(module: nn.Module, live: LivePoint) -> RemovableHandle:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = None if args else next((name for name in INPUT_NAMES if name in kwargs), None)
        if not args and key is None:
            raise HookError(
                f"The module of hook point {live.name!r} was called with {sorted(kwargs)}; expected its input"
                f" as the first argument or under one of {', '.join(INPUT_NAMES)}, as transformers does."
            )
        x = args[0] if key is None else kwargs[key]
        y = live.pass_on(x)
        if y is x:
            return None
        return ((y, *args[1:]), kwargs) if key is None else (args, {**kwargs, key: y})

    return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _tap_feature_map(module: nn.Module, live: LivePoint, layer: int) -> RemovableHandle:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        maps = list(output.feature_maps)
        x = maps[layer]
        y = live.pass_on(x)
        if y is x:
            return None
        maps[layer] = y
        output.feature_maps = tuple(maps)
        return output

    return module.register_forward_hook(hook, prepend=True)


def tap_mid(block: nn.Module, live: LivePoint, mid: MidEdits) -> list[RemovableHandle]:
    """Listen between attention and MLP of a decoder block; an edit reaches both the MLP and the stream."""

    def before_norm(_: nn.Module, args: tuple[Any, ...]) -> Any:
        y = live.pass_on(args[0])
        mid.stream, mid.mlp_out = (None if y is args[0] else y), None
        return None if y is args[0] else (y, *args[1:])

    def after_mlp(_: nn.Module, __: Any, output: Any) -> None:
        mid.mlp_out = output if mid.stream is not None else None

    def after_block(_: nn.Module, __: Any, output: Any) -> Any:
        settled = mid.settle(output)
        return None if settled is output else settled

    return [
        block.get_submodule("post_attention_layernorm").register_forward_pre_hook(before_norm, prepend=True),
        block.get_submodule("mlp").register_forward_hook(after_mlp),  # after hook_mlp_out's edit
        block.register_forward_hook(after_block, prepend=True),
    ]


class StopForward(Exception):
    """Ends a forward pass early; carries the residual stream `(B, L, d_model)` at the stop."""

    def __init__(self, residual: torch.Tensor) -> None:
        super().__init__("stopped at a layer")
        self.residual = residual


@contextmanager
def stopping_at(model: nn.Module, layer: int | None, n_layers: int) -> Iterator[None]:
    """Let the model's forward raise StopForward before block `layer` (or before the last norm)."""
    if layer is None:
        yield
        return
    path = f"model.language_model.layers.{layer}" if layer < n_layers else "model.language_model.norm"

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise StopForward(args[0] if args else kwargs["hidden_states"])

    handle = model.get_submodule(path).register_forward_pre_hook(stop, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


class HookCalls:
    """Count the calls of the hooks of one run, so that a hook that never fires is an error.

    Args:
        points: The table that the names come from.
    """

    def __init__(self, points: PointTable) -> None:
        self.points = points
        self.counts: dict[tuple[str, str], int] = {}
        self._groups: dict[tuple[str, tuple[str, ...]], int] = {}

    def watch(self, name: str, hook: Callable[..., Any], direction: str = "forward") -> Callable[..., Any]:
        """Wrap a hook so that its calls are counted.

        Args:
            name: The point's name.
            hook: Called as `hook(value, hook=point)`.
            direction: "forward" or "backward".
        """
        return self._counted(self.counts, (direction, name), hook)

    def watch_any(
        self, names: Sequence[str], hook: Callable[..., Any], direction: str = "forward"
    ) -> Callable[..., Any]:
        """Wrap a hook that a function placed at several points; one of them has to fire.

        Args:
            names: The points' names.
            hook: Called as `hook(value, hook=point)`.
            direction: "forward" or "backward".
        """
        return self._counted(self._groups, (direction, tuple(names)), hook)

    @staticmethod
    def _counted(counts: dict[Any, int], key: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        counts.setdefault(key, 0)

        def counted(value: Any, hook: Any) -> Any:  # TransformerLens passes hook= by keyword
            counts[key] += 1
            return function(value, hook=hook)

        return wraps(function)(counted) if hasattr(function, "__name__") else counted

    def require(self, backward: bool = True) -> None:
        """Raise HookError for the first watched hook, or group of hooks, that never fired.

        Args:
            backward: Whether backward hooks must have fired too.
        """
        for (direction, name), calls in self.counts.items():
            if calls == 0 and (direction == "forward" or backward):
                raise HookError(never_fired(self.points, name, direction))
        for (direction, names), calls in self._groups.items():
            if calls == 0 and (direction == "forward" or backward):
                raise HookError(
                    f"A function chose {len(names)} hook points, from {names[0]!r} to {names[-1]!r}, and no hook fired"
                    " at any of them. " + never_fired(self.points, names[0], direction)
                )


def never_fired(points: PointTable, name: str, direction: str = "forward") -> str:
    """Message for a hook that never fired, with the likeliest reason."""
    point = points.points.get(points.aliases.get(name, name).partition(".hook_sae_")[0])
    if direction == "backward":
        return (
            f"The backward hook at {name!r} never fired. Call backward() inside the `hooks()` block, on a"
            " result that depends on this point with gradients enabled."
        )
    why = "The model did not run, or it stopped before this point."
    if point is not None and point.prefill_only:
        why = "It fires only when the model sees pixel_values; this run had none."
    return (
        f"The hook at {name!r} never fired. {why} A hook that does nothing would look like an effect of zero."
    )
