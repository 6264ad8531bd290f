"""SAEs spliced into MAIRA-2's hook points, as SAELens' hooked classes do it.

    x' = decode(encode(x))                         without error term
    x' = decode(acts) + (x - decode(encode(x)))    with it: x itself, unless a hook edits the activations

While an SAE is in, its point gives way to the points inside it: `blocks.3.hook_resid_post.hook_sae_acts_post`
and so on. New here: an SAE trained on some token roles can be spliced in at those positions only. It knows
nothing about how SAEs are trained or stored.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from torch import nn
from transformer_lens.hook_points import HookPoint

from sae_lens_maira.errors import SAEError
from sae_lens_maira.hooks._positions import Bypass
from sae_lens_maira.hooks._root import HookedPoints


class Splice(nn.Module):
    """One SAE at one point: `(..., d_in) -> (..., d_in)`.

    Args:
        sae: The SAE, or a transcoder whose input was captured at another point.
        use_error_term: Whether what the SAE does not explain is added back.
        bypass: Gives the positions `(B, L)` that pass unchanged for a value, or None for no such position.
    """

    def __init__(
        self,
        sae: SAE[Any],
        use_error_term: bool,
        bypass: Bypass,
    ) -> None:
        super().__init__()
        # Kept out of torch's module tree: the SAE belongs to the caller, not to the model.
        self.__dict__["sae"] = sae
        self.use_error_term = use_error_term
        self.bypass = bypass
        self.captured: torch.Tensor | None = None
        self.inner: dict[str, HookPoint] = {
            **sae.hook_dict,
            "hook_sae_error": HookPoint(),
            "hook_sae_output": HookPoint(),
        }
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Replace a value by its reconstruction."""
        self.calls += 1
        sae: SAE[Any] = self.__dict__["sae"]
        source = x if self.captured is None else self.captured
        self.captured = None
        source = source.to(device=sae.device, dtype=sae.dtype)
        passed = self.bypass(x)
        if passed is not None:
            passed = passed.view(*passed.shape, *[1] * (x.ndim - passed.ndim))
        out = sae.decode(sae.encode(source))
        if self.use_error_term:
            with torch.no_grad():
                clean = out
                if any(point._forward_hooks for point in sae.hook_dict.values()):
                    # An edit of the activations must show, so the error is that of the unedited pass.
                    with _silenced(sae):
                        clean = sae.decode(sae.encode(source))
                # In the SAE's precision: a bf16 stream comes back as it was, not rounded twice.
                error = x.to(clean) - clean
                if passed is not None:
                    error = error.masked_fill(passed, 0)
                error = self.inner["hook_sae_error"](error)
            out = out + error
        out = out.to(x)
        if passed is not None:
            out = torch.where(passed, x, out)
        return self.inner["hook_sae_output"](out)


@contextmanager
def _silenced(sae: SAE[Any]) -> Iterator[None]:
    kept = [(point, point._forward_hooks) for point in sae.hook_dict.values()]
    try:
        for point, _ in kept:
            point._forward_hooks = OrderedDict()
        yield
    finally:
        for point, hooks in kept:
            point._forward_hooks = hooks


