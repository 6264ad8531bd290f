"""Image evidence: what is removed is the content of the images and nothing else."""

import dataclasses

import pytest
import torch

from sae_lens_maira.attribution.evidence import image_evidence
from sae_lens_maira.attribution.inputs import encode_with_report

pytestmark = pytest.mark.compat
HOOK = "blocks.3.hook_resid_post"


def test_evidence_is_the_drop_under_a_hook(hooked, study):
    """Scores and drops equal those of whole forward passes, one with a hook that averages each image's patches."""
    found = image_evidence(hooked, study, HOOK, report="teacher")
    encoding = encode_with_report(hooked, study, "teacher")
    index = encoding.image_index[0]

    def average(value, hook):
        edited = value.clone()
        for number in index[index >= 0].unique():
            edited[0, index == number] = value[0, index == number].mean(0)
        return edited

    ids = encoding.input_ids[0]
    with torch.no_grad():
        plain = hooked(encoding)[0].log_softmax(-1)
        blind = hooked.run_with_hooks(encoding, fwd_hooks=[(HOOK, average)])[0].log_softmax(-1)
    report = (encoding.roles[0] == 10).nonzero()[:, 0][:-1]
    score, without = (sum(logp[p - 1, ids[p]].item() for p in report) for logp in (plain, blind))
    assert found["score"].sum() == pytest.approx(score, abs=1e-2)
    assert found["evidence"].sum() == pytest.approx(score - without, abs=1e-2)
    assert (found["evidence_per_token"] * found["tokens"] - found["evidence"]).abs().max() < 1e-9


def test_a_flat_image_brings_nothing_beyond_its_mean(hooked, study):
    """With one patch value everywhere the stream differs by position only; far less is lost than on a real image."""
    real = image_evidence(hooked, study, "blocks.0.hook_resid_post", report="teacher")
    image = (
        torch.linspace(0, 1, 128 * 128).reshape(128, 128).numpy()
    )  # a smooth ramp: an image must have contrast
    flat = dataclasses.replace(study, frontal=image, lateral=None, truth=None)
    smooth = image_evidence(hooked, flat, "blocks.0.hook_resid_post", report=study.report)
    assert abs(smooth["evidence"].sum()) < real["evidence"].sum()


def test_latents_of_an_sae_can_be_removed_instead(hooked, study, sae):
    found = image_evidence(hooked, study, HOOK, sae, report="teacher")
    assert found["evidence"].abs().max() > 0
