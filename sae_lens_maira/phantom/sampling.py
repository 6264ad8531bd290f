"""Which findings a phantom study has, where they are and how they changed: the truth behind images and report.

About one study in eight is wholly normal; in the others every finding is sampled independently, and samples that
no image could show (air and fluid free in the same hemithorax, a lesion under a large effusion) are thrown
again. A case with a prior gives every finding a change; sized ones move by one whole size step, so that it
can be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sae_lens_maira.phantom.lesions import Lesion

FINDING_KEYS: tuple[str, ...] = (
    "pleural_effusion_left",
    "pleural_effusion_right",
    "pneumothorax_left",
    "pneumothorax_right",
    "consolidation_left",
    "consolidation_right",
    "cardiomegaly",
    "oedema",
    "atelectasis",
    "nodule",
    "pacemaker",
    "endotracheal_tube",
    "central_venous_line",
    "nasogastric_tube",
    "rib_fracture",
)
"""The label keys, in label order."""

DEVICES = ("pacemaker", "endotracheal tube", "central venous line", "nasogastric tube")
GROWING = ("pleural effusion", "pneumothorax", "consolidation")
"""Findings that can be larger or smaller than before."""
LASTING = ("cardiomegaly", "nodule", "rib fracture")
"""Findings that do not go away between two images."""
SIZES = ("small", "moderate", "large")

NORMAL_SHARE = 0.125
RATE = {
    "pneumothorax": 0.38,
    "pleural effusion": 0.36,
    "consolidation": 0.30,
    "atelectasis": 0.36,
    "nodule": 0.32,
}
OTHER_RATE = 0.24
MOST_FINDINGS = 6
REMOVED_RATE = 0.07


@dataclass(frozen=True)
class Entry:
    """One finding of a case: as it is now, as it was, and the word for the difference."""

    lesion: Lesion
    change: str | None = None
    before: Lesion | None = None
    """The lesion on the prior image; None when there is no prior or the finding is new."""

    @property
    def present(self) -> bool:
        """Whether it is on the current image."""
        return self.change != "removed"


@dataclass(frozen=True)
class Case:
    """All findings of one study, and whether it has a prior."""

    entries: tuple[Entry, ...]
    has_prior: bool

    @property
    def now(self) -> list[Lesion]:
        """Lesions on the current image."""
        return [entry.lesion for entry in self.entries if entry.present]

    @property
    def before(self) -> list[Lesion]:
        """Lesions on the prior image."""
        return [entry.before for entry in self.entries if entry.before is not None]

    def as_prior(self) -> Case:
        """The case as the prior report saw it: nothing known before, so no change is stated."""
        return Case(tuple(Entry(lesion) for lesion in self.before), has_prior=False)


def split_key(key: str) -> tuple[str, str | None]:
    """Name and side of a key: ("pleural effusion", "left") of "pleural_effusion_left"; None where unsided."""
    for side in ("left", "right"):
        if key.endswith("_" + side):
            return key[: -len(side) - 1].replace("_", " "), side
    return key.replace("_", " "), None


def visible_together(lesions: Sequence[Lesion]) -> bool:
    """Whether one image can show all of these plainly."""
    for side in ("left", "right"):
        mine = {lesion.name: lesion for lesion in lesions if lesion.side == side}
        fluid, air = mine.get("pleural effusion"), mine.get("pneumothorax")
        focal = [name for name in ("consolidation", "nodule", "atelectasis") if name in mine]
        if fluid and air:
            return False
        if fluid and fluid.size != "small" and "atelectasis" in mine:
            return False
        if focal and ((fluid and fluid.size == "large") or (air and air.size != "small")):
            return False
        if fluid and fluid.size == "moderate" and len(focal) > 1:
            return False
    return True


def _zone_height(rng: np.random.Generator, zone: int) -> float:
    return float(rng.uniform(*((0.255, 0.315), (0.41, 0.47), (0.555, 0.605))[zone]))


def zone_of(lesion: Lesion) -> str:
    """The zone word of a focal lung lesion, from its height."""
    return zone_at(lesion.v)


def zone_at(v: float) -> str:
    """The zone word of a height, 0 (top) to 1."""
    return "upper" if v < 0.36 else "mid" if v < 0.51 else "lower"


def _focal_place(rng: np.random.Generator, side: str, zone: int) -> tuple[float, float]:
    """Distance from the midline and height of a focal lesion that stays inside the lung and off the heart."""
    v = _zone_height(rng, zone)
    near, far = ((0.145, 0.205), (0.175, 0.265), (0.255, 0.290) if side == "left" else (0.200, 0.275))[zone]
    return float(rng.uniform(near, far)), v


def _place(entries: list[Entry], rng: np.random.Generator) -> list[Entry]:
    """Give every entry its place; what is on either image counts as in the way."""
    both = [e.lesion for e in entries] + [e.before for e in entries if e.before is not None]
    placed: list[Entry] = []
    taken: dict[str, set[int]] = {"left": set(), "right": set()}
    for side in ("left", "right"):
        here = [(lesion.name, lesion.size) for lesion in both if lesion.side == side]
        if ("pleural effusion", "moderate") in here:
            taken[side] |= {1, 2}
        if any(name == "pneumothorax" for name, _ in here):
            taken[side] |= {0}
        if any(name == "atelectasis" for name, _ in here):
            taken[side] |= {2}
    for entry in entries:
        lesion = entry.lesion
        d, v, tilt, variant = 0.0, 0.0, 0.0, 0
        if lesion.name in ("consolidation", "nodule"):
            side = str(lesion.side)
            free = [zone for zone in range(3) if zone not in taken[side]] or [0]
            zone = int(rng.choice(free))
            taken[side].add(zone)
            d, v = _focal_place(rng, side, zone)
            tilt = float(rng.uniform(-0.08, 0.08))
        elif lesion.name == "atelectasis":
            low = 0.272 if lesion.side == "left" else 0.185
            d, v = float(rng.uniform(low, 0.288)), float(rng.uniform(0.540, 0.595))
            tilt = float(rng.uniform(-0.35, 0.35))
        elif lesion.name == "rib fracture":
            v = float(rng.uniform(0.34, 0.60))
            rim = 0.10 + 0.275 * float(np.sqrt(1 - ((v - 0.62) / 0.5) ** 2))
            d = rim - float(rng.uniform(0.015, 0.045))
        elif lesion.name == "central venous line":
            variant, v = int(rng.random() < 0.5), float(rng.uniform(-0.03, 0.03))
        elif lesion.name in DEVICES:
            d, v = float(rng.uniform(-0.012, 0.012)), float(rng.uniform(-0.025, 0.025))
        where = {"d": d, "v": v, "tilt": tilt, "variant": variant}
        before = replace(entry.before, **where) if entry.before is not None else None
        placed.append(Entry(replace(lesion, **where), entry.change, before))
    return placed


def _changed(lesion: Lesion, rng: np.random.Generator) -> Entry:
    """Give a present finding its change and its former self."""
    if lesion.name in GROWING:
        change = str(rng.choice(("new", "larger", "smaller", "unchanged"), p=(0.22, 0.26, 0.26, 0.26)))
        if change in ("larger", "smaller"):
            step = int(rng.integers(2))
            low, high = SIZES[step], SIZES[step + 1]
            now, then = (high, low) if change == "larger" else (low, high)
            return Entry(replace(lesion, size=now), change, replace(lesion, size=then))
    else:
        change = "new" if rng.random() < 0.45 else "unchanged"
    return Entry(lesion, change, None if change == "new" else lesion)


def _draw(key: str, rng: np.random.Generator) -> Lesion:
    name, side = split_key(key)
    if name in ("atelectasis", "nodule", "rib fracture"):
        side = "left" if rng.random() < 0.5 else "right"
    size = SIZES[int(rng.integers(3))] if name in (*GROWING, "nodule") else None
    if name == "nodule" and size == "moderate":
        size = "small" if rng.random() < 0.5 else "large"
    return Lesion(name, side, size)


def draw_case(rng: np.random.Generator) -> Case:
    """Draw the findings of one study."""
    has_prior = bool(rng.random() < 0.40)
    normal = bool(rng.random() < NORMAL_SHARE)
    while True:
        entries: list[Entry] = []
        for key in FINDING_KEYS:
            rate = RATE.get(split_key(key)[0], OTHER_RATE)
            present = not normal and rng.random() < rate
            if present:
                lesion = _draw(key, rng)
                entries.append(_changed(lesion, rng) if has_prior else Entry(lesion))
            elif has_prior and rng.random() < REMOVED_RATE:
                lesion = _draw(key, rng)
                if lesion.name not in LASTING:
                    entries.append(Entry(lesion, "removed", lesion))
        case = Case(tuple(entries), has_prior)
        fits = len(entries) <= MOST_FINDINGS and visible_together(case.now) and visible_together(case.before)
        if fits and (normal or case.now):
            return Case(tuple(_place(entries, rng)), has_prior)
