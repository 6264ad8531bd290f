"""Do change words follow the prior? The phantom's prior image and prior report are swapped for those of another study.

For every finding of a study, the prior determines whether it is new (the prior does not have it) or not. A report
follows its prior if its change words agree with this.

Latents of report tokens are then compared at the token that predicts the first word at which the two reports' sentences
about a finding differ. The text before it is the same in both versions, so that only the prior differs. On one half,
latents of change are those whose firing at this token correlates most with "new". On the other half they should turn on
or off with the prior, and the controls (latents chosen for findings, and the most active others) should not.

    python recipes/counterfactual_prior.py --config recipes/counterfactual_prior.yaml
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from sae_lens_maira.attribution.counterfactual import counterfactual
from sae_lens_maira.attribution.difference import compared_with
from sae_lens_maira.attribution.inputs import encode_with_report, hook_point_of
from sae_lens_maira.attribution.residual import BUDGET_BYTES, ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences, split_sentences
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.interface import load_sae
from sae_lens_maira.io import atomic_write, csv_of
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.phantom import generate_studies, load_phantom, read_report
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.recipes._shared import mean_line
from sae_lens_maira.stats import f1_of_firing
from sae_lens_maira.studies import Study

BEFORE = frozenset({"unchanged", "larger", "smaller"})
"""Change words that imply that the prior had the finding."""


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison.

    Attributes:
        out: Folder of the tables; created if missing.
        sae: SAE of report tokens.
        studies: Studies with a prior; one half chooses latents, the other is reported.
        latents: Latents that are chosen for change, and for findings.
        seed: Random seed of the studies.
    """

    out: Path = Path("runs/counterfactual_prior")
    sae: str = "phantom-text"
    studies: int = 240
    latents: int = 8
    seed: int = 99_000


def run(settings: Settings) -> Path:
    """Run the comparison and write its tables.

    Args:
        settings: The settings.

    Returns:
        The folder.
    """
    settings.out.mkdir(parents=True, exist_ok=True)
    hooked, sae = HookedMaira2(load_phantom()), load_sae(settings.sae)
    words: list[dict[str, Any]] = []
    sites: list[Site] = []
    for study, own, other in tqdm(pairs(settings), total=settings.studies, desc="swap the prior"):
        swapped = counterfactual(study, prior_image=other.frontal, prior_report=other.report)
        versions = ((study, own), (swapped, other.present_keys))
        reports = [r.text for r in hooked.generate([study, swapped], return_type="reports")]
        labels = [read_report(text) for text in reports]
        for arm, known, (_, before) in zip(("own prior", "swapped prior"), labels, versions, strict=True):
            for key in sorted(study.present_keys & known.present):
                word = known.changes.get(key)
                if word is not None:
                    expected = BEFORE if key in before else {"new"}
                    words.append({
                        "study": study.study_id, "arm": arm, "finding": key, "word": word,
                        "flips": (key in own) != (key in other.present_keys), "follows": word in expected,
                    })  # fmt: skip
        sites += sites_of(hooked, sae, study, swapped, reports)
    table = pd.DataFrame(words)
    atomic_write(settings.out / "words.csv", csv_of(table))
    lines = [
        "# Prior swapped",
        "",
        "| measure | value | 95 % interval | n |",
        "|---|---|---|---|",
    ]
    for arm, rows in table.groupby("arm", sort=False):
        lines.append(mean_line(f"{arm}: change words that follow it", rows["follows"].to_numpy(float)))
    flipped = table.query("arm == 'swapped prior' and flips")
    lines.append(
        mean_line("swapped prior, only where old and new prior disagree", flipped["follows"].to_numpy(float))
    )
    lines += [mean_line(name, values) for name, values in flips(sites, settings.latents).items()]
    atomic_write(settings.out / "counterfactual_prior.md", "\n".join(lines) + "\n")
    return settings.out


def pairs(settings: Settings) -> Iterator[tuple[Study, frozenset[str], Study]]:
    """Yield studies with a prior and its report, the findings of this prior, and another study with the prior to swap
    in.
    """
    drawn = generate_studies(12 * settings.studies, settings.seed)
    others = [s for s in drawn if s.prior_frontal is None and s.report and s.present_keys]
    mine = [s for s in drawn if s.prior_frontal is not None and s.prior_report and s.present_keys]
    for study, other in list(zip(mine, others, strict=False))[: settings.studies]:
        yield study, read_report(study.prior_report or "").present, other


