"""Data classes of latent records, which interpretation, dashboards and steering read.

    record = numbers + contexts            context = (study, start, end, sparse activations)

Text and image positions are counted separately, since a latent that detects a finding in a patch differs from one that
repeats it in the report. Each study's tokens are stored once, as a `StudyText`; contexts refer to it. Credentialed
studies have pseudonyms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from sae_lens_maira.errors import RecordError
from sae_lens_maira.token_roles import VIEWS

MODALITIES = ("text", "image")
"""Modalities of positions: tokens of text, and image patches."""


@dataclass(frozen=True)
class ActivationMap:
    """Sparse activations of a latent on one image.

    Attributes:
        view: "frontal", "lateral" or "prior".
        rows, cols: Size of the patch grid (37 by 37 at 518 px).
        patches: Row-major indices of the patches where the latent fires, ascending.
        values: Activation at each of these patches.
    """

    view: str
    rows: int
    cols: int
    patches: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class StudyText:
    """Tokens and images of one study, shared by the contexts of all latents.

    Attributes:
        study: Pseudonym of the study.
        tokens: Text tokens of the prompt's sections and of the report, and every other token that was read, in order.
        positions: Position of every token in the study's unpadded sequence.
        roles: Name of every token's `TokenRole`, lower case ("indication", "report", ...).
        read: Whether the activation at the token was read.
        span: (start, end) of the tokens without special tokens at the ends.
        views: (view, rows, cols) of the patch grid of every image of the study.
    """

    study: str
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    roles: tuple[str, ...]
    read: tuple[bool, ...]
    span: tuple[int, int]
    views: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Context:
    """Activations of one latent in one study.

    The stored fields are the sparse activations; tokens and dense values come from the study's text, which is read on
    first use.

    Attributes:
        study: Pseudonym, a key of the record set's studies and texts.
        start, end: Span of the text's tokens that is shown.
        modality: "text" or "image": modality of the largest activation. In a context without activations, the modality
            at which the latent fires most in other studies.
        token_indices: Tokens of the text at which the latent fires, ascending.
        token_values: Activation at each of these tokens.
        patches: `(patch indices, activations)` for every view of the text, in its order.
        texts: Source of the study's text.
    """

    study: str
    start: int
    end: int
    modality: str
    token_indices: tuple[int, ...]
    token_values: tuple[float, ...]
    patches: tuple[tuple[tuple[int, ...], tuple[float, ...]], ...]
    texts: Mapping[str, StudyText] = field(compare=False, repr=False)

    @property
    def text(self) -> StudyText:
        """Tokens and views of the study."""
        return self.texts[self.study]

    @cached_property
    def value(self) -> float:
        """Largest activation in the study; 0.0 if the latent does not fire."""
        return max((0.0, *self.token_values, *(v for _, values in self.patches for v in values)))

    @property
    def tokens(self) -> tuple[str, ...]:
        """Tokens shown."""
        return self.text.tokens[self.start : self.end]

    @property
    def positions(self) -> tuple[int, ...]:
        """Position of each shown token in the study's unpadded sequence."""
        return self.text.positions[self.start : self.end]

    @property
    def roles(self) -> tuple[str, ...]:
        """Role of each shown token."""
        return self.text.roles[self.start : self.end]

    @cached_property
    def activations(self) -> tuple[float | None, ...]:
        """Activation at each shown token; None where it was not read."""
        values: list[float | None] = [0.0 if read else None for read in self.text.read]
        for index, value in zip(self.token_indices, self.token_values, strict=True):
            values[index] = value
        return tuple(values[self.start : self.end])

    @cached_property
    def maps(self) -> tuple[ActivationMap, ...]:
        """One activation map per image of the study, also for images on which the latent does not fire."""
        return tuple(
            ActivationMap(*view, patches, values)
            for view, (patches, values) in zip(self.text.views, self.patches, strict=True)
        )

    @property
    def peak(self) -> int:
        """Index into `tokens` of the token with the largest activation; -1 if that is at a patch or does not exist."""
        if self.modality != "text" or not self.token_values:
            return -1
        return self.token_indices[self.token_values.index(max(self.token_values))] - self.start

    @cached_property
    def patch(self) -> tuple[str, int, int] | None:
        """(view, row, col) of the patch with the largest activation; None if that is at a token or does not exist."""
        if self.modality != "image" or not self.value:
            return None
        for one in self.maps:
            if self.value in one.values:
                number = one.patches[one.values.index(self.value)]
                return one.view, number // one.cols, number % one.cols
        return None


