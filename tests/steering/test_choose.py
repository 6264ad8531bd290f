"""Selection: the one-gradient effect is the derivative, and rankings keep signs."""

import numpy as np
import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.steering import Direction, steering
from sae_lens_maira.steering.choose import Ranking, by_agreement, by_output_effect
from sae_lens_maira.steering.positions import patches

HOOK = "blocks.3.hook_resid_post"
TARGET = "There is a large left pleural effusion."
AGAINST = "No pleural effusion is seen."


def test_effect_is_the_derivative_of_the_log_probability(phantom, few, steering_sae):
    """Central difference along the decoder row of the strongest latent agrees with the one gradient."""
    ranking = by_output_effect(phantom, steering_sae, HOOK, few, [TARGET] * 4, [AGAINST] * 4)
    latent, step = ranking.boost(1)[0], 0.02
    values = []
    for text, sign in ((TARGET, 1), (AGAINST, -1)):
        encoding = phantom.processor.encode(few, report=[text] * 4, padding_side="right")
        for side in (1, -1):
            item = Direction(
                vector=steering_sae.W_dec[latent].detach(), strength=side * step, where=patches()
            )
            with steering(phantom, None, HOOK, item, encoding) as run:
                values.append(sign * side * float(log_probability(run.logits(), encoding)))
    measured = sum(values) / (2 * step * len(few))
    assert measured == pytest.approx(float(ranking.scores[latent]), rel=0.05)


def log_probability(logits, encoding):
    """Summed log-probability of the report tokens, from the logits of a whole forward."""
    logp = logits[:, :-1].log_softmax(-1).gather(-1, encoding.input_ids[:, 1:, None])[..., 0]
    return logp[encoding.roles[:, 1:] == TokenRole.REPORT].sum()


def test_ranking_keeps_signs():
    """Boost holds only latents above 0, suppress only those below."""
    ranking = Ranking("test", torch.tensor([0.5, -2.0, 0.0, 1.0]))
    assert ranking.boost(4) == (3, 0)
    assert ranking.suppress(4) == (1,)


def test_bad_input(phantom, few, steering_sae):
    """Texts and studies in unequal number, and positions the studies do not have, are refused."""
    with pytest.raises(InterventionError, match="one text per study"):
        by_output_effect(phantom, steering_sae, HOOK, few, [TARGET])
    alone = [s for s in few if s.lateral is None][:1]
    if alone:
        with pytest.raises(InterventionError, match="no position"):
            by_output_effect(phantom, steering_sae, HOOK, alone, [TARGET], where=patches("lateral"))


def test_agreement_ranks_by_f1_of_firing():
    """A latent that fires where the finding is stands first, one that fires everywhere next, a silent one nowhere."""
    truth = np.array([True, False, True, False])
    fires = np.stack([truth, np.ones(4, bool), np.zeros(4, bool), ~truth], 1)
    ranking = by_agreement(fires, truth)
    assert ranking.scores.tolist() == pytest.approx([1, 2 / 3, 0, 0])
    assert ranking.boost(4) == (0, 1)
