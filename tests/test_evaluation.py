"""`evaluate` on the phantom: tables per level and role, next to an untrained SAE, and refusals."""

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.cli import main
from sae_lens_maira.errors import HookError, SAEError
from sae_lens_maira.evaluation import POSITIONS, evaluate
from sae_lens_maira.hooks import PointTable
from sae_lens_maira.maira2 import TokenRole
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig, SpliceBatch, evaluate_splice

HOOK = "blocks.3.hook_resid_post"


@pytest.fixture(scope="module")
def studies():
    return generate_studies(6, seed=77)


@pytest.fixture(scope="module")
def perfect(phantom, studies):
    """An SAE that reconstructs exactly: both signs of every axis, whatever the level says."""
    rows = read_rows(phantom, studies, HOOK, RowSettings(roles="all"), progress=False)
    width = rows.values.shape[1]
    sae = MatryoshkaSAE(
        MatryoshkaSAEConfig(d_in=width, d_sae=2 * width, matryoshka_widths=[width, 2 * width])
    )
    eye = torch.eye(width)
    with torch.no_grad():
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
        sae.threshold.zero_()
    sae.cfg.metadata.hook_name = HOOK
    return sae


def test_perfect_reconstruction_recovers_everything(phantom, studies, perfect):
    """The whole of an exact SAE has explained variance 1 and loss recovered 1 at text and image positions."""
    tables = evaluate(phantom, perfect, studies, progress=False)
    whole = tables.rows[(tables.rows.sae == "trained") & (tables.rows.level == 1)]
    assert (whole.explained_variance > 1 - 1e-4).all()
    spliced = tables.splice[(tables.splice.sae == "trained") & (tables.splice.level == 1)]
    assert set(spliced.positions) == {"text", "image"}
    assert spliced.loss_recovered.to_numpy() == pytest.approx([1, 1], abs=1e-3)
    half = tables.rows[(tables.rows.sae == "trained") & (tables.rows.level == 0)]
    assert (half.explained_variance < 0.999).all()
    assert "untrained" in set(tables.rows.sae)
    assert "untrained" in set(tables.splice.sae)


def test_refusals(phantom, studies, perfect):
    """No hook point, an unknown one, and an SAE of another width are one-paragraph errors."""
    nameless = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=128, d_sae=8))
    with pytest.raises(SAEError, match="name no hook point"):
        evaluate(phantom, nameless, studies)
    with pytest.raises(HookError):
        evaluate(phantom, nameless, studies, hook_name="blocks.99.hook_resid_post")
    with pytest.raises(SAEError, match="belongs to another model"):
        evaluate(phantom, MatryoshkaSAE(MatryoshkaSAEConfig(d_in=64, d_sae=8)), studies, hook_name=HOOK)


def test_the_command_reads_a_table(perfect, tmp_path, capsys):
    """`evaluate --table --split`: the studies of that split alone; a split without studies is an error."""
    sae, table = tmp_path / "sae", tmp_path / "studies.parquet"
    perfect.save_model(sae)
    words = ["--source", "phantom", "--studies", "3", "--split", "test", "--out", str(table)]
    assert main(["studies", "import", *words]) == 0
    capsys.readouterr()
    words = ["evaluate", "--sae", str(sae), "--hook", HOOK, "--table", str(table), "--split"]
    assert main([*words, "test", "--studies", "2"]) == 0
    assert f"at {HOOK}, 2 studies" in capsys.readouterr().out
    assert main([*words, "train"]) == 2
    assert "none of them in the split train" in capsys.readouterr().err


@pytest.mark.parametrize(
    "hook", ["blocks.0.hook_resid_post", HOOK, "blocks.7.hook_resid_post", "blocks.3.hook_mlp_out"]
)
def test_repeating_the_upper_layers_gives_the_figures_of_whole_forwards(phantom, studies, hook):
    """Against whole forwards with a torch hook and no shared keys: the same cross-entropies, levels and positions."""
    one = studies[:3]
    width = phantom.model.config.text_config.hidden_size
    torch.manual_seed(0)
    sae = MatryoshkaSAE(MatryoshkaSAEConfig(d_in=width, d_sae=64, matryoshka_widths=[16, 64]))
    torch.nn.init.normal_(sae.W_enc, std=0.3)
    torch.nn.init.normal_(sae.W_dec, std=0.3)
    sae.cfg.metadata.hook_name = hook
    found = evaluate(phantom, sae, one, progress=False).splice
    point = PointTable(phantom.model.config).resolve(hook)
    batches = []
    for study in one:
        encoding = phantom.processor.encode([study], report="teacher", padding_side="right")
        labels = torch.where(encoding.roles == TokenRole.REPORT, encoding.input_ids, -100)
        batches.append(SpliceBatch(encoding.model_inputs(), labels, encoding.roles))
    positions = {where: [int(role) for role in roles] for where, roles in POSITIONS.items()}
    module = phantom.model.get_submodule(point.module)
    expected = evaluate_splice(phantom.model, module, batches, sae, positions=positions).to_frame()
    mine = found[found.sae == "trained"].reset_index(drop=True)
    assert list(mine.positions) == list(expected.positions) == ["text", "text", "image", "image"]
    for column in ("ce_clean", "ce_ablated", "ce_spliced"):
        assert np.asarray(mine[column]) == pytest.approx(np.asarray(expected[column]), rel=2e-4)
    assert (mine.replaced == expected.replaced).all()


def test_batch_size_changes_rounding_only(phantom, studies, perfect):
    small, large = (
        evaluate(phantom, perfect, studies, batch_size=size, progress=False).rows for size in (1, 6)
    )
    trained = [frame[frame.sae == "trained"] for frame in (small, large)]
    for column in ("rows", "l0", "explained_variance", "mse"):
        assert np.asarray(trained[0][column]) == pytest.approx(
            np.asarray(trained[1][column]), rel=1e-3, abs=1e-4
        )
