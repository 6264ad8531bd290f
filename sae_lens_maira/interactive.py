"""Model for notebooks: the top latents of a study, and reports before and after steering.

    m.top_latents(study, sae, k=5)                                      # DataFrame
    m.steer(study, sae, {7: 2.0}, where=sm.patches("frontal"))          # both reports, changed words marked

Strengths are in units of the latent's own 99th percentile (p99) over the rows where it is active. Results have a
readable `str` and an HTML form for notebooks.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from sae_lens_maira.errors import HookError, InterventionError, SAEError
from sae_lens_maira.hooks.hooked import HookedMaira2
from sae_lens_maira.interp.records import load
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.maira2 import Maira2, Maira2Encoding, TokenRole, role_mask
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering import Add, Effect, Intervention, Schedule, Steering, steering
from sae_lens_maira.steering.positions import everywhere
from sae_lens_maira.studies.words import Piece, compare_words

if TYPE_CHECKING:
    from sae_lens_maira.attribution import ReportAttribution

VIEWS = ("frontal", "lateral", "prior")


class InteractiveMaira2(HookedMaira2):
    """Hooked MAIRA-2 with methods that take a study and an SAE; made by `sae_lens_maira.load`."""

    @property
    def maira(self) -> Maira2:
        """Model and processor, for functions of the library."""
        if self.processor is None:
            raise HookError(
                "The model was wrapped without a processor. Pass one, or use sae_lens_maira.load."
            )
        return Maira2(self.model, self.processor)  # pyright: ignore[reportArgumentType] - wrapped as such

    def top_latents(
        self,
        study: Any,
        sae: MatryoshkaSAE,
        k: int = 5,
        report: Any = "teacher",
        roles: Any = None,
        task: str | None = None,
    ) -> pd.DataFrame:
        """Find the k strongest active latents at every position.

        Args:
            study: One study, or a `Maira2Encoding` of one row.
            sae: SAE; activations are read at its hook point.
            k: Number of latents per position.
            report: "teacher" for the study's report, "generated" for a report that the model generates now, a text, or
                None for the prompt only.
            roles: Token roles of the positions, for instance "image_only" or "report"; None for all positions.
            task: "findings", "grounded" or "phrase".

        Returns:
            One row per position and latent, strongest first within a position: `position` (0-based, padding not
            counted), `token`, `role`, `patch` (view, row and column; empty for text), `latent`, `activation`, `name`
            (empty if the SAE's latents have no names).

        Raises:
            HookError: Several studies were given, or the hook point has no text positions.
            SAEError: The SAE names no hook point or has another width.
        """
        encoding = self.encode(study, report=report, task=task)
        if len(encoding) != 1:
            raise HookError(f"top_latents was given {len(encoding)} studies; give one study at a time.")
        acts = self.latents(encoding, sae)[0]
        keep = role_mask(encoding, "all" if roles is None else roles)[0].cpu()
        first = int(encoding.attention_mask[0].cpu().argmax())
        values, latents = acts.topk(min(k, acts.shape[-1]), dim=-1)
        values, latents = values.float().cpu(), latents.cpu()
        names = getattr(sae, "latent_names", {})
        tokens = self.tokenizer.convert_ids_to_tokens(encoding.input_ids[0].tolist())
        rows = [
            {
                "position": position - first,
                "token": tokens[position],
                "role": TokenRole(int(encoding.roles[0, position])).name.lower(),
                "patch": _patch(encoding, position),
                "latent": int(latent),
                "activation": float(value),
                "name": names.get(int(latent), ""),
            }
            for position in keep.nonzero()[:, 0].tolist()
            for value, latent in zip(values[position], latents[position], strict=True)
            if value > 0
        ]
        columns = ("position", "token", "role", "patch", "latent", "activation", "name")
        return pd.DataFrame(rows, columns=list(columns))

    @torch.no_grad()
    def latents(self, study: Any, sae: MatryoshkaSAE, report: Any = "teacher") -> torch.Tensor:
        """Compute activations of all latents at every position.

        Args:
            study: A study, several, or a `Maira2Encoding`.
            sae: The SAE.
            report: As in `top_latents`.

        Returns:
            `(B, L, d_sae)` on the SAE's device.

        Raises:
            HookError: The hook point has no text positions.
            SAEError: The SAE names no hook point or has another width.
        """
        point = self.points.resolve(_hook_of(sae))
        if not point.spec.shape.startswith("(B, L, d_model)"):
            raise HookError(
                f"The SAE belongs to {point.name!r} of shape {point.spec.shape}, which has no token positions. "
                "Use run_with_cache and sae.encode there."
            )
        encoding = self.encode(study, report=report)
        _, cache = self.run_with_cache(encoding, names_filter=point.name, stop_at_layer=point.stop)
        hidden = cache[point.name]
        if hidden.shape[-1] != sae.cfg.d_in:
            raise SAEError(
                f"The SAE has d_in {sae.cfg.d_in} and the model's stream has width {hidden.shape[-1]}; it belongs to "
                "another model."
            )
        return sae.encode(hidden.to(sae.W_dec))

    def steer(
        self,
        study: Any,
        sae: MatryoshkaSAE | None,
        interventions: "Mapping[int, float] | Intervention | Sequence[Intervention]",
        where: Schedule | None = None,
        p99: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        task: str | None = None,
        control_seed: int | None = None,
        **generate: Any,
    ) -> Any:
        """Generate a study's report with and without an intervention.

        Args:
            study: One study, or a list of them (one batch).
            sae: The SAE; None if only directions are added.
            interventions: Latent -> added strength in units of its p99; or interventions such as `Ablate(latents=(7,),
                where=...)`.
            where: Positions for the mapping; None for all positions, including generated tokens.
            p99: `(d_sae,)` units; None for those of the SAE.
            max_new_tokens: Largest number of generated tokens; None for the task's budget.
            task: "findings", "grounded" or "phrase".
            control_seed: Replace every change by a random direction of equal norm, drawn with this seed.
            **generate: Further arguments of transformers' `generate`.

        Returns:
            A `SteeringResult`, or a list of them for a list of studies.

        Raises:
            InterventionError: The SAE has no p99, a latent is out of range, the study does not have the positions, or
                an intervention had no effect.
        """
        if where is not None and not isinstance(where, Schedule):
            raise InterventionError(
                f"where is {where!r}; expected a schedule of positions, such as sm.patches('frontal') or sm.report()."
            )
        if isinstance(interventions, Mapping):
            items: list[Intervention] = [
                Add(latents=(int(latent),), strength=strength, where=where or everywhere())
                for latent, strength in interventions.items()
            ]
        else:
            if where is not None:
                raise InterventionError(
                    "where was given with interventions that define their own positions; leave it out, or give a "
                    "mapping latent -> strength."
                )
            items = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        encoding = self.encode(study, report=None, task=task)
        before = self.generate(
            encoding, max_new_tokens=max_new_tokens, return_type="reports", task=task, **generate
        )
        budget = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
        with self.steering(encoding, sae, items, p99, control_seed=control_seed) as run:
            after = run.reports(self.maira.processor, **budget, **generate)
        made = [
            SteeringResult(old.text, new.text, tuple(items), run.hook_name, run.effect, control_seed)
            for old, new in zip(before, after, strict=True)
        ]
        return made if isinstance(study, Sequence) else made[0]

    def steering(
        self,
        study: Any,
        sae: MatryoshkaSAE | None,
        interventions: Intervention | Sequence[Intervention],
        p99: torch.Tensor | None = None,
        report: Any = None,
        require_effect: bool = True,
        control_seed: int | None = None,
    ) -> AbstractContextManager[Steering]:
        """Apply interventions inside a `with` block, to compute logits and reports.

        Args:
            study: A study, several, or a `Maira2Encoding`.
            sae: The SAE; None if only directions are added.
            interventions: One intervention or several.
            p99: `(d_sae,)` units; None for those of the SAE.
            report: Text after the prompt, as in `top_latents`.
            require_effect: Raise an error if nothing changed.
            control_seed: Replace every change by a random direction of equal norm, drawn with this seed.

        Returns:
            A context manager with `logits()`, `reports(processor)` and `effect` of the steered model.

        Raises:
            InterventionError: The SAE has no p99, a latent is out of range, or the study does not have the positions.
        """
        units = p99 if p99 is not None else getattr(sae, "p99", None)
        items = [interventions] if isinstance(interventions, Intervention) else list(interventions)
        if units is None and any(getattr(item, "needs_unit", False) for item in items):
            raise InterventionError(
                "Strengths are in units of p99, and this SAE does not record them. Give load_sae the latent records "
                "of the SAE (records=...) or p99=, or use interventions with unit='raw'."
            )
        encoding = study if isinstance(study, Maira2Encoding) else self.encode(study, report=report)
        hook_name = _hook_of(sae) if sae is not None else _only_hook(items)
        return steering(
            self, sae, hook_name, items, encoding, units, require_effect, control_seed=control_seed
        )

    def attribute(
        self,
        study: Any,
        sae: MatryoshkaSAE,
        sentence: "int | Sequence[int] | None" = None,
        report: str = "generated",
        **keywords: Any,
    ) -> "ReportAttribution":
        """Attribute the sentences of a report to latents at positions, with a check by ablation.

        Args:
            study: The study.
            sae: An SAE at the output of a decoder block.
            sentence: Number of the sentence, from 0, or several; None for all.
            report: "generated" for a report of the model, "teacher" for the study's report, or a text.
            **keywords: Further arguments of `sae_lens_maira.attribution.attribute`, for example `method` or `roles`.

        Returns:
            One attribution per sentence, with names of latents and maps per image.

        Raises:
            SAEError: The SAE names no hook point, does not match the model, or does not fire at any position.
            PromptError: There is no report, or no such sentence.
        """
        from sae_lens_maira.attribution import attribute

        names = keywords.pop("names", getattr(sae, "latent_names", None))
        return attribute(self, study, sae, sentence, report, names=names, **keywords)


@dataclass(frozen=True)
class SteeringResult:
    """Report without and with interventions.

    Attributes:
        before: Report of the unsteered model.
        after: Report of the steered model.
        interventions: Interventions that were applied.
        hook_name: Hook point of the interventions.
        effect: Number of changed positions and size of the change, over the whole batch.
        control_seed: Seed of the random directions that replaced the interventions; None for the interventions.
    """

    before: str
    after: str
    interventions: tuple[Intervention, ...]
    hook_name: str
    effect: Effect
    control_seed: int | None = None

    @property
    def pieces(self) -> tuple[tuple[Piece, ...], tuple[Piece, ...]]:
        """Both reports as runs of words; a run is marked if the other report does not have it."""
        return compare_words(self.before, self.after)

    def __str__(self) -> str:
        sides = [
            "".join(
                re.sub(r"^(\s*)(.*)$", r"\1[\2]", p.text, flags=re.S) if p.marked else p.text for p in side
            )
            for side in self.pieces
        ]
        return f"before  {sides[0]}\nafter   {sides[1]}\n{self._summary()}"

    __repr__ = __str__

    def _summary(self) -> str:
        done = "; ".join(_described(item) for item in self.interventions)
        if self.control_seed is not None:
            done = f"control: random directions (seed {self.control_seed}) of the norm of {done},"
        return (
            f"{done} at {self.hook_name}: {self.effect.changed:,} positions changed, by "
            f"{100 * self.effect.ratio:.1f} % of their norm on average"
        )

    def _repr_html_(self) -> str:
        marks = ("<s style='background:#fbd9d3'>{}</s>", "<b style='background:#cdeccf'>{}</b>")
        cells = [
            "".join(mark.format(escape(p.text)) if p.marked else escape(p.text) for p in side)
            for mark, side in zip(marks, self.pieces, strict=True)
        ]
        style = "text-align:left;vertical-align:top;width:50%;white-space:normal"
        return (
            "<table><tr><th>before</th><th>after</th></tr><tr>"
            + "".join(f"<td style='{style}'>{cell}</td>" for cell in cells)
            + f"</tr></table><p>{escape(self._summary())}</p>"
        )


def describe_sae(
    sae: MatryoshkaSAE, hook_name: str | None, p99: torch.Tensor | None, records: Path | None
) -> MatryoshkaSAE:
    """Set hook point, p99 and names of an SAE, and disable its gradients.

    Args:
        sae: SAE; changed in place.
        hook_name: Hook point that replaces the one in its metadata.
        p99: `(d_sae,)` units.
        records: Folder of its latent records, the source of p99 and names that are not given.

    Raises:
        SAEError: There is no hook point, or p99 has another length.
        RecordError: The records cannot be read, or belong to another SAE.
    """
    if hook_name is not None:
        sae.cfg.metadata.hook_name = hook_name
    _hook_of(sae)
    names: dict[int, str] = {}
    opened = None if records is None else RecordSet.open(records)
    if opened is not None:
        opened.require_sae(sae)
        names = {one.latent: one.explanation for one in load(opened.folder) if one.explanation}
        p99 = opened.p99.nan_to_num() if p99 is None else p99
    if p99 is not None and tuple(p99.shape) != (sae.cfg.d_sae,):
        raise SAEError(
            f"p99 has shape {tuple(p99.shape)} and the SAE has {sae.cfg.d_sae} latents; give one number per latent."
        )
    sae.requires_grad_(False)
    sae.p99, sae.latent_names, sae.records = p99, names, opened
    return sae


def _hook_of(sae: Any) -> str:
    hook_name = sae.cfg.metadata.hook_name
    if not hook_name:
        raise SAEError(
            "The SAE's metadata name no hook point. Pass hook_name= to load_sae, or --hook on the command line, for "
            "example blocks.15.hook_resid_post."
        )
    return hook_name


def _only_hook(items: Sequence[Intervention]) -> str:
    raise InterventionError(
        "No SAE was given, so there is no hook point to steer at. Use sae_lens_maira.steering.steering, which takes "
        "hook_name."
    )


def _patch(encoding: Maira2Encoding, position: int) -> str:
    view = int(encoding.view[0, position])
    if view < 0:
        return ""
    return f"{VIEWS[view]} {int(encoding.patch_row[0, position])},{int(encoding.patch_col[0, position])}"


def _described(item: Intervention) -> str:
    latents = getattr(item, "latents", ())
    what = f" latent {', '.join(map(str, latents))}" if latents else ""
    unit = " p99" if getattr(item, "unit", "") == "p99" and not getattr(item, "is_factor", True) else ""
    return f"{type(item).__name__}{what} x {item.strength}{unit}"
