"""One import: models, SAEs, studies, their latents and steering, by name."""

import subprocess
import sys

import pytest
import torch

import sae_lens_maira as sm
from sae_lens_maira.errors import InterventionError
from sae_lens_maira.interactive import describe_sae
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def m() -> sm.InteractiveMaira2:
    return sm.load("phantom")


@pytest.fixture(scope="module")
def study() -> sm.Study:
    return sm.phantom_studies(1)[0]


@pytest.fixture(scope="module")
def sae() -> MatryoshkaSAE:
    generator = torch.Generator().manual_seed(0)
    config = MatryoshkaSAEConfig(d_in=128, d_sae=64, matryoshka_widths=[16, 64], k=4)
    made = MatryoshkaSAE(config)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(made.W_enc.shape, generator=generator))
        made.W_dec.copy_(torch.randn(made.W_dec.shape, generator=generator))
        made.threshold.fill_(20.0)
    return describe_sae(made, HOOK, torch.full((64,), 30.0), None)


def test_importing_loads_nothing():
    """The names are there, and neither torch nor a host library is."""
    code = (
        "import sys, sae_lens_maira as sm\n"
        "assert set(sm.__all__) <= set(dir(sm))\n"
        "bad = [m for m in ('torch', 'transformers', 'sae_lens', 'nnsight', 'pandas') if m in sys.modules]\n"
        "assert not bad, bad\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_name_is_listed_for_lookup_and_for_type_checkers():
    """`__all__`, the lookup table and the real objects agree."""
    assert set(sm.__all__) == set(sm._MODULE_OF)
    assert all(getattr(sm, name).__name__ == name for name in sm.__all__)


def test_top_latents_are_those_of_the_sae(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """Every row of the table is the SAE's own activation at that position; patches are named."""
    table = m.top_latents(study, sae, k=3)
    assert list(table) == ["position", "token", "role", "patch", "latent", "activation", "name"]
    acts = m.latents(study, sae)[0]
    for row in table.iloc[:: len(table) // 20].itertuples():
        strongest = acts[row.position].topk(3)
        assert row.latent in strongest.indices.tolist()
        assert row.activation == pytest.approx(float(acts[row.position, row.latent]))
    images = table[table.role == "image"]
    assert set(images.patch[:1]) == {"frontal 0,0"}
    assert (table[table.role == "report"].patch == "").all()


def test_the_report_behind_the_prompt(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """ "teacher", "generated" and a text give the tokens that they name."""
    written = m.generate(study, return_type="reports")[0].text
    for report, text in (("teacher", study.report), ("generated", written), ("No effusion.", "No effusion.")):
        _, cache = m.run_with_cache(study, names_filter=HOOK, stop_at_layer=4, report=report)
        again = m.run_with_cache(study, names_filter=HOOK, stop_at_layer=4, report=text)[1]
        assert torch.equal(cache[HOOK], again[HOOK])


def test_reading_keeps_no_graph(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """No gradient unless asked; then also through frozen weights."""
    logits, cache = m.run_with_cache(study, names_filter=HOOK)
    assert not logits.requires_grad
    assert not cache[HOOK].requires_grad
    assert not sae.encode(cache[HOOK]).requires_grad
    assert not m(study).requires_grad
    _, cache = m.run_with_cache(study, names_filter=HOOK, return_type="loss", incl_bwd=True)
    assert float(cache[f"{HOOK}_grad"].abs().sum()) > 0
    assert m.run_with_cache(study, names_filter=HOOK, gradients=True)[0].requires_grad


def test_steering_shows_both_reports(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """Strengths in p99; words that changed are marked in text and in HTML."""
    result = m.steer(study, sae, {7: 2.0}, where=sm.patches("frontal"))
    assert isinstance(result, sm.SteeringResult)
    assert result.before == m.generate(study, return_type="reports")[0].text
    assert result.after != result.before
    assert result.effect.fired == [64]
    assert "[" in str(result)
    assert "<b style" in result._repr_html_()
    assert "x 2.0 p99" in str(result)
    raw = m.steer(study, sae, sm.Add(latents=(7,), strength=60.0, unit="raw", where=sm.patches("frontal")))
    assert raw.after == result.after
    both = m.steer([study, study], sae, {7: 2.0}, where=sm.patches("frontal"))
    assert [one.after for one in both] == [result.after] * 2


def test_steering_needs_p99(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """Without the scale of a latent the strength means nothing."""
    bare = MatryoshkaSAE(sae.cfg)
    with pytest.raises(InterventionError, match="records"):
        m.steer(study, bare, {7: 2.0})


def test_a_model_for_some_hooks_ends_behind_them():
    """Layers behind the last hook point are not loaded; logits need all of them."""
    for hooks, layers in (([HOOK], 4), (["vision_projector.hook_out"], 1), ([HOOK, "unembed.hook_out"], 8)):
        maira = sm.named_model("phantom", hooks=hooks)
        assert len(maira.model.model.language_model.layers) == layers  # pyright: ignore[reportArgumentType]
