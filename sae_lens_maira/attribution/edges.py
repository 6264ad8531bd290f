"""Edges from image latents to text latents to a sentence, each checked by ablating its source.

    target activation   A_t(h) = sum over t's positions of encode_t(h2),     h2 = blocks i+1 .. j of h
    predicted edge      sum over s's entries of a W_dec[s] . dA_t / dh
    measured edge       A_t(h) - A_t(h - entries of s)

Text latents and image latents are those of highest attribution for the sentence, each by its own SAE. An edge is kept
if ablating its source takes enough of the target's activation, in the direction that was predicted, and clearly more
than ablating random image entries of equal norm.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.attribution.attribute import Attribution, attribute
from sae_lens_maira.attribution.entries import Entries, active_entries
from sae_lens_maira.attribution.faithfulness import TIMES_RANDOM
from sae_lens_maira.attribution.inputs import hook_point_of
from sae_lens_maira.attribution.residual import BUDGET_BYTES, ResidualRun
from sae_lens_maira.errors import ConfigError, SAEError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.hooks._upper import frozen_weights
from sae_lens_maira.maira2 import role_mask


@dataclass(frozen=True)
class Node:
    """One latent of a sentence's graph.

    Attributes:
        latent: Number of the latent.
        name: Its name, if known.
        positions: Positions at which it is active: image patches, or tokens of the report.
        activation: Its activation, summed over these positions.
        drop: Nats that the sentence loses when the latent is ablated there.
        drop_random: Mean nats lost when as many random entries of equal norm are ablated.
    """

    latent: int
    name: str
    positions: int
    activation: float
    drop: float
    drop_random: float


@dataclass(frozen=True)
class Edge:
    """Effect of an image latent on a text latent, as shares of the text latent's activation.

    Attributes:
        source: Image latent.
        target: Text latent.
        predicted: By the gradient.
        measured: By ablating the source.
        random: Largest absolute effect over draws of as many random image entries, scaled to the same norm.
        kept: Whether the effect is large enough, has the predicted sign and exceeds the random one.
    """

    source: int
    target: int
    predicted: float
    measured: float
    random: float
    kept: bool


@dataclass(frozen=True)
class SentenceGraph:
    """Graph from image latents to text latents to one sentence.

    Attributes:
        sentence: The sentence.
        score: Its log-probability, nats.
        image_hook, text_hook: Hook points of the two SAEs.
        image: Image latents, highest attribution first.
        text: Text latents, highest attribution first.
        edges: Every edge that was measured, also those that were not kept.
    """

    sentence: str
    score: float
    image_hook: str
    text_hook: str
    image: tuple[Node, ...]
    text: tuple[Node, ...]
    edges: tuple[Edge, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def svg(self) -> str:
        """The graph of kept edges as one static SVG document."""
        from sae_lens_maira.attribution.graph_svg import draw

        return draw(self)

    def _repr_svg_(self) -> str:
        return self.svg()


def sentence_graph(
    hooked: HookedMaira2,
    study: Any,
    image_sae: SAE[Any],
    text_sae: SAE[Any],
    sentence: int = 0,
    report: str = "generated",
    image_roles: Any = "image_only",
    text_roles: Any = "generated_only",
    n_image: int = 8,
    n_text: int = 6,
    least_share: float = 0.05,
    draws: int = 2,
    image_names: dict[int, str] | None = None,
    text_names: dict[int, str] | None = None,
    max_new_tokens: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
    seed: int = 0,
) -> SentenceGraph:
    """Measure the graph of one sentence.

    Args:
        hooked: The model.
        study: The study.
        image_sae: SAE of image positions.
        text_sae: SAE of report positions at a later block.
        sentence: Number of the sentence.
        report: "generated", "teacher" or a text.
        image_roles: Token roles at which image latents are read.
        text_roles: Token roles at which text latents are read.
        n_image: Image latents.
        n_text: Text latents.
        least_share: Smallest absolute share of the target's activation for an edge to be kept.
        draws: Random controls per image latent.
        image_names: Name per image latent, if known.
        text_names: Name per text latent, if known.
        max_new_tokens: Budget of a generated report.
        budget_bytes: Bytes that one batch of ablations may take.
        seed: Seed of the random controls.

    Raises:
        ConfigError: No random control is wanted, so that no edge could be checked.
        SAEError: No image latent is active, or the random controls write nothing.
        HookError: The text SAE is not at a later block.
    """
    if draws < 1:
        raise ConfigError(
            f"draws is {draws}; expected at least 1, because every edge is compared with random entries."
        )
    text_hook = hook_point_of(text_sae)
    answer = attribute(
        hooked, study, text_sae, sentence, report, text_hook, text_roles,
        check=False, max_new_tokens=max_new_tokens, budget_bytes=budget_bytes,
    )  # fmt: skip
    item = answer.sentences[0]
    run = ResidualRun(hooked, answer.encoding, hook_point_of(image_sae), budget_bytes)
    here = role_mask(run.encoding, image_roles)[0].nonzero()[:, 0].to(run.hidden.device)
    entries, _ = active_entries(image_sae, run.hidden, here)
    if not len(entries):
        raise SAEError(f"No image latent is active at the {len(here)} positions of roles {image_roles!r}.")
    targets = _targets(item, n_text)
    slopes, amounts = _target_gradients(run, text_sae, text_hook, targets)
    predicted = torch.stack(
        [_per_latent(entries, entries.dot(slope), image_sae.cfg.d_sae) for slope in slopes]
    )
    seen = attribute(
        hooked, study, image_sae, sentence, answer.report, run.hook_name, image_roles,
        check=False, budget_bytes=budget_bytes,
    )  # fmt: skip
    active = set(entries.latent.tolist())
    ranked = [int(j) for j in seen.sentences[0].latents()["latent"] if int(j) in active]
    sources = ranked[:n_image]
    generator = torch.Generator().manual_seed(seed)
    groups = [(entries.latent == j).nonzero()[:, 0] for j in sources]
    deltas = [delta for group in groups for delta in _with_controls(entries, group, draws, generator)]
    after = _activations(run, text_sae, text_hook, targets, deltas).reshape(len(sources), 1 + draws, -1)
    share = (1 - after / amounts.clamp(min=1e-9)).cpu()
    edges = []
    for i, source in enumerate(sources):
        for k, (target, _, _) in enumerate(targets):
            guess = float(predicted[k, source] / amounts[k].clamp(min=1e-9))
            real, random = float(share[i, 0, k]), float(share[i, 1:, k].abs().max())
            kept = is_kept(guess, real, random, least_share)
            edges.append(Edge(source, target, guess, real, random, kept))
    image = _nodes(run, item, entries, sources, deltas, draws, image_names or {})
    upper = ResidualRun(hooked, answer.encoding, text_hook, budget_bytes)
    written, _ = active_entries(
        text_sae,
        upper.hidden,
        role_mask(upper.encoding, text_roles)[0].nonzero()[:, 0].to(upper.hidden.device),
    )
    groups = [
        ((written.latent == j) & torch.isin(written.position, places.to(written.position))).nonzero()[:, 0]
        for j, places, _ in targets
    ]
    changes = [delta for group in groups for delta in _with_controls(written, group, draws, generator)]
    text = _nodes(upper, item, written, [j for j, _, _ in targets], changes, draws, text_names or {}, groups)
    return SentenceGraph(
        item.sentence.text,
        item.score,
        run.hook_name,
        upper.hook_name,
        tuple(image),
        tuple(text),
        tuple(edges),
    )


def is_kept(predicted: float, measured: float, random: float, least_share: float = 0.05) -> bool:
    """Whether an edge's effect is large enough, has the predicted sign and exceeds the random one."""
    return abs(measured) >= max(least_share, TIMES_RANDOM * random) and measured * predicted > 0


