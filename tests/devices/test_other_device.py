"""Every path that runs on a GPU runs on a second device that refuses CPU tensors, with the CPU's results."""

import copy

import pandas as pd
import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.attribution import attribute
from sae_lens_maira.evaluation import evaluate
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.phantom import generate_studies, load_phantom
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_maira.steering import Ablate, Add, Direction, steering
from sae_lens_maira.steering.positions import patches, report
from sae_lens_maira.steering.prompts import Job, SharedPrompts

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture
def maira():
    """A model of this test's own, since it is moved in place."""
    return load_phantom()


@pytest.fixture(scope="module")
def few():
    return generate_studies(3, seed=99)


@pytest.fixture
def sae():
    """64 latents of random weights, dense enough that they fire."""
    torch.manual_seed(0)
    config = MatryoshkaSAEConfig(d_in=128, d_sae=64, matryoshka_widths=[8, 24, 64], device="cpu")
    config.metadata.hook_name = HOOK
    made = MatryoshkaSAE(config)
    with torch.no_grad():
        made.W_dec.copy_(torch.nn.functional.normalize(torch.randn(64, 128), dim=1))
        made.W_enc.copy_(made.W_dec.T)
        made.threshold.fill_(0.05)
    return made.eval()


def moved(sae, device):
    """A copy on `device`; the configuration names it, as `SAE.to` would."""
    sae.cfg.device = str(device)
    sae.device = torch.device(device)
    return sae


def test_the_device_refuses_cpu_tensors(on_other_device):
    """The check itself can fail, with the rules of a GPU."""
    layer = torch.nn.Linear(4, 4)
    with on_other_device(layer) as device, torch.no_grad():
        x = layer(torch.ones(3, 4, device=device))
        assert x.device == device
        place = torch.tensor([0, 2])
        assert torch.equal(x[place].cpu(), x.cpu()[place])
        x[[0, 2]] = 7.0
        assert x.tolist() == [[7.0] * 4, x.tolist()[1], [7.0] * 4]
        for mixed in (
            lambda: torch.ones(3)[place.to(device)],
            lambda: x.index_select(0, place),
            lambda: x * torch.ones(4),
            lambda: layer(torch.ones(4)),
        ):
            with pytest.raises(RuntimeError, match="on the CPU"):
                mixed()
        assert x.cpu().device.type == "cpu"


def test_shared_prompts_steer_on_the_models_device(maira, sae, few, on_other_device):
    """`SharedPrompts` and `Continuation.decode`: the same reports, divergences and perplexities."""
    jobs = [
        Job([0, 1, 2]),
        Job([2, 1], [Direction(vector=torch.randn(128), strength=1.0, where=patches())]),
        Job([0, 2], [Add(latents=(3, 40), strength=4.0, where=patches()), Ablate(latents=(5,))]),
        Job([1, 2], [Add(latents=(3,), strength=6.0, where=report(2, 5))]),
    ]

    def results():
        shared = SharedPrompts(maira, HOOK, few)
        written = shared.write_all(jobs, sae, torch.ones(64), 6, measure_kl=True)
        return written, shared.unsteered_perplexity([0, 2], 6)

    wanted, perplexities = results()
    with on_other_device(maira.model, sae) as device:
        moved(sae, device)
        found, again = results()
    assert [w.texts for w in found] == [w.texts for w in wanted]
    assert again == pytest.approx(perplexities, rel=1e-4)
    assert found[1].kl == pytest.approx(wanted[1].kl, rel=1e-2)


def test_generate_is_steered_on_the_models_device(maira, sae, few, on_other_device):
    encoding = maira.processor.encode(few[:2])

    def ids(encoding):
        with steering(
            maira, sae, HOOK, [Add(latents=(3,), strength=4.0)], encoding, p99=torch.ones(64)
        ) as run:
            return run.generate(max_new_tokens=6).tolist()

    wanted = ids(encoding)
    with on_other_device(maira.model, sae) as device:
        moved(sae, device)
        assert ids(encoding.to(device)) == wanted


def test_rows_are_read_on_the_models_device(maira, few, on_other_device):
    settings = RowSettings(roles="all", batch_size=2)
    wanted = read_rows(maira, few, HOOK, settings, progress=False)
    with on_other_device(maira.model):
        found = read_rows(maira, few, HOOK, settings, progress=False)
    assert found.values.device.type == "cpu"
    torch.testing.assert_close(found.values, wanted.values)


def test_evaluate_runs_on_the_models_device(maira, sae, few, on_other_device):
    wanted = evaluate(maira, copy.deepcopy(sae), few[:2], batch_size=2, progress=False)
    with on_other_device(maira.model, sae) as device:
        found = evaluate(maira, moved(sae, device), few[:2], batch_size=2, progress=False)
    pd.testing.assert_frame_equal(found.rows, wanted.rows, rtol=1e-3)
    pd.testing.assert_frame_equal(found.splice, wanted.splice, rtol=1e-3)


def test_attribution_runs_on_the_models_device(maira, sae, few, on_other_device):
    """Gradients, ablations and their random controls."""

    def results():
        return attribute(HookedMaira2(maira), few[0], sae, sentence=0, report="teacher", candidates=16)

    wanted = results()
    with on_other_device(maira.model, sae) as device:
        moved(sae, device)
        found = results()
    pd.testing.assert_frame_equal(found.table(), wanted.table(), rtol=1e-2)
    assert found.sentences[0].latent[0] == wanted.sentences[0].latent[0]