@dataclass(frozen=True)
class Site:
    """One finding that both reports mention, with the original and with the swapped prior.

    Attributes:
        study: The study's id.
        finding: The finding.
        new: Whether the report with the original prior, and the report with the swapped prior, state it as new.
        fires: (2, d_sae) latents that are active at the predicting token, with the original and with the swapped prior.
    """

    study: str
    finding: str
    new: tuple[bool, bool]
    fires: np.ndarray


def sites_of(
    hooked: HookedMaira2, sae: Any, study: Study, swapped: Study, reports: Sequence[str]
) -> list[Site]:
    """Find the findings of one study that both reports state with a change word, in different sentences."""
    changes = [read_report(text).changes for text in reports]
    sentences = [
        {key: text[a:b] for a, b in split_sentences(text) for key in read_report(text[a:b]).changes}
        for text in reports
    ]
    runs = [
        ResidualRun(hooked, encode_with_report(hooked, one, reports[0]), hook_point_of(sae))
        for one in (study, swapped)
    ]
    tokens = report_sentences(runs[0].encoding, hooked.tokenizer)
    starts = [int((run.encoding.roles[0] == TokenRole.REPORT).nonzero()[0, 0]) for run in runs]
    found = []
    for key in sorted(set(sentences[0]) & set(sentences[1]) & set(changes[0]) & set(changes[1])):
        here, instead = sentences[0][key], sentences[1][key]
        span = next((one for one in tokens if one.text == here), None)
        if span is None or here == instead:
            continue
        place = compared_with(hooked, study, runs[0], span, instead, BUDGET_BYTES).shared - 1
        rows = [run.hidden[place - starts[0] + start] for run, start in zip(runs, starts, strict=True)]
        with torch.no_grad():
            fires = sae.encode(torch.stack(rows).to(sae.W_dec)) > 0
        new = (changes[0][key] == "new", changes[1][key] == "new")
        found.append(Site(study.study_id, key, new, fires.numpy()))
    return found


def flips(sites: Sequence[Site], n: int) -> dict[str, np.ndarray]:
    """Measure how often latents turn on or off with the prior, on the second half of the studies.

    Args:
        sites: Findings of the studies, in order.
        n: Number of latents of every selection.

    Returns:
        Selection and case -> one value per finding: of the selected latents that are active with one of the priors, the
        share that is inactive with the other. "In the expected direction" counts only latents that are active for the
        prior that the sign of their correlation predicts.
    """
    names = list(dict.fromkeys(site.study for site in sites))
    early = set(names[: len(names) // 2])
    first = [site for site in sites if site.study in early]
    if not first:
        return {}
    fires = np.concatenate([site.fires for site in first])
    sign = correlation(fires, np.array([new for site in first for new in site.new]))
    stated = np.array([[site.finding == key for key in FINDING_KEYS] for site in first for _ in range(2)])
    change = np.argsort(-np.abs(sign))[:n]
    rest = np.setdiff1d(np.arange(len(sign)), change)
    chosen = {
        "change": change,
        "findings": rest[np.argsort(-f1_of_firing(fires, stated).max(1)[rest])][:n],
        "neither, the most active": rest[np.argsort(-fires.mean(0)[rest])][:n],
    }
    found: dict[str, list[float]] = {}

    def count(label: str, right: np.ndarray, either: np.ndarray) -> None:
        if either.any():
            found.setdefault(label, []).append(float(right[either].mean()))

    for site in sites:
        if site.study in early:
            continue
        either, moved = site.fires[0] | site.fires[1], np.logical_xor(*site.fires)
        turned = site.new[0] != site.new[1]
        where = 'where "new" comes or goes' if turned else "where it does not"
        for label, latents in chosen.items():
            count(f"latents of {label} that flip, {where}", moved[latents], either[latents])
        if turned:
            on, off = site.fires if site.new[0] else site.fires[::-1]
            side = np.where(sign > 0, on & ~off, off & ~on)
            count("latents of change that flip in the expected direction", side[change], either[change])
    return {name: np.array(values) for name, values in sorted(found.items())}


def correlation(fires: np.ndarray, label: np.ndarray) -> np.ndarray:
    """(d_sae,) correlation of firing (n, d_sae) with a label (n,); 0 for latents that never or always fire."""
    x, y = fires - fires.mean(0), label - label.mean()
    size = np.sqrt((x**2).mean(0) * (y**2).mean())
    return np.divide((x * y[:, None]).mean(0), size, out=np.zeros(x.shape[1]), where=size > 0)


if __name__ == "__main__":
    from sae_lens_maira.cli.parser import run_recipe

    sys.exit(run_recipe(Settings, run, __doc__))
