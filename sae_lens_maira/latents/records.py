"""One record per latent: everything that interpretation, dashboards and steering ask of it, and nothing else.

A record is plain data: numbers, strings, tuples. Text and image positions are counted apart everywhere, since a
latent that reads a finding in a patch and one that repeats it in the report are different things. Studies appear
under pseudonyms, with the licence class that later rooms obey. It knows nothing about models, SAEs or files.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens_maira.errors import RecordError

MODALITIES = ("text", "image")
"""Where a latent can fire: at tokens of text, or at image patches."""


@dataclass(frozen=True)
class ActivationMap:
    """A latent's activations on one image, sparse.

    Attributes:
        view: "frontal", "lateral" or "prior".
        rows, cols: the patch grid (37 by 37 at 518 px).
        patches: row-major numbers of the patches where the latent fires, ascending.
        values: its activation there.
    """

    view: str
    rows: int
    cols: int
    patches: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Context:
    """One study as one latent sees it.

    Attributes:
        study: pseudonym, a key of the record set's table of studies.
        value: the activation this context was chosen for (0.0 in a zero context).
        kind: "text" or "image": where that activation is.
        peak: index into `tokens` of the chosen token, or -1 where the hit is a patch.
        patch: (view, row, col) of the chosen patch, or None where the hit is a token.
        tokens: the text tokens shown, special tokens and patches left out, in order.
        positions: position of every token in the study's unpadded sequence.
        roles: name of every token's `TokenRole`, lower case ("indication", "report", ...).
        values: activation at every token; None where that token's activation was not harvested.
        heat: one map per image of the study, also where nothing fires.
    """

    study: str
    value: float
    kind: str
    peak: int
    patch: tuple[str, int, int] | None
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    roles: tuple[str, ...]
    values: tuple[float | None, ...]
    heat: tuple[ActivationMap, ...] = ()


@dataclass(frozen=True)
class Interval:
    """Contexts whose activation lies in [low, high), and the fraction of all rows that lie there."""

    low: float
    high: float
    fraction: float
    contexts: tuple[Context, ...]


@dataclass(frozen=True)
class Histogram:
    """Counts of activations above zero; `edges` has one entry more than `counts`."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Firing:
    """How a latent fires at one kind of position.

    Attributes:
        kind: "text" or "image".
        rows: activation rows of that kind.
        fired: how many of them are above zero.
        studies: studies with a row of that kind.
        studies_fired: studies in which the latent fires there at least once.
        mean: mean activation where it fires, 0.0 if it never does.
        max: largest activation.
        p99: 99th percentile of the activations above zero, from the histogram.
    """

    kind: str
    rows: int
    fired: int
    studies: int
    studies_fired: int
    mean: float
    max: float
    p99: float

    @property
    def density(self) -> float:
        """Share of rows at which the latent fires."""
        return self.fired / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class FindingAgreement:
    """F1 between "the latent fires in this study" and "the study has the finding", with a 95 % interval."""

    finding: str
    kind: str
    f1: float
    low: float
    high: float
    precision: float
    recall: float
    positives: int
    studies: int


@dataclass(frozen=True)
class TokenWeight:
    """An output token and what the latent's decoder row adds to its logit."""

    token: str
    token_id: int
    weight: float


@dataclass(frozen=True)
class Neighbour:
    """Another latent and how it relates: "co-fires" (Jaccard over rows), "similar" (cosine of decoder rows),
    "refines" (a coarser level's latent that fires wherever this one does: share of this one's rows).
    """

    latent: int
    relation: str
    value: float


@dataclass(frozen=True)
class MeanMap:
    """Mean activation per patch over the studies that have this view: rows * cols values, row-major."""

    view: str
    rows: int
    cols: int
    values: tuple[float, ...]
    studies: int


@dataclass(frozen=True)
class LatentRecord:
    """All that is known of one latent.

    Attributes:
        latent: its number, 0 to d_sae - 1.
        level: Matryoshka level it first belongs to, 0 the coarsest.
        status: "alive", "rare" (too few active studies to interpret) or "dead".
        density: share of all rows at which it fires.
        max: largest activation anywhere.
        histogram: of its activations above zero.
        firing: text and image positions apart.
        top_tokens, bottom_tokens: what its decoder row raises and lowers through `lm_head`.
        agreement: with known findings, best first, text and image apart.
        neighbours: see `Neighbour`.
        maps: mean activation map per view.
        top: contexts of largest activation, one study each.
        intervals: contexts per activation interval, highest interval first.
        zero: contexts of studies in which it never fires.
    """

    latent: int
    level: int
    status: str
    density: float
    max: float
    histogram: Histogram
    firing: tuple[Firing, ...]
    top_tokens: tuple[TokenWeight, ...]
    bottom_tokens: tuple[TokenWeight, ...]
    agreement: tuple[FindingAgreement, ...]
    neighbours: tuple[Neighbour, ...]
    maps: tuple[MeanMap, ...]
    top: tuple[Context, ...]
    intervals: tuple[Interval, ...]
    zero: tuple[Context, ...]

    def at(self, kind: str) -> Firing:
        """Firing at "text" or "image" positions."""
        for firing in self.firing:
            if firing.kind == kind:
                return firing
        raise RecordError(
            f"Latent {self.latent} has no counts for {kind!r} positions; expected one of {MODALITIES}."
        )


@dataclass(frozen=True)
class StudyInfo:
    """A study of the record set.

    Attributes:
        study: pseudonym.
        patient: pseudonym of the patient; splits keep a patient on one side.
        licence: "public", "credentialed" or "synthetic".
        report: report text; None where the record set was written without text.
        indication, technique, comparison, prior_report: prompt sections.
        findings: keys of the findings it is known to have (truth of the phantom, `rule_labels` otherwise).
        labelled_by: "truth", "rule_labels" or "" where no labels are known.
        boxes: (finding, x_min, y_min, x_max, y_max) in 0..1 of the frontal image as `images` holds it (the centre
            crop, where a record set keeps images), of the whole film where it holds none.
        images: (view, path relative to the record set or to the table's root); empty where images are not kept.
        split: of the data set, if any.
    """

    study: str
    patient: str
    licence: str
    report: str | None = None
    indication: str | None = None
    technique: str | None = None
    comparison: str | None = None
    prior_report: str | None = None
    findings: tuple[str, ...] = ()
    labelled_by: str = ""
    boxes: tuple[tuple[str, float, float, float, float], ...] = ()
    images: tuple[tuple[str, str], ...] = ()
    split: str | None = None


@dataclass(frozen=True)
class RecordsMeta:
    """What a set of records was made from.

    Attributes:
        model: name of the model, such as "microsoft/maira-2" or "phantom".
        hook_name: hook point.
        layer: decoder layer of the hook point.
        sae: name or folder of the SAE.
        control: "trained", or what stands in its place: "untrained", "untrained_whitened", "raw" (residual dimensions).
        d_in, d_sae: its sizes.
        level_widths: Matryoshka widths, ascending; (d_sae,) for a plain SAE.
        rows_text, rows_image: rows read.
        studies: studies read.
        findings: finding keys that agreement was measured for.
        seed: of every draw.
        versions: of the packages that took part.
    """

    model: str
    hook_name: str
    layer: int
    sae: str
    control: str
    d_in: int
    d_sae: int
    level_widths: tuple[int, ...]
    rows_text: int
    rows_image: int
    studies: int
    findings: tuple[str, ...]
    seed: int
    versions: dict[str, str]