@dataclass(frozen=True)
class Interval:
    """Contexts whose activation is in [low, high), and the fraction of all rows in it."""

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
    """Counts of a latent at positions of one modality.

    Attributes:
        modality: "text" or "image".
        rows: Number of activation rows.
        fired: Number of these rows with an activation above zero.
        studies: Number of studies with such a row.
        studies_fired: Number of studies in which the latent fires at least once at such positions.
        mean: Mean activation at the rows where it fires; 0.0 if it never does.
        max: Largest activation.
        p99: 99th percentile of the activations above zero, as `stats.p99` defines it.
    """

    modality: str
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
    modality: str
    f1: float
    low: float
    high: float
    precision: float
    recall: float
    positives: int
    studies: int


@dataclass(frozen=True)
class TokenWeight:
    """Output token, and the amount that the latent's decoder row adds to its logit."""

    token: str
    token_id: int
    weight: float


@dataclass(frozen=True)
class Neighbour:
    """Another latent and its relation to this one.

    "co-fires" is the Jaccard index over rows, "similar" the cosine of decoder rows. "refines" names a latent of a
    coarser level that fires where this one does, with the share of this one's rows.
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
    """Record of one latent.

    Attributes:
        latent: Index, 0 to d_sae - 1.
        level: First Matryoshka level that contains it; 0 is the coarsest.
        status: "alive", "rare" (too few active studies to interpret) or "dead".
        density: Share of all rows at which it fires.
        max: Largest activation.
        p99: 99th percentile of its activations above zero, over all rows.
        histogram: Histogram of its activations above zero.
        firing: Counts at text and at image positions.
        top_tokens, bottom_tokens: Output tokens whose logits its decoder row raises and lowers most.
        agreement: Agreement with findings, best first, text and image separately.
        neighbours: Related latents, see `Neighbour`.
        maps: Mean activation map per view.
        top: Contexts of largest activation, one study each.
        intervals: Contexts per activation interval, highest interval first.
        zero: Contexts of studies in which it never fires.
    """

    latent: int
    level: int
    status: str
    density: float
    max: float
    p99: float
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

    def at(self, modality: str) -> Firing:
        """Counts at "text" or "image" positions."""
        for firing in self.firing:
            if firing.modality == modality:
                return firing
        raise RecordError(
            f"Latent {self.latent} has no counts for {modality!r} positions; expected one of {MODALITIES}."
        )


@dataclass(frozen=True)
class StudyInfo:
    """Study of a record set.

    Attributes:
        study: Pseudonym.
        patient: Pseudonym of the patient; splits keep a patient on one side.
        licence: "public", "credentialed" or "synthetic".
        report: Report text; None where the record set was written without text.
        indication, technique, comparison, prior_report: Prompt sections.
        findings: Keys of the findings of the study (from its truth, or from rule labels of its report).
        labelled_by: Source of the findings: "truth", "rule_labels", or "" if they are unknown.
        boxes: (finding, x_min, y_min, x_max, y_max) in 0..1: of the centre crop if the record set keeps images, else of
            the whole frontal image.
        images: (view, path relative to the record set or to the table's root); empty if images are not kept.
        split: Split of the data set, if any.
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
    """Origin of a record set.

    Attributes:
        model: Name of the model, such as "microsoft/maira-2" or "phantom".
        hook_name: Hook point.
        layer: Decoder layer of the hook point.
        sae: Name or folder of the SAE.
        control: "trained", or the control recorded instead of the trained SAE, such as "untrained" or "raw".
        d_in, d_sae: Sizes of the SAE.
        level_widths: Matryoshka widths, ascending; (d_sae,) for a plain SAE.
        rows_text, rows_image: Number of rows read.
        studies: Number of studies read.
        findings: Finding keys that agreement was measured for.
        seed: Random seed of all sampling.
        versions: Versions of the packages that were used.
        sae_fingerprint: Hash of the SAE's weights, from `sae.fingerprint`.
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
    sae_fingerprint: str = ""


__all__ = [
    "MODALITIES",
    "VIEWS",
    "ActivationMap",
    "Context",
    "FindingAgreement",
    "Firing",
    "Histogram",
    "Interval",
    "LatentRecord",
    "MeanMap",
    "Neighbour",
    "RecordsMeta",
    "StudyInfo",
    "StudyText",
    "TokenWeight",
]
