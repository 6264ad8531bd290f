"""Train the phantom: the vision tower learns to see, then the whole model learns to write.

Phase 1 (*sight*): binary cross-entropy of two linear heads, thrown away afterwards, on the projected patches:
which finding's box covers a patch, which findings and sizes the image shows. MAIRA-2's tower is pretrained too.
Phase 2 (*reports*): next-token cross-entropy over the report tokens of findings, grounded and phrase tasks.
Phase 3 (*polish*): the same, mostly on studies with a prior image to compare with.
A checkpoint holds weights, optimizer and step; batches depend on the step only, so a run resumes where it was.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from sae_lens_maira.errors import ConfigError
from sae_lens_maira.io import atomic_file
from sae_lens_maira.maira2 import (
    Maira2ForConditionalGeneration,
    Maira2Processor,
    build_prompt,
    save_processor,
)
from sae_lens_maira.phantom.corpus import SIZES, Batch, Corpus
from sae_lens_maira.phantom.generator import generate_study
from sae_lens_maira.phantom.initial import initialise
from sae_lens_maira.phantom.model import IMAGE_SIZE, PATCH_SIZE, make_processor, tiny_config
from sae_lens_maira.phantom.sampling import FINDING_KEYS
from sae_lens_maira.phantom.tokenizer import build_tokenizer

POLISH_SEED = 500
"""Added to the seed for phase 3's own studies."""


@dataclass(frozen=True)
class PhantomTraining:
    """Settings of a phantom's training.

    Attributes:
        studies: Studies drawn for training.
        seed: Random seed of studies, weights and batches.
        vocab_size: Tokenizer pieces before the 207 added tokens.
        sight_steps: Steps of phase 1 (0 = skip it).
        sight_batch: Images per step of phase 1.
        steps: Steps of phase 2.
        batch: Sequences per step of phase 2.
        polish_steps: Steps of phase 3 (0 = skip it).
        polish_compare: Share of phase 3's sequences that have a prior image.
        polish_studies: Studies drawn for phase 3, none of which phases 1 and 2 saw.
        lr: Peak learning rate of phase 2 (1.5 times as much in phase 1); cosine to zero after the warm-up.
        warmup: Steps of linear warm-up in either phase.
        autocast: Bfloat16 matrix products on the CPU; a third faster where the processor has them.
        checkpoint_every: Steps between checkpoints.
    """

    studies: int = 16_000
    seed: int = 0
    vocab_size: int = 1024
    sight_steps: int = 6000
    sight_batch: int = 20
    steps: int = 4000
    batch: int = 12
    polish_steps: int = 5000
    polish_compare: float = 0.7
    polish_studies: int = 24_000
    lr: float = 1e-3
    warmup: int = 100
    autocast: bool = True
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        for name in ("studies", "steps", "batch", "sight_batch", "polish_studies", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1.")


class SightHeads(nn.Module):
    """Linear read-outs of projected patches: boxes by patch, findings and sizes by image."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.patch = nn.Linear(d_model, len(FINDING_KEYS))
        self.image = nn.Linear(2 * d_model, len(FINDING_KEYS))
        self.size = nn.Linear(2 * d_model, len(FINDING_KEYS) * len(SIZES))

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits (B, P, F), (B, F) and (B, F, sizes) of patches (B, P, d_model)."""
        pooled = torch.cat([patches.mean(1), patches.amax(1)], -1)
        return self.patch(patches), self.image(pooled), self.size(pooled).unflatten(-1, (-1, len(SIZES)))


def train_sight(
    model: Maira2ForConditionalGeneration, corpus: Corpus, config: PhantomTraining, folder: Path
) -> None:
    """Phase 1: teach tower and projector to see, in place. Resumes from `folder/sight.pt`."""
    heads = SightHeads(model.config.text_config.hidden_size)
    parts = nn.ModuleDict(
        {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector, "heads": heads}
    )
    loop = _Loop(parts, 1.5 * config.lr, config.sight_steps, config, folder / "sight.pt")
    with loop.bar("learning to see") as bar:
        for step in bar:
            rng = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            pick = torch.randint(len(corpus.frontal), (config.sight_batch,), generator=rng)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.autocast):
                seen = model.model.vision_tower(corpus.image(corpus.frontal[pick])).feature_maps[-1][:, 1:]
                patch, image, size = heads(model.model.multi_modal_projector(seen))
            target = corpus.sight.size[pick].long()
            loss = (
                F.binary_cross_entropy_with_logits(patch.float(), corpus.sight.patches[pick].float())
                + F.binary_cross_entropy_with_logits(image.float(), corpus.sight.present[pick])
                + 0.3 * F.cross_entropy(size.float().flatten(0, 1), target.flatten(), ignore_index=-1)
            )
            loop.step(step, loss, bar)


def train_reports(
    model: Maira2ForConditionalGeneration, corpus: Corpus, config: PhantomTraining, folder: Path
) -> None:
    """Phase 2: teach the whole model to write reports, in place. Resumes from `folder/reports.pt`."""
    loop = _Loop(model, config.lr, config.steps, config, folder / "reports.pt")
    _write(
        model, loop, corpus.batches(config.batch, config.seed, loop.start, config.steps), "learning to write"
    )


def polish(
    model: Maira2ForConditionalGeneration, corpus: Corpus, config: PhantomTraining, folder: Path
) -> None:
    """Phase 3: the same at 0.7 of the rate, mostly on studies with a prior image. Resumes from `folder/polish.pt`.

    Comparison is learned last: after phase 2 every image is read, and three changes in ten are still named wrongly.
    """
    steps, seed = config.polish_steps, config.seed + 1
    loop = _Loop(model, 0.7 * config.lr, steps, config, folder / "polish.pt")
    batches = corpus.batches(config.batch, seed, loop.start, steps, compare=config.polish_compare)
    _write(model, loop, batches, "learning to compare")


