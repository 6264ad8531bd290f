"""Sentences for a phantom case: several phrasings, negations, doubt, comparison with the prior.

A report is an ordered list of (sentence, entries it states): devices, heart, lungs, pleura, bones. Every
present finding is stated; with a prior each one is stated in its own sentence together with its change; some
absent findings are denied, the common ones mostly. Sentences are a noun phrase in a frame of `phrases`; the
shipped model was trained on them, so that changing one means training again.
"""

from __future__ import annotations

import numpy as np

from sae_lens_maira.phantom.lesions import Lesion
from sae_lens_maira.phantom.phrases import (
    CHANGED,
    CLEAR_LUNGS,
    COMPARED,
    DOUBT_RATE,
    DOUBTED,
    GROUP,
    HEART,
    HINT_RATE,
    HINTS,
    IN_PLACE,
    INDICATIONS,
    MASS_NOUNS,
    NO_AIR,
    NO_CONSOLIDATION,
    NO_DEVICE,
    NO_FLUID,
    NO_FLUID_NO_AIR,
    NO_FRACTURE,
    NO_NODULE,
    NO_OEDEMA,
    NORMAL_HEART,
    NOT_COMPARED,
    ONE_VIEW,
    PRESENT,
    TAKEN_OUT,
    TWO_VIEWS,
)
from sae_lens_maira.phantom.sampling import DEVICES, Case, Entry, zone_of

Sentence = tuple[str, tuple[Entry, ...]]

LONGEST = 68
"""Words of a report; optional denials are dropped beyond it."""


def _pick(options: tuple[str, ...], rng: np.random.Generator) -> str:
    return options[int(rng.integers(len(options)))]


def noun_phrase(lesion: Lesion, rng: np.random.Generator, sized: bool = True) -> str:
    """Name of one finding without article, with side, size and sometimes place.

    Args:
        lesion: What is named.
        rng: Chooses the phrasing.
        sized: Whether the size word is said; it is not where a removed finding is recalled.
    """
    side = lesion.side
    size = f"{lesion.size} " if sized and lesion.size else ""
    if lesion.name == "pleural effusion":
        return _pick((f"{size}{side} pleural effusion", f"{size}pleural effusion on the {side}"), rng)
    if lesion.name == "pneumothorax":
        return _pick(
            (
                f"{size}{side} pneumothorax",
                f"{size}{side} apical pneumothorax",
                f"{size}pneumothorax on the {side}",
            ),
            rng,
        )
    zone = zone_of(lesion)
    if lesion.name == "consolidation":
        return _pick(
            (
                f"{size}consolidation in the {side} {zone} zone",
                f"{size}{side} lung consolidation",
                f"{size}airspace consolidation in the {side} lung",
            ),
            rng,
        )
    if lesion.name == "nodule":
        return _pick(
            (
                f"{size}nodule in the {side} {zone} zone",
                f"{size}{side} lung nodule",
                f"{size}nodule in the {side} lung",
            ),
            rng,
        )
    if lesion.name == "atelectasis":
        return _pick(
            (
                f"{side} basilar atelectasis",
                f"linear atelectasis at the {side} base",
                f"{side} lower lung atelectasis",
            ),
            rng,
        )
    if lesion.name == "oedema":
        return _pick(("pulmonary edema", "bilateral pulmonary edema", "perihilar pulmonary edema"), rng)
    if lesion.name == "rib fracture":
        return _pick(
            (f"{side} rib fracture", f"displaced {side} rib fracture", f"fracture of a {side} lateral rib"),
            rng,
        )
    if lesion.name == "pacemaker":
        return _pick(
            ("left chest wall pacemaker", "pacemaker with a right ventricular lead", "left pacemaker"), rng
        )
    if lesion.name == "endotracheal tube":
        return _pick(("endotracheal tube", "endotracheal tube ending above the carina"), rng)
    if lesion.name == "nasogastric tube":
        return _pick(("nasogastric tube", "nasogastric tube ending in the stomach"), rng)
    if lesion.name == "central venous line":
        way = "internal jugular" if lesion.variant == 0 else "subclavian"
        return _pick(
            (
                f"right {way} central venous line",
                f"right {way} central venous catheter",
                "right central venous line",
            ),
            rng,
        )
    return "cardiomegaly"


def _fill(frame: str, phrase: str, mass: bool) -> str:
    article = "" if mass else ("an " if phrase[0] in "aeio" else "a ")
    slots = {
        "np": phrase,
        "a": article + phrase,
        "the": "the " + phrase,
        "new": ("" if mass else "a ") + "new " + phrase,
    }
    slots["A"] = slots["a"][0].upper() + slots["a"][1:]
    slots["The"] = "The " + phrase
    return frame.format(**slots)


