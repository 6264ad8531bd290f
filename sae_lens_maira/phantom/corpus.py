"""Training material for the phantom: studies encoded once, kept as tensors, served in batches of similar length.

Every study gives up to three examples (findings report, grounded report, one phrase to ground) that share its
images. The images pass through the processor's own path, so the model is trained on what users will pass to it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from sae_lens_maira.maira2 import Maira2Processor, TokenRole
from sae_lens_maira.phantom.generator import generate_study
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.studies import Study

PRIOR = 2  # the view number of a prior frontal image's patches
SIZES = ("small", "moderate", "large")
TASK_SHARE = {"findings": 0.72, "grounded": 0.2, "phrase": 0.08}


@dataclass(frozen=True)
class Example:
    """One teacher-forced sequence.

    Attributes:
        ids: (L,) token ids.
        scored: (L,) True where the token is report text, which the loss is taken over.
        images: Rows of `Corpus.pixels` that fill its image tokens, in order.
        compares: Whether a prior image is among them.
    """

    ids: torch.Tensor
    scored: torch.Tensor
    images: tuple[int, ...]
    compares: bool = False


@dataclass(frozen=True)
class Batch:
    """A padded batch: `ids`, `attention`, `scored` are (B, L); `pixels` is (images, 3, S, S)."""

    ids: torch.Tensor
    attention: torch.Tensor
    scored: torch.Tensor
    pixels: torch.Tensor


@dataclass(frozen=True)
class SightTargets:
    """What a frontal image shows, for the phase in which the vision tower learns to see.

    Attributes:
        present: (N, F) 1 where the finding is on the frontal image.
        patches: (N, P, F) share of each patch that the finding's box covers.
        size: (N, F) index into `SIZES`, or -1 where the finding is absent or has no size.
    """

    present: torch.Tensor
    patches: torch.Tensor
    size: torch.Tensor


class Corpus:
    """Encoded studies with their pixels.

    Attributes:
        pixels: (M, S, S) float16, one channel: the three channels of a grey image are equal.
        frontal: (N,) row of `pixels` that holds study n's frontal image.
        examples: Examples per task.
        sight: Targets of the frontal images.
    """

    def __init__(self, processor: Maira2Processor, n: int, seed: int, grid: int) -> None:
        self.examples: dict[str, list[Example]] = {task: [] for task in TASK_SHARE}
        self._pools: dict[tuple[str, bool], list[Example]] = {}
        pixels: list[torch.Tensor] = []
        frontal: list[int] = []
        n_keys = len(FINDING_KEYS)
        present = torch.zeros(n, n_keys)
        patches = torch.zeros(n, grid * grid, n_keys, dtype=torch.float16)
        size = torch.full((n, n_keys), -1, dtype=torch.int8)
        rng = np.random.default_rng((seed, 7))
        for index in tqdm(range(n), desc="phantom studies", unit="study"):
            study = generate_study(seed, index)
            rows = []
            frontal.append(len(pixels))
            for image in (study.frontal, study.lateral, study.prior_frontal):
                if image is not None:
                    rows.append(len(pixels))
                    pixels.append(processor.image_to_pixels(image)[0].half())
            self._add_examples(processor, study, tuple(rows), rng)
            for finding in study.truth or ():
                if not finding.present:
                    continue
                column = FINDING_KEYS.index(finding.key)
                present[index, column] = 1
                if finding.size in SIZES:
                    size[index, column] = SIZES.index(finding.size)
                if finding.box is not None:
                    cover = torch.from_numpy(box_cover(finding.box, grid))
                    patches[index, :, column] = torch.maximum(patches[index, :, column], cover.half())
        self.pixels = torch.stack(pixels)
        self.frontal = torch.tensor(frontal)
        self.sight = SightTargets(present, patches, size)

    def _add_examples(
        self, processor: Maira2Processor, study: Study, rows: tuple[int, ...], rng: np.random.Generator
    ) -> None:
        encodings = {"findings": processor.encode(study, task="findings", report="teacher")}
        encodings["grounded"] = processor.encode(study, task="grounded", report="teacher")
        located = [item for item in study.grounded_report or () if item.boxes]
        if located:
            phrase = located[int(rng.integers(len(located)))].text
            encodings["phrase"] = processor.encode(study, task="phrase", phrase=phrase, report="teacher")
        # Comparison with a prior is the hardest thing to learn; such studies are sampled half as often again,
        # and so are rib fractures, the smallest lesion.
        copies = 1 + (study.prior_frontal is not None and rng.random() < 0.5)
        if any(finding.name == "rib fracture" for finding in study.truth or ()):
            copies += int(rng.random() < 0.5)
        for task, encoding in encodings.items():
            scored = encoding.roles[0] == TokenRole.REPORT
            images = rows[: encoding.images_per_row[0]]
            compares = bool((encoding.view == PRIOR).any())
            self.examples[task] += [Example(encoding.input_ids[0].int(), scored, images, compares)] * copies

    def batches(
        self, size: int, seed: int, start: int, stop: int, compare: float | None = None
    ) -> Iterator[Batch]:
        """Batches `start` to `stop` of an endless deterministic stream.

        Sequences of one batch have similar length: 16 batches are drawn together, sorted, and served in random order.

        Args:
            size: Sequences per batch.
            seed: Random seed of the stream.
            start: First batch; a resumed run passes the steps it has made.
            stop: End of the stream.
            compare: Share of sequences with a prior image; None leaves it as the studies have it.
        """
        tasks = list(TASK_SHARE)
        share = np.array([TASK_SHARE[t] for t in tasks])
        group = 16
        for number in range(start // group, -(-stop // group)):
            rng = np.random.default_rng((seed, number))
            chosen: list[Example] = []
            for task in rng.choice(len(tasks), size=size * group, p=share / share.sum()):
                pool = self.examples[tasks[task]]
                if compare is not None and tasks[task] != "phrase":
                    wanted = bool(rng.random() < compare)
                    pool = self._pool(tasks[task], wanted)
                chosen.append(pool[int(rng.integers(len(pool)))])
            chosen.sort(key=lambda example: len(example.ids))
            for offset, place in enumerate(rng.permutation(group)):
                if start <= number * group + offset < stop:
                    yield self.collate(chosen[place * size : (place + 1) * size])

    def _pool(self, task: str, compares: bool) -> list[Example]:
        key = (task, compares)
        if key not in self._pools:
            self._pools[key] = [example for example in self.examples[task] if example.compares == compares]
        return self._pools[key]

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Pad examples on the right and gather their images."""
        length = max(len(example.ids) for example in examples)
        ids = torch.zeros(len(examples), length, dtype=torch.long)
        attention = torch.zeros_like(ids)
        scored = torch.zeros(len(examples), length, dtype=torch.bool)
        for row, example in enumerate(examples):
            end = len(example.ids)
            ids[row, :end] = example.ids
            attention[row, :end] = 1
            scored[row, :end] = example.scored
        rows = [image for example in examples for image in example.images]
        return Batch(ids, attention, scored, self.image(torch.tensor(rows)))

    def image(self, rows: torch.Tensor) -> torch.Tensor:
        """Pixels (len(rows), 3, S, S) float32 of stored images."""
        return self.pixels[rows].float()[:, None].expand(-1, 3, -1, -1).contiguous()


def box_cover(box: tuple[float, float, float, float], grid: int) -> np.ndarray:
    """Share of each patch covered by a box.

    Args:
        box: x_min, y_min, x_max, y_max in 0..1.
        grid: Patches along a side.

    Returns:
        (grid * grid,) float32 in 0..1, row-major.
    """
    edges = np.arange(grid) / grid
    x = np.clip(np.minimum(edges + 1 / grid, box[2]) - np.maximum(edges, box[0]), 0, None) * grid
    y = np.clip(np.minimum(edges + 1 / grid, box[3]) - np.maximum(edges, box[1]), 0, None) * grid
    return np.outer(y, x).reshape(-1).astype(np.float32)
