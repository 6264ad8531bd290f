"""A saved SAE is the SAE that was trained: in plain SAELens, with levels, after a fold, after a resume."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from sae_lens import SAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEMetadata, TrainingSAE, TrainingSAEConfig

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaTrainingSAE, load_matryoshka, register

pytestmark = pytest.mark.compat

CONVENTIONS = ["saelens", "dictionary_learning", "explicit"]

PLAIN_PROCESS = """
import sys, torch

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "sae_lens_maira":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
from sae_lens import SAE
rows, out, *folders = sys.argv[1:]
results = []
for folder in folders:
    sae = SAE.load_from_disk(folder)
    assert type(sae).__name__ == "JumpReLUSAE", type(sae)
    assert sae.cfg.metadata.matryoshka["level_widths"] == [8, 20, 48], sae.cfg.metadata
    acts = sae.encode(torch.load(rows))
    results.append((acts, sae.decode(acts)))
assert not any(name.startswith("sae_lens_maira") for name in sys.modules)
torch.save(results, out)
"""


def train(make_config, make_trainer, convention, **changes):
    weights = [0.5, 1.0, 2.0] if convention == "explicit" else []
    sae = MatryoshkaTrainingSAE(
        make_config(loss_convention=convention, level_weights=weights, threshold_start_step=5, **changes)
    )
    make_trainer(sae, steps=40).fit()
    return sae.eval()


def test_plain_saelens_encodes_and_decodes_identically(make_config, make_trainer, make_rows, tmp_path):
    """In a process in which this package cannot be imported: all conventions, and one saved with levels."""
    rows = make_rows(40, seed=5)
    torch.save(rows, tmp_path / "rows.pt")
    folders = [tmp_path / convention for convention in CONVENTIONS]
    for folder in folders:
        train(make_config, make_trainer, folder.name).save_inference_model(folder)
    folders.append(tmp_path / "was saved with levels")
    with_levels = train(make_config, make_trainer, "saelens", inference_architecture="matryoshka")
    load_matryoshka(with_levels).save_model(folders[-1])
    arguments = [str(path) for path in (tmp_path / "rows.pt", tmp_path / "out.pt", *folders)]
    subprocess.run([sys.executable, "-c", PLAIN_PROCESS, *arguments], check=True)
    for folder, (acts, out) in zip(folders, torch.load(tmp_path / "out.pt"), strict=True):
        ours = load_matryoshka(folder)
        assert torch.equal(ours.encode(rows), acts)
        assert torch.equal(ours.decode(acts), out)
        assert (acts > 0).any()


def test_saved_activations_are_the_thresholded_pre_activations(trained, make_rows):
    """JumpReLU of the saved SAE = h n where h n exceeds the threshold; reconstruction = training decode."""
    rows = make_rows(40, seed=5)
    _, hidden_pre = trained.encode_with_hidden_pre(rows)
    expected = torch.where(hidden_pre > trained.topk_threshold, hidden_pre, 0).relu()
    saved = load_matryoshka(trained)
    torch.testing.assert_close(saved.encode(rows), expected)
    torch.testing.assert_close(saved.decode(saved.encode(rows)), trained.decode(expected))
    assert trained.W_dec.norm(dim=-1).std() > 0.01


def test_levels_and_training_facts_survive_two_round_trips(make_config, make_trainer, tmp_path):
    metadata = SAEMetadata(model_name="m", hook_name="blocks.1.hook_resid_post")
    sae = train(
        make_config, make_trainer, "dictionary_learning", metadata=metadata,
        matryoshka_widths=[], group_fractions=[0.25, 0.25, 0.5], k=4.5,
    )  # fmt: skip
    sae.save_inference_model(tmp_path / "first")
    plain = SAE.load_from_disk(tmp_path / "first")
    assert type(plain) is JumpReLUSAE
    plain.save_model(tmp_path / "second")
    again = load_matryoshka(tmp_path / "second")
    assert again.level_widths == (12, 24, 48)
    assert again.cfg.k == 4.5
    facts = again.cfg.metadata.to_dict()
    assert (facts["model_name"], facts["hook_name"]) == ("m", "blocks.1.hook_resid_post")
    assert facts["matryoshka"]["loss_convention"] == "dictionary_learning"
    assert facts["matryoshka"]["level_weights"] == pytest.approx([1 / 9] * 3)
    assert facts["training_architecture"] == "matryoshka"
    assert facts["training_architecture_details"]["aux_loss_coefficient"] == 1 / 32
    assert facts["num_dead_features"] is not None


def test_saving_with_levels(make_config, make_trainer, tmp_path):
    """The architecture `matryoshka` keeps its levels through saving and loading."""
    sae = train(make_config, make_trainer, "saelens", inference_architecture="matryoshka")
    sae.save_inference_model(tmp_path / "sae")
    loaded = SAE.load_from_disk(tmp_path / "sae")
    assert isinstance(loaded, MatryoshkaSAE)
    assert loaded.level_widths == (8, 20, 48)
    loaded.save_model(tmp_path / "again")
    assert load_matryoshka(tmp_path / "again").level_widths == (8, 20, 48)


def test_levels_of_saelens_own_class_are_found(make_rows, tmp_path):
    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=12, d_sae=48, k=4, matryoshka_widths=[8, 20, 48])
    theirs = MatryoshkaBatchTopKTrainingSAE(config)
    theirs.save_inference_model(tmp_path)
    for source in (tmp_path, theirs, SAE.load_from_disk(tmp_path)):
        loaded = load_matryoshka(source)
        assert loaded.level_widths == (8, 20, 48)
        assert loaded.cfg.k == 4


def test_an_sae_in_memory_shares_its_weights(trained, tmp_path):
    trained.save_inference_model(tmp_path)
    plain = SAE.load_from_disk(tmp_path)
    assert load_matryoshka(plain).W_dec.data_ptr() == plain.W_dec.data_ptr()
    assert load_matryoshka(trained).b_dec.data_ptr() != trained.b_dec.data_ptr()


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_training_checkpoint_opens_for_inference(
    convention, make_config, make_trainer, make_rows, tmp_path
):
    sae = train(make_config, make_trainer, convention)
    sae.save_model(tmp_path)
    rows = make_rows(20)
    torch.testing.assert_close(load_matryoshka(tmp_path).encode(rows), load_matryoshka(sae).encode(rows))
    with pytest.raises(SAEError, match="checkpoint"):
        SAE.load_from_disk(tmp_path)
    with pytest.raises(SAEError, match="load_release"):
        load_matryoshka(tmp_path / "absent")


def test_saes_without_levels_are_refused(tmp_path):
    from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    with pytest.raises(SAEError, match="names no levels"):
        load_matryoshka(JumpReLUSAE(JumpReLUSAEConfig(d_in=4, d_sae=8)))
    with pytest.raises(SAEError, match="'standard'"):
        load_matryoshka(StandardSAE(StandardSAEConfig(d_in=4, d_sae=8)))


@pytest.mark.parametrize(
    ("convention", "normalisation"),
    [(c, "expected_average_only_in") for c in CONVENTIONS]
    + [(c, "covariance_whitening") for c in ("saelens", "explicit")],
)
def test_folding_of_activation_scaling(convention, normalisation, make_config, make_trainer, make_rows):
    """After the fold the SAE takes raw rows and gives what scaled rows gave before, in raw units."""
    sae = MatryoshkaTrainingSAE(
        make_config(
            loss_convention=convention, normalize_activations=normalisation, dtype="float64",
            level_weights=[1.0, 1.0, 2.0] if convention == "explicit" else [], threshold_start_step=5,
        )
    )  # fmt: skip
    trainer = make_trainer(sae, steps=30)
    rows = make_rows(50, seed=9, dtype=torch.float64)
    fold = (
        "fold_activation_norm_scaling_factor" if "average" in normalisation else "fold_activation_whitening"
    )
    before = {}

    def spy(*args, **kwargs):
        scaled = trainer.activation_scaler.scale(rows)
        inference = load_matryoshka(sae)
        before["active"] = inference.encode(scaled) > 0
        before["out"] = trainer.activation_scaler.unscale(inference.decode(inference.encode(scaled)))
        return getattr(type(sae), fold)(sae, *args, **kwargs)

    setattr(sae, fold, spy)
    trainer.fit()
    folded = load_matryoshka(sae)
    assert folded.cfg.normalize_activations == "none"
    assert torch.equal(folded.encode(rows) > 0, before["active"])
    torch.testing.assert_close(folded.decode(folded.encode(rows)), before["out"], rtol=1e-9, atol=1e-9)
    if convention == "dictionary_learning":
        torch.testing.assert_close(folded.W_dec.norm(dim=-1), torch.ones(48, dtype=torch.float64))


def test_folding_decoder_norms_keeps_levels(trained, make_rows):
    sae = load_matryoshka(trained)
    with torch.no_grad():
        sae.W_dec.mul_(torch.rand(48, 1) + 0.5)
    rows = make_rows(30)
    active, outs = sae.encode(rows) > 0, [sae.decode(sae.encode(rows), level=i) for i in range(3)]
    sae.fold_W_dec_norm()
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(48))
    assert torch.equal(sae.encode(rows) > 0, active)
    for level, out in enumerate(outs):
        torch.testing.assert_close(sae.decode(sae.encode(rows), level=level), out)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_resume_is_bit_exact(convention, dtype, make_config, make_trainer, tmp_path):
    """20 steps straight = 10 steps, checkpoint, a new process' objects, 10 steps: every tensor equal."""

    def new():
        weights = [0.5, 1.0, 2.0] if convention == "explicit" else []
        config = make_config(
            loss_convention=convention, level_weights=weights, dtype=dtype, threshold_start_step=4,
            dead_after_tokens=200, normalize_activations="expected_average_only_in",
        )  # fmt: skip
        return MatryoshkaTrainingSAE(config)

    torch.manual_seed(1)
    straight = make_trainer(new(), steps=20, dead_feature_window=3)
    straight.fit()
    torch.manual_seed(1)
    first = make_trainer(new(), steps=20, dead_feature_window=3)
    first.activation_scaler.estimate_scaling_factor(12, first.data_provider, 3)
    for _ in range(10):
        first.step(next(first.data_provider))
        first.n_training_steps += 1
    first.save_checkpoint("half", base_path=tmp_path)
    torch.manual_seed(2)
    loaded = new()
    loaded.load_weights_from_checkpoint(tmp_path / "half")
    second = make_trainer(loaded, steps=20, skip=13, dead_feature_window=3)
    second.load_trainer_state(tmp_path / "half")
    second.fit()
    for name, value in straight.sae.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_training_sae_loads_from_disk(convention, make_config, make_trainer, tmp_path):
    sae = train(make_config, make_trainer, convention)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert isinstance(loaded, MatryoshkaTrainingSAE)
    assert loaded.cfg.to_dict() == sae.cfg.to_dict()
    for name, value in sae.state_dict().items():
        assert loaded.state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(
            loaded.state_dict()[name], value, rtol=1e-7, atol=0
        )  # the threshold passed float32