def _state(entry: Entry, rng: np.random.Generator) -> str:
    """One self-contained sentence about one finding."""
    lesion, change = entry.lesion, entry.change
    if lesion.name == "cardiomegaly":
        return _pick(HEART[change], rng)
    phrase = noun_phrase(lesion, rng, sized=change != "removed")
    device = lesion.name in DEVICES
    if change is None:
        doubt = not device and rng.random() < DOUBT_RATE
        frames = DOUBTED if doubt else IN_PLACE if device else PRESENT
    elif change == "removed" and device:
        frames = TAKEN_OUT
    else:
        frames = CHANGED[change]
    return _fill(_pick(frames, rng), phrase, lesion.name in MASS_NOUNS)


def _both_sides(pair: list[Entry], rng: np.random.Generator) -> str:
    """One sentence about the same finding on both sides."""
    plural = "pleural effusions" if pair[0].lesion.name == "pleural effusion" else "lung consolidations"
    size = {entry.lesion.side: entry.lesion.size for entry in pair}
    if size["left"] == size["right"]:
        return _pick(
            (
                f"There are {size['left']} bilateral {plural}.",
                f"Bilateral {size['left']} {plural} are present.",
            ),
            rng,
        )
    first, second = ("left", "right") if rng.random() < 0.5 else ("right", "left")
    return f"Bilateral {plural}, {size[first]} on the {first} and {size[second]} on the {second}."


def _denials(case: Case, rng: np.random.Generator) -> list[tuple[int, str]]:
    """Sentences about what is absent, as (group, sentence); the least needed come last."""
    named = {entry.lesion.name for entry in case.entries}
    out: list[tuple[int, str]] = []

    def maybe(rate: float, group: int, options: tuple[str, ...]) -> None:
        if rng.random() < rate:
            out.append((group, _pick(options, rng)))

    fluid, air = "pleural effusion" in named, "pneumothorax" in named
    if not fluid and not air and rng.random() < 0.6:
        maybe(0.9, 3, NO_FLUID_NO_AIR)
    else:
        if not fluid:
            maybe(0.8, 3, NO_FLUID)
        if not air:
            maybe(0.8, 3, NO_AIR)
    if "cardiomegaly" not in named:
        maybe(0.8, 1, NORMAL_HEART)
    if not named & {"consolidation", "oedema", "atelectasis", "nodule"}:
        maybe(0.85, 2, CLEAR_LUNGS if rng.random() < 0.6 else NO_CONSOLIDATION)
    elif "consolidation" not in named:
        maybe(0.6, 2, NO_CONSOLIDATION)
    if "oedema" not in named:
        maybe(0.2, 2, NO_OEDEMA)
    if "rib fracture" not in named:
        maybe(0.2, 4, NO_FRACTURE)
    if "nodule" not in named:
        maybe(0.06, 2, NO_NODULE)
    if not named & set(DEVICES):
        maybe(0.08, 0, NO_DEVICE)
    return out


def write_report(case: Case, rng: np.random.Generator) -> list[Sentence]:
    """Write the findings of a case: (sentence, the entries it states) in reading order."""
    parts: list[tuple[int, float, Sentence]] = []
    left = list(case.entries)
    for name in ("pleural effusion", "consolidation"):
        pair = [entry for entry in left if entry.lesion.name == name]
        if len(pair) == 2 and not case.has_prior and rng.random() < 0.7:
            parts.append((GROUP[name], rng.random(), (_both_sides(pair, rng), tuple(pair))))
            left = [entry for entry in left if entry.lesion.name != name]
    for entry in left:
        parts.append((GROUP[entry.lesion.name], rng.random(), (_state(entry, rng), (entry,))))
    words = sum(len(sentence.split()) for _, _, (sentence, _) in parts)
    for group, sentence in _denials(case, rng):
        words += len(sentence.split())
        if words <= LONGEST or not parts:
            parts.append((group, rng.random(), (sentence, ())))
    if not parts:
        parts.append((2, 0.0, ("The lungs are clear.", ())))
    return [part for _, _, part in sorted(parts, key=lambda item: item[:2])]


def write_sections(
    case: Case, with_lateral: bool, rng: np.random.Generator
) -> tuple[str | None, str | None, str | None]:
    """Indication, technique and comparison of a study; each is sometimes missing."""
    indication: str | None = _pick(INDICATIONS, rng)
    hints = [HINTS[lesion.name] for lesion in case.now if lesion.name in HINTS]
    if hints and rng.random() < HINT_RATE:
        indication = INDICATIONS[hints[int(rng.integers(len(hints)))]]
    if rng.random() < 0.1:
        indication = None
    technique: str | None = _pick(TWO_VIEWS if with_lateral else ONE_VIEW, rng)
    if rng.random() < 0.15:
        technique = None
    comparison: str | None = _pick(COMPARED if case.has_prior else NOT_COMPARED, rng)
    if rng.random() < 0.15:
        comparison = None
    return indication, technique, comparison