class SplicingPoints(HookedPoints):
    """Hook points into which SAEs can be spliced."""

    def __init__(self, model: nn.Module) -> None:
        self._splices: dict[str, Splice] = {}
        self._undo: dict[str, Callable[[], None]] = {}
        self._settings: dict[str, dict[str, Any]] = {}
        super().__init__(model)

    def setup(self) -> None:
        """List the hook points again: those inside a spliced SAE instead of the point it covers."""
        super().setup()
        for name, splice in self._splices.items():
            del self.hook_dict[name]
            for inner, point in splice.inner.items():
                point.name = f"{name}.{inner}"
                self.hook_dict[point.name] = point
        self.mod_dict = dict(self.hook_dict)

    @property
    def acts_to_saes(self) -> dict[str, SAE[Any]]:
        """Canonical hook name -> the SAE spliced in there."""
        return {name: splice.__dict__["sae"] for name, splice in self._splices.items()}

    def add_sae(
        self,
        sae: SAE[Any],
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        roles: Any = None,
    ) -> None:
        """Splice an SAE in at the point its metadata names, in place of any that is there, until
        `reset_saes`.

        Args:
            sae: The SAE or transcoder; `cfg.metadata.hook_name` (and `hook_name_out`) say where.
            use_error_term: Whether the unexplained part is added back; None follows the SAE's own setting.
            exclude_special_tokens: Positions left alone by token: True for the tokenizer's BOS, EOS, PAD and
                SEP, or a list of ids.
            roles: Positions the SAE acts on, by token role (a preset's name, a role, or several); needs
                inputs that carry roles, that is studies or encodings. None for every position.

        Raises:
            SAEError: The SAE names no hook, or its width is not the point's.
            HookError: The hook is unknown, or covered by a transcoder.
        """
        site = self._site(sae)
        source = self.points.resolve(sae.cfg.metadata.hook_name).name
        width = self.points.width(source)
        if sae.cfg.d_in != width:
            raise SAEError(
                f"The SAE has d_in {sae.cfg.d_in}, but the value at {source!r} has width {width}. Check that"
                " cfg.metadata.hook_name names the point it was trained on, and the model its model."
            )
        if site in self._splices:
            self._remove_sae(site)
        splice = Splice(
            sae,
            sae.use_error_term if use_error_term is None else use_error_term,
            self._bypass(site, exclude_special_tokens, roles),
        )
        handles = [self.live[site].register_forward_hook(lambda _, __, x: splice(x))]
        if source != site:

            def capture(_: nn.Module, __: Any, x: torch.Tensor) -> None:
                splice.captured = x

            handles.append(self.live[source].register_forward_hook(capture))
        names = {inner: point.name for inner, point in splice.inner.items()}

        def undo() -> None:
            for handle in handles:
                handle.remove()
            for point in (self.live[site], self.live[source]):
                point.release()
            for inner, point in splice.inner.items():
                point.name = names[inner]
            self._left.update(splice.inner.values())

        self._splices[site], self._undo[site] = splice, undo
        self._settings[site] = {
            "use_error_term": splice.use_error_term,
            "exclude_special_tokens": exclude_special_tokens,
            "roles": roles,
        }
        self.setup()

    def _site(self, sae: SAE[Any]) -> str:
        metadata = sae.cfg.metadata
        if not metadata.hook_name:
            raise SAEError(
                "The SAE's cfg.metadata.hook_name is empty, so it does not say where it belongs. Set it, for"
                " instance to 'blocks.15.hook_resid_post'."
            )
        return self.points.resolve(metadata.hook_name_out or metadata.hook_name).name

    def _remove_sae(self, site: str) -> None:
        del self._splices[site]
        self._settings.pop(site)
        self._undo.pop(site)()
        self.setup()

    def reset_saes(self, act_names: str | Sequence[str] | None = None) -> None:
        """Take SAEs out again.

        Args:
            act_names: The points they are at, under any accepted name; None means all.

        Raises:
            SAEError: There is none at one of them.
        """
        names = list(self._splices) if act_names is None else act_names
        for name in [names] if isinstance(names, str) else names:
            site = self.points.resolve(name).name
            if site not in self._splices:
                at = ", ".join(self._splices) or "none at all"
                raise SAEError(f"No SAE is spliced in at {name!r}; there is {at}. Nothing was to be reset.")
            self._remove_sae(site)

    @contextmanager
    def saes(
        self,
        saes: SAE[Any] | Sequence[SAE[Any]] = (),
        reset_saes_end: bool = True,
        use_error_term: bool | None = None,
        exclude_special_tokens: bool | Sequence[int] = False,
        roles: Any = None,
    ) -> Iterator["SplicingPoints"]:
        """SAEs for the length of a `with` block; those that they covered come back after it.

        Args:
            saes: One SAE or several.
            reset_saes_end: Whether they are taken out at the end.
            use_error_term: See `add_sae`.
            exclude_special_tokens: See `add_sae`.
            roles: See `add_sae`.
        """
        given = [saes] if isinstance(saes, SAE) else list(saes)
        added: list[str] = []
        covered: dict[str, tuple[SAE[Any], dict[str, Any]]] = {}
        try:
            for sae in given:
                site = self._site(sae)
                if site in self._splices and site not in added:
                    covered[site] = (self.acts_to_saes[site], self._settings[site])
                self.add_sae(sae, use_error_term, exclude_special_tokens, roles)
                added.append(site)
            yield self
        finally:
            if reset_saes_end:
                for site in added:
                    if site in self._splices:
                        self._remove_sae(site)
                for sae, settings in covered.values():
                    self.add_sae(sae, **settings)

    def run_with_saes(self, *args: Any, saes: Any = (), reset_saes_end: bool = True, **kwargs: Any) -> Any:
        """One call of the model with SAEs spliced in; arguments of `saes` and of the call."""
        options = _split(kwargs)
        with self.saes(saes, reset_saes_end, **options):
            return self(*args, **kwargs)

    def run_with_cache_with_saes(
        self, *args: Any, saes: Any = (), reset_saes_end: bool = True, **kwargs: Any
    ) -> tuple[Any, Any]:
        """`run_with_cache` with SAEs spliced in, whose inner points can be named too."""
        options = _split(kwargs)
        with self.saes(saes, reset_saes_end, **options):
            return self.run_with_cache(*args, **kwargs)

    def run_with_hooks_with_saes(
        self, *args: Any, saes: Any = (), reset_saes_end: bool = True, **kwargs: Any
    ) -> Any:
        """`run_with_hooks` with SAEs spliced in, whose inner points can be hooked too."""
        options = _split(kwargs)
        with self.saes(saes, reset_saes_end, **options):
            return self.run_with_hooks(*args, **kwargs)

    def _bypass(self, site: str, exclude: bool | Sequence[int], roles: Any) -> Bypass:
        raise NotImplementedError


def _split(kwargs: dict[str, Any]) -> dict[str, Any]:
    names = ("use_error_term", "exclude_special_tokens", "roles")
    return {name: kwargs.pop(name) for name in names if name in kwargs}
