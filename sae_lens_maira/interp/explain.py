"""Explain one latent by a language model, from examples of the train half.

Activations in text are shown as marked windows; activations in images as the report's sentences with the place of the
patch in words, and to a model that sees also as images with the active patches outlined. An unusable answer is not
replaced: the latent then has no explanation.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from sae_lens_maira.interp import prompts
from sae_lens_maira.interp.examples import Example, LatentTask, Plan, modality_of, scaled
from sae_lens_maira.interp.judge import Judge
from sae_lens_maira.interp.offline import Explanation, category_of_text
from sae_lens_maira.interp.windows import active_tokens, data_uri, outlined, place, window


def question(
    examples: Sequence[Example],
    tokens: Sequence[str],
    seed: int = 0,
    pictures: int = 0,
    folder: Path | None = None,
) -> prompts.Messages:
    """The messages that ask for an explanation of these examples.

    Args:
        examples: examples sampled from the train half.
        tokens: output tokens that the latent raises most.
        seed: random seed for the windows of silent examples.
        pictures: number of active examples of an image latent whose outlined images are shown.
        folder: folder of the record set, which contains the images.
    """
    modality, rng = modality_of(examples), random.Random(seed)
    firing = [e for e in examples if e.active]
    active = [
        (
            window(e, modality, rng, active_tokens(e) if e.context.modality == "text" else ()),
            place(e.context),
            scaled(e.context.value, e.max),
        )
        for e in firing
    ]
    silent = [window(e, modality, rng) for e in examples if not e.active]
    images: list[str] = []
    if pictures and folder is not None and modality == "image":
        shown: list[int] = []
        for number, e in enumerate(firing):
            image = outlined(e, folder) if len(shown) < pictures else None
            if image is not None:
                shown.append(number)
                images.append(data_uri(image))
        # Examples with an image come first, so that texts and images are in one order.
        order = [*shown, *(n for n in range(len(firing)) if n not in shown)]
        active = [active[n] for n in order]
    return prompts.explain(active, silent, tokens, images)


async def explain(
    judge: Judge,
    task: LatentTask,
    keys: Sequence[str],
    plan: Plan,
    folder: Path,
    licences: Iterable[str],
) -> Explanation:
    """Ask for an explanation.

    Args:
        judge: client of the language model.
        task: the latent and its train examples.
        keys: finding keys, for the category.
        plan: seed, and the number of images to show.
        folder: folder of the record set.
        licences: licence classes of the record set.

    Raises:
        PrivacyError: credentialed text would leave the machine.
        ServerError: the server does not answer.
    """
    asked = question(task.train, task.tokens, plan.seed, plan.pictures, folder)
    reply = await judge.ask(asked, prompts.Sentence, licences, topic="explanation")
    if reply.answer is None:
        status = "over_budget" if reply.problem == "over budget" else "unusable"
        return Explanation(None, "other", (reply.key,), status)
    text = " ".join(reply.answer.explanation.split())
    return Explanation(text, category_of_text(text, keys), (reply.key,))
