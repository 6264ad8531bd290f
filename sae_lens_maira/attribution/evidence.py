"""Image evidence of a sentence: drop of its log-probability when the image's content is removed.

    evidence(sentence) = score(h) - score(h0),   h0 = h with every image position replaced by the image's mean

The positions stay, so that the sequence keeps its length, but no patch differs from another one of its image. The mean
of an image still carries its overall brightness; with `sae=` every active latent of that SAE is removed there instead.
"""

from typing import Any

import pandas as pd
import torch
from sae_lens import SAE

from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.inputs import encode_with_report
from sae_lens_maira.attribution.residual import BUDGET_BYTES, ResidualRun
from sae_lens_maira.attribution.sentences import report_sentences
from sae_lens_maira.errors import ConfigError
from sae_lens_maira.hooks import HookedMaira2


def image_evidence(
    hooked: HookedMaira2,
    study: Any,
    hook_name: str = "blocks.0.hook_resid_post",
    sae: SAE[Any] | None = None,
    report: str = "generated",
    max_new_tokens: int | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> pd.DataFrame:
    """Score every sentence of a report with and without the content of the images.

    Args:
        hooked: The model.
        study: The study.
        hook_name: Output of a decoder block, where the content is removed.
        sae: Remove this SAE's active latents at the image positions, instead of taking the mean of the patches.
        report: "generated", "teacher" or a text.
        max_new_tokens: Budget of a generated report.
        budget_bytes: Bytes that one batch may take.

    Returns:
        One row per sentence: sentence, tokens, score (nats), score_per_token, evidence (nats lost without the images'
        content), evidence_per_token.

    Raises:
        ConfigError: The study has no image positions.
    """
    encoding = encode_with_report(hooked, study, report, max_new_tokens)
    run = ResidualRun(hooked, encoding, hook_name, budget_bytes)
    index = run.encoding.image_index[0].to(run.hidden.device)
    if not bool((index >= 0).any()):
        raise ConfigError(
            "The study has no image positions, so no sentence can rest on an image. Give one with an image."
        )
    if sae is None:
        delta = torch.zeros(run.hidden.shape, device=run.hidden.device)
        for number in index[index >= 0].unique():
            here = index == number
            values = run.hidden[here].float()
            delta[here] = values.mean(0) - values
    else:
        entries, _ = active_entries(sae, run.hidden, (index >= 0).nonzero()[:, 0])
        delta = -entries.delta(torch.arange(len(entries), device=run.hidden.device))
    rows = []
    for sentence in report_sentences(run.encoding, hooked.tokenizer):
        score, without = run.scores([torch.zeros_like(delta), delta], sentence.positions).tolist()
        n = len(sentence.positions)
        rows.append(
            {
                "sentence": sentence.text,
                "tokens": n,
                "score": score,
                "score_per_token": score / n,
                "evidence": score - without,
                "evidence_per_token": (score - without) / n,
            }
        )
    return pd.DataFrame(rows)
