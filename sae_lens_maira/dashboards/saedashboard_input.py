"""Studies as sae-dashboard's runner takes a text model's prompts: token ids, cached activations, a stand-in model.

    prompt = pad ... pad  study  row  row  row ...  pad ... pad        one prompt a study, one token a row

A row of text keeps its token id; a patch gets an id of its own behind the vocabulary, so does every study. Nothing is
run: the runner finds `model_activations_{i}.pt` in its cache. It knows nothing about sae-dashboard's classes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from sae_lens_maira.dashboards.sequences import clean
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.activations import spell
from sae_lens_maira.latents.statistics import VIEWS

if TYPE_CHECKING:
    from sae_lens_maira.latents.source import ActivationSource

PAD = "␀"
MOST_POSITIONS = 2**24
"""`torch.quantile`, which the runner calls on every latent, takes no more values."""


@dataclass(frozen=True)
class Readout:
    """What turns latents into words.

    Attributes:
        tokens: V spelled tokens of the vocabulary.
        unembed: (d_in, V), the gain of the final norm folded in, as in latent records.
        side: patches along a side of an image.
    """

    tokens: Sequence[str]
    unembed: torch.Tensor
    side: int

    @classmethod
    def of(cls, maira: Any) -> Readout:
        """The readout of a MAIRA-2 with its processor."""
        gain = maira.model.get_submodule("model.language_model.norm").weight.detach().float().cpu()
        head = maira.model.lm_head.weight.detach().float().cpu()
        spelled = maira.processor.tokenizer.convert_ids_to_tokens(list(range(len(head))))
        tokens = [spell(token or f"<{i}>") for i, token in enumerate(spelled)]
        return cls(tokens, (head * gain).T.contiguous(), maira.processor.patches_per_side)


@dataclass(frozen=True)
class Prompts:
    """Studies as prompts.

    Attributes:
        tokens: (n, S) token ids.
        names: n names of studies.
        texts: token id -> text, patches, studies and the pad included.
        first_study: token id of the first study; patches have the ids before it, down to `vocabulary`.
        vocabulary: V; ids from here on have no logit.
        pad: token id.
        rows: activation rows in all prompts together.
        hook_name: where they were taken.
    """

    tokens: torch.Tensor
    names: tuple[str, ...]
    texts: dict[int, str]
    first_study: int
    vocabulary: int
    pad: int
    rows: int
    hook_name: str

    @property
    def silent(self) -> set[int]:
        """Ids at whose positions nothing was read."""
        return set(range(self.first_study, self.pad + 1))

    def model(self, readout: Readout, harmless: bool = False) -> Any:
        """The four attributes that the runner reads of a model; logits of ids behind the vocabulary are zero.

        Args:
            readout: words.
            harmless: no token may hold signs of markup, since the classic page parses them.
        """
        unembed = torch.zeros(readout.unembed.shape[0], self.pad + 1)
        unembed[:, : self.vocabulary] = readout.unembed
        # A text may stand for several ids; the page looks up ids in an inverted {text: id}, so texts are made unique.
        texts: dict[str, int] = {}
        for number, text in self.texts.items():
            shown = _harmless(text) if harmless else text
            while shown in texts:
                shown += "\u200b"
            texts[shown] = number
        return SimpleNamespace(
            hook_dict={self.hook_name: None},
            W_U=unembed,
            tokenizer=SimpleNamespace(vocab=texts),
            cfg=SimpleNamespace(d_vocab=self.pad + 1),
        )


def write_prompts(
    blocks: ActivationSource,
    names: Sequence[str],
    readout: Readout,
    silent: torch.Tensor,
    cache: Path,
    buffer: tuple[int, int],
    per_file: int,
) -> Prompts:
    """Lay studies out as prompts, and write their activations where the runner looks for them.

    Args:
        blocks: units of rows, whole studies in ascending order; read twice.
        names: of the studies, by number.
        readout: words.
        silent: (d_in,) what stands at positions without a row.
        cache: empty folder.
        buffer: tokens that the runner wants before and behind every hit.
        per_file: prompts per file, the runner's minibatch.

    Raises:
        RecordError: no rows, or more positions than the runner's quantiles take.
    """
    ids: dict[int, np.ndarray] = {}
    first, hook_name, side = len(readout.tokens), "", readout.side
    for block in _every(blocks):
        hook_name = block.hook_name
        patch = first + (block.kind.astype(np.int64) * side + block.patch_row) * side + block.patch_col
        token = np.where(block.is_image, patch, block.token)
        for study in np.unique(block.study).tolist():
            mine = np.flatnonzero(block.study == study)
            ids[study] = token[mine[np.argsort(block.position[mine], kind="stable")]]
    if not ids:
        raise RecordError("The blocks held no rows, so there is nothing to show; give studies with reports.")
    before, behind = buffer[0] + 1, buffer[1]
    length = before + max(map(len, ids.values())) + behind
    if len(ids) * length > MOST_POSITIONS:
        raise RecordError(
            f"{len(ids)} studies of up to {length} positions were given; sae-dashboard's quantiles take at most "
            f"{MOST_POSITIONS} positions in all. Give at most {MOST_POSITIONS // length} studies, or use "
            "`dashboards neuronpedia --kind saedashboard`, which has no such limit."
        )
    first_study = first + len(VIEWS) * side * side
    pad = first_study + len(ids)
    tokens = torch.full((len(ids), length), pad, dtype=torch.int64)
    for number, (_, mine) in enumerate(sorted(ids.items())):
        tokens[number, before - 1] = first_study + number
        tokens[number, before : before + len(mine)] = torch.from_numpy(mine)
    shown = [names[study] for study in sorted(ids)]
    texts = {number: clean(token) for number, token in enumerate(readout.tokens)}
    texts |= {
        first + (view * side + row) * side + col: f"<{name} r{row:02d}c{col:02d}>"
        for view, name in enumerate(VIEWS)
        for row in range(side)
        for col in range(side)
    }
    texts |= {first_study + number: f"⟦study {clean(name)}⟧" for number, name in enumerate(shown)}
    texts[pad] = PAD
    prompts = Prompts(
        tokens, tuple(shown), texts, first_study, first, pad, sum(map(len, ids.values())), hook_name
    )
    _write_cache(blocks, prompts, sorted(ids), silent, cache, before, per_file)
    return prompts


def _write_cache(
    blocks: ActivationSource,
    prompts: Prompts,
    order: list[int],
    silent: torch.Tensor,
    cache: Path,
    before: int,
    per_file: int,
) -> None:
    """One file per `per_file` prompts, in order, one file in memory at a time."""
    n, length = prompts.tokens.shape
    place = {study: number for number, study in enumerate(order)}
    values, filled = torch.empty(0), 0
    for block in _every(blocks):
        for study in np.unique(block.study).tolist():
            number = place[study]
            if number != filled:
                raise RecordError(
                    f"The blocks gave study {study} out of order; whole studies in ascending order were expected. "
                    "Sort them, or harvest anew."
                )
            if number % per_file == 0:
                values = silent.float().repeat(min(per_file, n - number), length, 1)
            mine = np.flatnonzero(block.study == study)
            mine = mine[np.argsort(block.position[mine], kind="stable")]
            rows = block.values[torch.from_numpy(mine)].float()
            values[number % per_file, before : before + len(rows)] = rows
            filled += 1
            if filled % per_file == 0 or filled == n:
                torch.save({prompts.hook_name: values}, cache / f"model_activations_{number // per_file}.pt")


def _every(blocks: ActivationSource) -> Iterator[Any]:
    for unit in range(len(blocks)):
        yield from blocks[unit]


def plain_copy(sae: SAE[Any]) -> SAE[Any]:
    """A deep copy on the CPU that sae-dashboard can mask and may spoil.

    The runner knows architectures by name, so a Matryoshka SAE becomes the JumpReLU SAE that it computes; and it
    folds decoder norms into the latents in place, which is switched off here: values stay those of the SAE.
    """
    if isinstance(sae, JumpReLUSAE) and sae.cfg.architecture() != JumpReLUSAEConfig.architecture():
        config = JumpReLUSAEConfig(
            **{f.name: copy.deepcopy(getattr(sae.cfg, f.name)) for f in fields(JumpReLUSAEConfig)}
        )
        config.device = "cpu"
        copied: SAE[Any] = JumpReLUSAE(config)
        copied.load_state_dict({k: v.detach().clone().cpu() for k, v in sae.state_dict().items()})
    else:
        copied = copy.deepcopy(sae).to("cpu")
    copied.fold_W_dec_norm = lambda: None
    return copied.requires_grad_(False).eval()


_ALIKE = str.maketrans({"<": "‹", ">": "›", "&": "＆", '"': "”", "'": "’", "\\": "＼", "\n": "↵", "`": "‘"})


def _harmless(text: str) -> str:
    """Text with signs that look alike in place of those of markup: the page turns entities back and parses the rest."""
    return text.translate(_ALIKE)
