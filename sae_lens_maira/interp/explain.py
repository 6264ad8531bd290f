"""An explanation of one latent by a language model, from examples of the train half.

Text hits are shown as marked windows; image hits as the report's sentences with the place of the patch in words, and
to a model that sees also as films with the firing patches outlined. The answer is one sentence or nothing: an
unusable answer is not replaced. It knows nothing about scoring.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from sae_lens_maira.interp import prompts
from sae_lens_maira.interp.examples import Example, kind_of, scaled
from sae_lens_maira.interp.findings import category_of_text
from sae_lens_maira.interp.judge import Judge
from sae_lens_maira.interp.offline import Explanation
from sae_lens_maira.interp.pictures import data_uri, outlined
from sae_lens_maira.interp.windows import active_tokens, place, window


def question(
    examples: Sequence[Example],
    tokens: Sequence[str],
    seed: int = 0,
    pictures: int = 0,
    folder: Path | None = None,
) -> prompts.Messages:
    """The messages that ask for an explanation of these examples.

    Args:
        examples: sampled from the train half.
        tokens: output tokens the latent raises most.
        seed: of the windows of silent examples.
        pictures: of an image latent's active examples, shown as outlined films to a model that sees.
        folder: of the record set, which holds the films.
    """
    kind, rng = kind_of(examples), random.Random(seed)
    firing = [e for e in examples if e.active]
    active = [
        (
            window(e, kind, rng, active_tokens(e) if e.context.kind == "text" else ()),
            place(e.context),
            scaled(e.context.value, e.max),
        )
        for e in firing
    ]
    silent = [window(e, kind, rng) for e in examples if not e.active]
    films: list[str] = []
    if pictures and folder is not None and kind == "image":
        # Those with a film come first, so that text and films are in one order.
        shown = [(e, film) for e in examples if e.active and (film := outlined(e, folder)) is not None]
        chosen = {id(e) for e, _ in shown[:pictures]}
        order = sorted(range(len(active)), key=lambda i: id(firing[i]) not in chosen)
        active = [active[i] for i in order]
        films = [data_uri(film) for _, film in shown[:pictures]]
    return prompts.explain(active, silent, tokens, films)


async def explain(
    judge: Judge,
    examples: Sequence[Example],
    tokens: Sequence[str],
    keys: Sequence[str],
    seed: int = 0,
    pictures: int = 0,
    folder: Path | None = None,
) -> Explanation:
    """Ask for an explanation.

    Args:
        judge: the door to the model.
        examples: sampled from the train half.
        tokens: output tokens the latent raises most.
        keys: finding keys, for the category.
        seed: of the windows of silent examples.
        pictures: outlined films to show of an image latent.
        folder: of the record set.

    Raises:
        PrivacyError: credentialed text would leave the machine.
        ServerError: the server answers no question at all.
    """
    licences = {e.study.licence for e in examples}
    reply = await judge.ask(question(examples, tokens, seed, pictures, folder), prompts.Sentence, licences)
    if reply.answer is None:
        status = "over_budget" if reply.problem == "over budget" else "unusable"
        return Explanation(None, "other", (reply.key,), status)
    text = " ".join(reply.answer.explanation.split())
    return Explanation(text, category_of_text(text, keys), (reply.key,))
