"""The edit of the stream at a hook point: one function, the same for every host library.

    edit(h (R, T, d_model)) -> h' or None            R = batch x beams, T = prompt, one token, or all so far

The engine counts absolute positions over prefill and decoding, how often it acted, and how much it changed. With a
`control_seed` every change is replaced by a random direction of the same norm at the same position.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import TrainingSAE

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import Maira2Encoding
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering.interventions import AddVectors, Direction, Intervention, LatentIntervention
from sae_lens_maira.steering.positions import Layout

LARGEST_SHARE = 4
"""Encoder columns are copied if they are at most one in so many."""


class LatentSubset:
    """Activations of a few latents, computed without the others where the architecture allows it.

        a[:, c] = relu(z) [z > threshold_c],   z = (x - b_dec) W_enc[:, c] + b_enc[c]         JumpReLU
        a[:, c] = encode(x)[:, c]                                                             any other SAE

    A JumpReLU latent does not depend on the others, so an intervention on 8 of 16,384 reads 8 columns; in a TopK SAE
    latents compete, and all of them are computed.

    Args:
        sae: The SAE.
        latents: Indices of the latents, each once.
    """

    def __init__(self, sae: SAE[Any], latents: Sequence[int]) -> None:
        self._sae = sae
        self._chosen = torch.tensor(latents, device=sae.W_dec.device)
        self._slot = {j: i for i, j in enumerate(latents)}
        # Only where `encode` is JumpReLU's own: a subclass may couple its latents.
        self._independent = (
            isinstance(sae, JumpReLUSAE)
            and type(sae).encode is JumpReLUSAE.encode
            and LARGEST_SHARE * len(latents) <= sae.cfg.d_sae
        )
        self._encoder = sae.W_enc.detach()[:, self._chosen] if self._independent else None
        self._decoder: torch.Tensor | None = None

    def slots(self, latents: torch.Tensor) -> torch.Tensor:
        """Columns of these latents, in their order, on the SAE's device."""
        return torch.tensor([self._slot[int(j)] for j in latents], device=self._chosen.device)

    @torch.no_grad()
    def encode(self, hidden: torch.Tensor) -> torch.Tensor:
        """(n, c) float32 activations of the stream (n, d_model), on the SAE's device."""
        sae: Any = self._sae
        hidden = hidden.to(sae.W_dec)
        if self._encoder is None:
            return sae.encode(hidden)[:, self._chosen].float()
        before = sae.process_sae_in(hidden) @ self._encoder + sae.b_enc[self._chosen]
        return (sae.activation_fn(before) * (before > sae.threshold[self._chosen])).float()

    @torch.no_grad()
    def decode(self, change: torch.Tensor) -> torch.Tensor:
        """(n, d_model) float32 step of the stream for changes (n, c) of the activations."""
        if self._decoder is None:
            self._decoder = self._sae.W_dec.detach()[self._chosen].float()
        return change @ self._decoder


@dataclass
class Effect:
    """Effect of a run of interventions on the stream.

    Attributes:
        calls: Number of times the hook point was reached.
        positions: Absolute positions of the last run: prompt plus new tokens that entered the model. The last token
            that is written does not enter it.
        fired: Per intervention, the number of positions (rows counted separately) at which its weight was not 0.
        changed: Number of positions at which the stream was changed.
        ratio: Mean |delta| / |h| over the changed positions.
        largest: Largest |delta| / |h|.
    """

    calls: int
    positions: int
    fired: list[int]
    changed: int = 0
    ratio: float = 0.0
    largest: float = 0.0


