"""Generate reports for studies: encode, generate greedily, parse the output.

The token budgets are those of the published model: 300 for findings, 450 for grounded findings, 150 for a grounded
phrase.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from sae_lens_maira.maira2.modeling import Maira2ForConditionalGeneration
from sae_lens_maira.maira2.processing import Maira2Processor, Task
from sae_lens_maira.maira2.prompts import StudyLike
from sae_lens_maira.maira2.reports import ParsedReport

MAX_NEW_TOKENS: dict[str, int] = {"findings": 300, "grounded": 450, "phrase": 150}


@torch.no_grad()
def generate_reports(
    model: Maira2ForConditionalGeneration,
    processor: Maira2Processor,
    studies: StudyLike | Iterable[StudyLike],
    task: Task = "findings",
    phrase: str | Sequence[str] | None = None,
    max_new_tokens: int | None = None,
    **generate: Any,
) -> list[ParsedReport]:
    """Generate one report per study, greedily by default, in one batch.

    Args:
        model: Loaded model.
        processor: Processor of the model.
        studies: One study or several.
        task: "findings", "grounded" or "phrase".
        phrase: Phrase for task "phrase": one for all studies or one per study.
        max_new_tokens: Largest number of generated tokens; None for the task's budget.
        **generate: Further arguments of the model's `generate`.
    """
    encoding = processor.encode(studies, task=task, phrase=phrase).to(model.device, model.dtype)
    arguments: dict[str, Any] = {
        "max_new_tokens": max_new_tokens or MAX_NEW_TOKENS[task],
        "do_sample": False,
        "pad_token_id": encoding.pad_token_id,
        "eos_token_id": encoding.eos_token_id,
    } | generate
    output: Any = model.generate(**encoding.model_inputs(), **arguments)
    sequences = getattr(output, "sequences", output)
    return [processor.decode_report(row) for row in sequences[:, encoding.input_ids.shape[1] :]]