def _write(
    model: Maira2ForConditionalGeneration, loop: "_Loop", batches: Iterator[Batch], label: str
) -> None:
    with loop.bar(label) as bar:
        for step, batch in zip(bar, batches, strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=loop.config.autocast):
                hidden = model.model(
                    input_ids=batch.ids,
                    attention_mask=batch.attention,
                    pixel_values=batch.pixels,
                    use_cache=False,
                ).last_hidden_state
                # Logits only where a report token is predicted: a third of the sequence, a third of the cost.
                logits = model.lm_head(hidden[:, :-1][batch.scored[:, 1:]])
            loss = F.cross_entropy(logits.float(), batch.ids[:, 1:][batch.scored[:, 1:]])
            loop.step(step, loss, bar)


def _restore(
    model: Maira2ForConditionalGeneration, config: PhantomTraining, checkpoint: Path, steps: int
) -> bool:
    """Put a finished phase's weights into the model; False if the phase has not ended."""
    saved = _read_checkpoint(checkpoint, config) if checkpoint.exists() else None
    if saved is None or saved["step"] < steps:
        return False
    model.load_state_dict(saved["module"])
    return True


def _read_checkpoint(checkpoint: Path, config: PhantomTraining) -> dict:
    saved = torch.load(checkpoint, weights_only=True)
    ours = asdict(config)
    if any(ours.get(name) != value for name, value in saved["config"].items()):
        raise ConfigError(
            f"{checkpoint} was written with other settings ({saved['config']}); "
            "pass the same settings to resume, or another output folder to start again."
        )
    return saved


class _Loop:
    """Optimizer, schedule and checkpoints of one phase."""

    def __init__(
        self, module: nn.Module, lr: float, steps: int, config: PhantomTraining, checkpoint: Path
    ) -> None:
        # In phase 2 the tower can already see; a full-size step at the warm-up's end would make it forget.
        tower = {id(p) for name, p in module.named_parameters() if "vision_tower" in name}
        groups = []
        for in_tower in (False, True):
            for decay in (0.01, 0.0):
                chosen = [
                    p
                    for p in module.parameters()
                    if (id(p) in tower) == in_tower and (p.ndim > 1) == (decay > 0)
                ]
                if chosen:
                    groups.append(
                        {"params": chosen, "weight_decay": decay, "share": 0.3 if in_tower else 1.0}
                    )
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=lr,
            betas=(0.9, 0.98),
            fused=True,
        )
        self.module, self.lr, self.steps, self.config, self.file = module, lr, steps, config, checkpoint
        self.start, self.mean_loss = 0, 0.0
        module.train()
        if checkpoint.exists():
            saved = _read_checkpoint(checkpoint, config)
            module.load_state_dict(saved["module"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.start = saved["step"]

    def bar(self, label: str) -> "tqdm[int]":
        return tqdm(
            range(self.start, self.steps), desc=label, unit="step", initial=self.start, total=self.steps
        )

    def step(self, step: int, loss: torch.Tensor, bar: "tqdm[int]") -> None:
        warm = min(1.0, (step + 1) / max(1, self.config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = group["share"] * self.lr * warm * 0.5 * (1 + math.cos(math.pi * step / self.steps))
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.mean_loss = loss.item() if not self.mean_loss else 0.98 * self.mean_loss + 0.02 * loss.item()
        bar.set_postfix(loss=f"{self.mean_loss:.3f}")
        if (step + 1) % self.config.checkpoint_every == 0 or step + 1 == self.steps:
            state = {
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": step + 1,
                "config": asdict(self.config),
            }
            # A kill during the write leaves the previous checkpoint whole.
            with atomic_file(self.file) as draft:
                torch.save(state, draft)


def train_phantom(config: PhantomTraining, out: Path) -> Path:
    """Train a phantom from scratch, or resume one.

    Args:
        config: The settings.
        out: Folder of checkpoints (`sight.pt`, `reports.pt`, `polish.pt`) and of the result.

    Returns:
        `out/weights`: the model as fp16 safetensors in the published key layout, with its processor.

    Raises:
        ConfigError: `out` holds checkpoints of other settings.
    """
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)
    processor = build_processor(config)
    model = Maira2ForConditionalGeneration(tiny_config(len(processor.tokenizer), processor.image_token_id))
    grid = IMAGE_SIZE // PATCH_SIZE
    if not _restore(model, config, out / "reports.pt", config.steps):
        corpus = Corpus(processor, config.studies, config.seed, grid)
        initialise(model, corpus.pixels[corpus.frontal[:1500]])
        if config.sight_steps:
            train_sight(model, corpus, config, out)
        train_reports(model, corpus, config, out)
        del corpus  # a gigabyte that the next one needs
    if config.polish_steps:
        # The seeds of other phases and of held-out studies are never POLISH_SEED apart.
        fresh = Corpus(processor, config.polish_studies, config.seed + POLISH_SEED, grid)
        polish(model, fresh, config, out)
    folder = out / "weights"
    model.eval().half().save_pretrained(folder)
    save_processor(processor, folder)
    return folder


def build_processor(config: PhantomTraining) -> Maira2Processor:
    """The phantom's processor, its tokenizer learned from the prompts and reports of 4,000 of its studies."""
    texts = []
    for index in range(min(4000, config.studies)):
        study = generate_study(config.seed, index)
        texts += [build_prompt(study, task).text for task in ("findings", "grounded")]
        texts += [study.report or "", *(item.text for item in study.grounded_report or ())]
    return make_processor(build_tokenizer(texts, config.vocab_size))