def test_checkpoint_of_saelens_class_loads_into_ours(make_config, tmp_path):
    config = MatryoshkaBatchTopKTrainingSAEConfig(d_in=12, d_sae=48, k=4, matryoshka_widths=[8, 20, 48])
    theirs = MatryoshkaBatchTopKTrainingSAE(config)
    theirs.save_model(tmp_path)
    ours = MatryoshkaTrainingSAE(make_config())
    ours.load_weights_from_checkpoint(tmp_path)
    assert torch.equal(ours.W_enc, theirs.W_enc)


def test_registry_and_config_round_trip(make_config, tmp_path):
    from sae_lens.registry import get_sae_class, get_sae_training_class

    register()
    register()
    assert get_sae_training_class("matryoshka")[0] is MatryoshkaTrainingSAE
    assert get_sae_class("matryoshka")[0] is MatryoshkaSAE
    config = make_config(loss_convention="explicit", level_weights=[1, 2, 3], k=3.5)
    again = TrainingSAEConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config


def test_a_foreign_class_under_our_name_is_reported(monkeypatch):
    from sae_lens import registry

    monkeypatch.setitem(registry.SAE_CLASS_REGISTRY, "matryoshka", (JumpReLUSAE, JumpReLUSAE))
    with pytest.raises(SAEError, match="JumpReLUSAE"):
        register()


