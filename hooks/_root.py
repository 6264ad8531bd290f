"""Hooks by name on MAIRA-2's live points, with TransformerLens' own HookedRootModule underneath.

What TransformerLens does not promise is added here: aliases and module paths work wherever a name does, an
unknown name is an error, a hook requested by name that never fires is an error (hooks chosen by a function
may stay silent), and `run_with_cache` holds just the named tensors.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from transformer_lens.hook_points import HookPoint
from typing_extensions import Self

from sae_lens_maira.errors import HookError
from sae_lens_maira.hooks._attach import HookCalls, LivePoint, attach_points, never_fired
from sae_lens_maira.hooks._cache import Maira2Cache
from sae_lens_maira.hooks._names import PointTable
from sae_lens_maira.hooks._pattern import is_eager
from sae_lens_maira.maira2.versions import has_transformer_bridge

if TYPE_CHECKING or has_transformer_bridge():
    from transformer_lens.HookedRootModule import HookedRootModule
else:
    from transformer_lens.hook_points import HookedRootModule

HookFn = Callable[..., Any]
Hooks = Sequence[tuple[str | Callable[[str], bool], HookFn]]
Filter = str | Sequence[str] | Callable[[str], bool] | None


class HookedPoints(HookedRootModule):
    """A transformers model whose hook points answer to names.

    Args:
        model: A `Maira2ForConditionalGeneration`; it is wrapped, not copied or changed.

    Raises:
        HookError: The model lacks a module that a hook point belongs to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.points = PointTable(model.config)
        """The table of hook points: names, aliases, order."""
        self.live: dict[str, LivePoint] = attach_points(model, self.points)
        self._watched: set[str] = set()
        self._left: WeakSet[HookPoint] = WeakSet()
        """Points inside SAEs that were spliced in; `reset_hooks` reaches the hooks that were added there."""
        self._lock = threading.RLock()
        self.setup()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the model for this thread: runs and hooks of other threads wait until the block ends.

        Every run and every `hooks` block does this by itself. Use it around several calls that belong together, or
        around calls of `.model`, which is not locked.
        """
        with self._lock:
            yield

    def setup(self) -> None:
        """List the hook points again; TransformerLens looks them up in `hook_dict` and `mod_dict`."""
        self.hook_dict: dict[str, HookPoint] = dict(self.live)
        self.mod_dict: dict[str, nn.Module] = dict(self.hook_dict)

    def resolve(self, name: str) -> str:
        """Name of a point in `hook_dict`, from any accepted name.

        Raises:
            HookError: No such point, or it is covered by an SAE.
        """
        if name in self.hook_dict:
            return name
        base, dot, inner = name.partition(".hook_sae_")
        canonical = self.points.resolve(base).name
        full = canonical + dot + inner
        if full in self.hook_dict:
            return full
        inside = [n.rsplit(".", 1)[-1] for n in self.hook_dict if n.startswith(f"{canonical}.hook_sae_")]
        if inside:
            raise HookError(
                f"An SAE is spliced in at {canonical!r}, so {name!r} is not a hook point now. Inside it"
                f" there are {', '.join(inside)}; the value before is hook_sae_input, the value after"
                " hook_sae_output."
            )
        raise HookError(f"{name!r} is inside an SAE, but none is spliced in at {canonical!r}. Add it first.")

    def remove_all_hook_fns(self, *args: Any, **kwargs: Any) -> None:
        """As in TransformerLens, but only where there are hooks: every context ends with this call."""
        for point in (*self.hook_points(), *self._left):
            if point.fwd_hooks or point.bwd_hooks:
                point.remove_hooks(*args, **kwargs)

    def add_hook(
        self,
        name: str | Callable[[str], bool],
        hook: HookFn,
        dir: Any = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add a hook until `reset_hooks`; one added by name must fire in every forward and `generate`.

        Args:
            name: A hook point, or a function that chooses among all.
            hook: `hook(value, hook=point)` returns a replacement or None.
            dir: "fwd" or "bwd".
            is_permanent: Whether `reset_hooks` leaves it alone.
            level: TransformerLens' context level.
            prepend: Whether it runs before the point's other hooks.

        Raises:
            HookError: An unknown name, or attention that never forms a pattern.
        """
        if isinstance(name, str):
            name = self.resolve(name)
            if dir == "fwd":
                self._watched.add(name)
        else:
            chosen = set(self._chosen(name))
            name = chosen.__contains__
        super().add_hook(name, hook, dir=dir, is_permanent=is_permanent, level=level, prepend=prepend)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[Self]:
        """Hooks for the length of a `with` block; other threads wait for its end, and none remains after it.

        Args:
            fwd_hooks: Pairs of a hook point (or a function that chooses among all) and
                `hook(value, hook=point)`, which returns a replacement or None.
            bwd_hooks: The same for gradients.
            reset_hooks_end: Whether the hooks are removed at the end.
            clear_contexts: Whether the points' `ctx` is cleared with them.

        Raises:
            HookError: An unknown name; or, at the end of a block that raised nothing, a hook requested by
                name that never fired.
        """
        with self.exclusive():
            calls = HookCalls(self.points)
            forward = self._named(fwd_hooks, calls, "forward")
            backward = self._named(bwd_hooks, calls, "backward")
            with super().hooks(forward, backward, reset_hooks_end, clear_contexts):
                yield self
            calls.require(backward=reset_hooks_end)

    def run_with_hooks(
        self,
        *args: Any,
        fwd_hooks: Hooks = (),
        bwd_hooks: Hooks = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """One call of the model with hooks; see `hooks` for these, and the call for the other arguments."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*args, **kwargs)

    def _named(self, pairs: Any, calls: HookCalls, direction: str) -> list[Any]:
        made: list[Any] = []
        for name, hook in pairs:
            if isinstance(name, str):
                known = self.resolve(name)
                made.append((known, calls.watch(known, hook, direction)))
            else:
                chosen = self._chosen(name)
                made += [(point, calls.watch_any(chosen, hook, direction)) for point in chosen]
        return made

    def _chosen(self, wanted: Callable[[str], bool]) -> list[str]:
        """Names a function picks; picking none is an error."""
        chosen = self._choose(wanted)
        if not chosen:
            raise HookError(
                f"The function chose none of the {len(self.hook_dict)} hook points. `hook_dict` lists their names."
            )
        return chosen

    def _choose(self, wanted: Callable[[str], bool] | None) -> list[str]:
        """Names a function picks; patterns that fused attention never forms are left out."""
        return [
            name
            for name in self.hook_dict
            if (wanted is None or wanted(name))
            and (self.forms_pattern or not name.endswith("attn.hook_pattern"))
        ]

    @property
    def forms_pattern(self) -> bool:
        """Whether the language model's attention is eager, so that `attn.hook_pattern` exists."""
        return is_eager(self.model.get_submodule("model.language_model.layers.0.self_attn"))

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Check that every hook added by name fires while the model runs."""
        before = {name: self.live[name].calls for name in self._watched if name in self.live}
        before = {name: calls for name, calls in before.items() if self.live[name].fwd_hooks}
        self._watched &= set(before)
        yield
        for name, calls in before.items():
            if self.live[name].calls == calls:
                raise HookError(never_fired(self.points, name))

    def run_with_cache(
        self,
        *args: Any,
        names_filter: Filter = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: Any = None,
        stop_at_layer: int | None = None,
        return_cache_object: bool = False,
        gradients: bool = False,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """Run the model and keep the values at the named points.

        No autograd graph is kept unless `gradients` or `incl_bwd` asks for it: over 16 layers of MAIRA-2 and one image
        it would take 7 GB.

        Args:
            *args: Arguments of the model's call.
            names_filter: A name, a list of names, a function of canonical names, or None for all.
            device: Device of the kept tensors, for instance "cpu"; None keeps theirs.
            remove_batch_dim: Whether a batch of one loses its first axis.
            incl_bwd: Whether `backward()` is called on the result and gradients are kept under `<name>_grad`.
            reset_hooks_end: Whether the caching hooks are removed.
            clear_contexts: Whether the points' `ctx` is cleared.
            pos_slice: Positions to keep, as in TransformerLens.
            stop_at_layer: Run only the blocks before this one; the result is then the residual stream there.
            return_cache_object: Whether the cache is an `ActivationCache` of TransformerLens and not a dict.
            gradients: Whether the result keeps its autograd graph; cached values are always detached.
            **kwargs: Further arguments of the model's call.

        Returns:
            The call's result, and the cache: canonical name (and every other name that was requested) ->
            tensor.

        Raises:
            HookError: An unknown name, or a named point that never fires in this run.
        """
        asked = [names_filter] if isinstance(names_filter, str) else names_filter
        if asked is None or callable(asked):
            named, aliases = None, {}
            wanted = self._choose(asked if callable(asked) else None)
        else:
            aliases = {name: self.resolve(name) for name in asked}
            named = wanted = list(dict.fromkeys(aliases.values()))
        stop = self.points.stop_before(stop_at_layer, named)
        place = None if device is None else torch.device(device)
        cache, forward, backward = self.get_caching_hooks(
            wanted, incl_bwd, place, remove_batch_dim, pos_slice=pos_slice
        )
        # Only hooks requested by name must fire; gradients stay away from frozen parts.
        unchecked = super().hooks([] if named else forward, backward, reset_hooks_end, clear_contexts)
        with (
            self._gradients(gradients or incl_bwd),
            self.hooks(forward if named else (), (), reset_hooks_end, clear_contexts),
            unchecked,
        ):
            out = self(*args, stop_at_layer=stop, **kwargs)
            if incl_bwd:
                out.backward()
        self.is_caching = False
        cache |= {name: cache[known] for name, known in aliases.items()}
        if return_cache_object:
            return out, Maira2Cache(cache, self, has_batch_dim=not remove_batch_dim)
        return out, cache

    @contextmanager
    def _gradients(self, wanted: bool) -> Iterator[None]:
        """Keep the autograd graph or not; a model with frozen weights gets one from its embeddings on."""
        if not wanted:
            with torch.no_grad():
                yield
            return
        frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        embed = self.model.get_submodule("model.language_model.embed_tokens")
        handle = embed.register_forward_hook(lambda _, __, out: out.requires_grad_()) if frozen else None
        try:
            with torch.enable_grad():
                yield
        finally:
            if handle is not None:
                handle.remove()
