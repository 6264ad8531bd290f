"""One import: models, SAEs, studies, their latents and steering, by name."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from sae_lens import SAE

import sae_lens_maira as sm
from sae_lens_maira.cli import main
from sae_lens_maira.errors import InterventionError, RecordError
from sae_lens_maira.interactive import describe_sae
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.phantom import phantom_path
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
    assert set(sm.__all__) == {name for names in sm._SOURCES.values() for name in names}
    objects = {name: getattr(sm, name) for name in sm.__all__}
    assert all(callable(found) for found in objects.values())
    # `workbench` is its package where that was imported before, which can be called as well.
    assert all(found.__name__.rpartition(".")[2] == name for name, found in objects.items())


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
    control = m.steer(study, sae, {7: 2.0}, where=sm.patches("frontal"), control_seed=1)
    assert "control: random directions (seed 1)" in str(control)
    assert "control" not in str(result)
    both = m.steer([study, study], sae, {7: 2.0}, where=sm.patches("frontal"))
    assert [one.after for one in both] == [result.after] * 2


def test_attribution_carries_its_check_and_shows_itself(m: sm.InteractiveMaira2, study: sm.Study):
    """One sentence of the model's own report: its latents, named, and what ablation says."""
    sae: Any = sm.load_sae("phantom-image")
    found = m.attribute(study, sae, sentence=0, candidates=32)
    (one,) = found.sentences
    assert one.sentence.text in m.generate(study, return_type="reports")[0].text
    assert one.check is not None
    assert one.check.drop > one.check.drop_random
    assert "passed" in str(found)
    assert "<table" in found._repr_html_()
    assert "<table" in sae.records._repr_html_()


def test_a_steered_block_has_its_own_logits(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """Inside the block logits are steered; behind it the model is as before."""
    plain = m(study)
    with m.steering(study, sae, sm.Add(latents=(7,), strength=2.0, where=sm.patches("frontal"))) as run:
        steered = run.logits()
    assert run.hook_name == HOOK
    assert not torch.allclose(steered, plain)
    assert torch.equal(m(study), plain)


def test_steering_needs_p99(m: sm.InteractiveMaira2, study: sm.Study, sae: MatryoshkaSAE):
    """Without the scale of a latent the strength means nothing."""
    bare = MatryoshkaSAE(sae.cfg)
    with pytest.raises(InterventionError, match="records"):
        m.steer(study, bare, {7: 2.0})


def test_a_threshold_that_was_never_set_is_reported(tmp_path, monkeypatch, capsys):
    """By a folder, by a name of SAELens, and on stderr of a command."""
    made = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=128, d_sae=64, matryoshka_widths=[16, 64], k=4))
    with torch.no_grad():
        made.threshold[:48] = -1
    made.cfg.metadata.hook_name = HOOK
    made.save_model(tmp_path / "unset")
    with pytest.warns(
        UserWarning, match="unset: 48 of 64 latents have a negative threshold. It was never set"
    ):
        sm.load_sae(tmp_path / "unset")
    monkeypatch.setattr("sae_lens_maira.interface._is_saelens_name", lambda name: name == "release/id")
    monkeypatch.setattr(SAE, "from_pretrained", lambda *_, **__: made)
    with pytest.warns(UserWarning, match="release/id: 48 of 64 latents have a negative threshold"):
        sm.load_sae("release/id")
    with pytest.warns(UserWarning, match="negative threshold"):
        assert main(["match", "--sae", str(tmp_path / "unset"), "--other", str(tmp_path / "unset")]) == 0


def test_a_model_for_some_hooks_ends_behind_them():
    """Layers behind the last hook point are not loaded; logits need all of them."""
    for hooks, layers in (([HOOK], 4), (["vision_projector.hook_out"], 1), ([HOOK, "unembed.hook_out"], 8)):
        maira = sm.named_model("phantom", hooks=hooks)
        assert len(maira.model.model.language_model.layers) == layers  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("name", "hook_name", "modality"),
    [("phantom-image", HOOK, "image"), ("phantom-text", "blocks.6.hook_resid_post", "text")],
)
def test_shipped_saes_have_hook_point_p99_and_names(name, hook_name, modality, tmp_path):
    """They open by name, the records are undamaged and theirs, and their best latents follow findings."""
    sae: Any = sm.load_sae(name)
    assert sae.cfg.metadata.hook_name == hook_name
    folder = phantom_path().parent / "saes" / modality
    records = RecordSet.open(folder / "records")
    records.check()
    assert torch.equal(sae.p99 > 0, torch.tensor(records.table["density"].to_numpy() > 0))
    assert len(sae.latent_names) > 100
    best = records.table.sort_values(f"f1_{modality}", ascending=False).iloc[0]
    assert best[f"f1_{modality}"] > 0.9
    assert best[f"finding_{modality}"].split("_")[0] in sae.latent_names[int(best["latent"])].lower()
    plain = SAE.load_from_disk(folder)
    rows = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(plain.encode(rows), sae.encode(rows), atol=1e-5)
    assert sm.load_sae(name, dtype="bfloat16").p99 is not None
    with torch.no_grad():
        plain.W_dec.add_(0.01)
    plain.save_model(tmp_path)
    with pytest.raises(RecordError, match="other weights"):
        sm.load_sae(tmp_path, records=folder / "records")