def test_bfloat16_keeps_the_threshold_in_double(trained):
    threshold = trained.topk_threshold.clone()
    trained.to(torch.bfloat16)
    assert trained.W_dec.dtype == torch.bfloat16
    assert trained.topk_threshold.dtype == torch.float64
    assert torch.equal(trained.topk_threshold, threshold)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_autocast_training_saves_a_finite_float32_sae(convention, make_config, make_trainer, make_rows):
    weights = [0.5, 1.0, 2.0] if convention == "explicit" else []
    sae = MatryoshkaTrainingSAE(
        make_config(
            loss_convention=convention, level_weights=weights, threshold_start_step=5, dead_after_tokens=200
        )
    )
    make_trainer(sae, steps=30, autocast=True, dead_feature_window=3).fit()
    assert sae.topk_threshold.dtype == torch.float64
    assert sae.topk_threshold > 0
    saved = load_matryoshka(sae)
    assert {p.dtype for p in saved.parameters()} == {torch.float32}
    assert torch.isfinite(saved(make_rows(10))).all()


def test_what_load_matryoshka_returns_is_published_as_plain_jumprelu(
    trained, make_rows, tmp_path, monkeypatch
):
    """`save_model` and SAELens' upload write a folder that a process without this package reads; levels remain."""
    from sae_lens.training import upload_saes_to_huggingface as upload

    sae, rows = load_matryoshka(trained), make_rows(40, seed=5)
    sae.save_model(tmp_path / "saved")
    sent = tmp_path / "sent"

    def keep(api, sae_path, **_):
        shutil.copytree(sae_path, sent)

    monkeypatch.setattr(upload, "_upload_sae", keep)
    monkeypatch.setattr(upload, "_repo_exists", lambda *_: True)
    upload.upload_saes_to_huggingface(
        {"one": sae}, "someone/saes", show_progress=False, add_default_readme=False
    )
    torch.save(rows, tmp_path / "rows.pt")
    arguments = [str(tmp_path / name) for name in ("rows.pt", "out.pt", "saved", "sent")]
    subprocess.run([sys.executable, "-c", PLAIN_PROCESS, *arguments], check=True)
    for acts, out in torch.load(tmp_path / "out.pt"):
        assert torch.equal(acts, sae.encode(rows))
        assert torch.equal(out, sae.decode(acts))
    assert load_matryoshka(tmp_path / "sent").level_widths == (8, 20, 48)
