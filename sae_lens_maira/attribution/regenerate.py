"""Write a report again with the entries removed from the prompt that make the model state something.

    h'(p) = h(p) - sum of the chosen entries' a W_dec at p,       p in the prompt

Entries are chosen in rounds: the sentences that make the statement are attributed at the stream as edited so far, the
strongest entries are removed, and the report is written again, until it no longer makes the statement. A single round
misses what the model then writes in other words. An entry's effect on the report's other sentences is subtracted from
its effect on the statement, so that what others need is spared.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_maira.attribution.entries import Entries, active_entries
from sae_lens_maira.attribution.inputs import encode_with_report, hook_point_of, trained_roles
from sae_lens_maira.attribution.residual import BUDGET_BYTES, ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences
from sae_lens_maira.errors import InterventionError, PromptError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.maira2 import Maira2Encoding, ParsedReport, role_mask


@dataclass(frozen=True)
class Removal:
    """What was removed to make a statement disappear, and the report that is then written.

    Attributes:
        report: The report written last.
        gone: Whether it no longer makes the statement.
        rounds: How often entries were removed and the report was written again.
        position, latent: (n,) int64, the removed entries in the order of removal.
        delta: (L, d_model) float32, what was added to the stream of the prompt's L positions.
    """

    report: str
    gone: bool
    rounds: int
    position: torch.Tensor = field(repr=False)
    latent: torch.Tensor = field(repr=False)
    delta: torch.Tensor = field(repr=False)

    def __len__(self) -> int:
        return len(self.position)


def remove_statement(
    hooked: HookedMaira2,
    study: Any,
    sae: SAE[Any],
    states: Callable[[str], bool],
    report: str = "generated",
    hook_name: str | None = None,
    roles: Any = None,
    step: int = 16,
    max_rounds: int = 12,
    protect: float = 0.3,
    max_new_tokens: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> Removal:
    """Remove a statement from the report that the model writes.

    Args:
        hooked: The model.
        study: The study.
        sae: An SAE at the output of a decoder block.
        states: Whether a sentence makes the statement.
        report: The model's own greedy report, if it was generated already.
        hook_name: Hook point; taken from the SAE's metadata if not given.
        roles: Token roles whose entries may be removed, of the prompt; what the SAE was trained on if not given.
        step: Entries that are removed per round.
        max_rounds: Rounds after which the statement counts as not removable.
        protect: Weight of an entry's absolute effect on the other sentences; 0 ignores them.
        max_new_tokens: Budget of a report.
        budget_bytes: Bytes that one batch may take.

    Raises:
        PromptError: No sentence of the report makes the statement.
        InterventionError: No latent is active at these roles of the prompt.
    """
    place = hook_point_of(sae, hook_name)
    wanted = roles or trained_roles(sae)
    processor: Any = hooked.processor
    prompt = processor.encode([study])
    length = prompt.input_ids.shape[1]
    delta = torch.zeros(length, sae.cfg.d_in, device=sae.W_dec.device)
    positions, latents = [], []
    text, rounds = report, 0
    while True:
        encoding = encode_with_report(hooked, study, text, max_new_tokens)
        run = ResidualRun(hooked, encoding, place, budget_bytes)
        sentences = report_sentences(run.encoding, hooked.tokenizer)
        mine = [s for s in sentences if states(s.text)]
        if rounds == 0:
            text = " ".join(s.text for s in sentences)
            if not mine:
                raise PromptError(f"No sentence of the report makes the statement. The report: {text}")
        if not mine or rounds == max_rounds:
            break
        run.edit(delta)
        others = [s for s in sentences if s not in mine]
        here = role_mask(run.encoding, wanted)[0].nonzero()[:, 0].to(run.hidden.device)
        entries, _ = active_entries(sae, run.hidden, here[here < length])
        if not len(entries):
            raise InterventionError(
                f"No latent is active at the prompt's positions of roles {wanted!r}, so nothing can be removed there. "
                "Choose roles of the prompt, such as image_only."
            )
        value = _specific_effect(run, entries, mine, others, protect)
        chosen = value.topk(min(step, int((value > 0).sum()))).indices
        if not len(chosen):
            break
        delta = delta - entries.delta(chosen)[:length]
        positions.append(entries.position[chosen])
        latents.append(entries.latent[chosen])
        text = generate_with_delta(hooked, prompt, place, delta, max_new_tokens).text
        rounds += 1
        if not text.strip():
            mine = []
            break
    empty = torch.empty(0, dtype=torch.int64)
    return Removal(
        text,
        not mine,
        rounds,
        torch.cat(positions).cpu() if positions else empty,
        torch.cat(latents).cpu() if latents else empty,
        delta,
    )


def same_statement(sentence: str, read: Callable[[str], frozenset[str]]) -> Callable[[str], bool]:
    """A test whether a sentence states one of a sentence's findings, or is that sentence where it states none.

    Args:
        sentence: The sentence.
        read: Function from a text to the findings that it states as present.
    """
    findings = read(sentence)
    return lambda text: bool(findings & read(text)) if findings else text == sentence


def _specific_effect(
    run: ResidualRun, entries: Entries, mine: Any, others: Any, protect: float
) -> torch.Tensor:
    """(E,) first-order effect on the statement, minus the weighted absolute effects on the other sentences."""
    spared = others if protect else []
    _, gradients = run.gradients(run.hidden, [s.positions for s in [*mine, *spared]])
    value = torch.zeros(len(entries), device=gradients.device)
    for number, gradient in enumerate(gradients):
        effect = entries.dot(gradient)
        value += effect if number < len(mine) else -protect * effect.abs()
    return value


@torch.no_grad()
def generate_with_delta(
    hooked: HookedMaira2,
    prompt: Maira2Encoding,
    hook_name: str,
    delta: torch.Tensor,
    max_new_tokens: int | None = None,
) -> ParsedReport:
    """Generate greedily with a fixed edit of the prompt's stream.

    Args:
        hooked: The model.
        prompt: One encoded study without a report.
        hook_name: Hook point of the edit.
        delta: (L, d_model), added at the prompt's L positions.
        max_new_tokens: Budget of the report.
    """
    length = prompt.input_ids.shape[1]

    def edit(value: torch.Tensor, hook: Any) -> torch.Tensor | None:
        if value.shape[1] < length:
            return None  # a decoding step with a cache
        edited = value.clone()
        edited[:, :length] = (value[:, :length].float() + delta).to(value.dtype)
        return edited

    with hooked.hooks(fwd_hooks=[(hook_name, edit)]):
        (report,) = hooked.generate(prompt, return_type="reports", max_new_tokens=max_new_tokens)
    return report


__all__ = ["Removal", "generate_with_delta", "remove_statement", "same_statement"]
