"""MAIRA-2 as SAELens' TransformerBridge class, with this package's names and errors.

TransformerLens' bridge silently skips unknown hook names, SAELens' loses its aliases, and both accept a hook that
never fires. Here every name is looked up in the one table of points, an unknown name is an error, and studies and
encodings are accepted as inputs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from inspect import signature
from typing import Any, cast
from weakref import WeakSet

import torch
from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge
from transformers import LlavaForConditionalGeneration

from sae_lens_maira.errors import HookError, SAEError
from sae_lens_maira.hooks._attach import HookCalls, LivePoint, MidEdits, StopForward, stopping_at, tap_mid
from sae_lens_maira.hooks._cache import Maira2Cache
from sae_lens_maira.hooks._inputs import ModelInputs, gather_inputs
from sae_lens_maira.hooks._names import Point, PointTable
from sae_lens_maira.maira2 import MAX_NEW_TOKENS

Named = Sequence[tuple[str | Callable[[str], bool], Callable[..., Any]]]
_ENCODE = ("task", "phrase", "report")


class BridgedMaira2(SAETransformerBridge):
    """A TransformerBridge over MAIRA-2, made by `to_bridge`.

    All of TransformerLens' and SAELens' bridges works with images; inputs may be studies or encodings. Two limits
    are TransformerLens': an edit at `hook_resid_mid` reaches the MLP but not the residual stream (in `HookedMaira2` it
    reaches both), and attention is always eager.
    """

    points: PointTable
    _generating = False
    _takes_cache = False
    _conversions: dict[str, Any]
    _left: WeakSet[HookPoint]
    _mids: dict[str, LivePoint]
    _hooks_by_name: dict[str, HookPoint] | None = None

    @classmethod
    def take_over(cls, bridge: TransformerBridge, processor: Any = None) -> "BridgedMaira2":
        """Turn a TransformerBridge over MAIRA-2 into this class, as SAELens turns one into its own.

        Args:
            bridge: The bridge; it becomes the result.
            processor: The processor of the model, for studies and text.
        """
        taken: Any = bridge
        taken.__class__ = cls
        taken._acts_to_saes = {}
        taken._transcoder_output_hooks = {}
        taken._conversions = {}
        taken._left = WeakSet()
        taken.points = PointTable(taken.original_model.config)
        if processor is not None:
            taken.processor = processor
            # Set here it is used directly; given to the builder it would be loaded again from disk.
            taken.tokenizer = processor.tokenizer
            taken.cfg.tokenizer_prepends_bos, taken.cfg.tokenizer_appends_eos = True, False
        taken._takes_cache = "cache" in signature(LlavaForConditionalGeneration.forward).parameters
        named = taken.points.points
        mids = [
            _mid_point(named[f"blocks.{i}.hook_resid_mid"], block.original_component)
            for i, block in enumerate(taken.blocks)
        ]
        taken._mids = {mid.name: mid for mid in mids}
        taken._hook_registry |= taken._mids
        return taken

    def clear_hook_registry(self) -> None:
        """As TransformerBridge's, which calls it in `enable_compatibility_mode`."""
        super().clear_hook_registry()
        self._hooks_by_name = None

    def _initialize_hook_registry(self) -> None:
        super()._initialize_hook_registry()
        self._hook_registry |= self._mids
        self._hooks_by_name = None

    def enable_compatibility_mode(self, *args: Any, **kwargs: Any) -> None:
        """As TransformerBridge's: weights processed as HookedTransformer does, in the bridge alone."""
        super().enable_compatibility_mode(*args, **kwargs)
        self._hooks_by_name = None

    @property
    def norms(self) -> list[Any]:
        """The norms of the residual stream: ln1 and ln2 per block, then the final one."""
        blocks: Any = self.blocks
        bridged = [*(norm for block in blocks for norm in (block.ln1, block.ln2)), self.ln_final]
        return [norm.original_component for norm in bridged]

    def clear_contexts(self) -> None:
        """Clear the stored `ctx` on every registered hook point, also while an SAE is attached at one of them."""
        for point in self._registered():
            point.clear_context()

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Any = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """As TransformerBridge's, also while SAEs are attached; their hooks are removed and they stay."""
        if not self._acts_to_saes:
            super().reset_hooks(clear_contexts, direction, including_permanent, level)
            return
        # TransformerBridge would ask SAELens' wrapper for methods of a hook point.
        if clear_contexts:
            self.clear_contexts()
        self.remove_all_hook_fns(direction, including_permanent, level)

    def _registered(self) -> Iterator[HookPoint]:
        """Registered hook points; where an SAE is attached, those inside it."""
        registered: Any = self._hook_registry.values()
        for entry in registered:
            yield from (point for point in entry.modules() if isinstance(point, HookPoint))

    def remove_all_hook_fns(
        self, direction: Any = "both", including_permanent: bool = False, level: int | None = None
    ) -> None:
        """As TransformerBridge's, and hooks that were added inside an SAE that has been taken out."""
        for point in (*self._registered(), *self._left):
            point.remove_hooks(direction, including_permanent=including_permanent, level=level)

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every accepted TransformerLens name -> hook point; SAELens' own property drops the aliases.

        TransformerLens makes this dict again several times per call, which is slow; here it is kept until the hook
        points change.
        """
        if self._hooks_by_name is None:
            inside = super().hook_dict
            covered = {name for name in self._hook_registry if name not in inside}
            aliased: dict[str, Any] = TransformerBridge.hook_dict.fget(self)  # pyright: ignore[reportOptionalCall]
            kept = (
                name
                for name, point in aliased.items()
                if isinstance(point, HookPoint) and name not in covered
            )
            for name, point in list(inside.items()):
                site, dot, inner = name.partition(".hook_sae_")
                if dot:
                    inside[self.points.aliases.get(site, site) + dot + inner] = point
            self._hooks_by_name = {**{name: aliased[name] for name in kept}, **inside}
        return self._hooks_by_name

    def resolve(self, name: str) -> str:
        """Name of a point in `hook_dict`, from any accepted name.

        Raises:
            HookError: No such point.
        """
        known = self.hook_dict
        if name in known:
            return name
        base, dot, inner = name.partition(".hook_sae_")
        full = self.points.resolve(base).name + dot + inner
        if full in known:
            return full
        raise HookError(
            f"{name!r} is not a hook point of this bridge now: an SAE covers it, or none is spliced in"
            " there. The points inside an SAE are called <point>.hook_sae_input, hook_sae_acts_post,"
            " hook_sae_output."
        )

    def _hookable(self, name: str) -> str:
        """`resolve`, for a point that is about to be read or hooked.

        Raises:
            HookError: No such point, or it fires only after a setter of TransformerLens was called.
        """
        known = self.resolve(name)
        setter = self._gated_hook_reason(name) or self._gated_hook_reason(known)
        if setter:
            raise HookError(
                f"Hook point {name!r} fires only while {setter} is on. Call `bridge.set_{setter}(True)` first."
            )
        return known

    def _resolve_hook_name(self, hook_name: str) -> str:
        if hook_name in self._hook_registry:
            return hook_name
        resolved = super()._resolve_hook_name(hook_name)
        if resolved in self._hook_registry:
            return resolved
        return super()._resolve_hook_name(self.points.resolve(hook_name).name)

    def add_sae(self, sae: Any, use_error_term: bool | None = None) -> None:
        """Splice an SAE in; SAELens warns and goes on where it finds no hook, here that is an error.

        Raises:
            SAEError: The SAE names no hook, or its width is not the point's.
            HookError: The hook is unknown, or is `hook_resid_mid`, which SAELens cannot reach here.
        """
        name = sae.cfg.metadata.hook_name
        if not name:
            raise SAEError("The SAE's cfg.metadata.hook_name is empty; set it to the point it belongs to.")
        if self.points.resolve(name).spec.name.endswith("hook_resid_mid"):
            raise HookError(f"SAELens cannot splice at {name!r} of a bridge. Use HookedMaira2, which can.")
        width = self.points.width(name)
        if sae.cfg.d_in != width:
            raise SAEError(
                f"The SAE has d_in {sae.cfg.d_in}, but the value at {name!r} has width {width}. Check"
                " that the SAE belongs to this model and hook."
            )
        for hook in (name, sae.cfg.metadata.hook_name_out or name):
            site = self._resolve_hook_name(hook)
            if isinstance(covered := self._hook_registry[site], HookPoint):
                # An SAE that another one covered comes back on a bare point: the first entry is the true one.
                self._conversions.setdefault(site, covered.hook_conversion)
        super().add_sae(sae, use_error_term)
        self._hooks_by_name = None

    def _reset_sae(self, act_name: str, *args: Any, **kwargs: Any) -> None:
        wrapper = self._acts_to_saes.get(act_name)
        if wrapper is not None:
            self._left.update(point for point in wrapper.modules() if isinstance(point, HookPoint))
        super()._reset_sae(act_name, *args, **kwargs)
        # SAELens puts a bare hook point back: without the split into heads that hook_q, _k, _v and _z had.
        for site in list(self._conversions):
            if isinstance(point := self._hook_registry[site], HookPoint):
                point.hook_conversion = self._conversions.pop(site)
        # The fresh hook point took its short name when it was put in place; TransformerLens then takes the long
        # one for an alias of nothing and drops hooks that are added under it.
        for name, point in self._hook_registry.items():
            if isinstance(point, HookPoint) and point.name != name and name.endswith(f".{point.name}"):
                point.name = name
        self._hooks_by_name = None

    def _gather(self, given: Any, kwargs: dict[str, Any]) -> ModelInputs:
        encode = {key: kwargs.pop(key) for key in (*_ENCODE, "padding_side") if kwargs.get(key) is not None}
        tensors = {name: kwargs.pop(name, None) for name in ("input_ids", "attention_mask", "pixel_values")}
        config: Any = self.original_model.config  # pyright: ignore[reportAttributeAccessIssue]
        # A step of generation carries the mask of all tokens so far, and a finished row's next token is a pad token.
        pad = None if self._generating else config.pad_token_id
        return gather_inputs(given, self.processor, self.cfg.device, encode, pad, **tensors)

    def forward(self, input: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As TransformerBridge's, for studies, encodings and mappings too.

        Positions are transformers' own (0, 1, 2, ... with padding counted) unless `position_ids` is given.

        Raises:
            HookError: An input of another kind, or a stop out of range.
            PromptError: Image placeholders and images do not agree.
        """
        inputs = self._gather(input, kwargs)
        stop = kwargs["stop_at_layer"] = self._stop(kwargs.get("stop_at_layer"))
        tensors = dict(inputs.tensors)
        ids = tensors.pop("input_ids")
        if "past_key_values" in kwargs and self._takes_cache:
            kwargs["cache"] = kwargs.pop("past_key_values")  # its name since transformers 5.24
        if not self._generating:  # generate counts positions without padding, as transformers' own does
            kwargs.setdefault("position_ids", torch.arange(ids.shape[1], device=ids.device)[None])
        try:
            with self._stopping(stop):
                return super().forward(ids, *args, **tensors, **kwargs)
        except StopForward as stopped:
            return stopped.residual

    def _stop(self, layer: int | None, names: Sequence[str] = ()) -> int | None:
        """Check a `stop_at_layer` against the number of blocks and the names that the run has to reach."""
        table = self.points
        bases = [name.partition(".hook_sae_")[0] for name in names]
        known = [table.aliases.get(base, base) for base in bases]
        return table.stop_before(layer, [name for name in known if name in table.points])

    def _stopping(self, stop: int | None) -> Any:
        """TransformerLens ignores a stop after the last block; here the run ends before the final norm."""
        count = self.points.counts["block"]
        return stopping_at(self.original_model, stop if stop == count else None, count)  # pyright: ignore[reportArgumentType]

    def run_with_cache(self, input: Any = None, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
        """As TransformerBridge's; named points must be in the cache afterwards, under the requested names.

        Raises:
            HookError: An unknown name, a stop out of range, or a named point that never fired.
        """
        host: Any = super()
        given: Any = names_filter
        named = given is not None and not callable(given)
        asked: list[str] = [] if not named else [given] if isinstance(given, str) else list(cast(Any, given))
        names = {name: self._hookable(name) for name in asked}
        stop = kwargs["stop_at_layer"] = self._stop(kwargs.get("stop_at_layer"), asked)
        wanted = list(names.values()) if named else names_filter
        with self._stopping(stop):
            out, cache = host.run_with_cache(input, *args, names_filter=wanted, **kwargs)
        kept: Any = cache if isinstance(cache, dict) else cache.cache_dict
        calls = HookCalls(self.points)
        calls.counts = {("forward", name): int(known in kept) for name, known in names.items()}
        calls.require()
        kept |= {name: kept[known] for name, known in names.items()}
        if isinstance(cache, dict):
            return out, cache
        return out, Maira2Cache(kept, self, has_batch_dim=cache.has_batch_dim)

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Named = (),
        bwd_hooks: Named = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator["BridgedMaira2"]:
        """As TransformerBridge's; unknown names and named hooks that never fire are errors.

        Raises:
            HookError: An unknown name, or a named hook that never fired in a block that raised nothing.
        """
        calls = HookCalls(self.points)
        pairs = [
            self._watched(given, calls, way)
            for given, way in ((fwd_hooks, "forward"), (bwd_hooks, "backward"))
        ]
        with super().hooks(*pairs, reset_hooks_end=reset_hooks_end, clear_contexts=clear_contexts):
            yield self
        calls.require(backward=reset_hooks_end)

    def _watched(self, pairs: Named, calls: HookCalls, direction: str) -> list[Any]:
        made: list[Any] = []
        for name, hook in pairs:
            if isinstance(name, str):
                known = self._hookable(name)
                made.append((known, calls.watch(known, hook, direction)))
                continue
            chosen = [known for known in self.hook_dict if name(known)]
            if not chosen:
                raise HookError(
                    f"The function chose none of the {len(self.hook_dict)} hook points. `hook_dict` lists their names."
                )
            made.append((name, calls.watch_any(chosen, hook, direction)))
        return made

    def run_with_hooks(  # pyright: ignore[reportIncompatibleMethodOverride] - the rest goes by keyword
        self,
        input: Any = None,
        fwd_hooks: Named = (),
        bwd_hooks: Named = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As TransformerBridge's; unknown names and named hooks that never fire are errors."""
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(input, **kwargs)

    def add_hook(self, name: Any, hook_fn: Any, dir: Any = "fwd", is_permanent: bool = False) -> None:
        """As TransformerBridge's, under any accepted name.

        Raises:
            HookError: An unknown name, or a point that fires only after a setter was called.
        """
        if not isinstance(name, str):
            super().add_hook(name, hook_fn, dir=dir, is_permanent=is_permanent)
            return
        self.hook_dict[self._hookable(name)].add_hook(hook_fn, dir=dir, is_permanent=is_permanent)

    def generate(self, input: Any = None, max_new_tokens: int | None = None, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """As TransformerBridge's, but greedy, silent and returning tokens `(B, L + T)` by default.

        Raises:
            HookError: Images and `use_past_kv_cache=False`, with which TransformerLens forgets the images
                after the first token.
        """
        task = kwargs.get("task")
        inputs = self._gather(input, kwargs)
        if "pixel_values" in inputs.tensors and not kwargs.get("use_past_kv_cache", True):
            raise HookError(
                "TransformerBridge passes images with the first token only, so it cannot generate without"
                " a KV cache. Leave use_past_kv_cache on, or use HookedMaira2.generate(..., use_cache=False)."
            )
        tensors = dict(inputs.tensors)
        config: Any = self.original_model.config  # pyright: ignore[reportAttributeAccessIssue]
        defaults = {
            "do_sample": False,
            "verbose": False,
            "return_type": "tokens",
            "eos_token_id": config.text_config.eos_token_id,
        }
        budget = max_new_tokens or MAX_NEW_TOKENS[task or "findings"]
        self._generating = True
        try:
            return super().generate(
                tensors.pop("input_ids"), max_new_tokens=budget, **{**defaults, **tensors, **kwargs}
            )
        finally:
            self._generating = False


def _mid_point(point: Point, block: Any) -> LivePoint:
    return LivePoint(point, lambda live: tap_mid(block, live, MidEdits()))