Target = tuple[int, torch.Tensor, float]
"""A text latent, the positions of its attributed entries, and its attribution in nats."""


def _targets(item: Attribution, n: int) -> list[Target]:
    """The text latents of highest attribution."""
    table = item.latents().head(n)
    found: list[Target] = []
    for latent, value in zip(table["latent"].tolist(), table["value"].tolist(), strict=True):
        places = torch.from_numpy(item.position[(item.latent == latent) & (item.value > 0)])
        if value > 0 and len(places):
            found.append((int(latent), places.sort().values, float(value)))
    return found


def _target_gradients(
    run: ResidualRun, sae: SAE[Any], hook_name: str, targets: Sequence[Target]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (T, L, d_model) of the targets' activations in the stream, and the activations (T,)."""
    leaf = run.hidden.detach()[None].clone().requires_grad_(True)
    slopes, amounts = [], []
    with torch.enable_grad(), frozen_weights(sae), frozen_weights(run.model):
        later = run.stream(leaf, hook_name)[0]
        for number, (latent, places, _) in enumerate(targets):
            amount = sae.encode(later[places.to(later.device)].to(sae.W_dec))[:, latent].sum()
            more = number + 1 < len(targets)
            slopes.append(torch.autograd.grad(amount, leaf, retain_graph=more)[0][0].float())
            amounts.append(amount.detach())
    return torch.stack(slopes), torch.stack(amounts)


def _activations(
    run: ResidualRun, sae: SAE[Any], hook_name: str, targets: Sequence[Target], deltas: Sequence[torch.Tensor]
) -> torch.Tensor:
    """(len(deltas), T) the targets' activations under edits."""
    every = torch.cat([places for _, places, _ in targets]).unique()
    streams = run.streams(deltas, hook_name, every.to(run.hidden.device))
    with torch.no_grad():
        acts = sae.encode(streams.to(sae.W_dec))
    columns = [acts[:, torch.isin(every, places), latent].sum(1) for latent, places, _ in targets]
    return torch.stack(columns, 1)


def _with_controls(
    entries: Entries, group: torch.Tensor, draws: int, generator: torch.Generator
) -> list[torch.Tensor]:
    """The edit that ablates a group of entries, and edits that ablate as many random ones, of equal norm."""
    removed = entries.delta(group)
    return [
        -removed,
        *(-entries.random_delta(len(group), removed.norm(), generator) for _ in range(draws)),
    ]


def _nodes(
    run: ResidualRun,
    item: Attribution,
    entries: Entries,
    latents: Sequence[int],
    deltas: Sequence[torch.Tensor],
    draws: int,
    names: dict[int, str],
    groups: Sequence[torch.Tensor] | None = None,
) -> list[Node]:
    """Ablate every latent and its controls, and read the sentence."""
    drops = (item.score - run.scores(deltas, item.sentence.positions)).reshape(len(latents), 1 + draws)
    made = []
    for number, (latent, drop) in enumerate(zip(latents, drops, strict=True)):
        mine = (entries.latent == latent).nonzero()[:, 0] if groups is None else groups[number]
        random = float(drop[1:].mean())
        total = float(entries.activation[mine].sum())
        made.append(Node(latent, names.get(latent, ""), len(mine), total, float(drop[0]), random))
    return made


def _per_latent(entries: Entries, values: torch.Tensor, d_sae: int) -> torch.Tensor:
    """(d_sae,) values of entries summed per latent."""
    return torch.zeros(d_sae, device=values.device).index_add_(0, entries.latent, values)


__all__ = ["Edge", "Node", "SentenceGraph", "sentence_graph"]
