"""The edit itself: one function of the stream at a hook point, the same for every host library.

    edit(h (R, T, d_model)) -> h' or None            R = batch x beams, T = prompt, one token, or all so far

It keeps count of absolute positions over prefill and decode, of how often it fired and of how much it changed. It
knows nothing about how it is attached to a model.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import Maira2Encoding
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering.columns import Columns
from sae_lens_maira.steering.interventions import Direction, Intervention, LatentIntervention
from sae_lens_maira.steering.schedule import Layout


@dataclass
class Effect:
    """What a run of interventions did.

    Attributes:
        calls: how often the stream passed.
        positions: absolute positions seen by the last run: prompt + new tokens that entered the model. The last
            token that is written never does.
        fired: per intervention, the positions (rows counted apart) at which its schedule was not 0.
        changed: positions at which the stream was changed.
        ratio: mean |delta| / |h| over the changed positions.
        largest: the largest |delta| / |h|.
    """

    calls: int
    positions: int
    fired: list[int]
    changed: int = 0
    ratio: float = 0.0
    largest: float = 0.0


class Engine:
    """Interventions made ready for one encoding.

    Args:
        sae: the SAE whose latents are meant; None if there are only directions.
        interventions: applied in order.
        encoding: the batch that will be run.
        p99: (d_sae,) units.
        d_model: width of the stream.

    Raises:
        InterventionError: a latent out of range, another SAE's width, a missing or zero unit, a wrong number of
            strengths.
    """

    def __init__(
        self,
        sae: SAE[Any] | None,
        interventions: Sequence[Intervention],
        encoding: Maira2Encoding,
        p99: torch.Tensor | None,
        d_model: int,
    ) -> None:
        if not interventions:
            raise InterventionError(
                "No intervention was given; a run without one would be labelled as steered."
            )
        self.sae, self.encoding, self.interventions = sae, encoding, tuple(interventions)
        self.prompt_length = encoding.input_ids.shape[1]
        self.effect = Effect(0, 0, [0] * len(self.interventions))
        if sae is not None:
            check_sae(sae, d_model)
        self._strengths = [item.strengths(len(encoding)) for item in self.interventions]
        self._latents: list[torch.Tensor | None] = []
        self._units: list[torch.Tensor | None] = []
        self._thresholds: list[float] = []
        for item in self.interventions:
            self._prepare(item, p99, d_model)
        self._columns = self._read_columns()
        self._weights: list[torch.Tensor] = []
        self._known = 0
        self._grow(self.prompt_length)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """The stream (R, T, d_model) with the interventions in force, or None if no bit changes."""
        start, copies = self._place(hidden)
        self.effect.calls += 1
        stop = start + hidden.shape[1]
        self._grow(stop)
        here = [w[:, start:stop] for w in self._weights]
        counts = [copies * int(w.count_nonzero()) for w in here]
        if not any(counts):
            return None  # a decode step behind the patches costs no more than this
        for i, count in enumerate(counts):
            self.effect.fired[i] += count
        weights = [w if copies == 1 else w.repeat_interleave(copies, 0) for w in here]
        active = weights[0] != 0
        for weight in weights[1:]:
            active = active | (weight != 0)
        place = active.flatten().nonzero().squeeze(1)
        stream = hidden.reshape(-1, hidden.shape[2])
        everywhere = len(place) == len(stream)  # as in most decode steps; then nothing is gathered
        at = [weight.flatten() if everywhere else weight.flatten()[place] for weight in weights]
        row = (place // hidden.shape[1] // copies).to(hidden.device)
        place = place.to(hidden.device)
        h = stream if everywhere else stream.index_select(0, place)
        delta, changed = self._delta(h, row, [w.to(hidden.device, torch.float32) for w in at])
        moved = int(changed.count_nonzero())
        if not moved:
            return None
        size = delta.norm(dim=1) / h.float().norm(dim=1).clamp(min=1e-12)
        edited = (h.float() + delta).to(h.dtype)
        if moved < len(h):  # a gate was shut somewhere: those rows keep their bits
            size, edited = size[changed], torch.where(changed[:, None], edited, h)
        total = self.effect.ratio * self.effect.changed + float(size.sum())
        self.effect.changed += moved
        self.effect.ratio = total / self.effect.changed
        self.effect.largest = max(self.effect.largest, float(size.max()))
        return (edited if everywhere else stream.index_copy(0, place, edited)).view_as(hidden)

    def reaches(self, stop: int) -> bool:
        """Whether any schedule acts between the prompt and position `stop`."""
        self._grow(stop)
        return any(bool(w[:, self.prompt_length : stop].any()) for w in self._weights)

    def require(self, effect: bool) -> None:
        """Raise InterventionError if the run was a silent no-op.

        Args:
            effect: whether a run in which no activation changed is refused too.
        """
        if self.effect.calls == 0:
            raise InterventionError(
                "The model never ran while the interventions were in force, so they did nothing; run or generate "
                "inside the block."
            )
        for item, fired in zip(self.interventions, self.effect.fired, strict=True):
            if not fired:
                raise InterventionError(
                    f"The schedule of {type(item).__name__} never fired in {self.effect.positions} positions, so it "
                    f"did nothing: {item.where}. Choose positions that the prompt or the report has."
                )
        if effect and not self.effect.changed and not all(item.neutral for item in self.interventions):
            raise InterventionError(
                "The interventions reached their positions but changed no activation there: a gate stayed shut, or "
                "the latents were where they were to be put. Pass require_effect=False if that is a result."
            )

    def _prepare(self, item: Intervention, p99: torch.Tensor | None, d_model: int) -> None:
        if isinstance(item, Direction) and len(item.vector) != d_model:
            raise InterventionError(
                f"The direction has {len(item.vector)} dimensions and the stream has {d_model}; it was made at "
                "another point or for another model."
            )
        if not isinstance(item, LatentIntervention):
            self._latents.append(None)
            self._units.append(None)
            self._thresholds.append(0.0)
            return
        if self.sae is None:
            raise InterventionError(f"{type(item).__name__} acts on latents, but no SAE was given.")
        d_sae = self.sae.cfg.d_sae
        latents = item.latents
        if item.level is not None:
            if not isinstance(self.sae, MatryoshkaSAE):
                raise InterventionError(
                    "A level was given, but the SAE has none; open it with load_matryoshka."
                )
            latents = tuple(self.sae.latents_of(item.level))
        asked = latents if item.if_latent is None else (*latents, item.if_latent[0])
        wrong = sorted({j for j in asked if not 0 <= j < d_sae})
        if wrong:
            raise InterventionError(
                f"Latents {wrong} were given, but the SAE has {d_sae} latents, 0 to {d_sae - 1}; they may belong to "
                "another SAE."
            )
        if len(set(latents)) < len(latents):
            raise InterventionError(f"Latents {latents} name one twice; name each once.")
        units = torch.ones(d_sae)
        if item.needs_unit:
            if p99 is None or p99.shape != (d_sae,):
                raise InterventionError(
                    f"Strengths are in units of p99, but p99 is {None if p99 is None else tuple(p99.shape)}; give "
                    f"({d_sae},) values of this SAE, as stats.p99 makes them, or use unit='raw'."
                )
            silent = [j for j in asked if not float(p99[j]) > 0]
            if silent and item.level is None:
                raise InterventionError(
                    f"Latents {silent} never fired where p99 was measured, so it is no unit; use unit='raw'."
                )
            units = p99.float().cpu()
        self._latents.append(torch.tensor(latents))
        self._units.append(units[list(latents)])
        self._thresholds.append(
            0.0 if item.if_latent is None else item.if_latent[1] * float(units[item.if_latent[0]])
        )

    def _read_columns(self) -> Columns | None:
        """The latents that are changed, and those that gates ask."""
        asked: dict[int, None] = {}
        for item, latents in zip(self.interventions, self._latents, strict=True):
            if latents is not None and isinstance(item, LatentIntervention):
                asked |= dict.fromkeys(latents.tolist())
                asked |= {} if item.if_latent is None else {item.if_latent[0]: None}
        return Columns(self.sae, list(asked)) if asked and self.sae is not None else None

    def _place(self, hidden: torch.Tensor) -> tuple[int, int]:
        """First absolute position of what passes, and rows per study."""
        rows, length = hidden.shape[:2]
        copies, rest = divmod(rows, len(self.encoding))
        seen = self.effect.positions
        if length == self.prompt_length or (seen and length == seen + 1):
            start = 0
        elif seen and length < self.prompt_length:
            start = seen
        else:
            rest = 1
            start = 0
        if rest:
            raise InterventionError(
                f"A stream of {rows} rows and {length} positions passed where {len(self.encoding)} rows (or beams of "
                f"them) and {self.prompt_length} positions were expected; run the encoding that was given to steering."
            )
        self.effect.positions = start + length
        return start, copies

    def _grow(self, n: int) -> None:
        if n <= self._known:
            return
        self._known = n if not self._known else n + 256
        layout = Layout.of(self.encoding, self._known)
        self._weights = [item.where.weights(layout) for item in self.interventions]

    def _delta(
        self, h: torch.Tensor, row: torch.Tensor, weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, d_model) float32 change and (n,) whether there is one."""
        delta = torch.zeros(h.shape, device=h.device)
        changed = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        acts = new = None
        columns = self._columns
        if columns is not None:
            acts = columns.encode(h)
            new = acts.clone()
        for i, item in enumerate(self.interventions):
            weight, strength = weights[i], self._strengths[i].to(h.device)[row]
            latents, units = self._latents[i], self._units[i]
            if isinstance(item, Direction):
                vector = item.vector.to(h.device, torch.float32)
                amount = strength * weight
                if item.relative:
                    amount, vector = amount * h.float().norm(dim=1), vector / vector.norm()
                delta += amount[:, None] * vector
                changed |= amount != 0
            elif columns is not None and acts is not None and new is not None:
                assert isinstance(item, LatentIntervention)
                assert latents is not None
                assert units is not None
                slots = columns.slots(latents).to(h.device)
                value = strength[:, None] * (1.0 if item.is_factor else units.to(h.device))
                current = new[:, slots]
                gate = (weight != 0)[:, None].expand_as(current)
                if item.if_active:
                    gate = gate & (acts[:, slots] > 0)
                if item.if_latent is not None:
                    key = columns.slots(torch.tensor(item.if_latent[:1], dtype=torch.long)).to(h.device)
                    gate = gate & (acts[:, key] > self._thresholds[i])
                value = value.expand_as(current)
                new[:, slots] = torch.where(gate, item.change(current, value, weight[:, None]), current)
        if columns is not None and acts is not None and new is not None:
            moved = (new != acts).any(1)
            if bool(moved.any()):
                delta += columns.decode(new - acts)
                changed |= moved
        return delta, changed


def check_sae(sae: SAE[Any], d_model: int) -> None:
    """Raise InterventionError if an SAE cannot steer a stream of this width exactly."""
    if isinstance(sae, TrainingSAE):
        raise InterventionError(
            "An SAE under training was given, whose batch-wide TopK would let rows leak into each other; make an "
            "inference SAE of it with load_matryoshka."
        )
    if sae.cfg.d_in != d_model:
        raise InterventionError(
            f"The SAE reads {sae.cfg.d_in} dimensions and the stream has {d_model}; it belongs to another model or "
            "point."
        )
    if sae.cfg.normalize_activations != "none":
        raise InterventionError(
            f"The SAE normalises its input at run time ({sae.cfg.normalize_activations!r}), so a latent's unit is not "
            "a step of the stream; fold the normalisation into its weights first."
        )