class Engine:
    """Interventions prepared for one encoding.

    Args:
        sae: SAE whose latents are meant; None if there are only directions.
        interventions: What to do, in order.
        encoding: The batch that will be run.
        p99: (d_sae,) units.
        d_model: Width of the stream.
        control_seed: Replace every change by a random direction of the same norm, drawn with this seed.

    Raises:
        InterventionError: A latent is out of range, the SAE has another width, a unit is missing or 0, or the number
            of strengths is wrong.
    """

    def __init__(
        self,
        sae: SAE[Any] | None,
        interventions: Sequence[Intervention],
        encoding: Maira2Encoding,
        p99: torch.Tensor | None,
        d_model: int,
        control_seed: int | None = None,
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
        self._subset = self._latent_subset()
        self._random: torch.Tensor | None = None
        if control_seed is not None:
            drawn = torch.randn(d_model, generator=torch.Generator().manual_seed(control_seed))
            self._random = drawn / drawn.norm()
        self._weights: list[torch.Tensor] = []
        self._known = 0
        self._grow(self.prompt_length)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Apply the interventions to the stream (R, T, d_model); None if nothing changes."""
        start, copies = self._place(hidden)
        self.effect.calls += 1
        stop = start + hidden.shape[1]
        self._grow(stop)
        here = [w[:, start:stop] for w in self._weights]
        counts = [copies * int(w.count_nonzero()) for w in here]
        if not any(counts):
            return None  # a decode step after the patches costs nothing more
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
        if moved < len(h):  # a gate was closed somewhere: those rows are returned unchanged
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
        """Raise InterventionError if the run did nothing.

        Args:
            effect: Also refuse a run in which no activation changed.
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
                "The interventions reached their positions but changed no activation there: a gate stayed closed, or "
                "the latents already had these values. Pass require_effect=False to accept that as a result."
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
                    "A level was given, but the SAE has no levels; open it with load_matryoshka."
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
            raise InterventionError(f"Latents {latents} contain one twice; name each once.")
        if isinstance(item, AddVectors) and item.vectors.shape != (len(latents), d_model):
            raise InterventionError(
                f"The vectors have shape {tuple(item.vectors.shape)}; {len(latents)} latents and a stream of {d_model} "
                f"dimensions need ({len(latents)}, {d_model})."
            )
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
                    f"Latents {silent} never fired where p99 was measured, so they have no unit; use unit='raw'."
                )
            units = p99.float().cpu()
        self._latents.append(torch.tensor(latents))
        self._units.append(units[list(latents)])
        self._thresholds.append(
            0.0 if item.if_latent is None else item.if_latent[1] * float(units[item.if_latent[0]])
        )

    def _latent_subset(self) -> LatentSubset | None:
        """The latents that are changed, and those that gates depend on."""
        asked: dict[int, None] = {}
        for item, latents in zip(self.interventions, self._latents, strict=True):
            if latents is not None and isinstance(item, LatentIntervention):
                asked |= dict.fromkeys(latents.tolist())
                asked |= {} if item.if_latent is None else {item.if_latent[0]: None}
        return LatentSubset(self.sae, list(asked)) if asked and self.sae is not None else None

    def _place(self, hidden: torch.Tensor) -> tuple[int, int]:
        """First absolute position of the stream that arrived, and rows per study."""
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
                f"A stream of {rows} rows and {length} positions arrived where {len(self.encoding)} rows (or beams of "
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
        """(n, d_model) float32 change and (n,) whether there is one, on the stream's device."""
        delta = torch.zeros(h.shape, device=h.device)
        changed = torch.zeros(len(h), dtype=torch.bool, device=h.device)
        acts = new = None
        subset = self._subset
        if subset is not None:
            acts = subset.encode(h)
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
            elif subset is not None and acts is not None and new is not None:
                assert isinstance(item, LatentIntervention)
                assert latents is not None
                assert units is not None
                slots = subset.slots(latents)
                weight, strength = weight.to(acts.device), strength.to(acts.device)  # those of the SAE
                value = strength[:, None] * (1.0 if item.is_factor else units.to(acts.device))
                current = new[:, slots]
                gate = (weight != 0)[:, None].expand_as(current)
                if item.if_active:
                    gate = gate & (acts[:, slots] > 0)
                if item.if_latent is not None:
                    key = subset.slots(torch.tensor(item.if_latent[:1], dtype=torch.long))
                    gate = gate & (acts[:, key] > self._thresholds[i])
                value = value.expand_as(current)
                if isinstance(item, AddVectors):
                    amount = torch.where(gate, value * weight[:, None] * acts[:, slots], 0.0)
                    delta += (amount @ item.vectors.to(amount)).to(h.device)
                    changed |= amount.any(1).to(h.device)
                else:
                    new[:, slots] = torch.where(gate, item.change(current, value, weight[:, None]), current)
        if subset is not None and acts is not None and new is not None:
            moved = (new != acts).any(1)
            if bool(moved.any()):
                delta += subset.decode(new - acts).to(h.device)
                changed |= moved.to(h.device)
        if self._random is not None:
            delta = delta.norm(dim=1, keepdim=True) * self._random.to(h.device)
        return delta, changed


def check_sae(sae: SAE[Any], d_model: int) -> None:
    """Raise InterventionError if an SAE cannot steer a stream of this width exactly."""
    if isinstance(sae, TrainingSAE):
        raise InterventionError(
            "A training SAE was given; its batch-wide TopK would mix the rows of a batch. Save it and open "
            "the inference SAE with load_matryoshka."
        )
    if sae.cfg.d_in != d_model:
        raise InterventionError(
            f"The SAE reads {sae.cfg.d_in} dimensions and the stream has {d_model}; it belongs to another model or "
            "point."
        )
    if sae.cfg.normalize_activations != "none":
        raise InterventionError(
            f"The SAE normalises its input at run time ({sae.cfg.normalize_activations!r}), so activations are not in "
            "units of the stream; fold the normalisation into its weights first."
        )
