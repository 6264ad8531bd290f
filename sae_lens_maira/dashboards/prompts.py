"""Convert studies to a text model's prompts for sae-dashboard: token ids, cached activations, a substitute model.

    prompt = pad ... pad  study  row  row  row ...  pad ... pad        one prompt per study, one token per row

Text rows keep their token ids; patches and studies get ids after the vocabulary. The model is never run: the runner
finds `model_activations_{i}.pt` in its cache.
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
from sae_lens_maira.latents.contexts import spell
from sae_lens_maira.latents.records import VIEWS

if TYPE_CHECKING:
    from sae_lens_maira.latents.source import ActivationSource

PAD = "␀"
MOST_POSITIONS = 2**24
"""Largest input of `torch.quantile`, which the runner calls on every latent."""


@dataclass(frozen=True)
class Readout:
    """Vocabulary and unembedding of a model.

    Attributes:
        tokens: V token texts of the vocabulary.
        unembed: (d_in, V) unembedding with the gain of the final norm folded in, as in latent records.
        side: Patches along one side of an image.
    """

    tokens: Sequence[str]
    unembed: torch.Tensor
    side: int

    @classmethod
    def of(cls, maira: Any) -> Readout:
        """Read vocabulary and unembedding from a MAIRA-2 with its processor."""
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
        names: Names of the n studies.
        texts: Text per token id, including patches, studies and padding.
        first_study: Token id of the first study; patches have the ids before it, down to `vocabulary`.
        vocabulary: V; ids from here on have no logit.
        pad: Token id of the padding.
        rows: Number of activation rows in all prompts together.
        hook_name: Hook point of the rows.
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
        """Token ids of positions without an activation row."""
        return set(range(self.first_study, self.pad + 1))

    def model(self, readout: Readout, harmless: bool = False) -> Any:
        """A substitute model with the four attributes that the runner reads.

        Logits of ids after the vocabulary are zero.

        Args:
            readout: Vocabulary and unembedding.
            harmless: Replace markup characters in tokens, since the classic page parses them.
        """
        unembed = torch.zeros(readout.unembed.shape[0], self.pad + 1)
        unembed[:, : self.vocabulary] = readout.unembed
        # Several ids may have the same text; the page looks ids up in {text: id}, so texts are made unique.
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
    """Convert studies to prompts, and write their activations to the runner's cache.

    Args:
        blocks: Source of activation rows, whole studies in ascending order; read twice.
        names: Names of the studies, by number.
        readout: Vocabulary and unembedding.
        silent: (d_in,) activation at positions without a row.
        cache: Empty folder.
        buffer: Tokens that the runner requires before and after every peak.
        per_file: Prompts per file, the runner's minibatch size.

    Raises:
        RecordError: There are no rows, or more positions than the runner supports.
    """
    ids: dict[int, np.ndarray] = {}
    first, hook_name, side = len(readout.tokens), "", readout.side
    for block in _every(blocks):
        hook_name = block.hook_name
        patch = first + (block.view.astype(np.int64) * side + block.patch_row) * side + block.patch_col
        token = np.where(block.is_image, patch, block.token)
        for study in np.unique(block.study).tolist():
            mine = np.flatnonzero(block.study == study)
            ids[study] = token[mine[np.argsort(block.position[mine], kind="stable")]]
    if not ids:
        raise RecordError(
            "The studies have no activation rows, so there is nothing to show. Give studies with reports."
        )
    before, after = buffer[0] + 1, buffer[1]
    length = before + max(map(len, ids.values())) + after
    if len(ids) * length > MOST_POSITIONS:
        raise RecordError(
            f"{len(ids)} studies of up to {length} positions were given; sae-dashboard's quantiles accept at most "
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
    """Write one file per `per_file` prompts, in order, with one file in memory at a time."""
    n, length = prompts.tokens.shape
    place = {study: number for number, study in enumerate(order)}
    values, filled = torch.empty(0), 0
    for block in _every(blocks):
        for study in np.unique(block.study).tolist():
            number = place[study]
            if number != filled:
                raise RecordError(
                    f"Study {study} is out of order; expected whole studies in ascending order. Sort them, or harvest "
                    "again."
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
    """Copy an SAE to the CPU in a form that sae-dashboard can run and modify.

    The runner selects architectures by name, so a Matryoshka SAE becomes the equivalent JumpReLU SAE. The runner also
    folds decoder norms into the latents in place, which is switched off here, so that activations stay the SAE's own.
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
    """Replace markup characters by look-alikes, since the page decodes entities and parses the rest."""
    return text.translate(_ALIKE)
