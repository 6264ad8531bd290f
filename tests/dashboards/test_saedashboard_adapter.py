"""sae-dashboard's own runner over our rows, held against our records of the same latents: the same numbers."""

import importlib.util
import json

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.dashboards.adapter import AdapterConfig, run_saedashboard
from sae_lens_maira.dashboards.prompts import Readout, plain_copy
from sae_lens_maira.dashboards.saedashboard import feature
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.validate import validate
from sae_lens_maira.errors import ConfigError, PrivacyError
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.maira2 import resolve_roles
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control

pytestmark = [
    pytest.mark.compat,
    pytest.mark.skipif(
        importlib.util.find_spec("sae_dashboard") is None, reason="sae-dashboard is not installed"
    ),
]
HOOK = "blocks.3.hook_resid_post"
LATENTS = tuple(range(12))
HALF = 0.0006
"""sae-dashboard's converter writes three digits."""


@pytest.fixture(scope="module")
def studies():
    return generate_studies(14, seed=78)


@pytest.fixture(scope="module")
def blocks(phantom, studies):
    roles = resolve_roles(("image", "indication", "report"))
    settings = RowSettings(roles=roles)
    parts = [read_rows(phantom, studies[i : i + 5], HOOK, settings, progress=False) for i in (0, 5, 10)]
    for start, part in zip((0, 5, 10), parts, strict=True):
        part.study[:] += start
    return [[part] for part in parts]


@pytest.fixture(scope="module")
def sae(blocks):
    """Matryoshka, decoder rows of any norm, so that folded norms would show; latent 5 never fires."""
    values = torch.cat([block.values for (block,) in blocks])
    config = MatryoshkaTrainingSAEConfig(
        d_in=values.shape[1], d_sae=48, k=6, matryoshka_widths=[16, 48], device="cpu"
    )
    config.metadata.hook_name = HOOK
    torch.manual_seed(0)
    made = make_control("untrained", MatryoshkaTrainingSAE(config), values, l0=6.0, seed=1)
    with torch.no_grad():
        made.W_dec.data *= torch.linspace(0.5, 2.0, 48)[:, None]
        made.threshold[5] = 1e9
    return made


@pytest.fixture(scope="module")
def ours(blocks, studies, sae, phantom, tmp_path_factory):
    config = CollectConfig(latents=LATENTS, top=14)
    return collect_records(blocks, studies, sae, phantom, tmp_path_factory.mktemp("records"), config)


@pytest.fixture(scope="module")
def folder(blocks, studies, sae, phantom, tmp_path_factory):
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    out = run_saedashboard(
        blocks,
        [(study.study_id, study.licence.value) for study in studies],
        sae,
        Readout.of(phantom),
        Target(set_name="res-16k", model_id="phantom", layers=8),
        3,
        tmp_path_factory.mktemp("theirs") / "out",
        AdapterConfig(latents=LATENTS, batch_size=8, top=200),
    )
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert not value.is_inference()
    return out


@pytest.fixture(scope="module")
def theirs(folder):
    batches = [json.loads((folder / f"batch-{n}.json").read_text()) for n in range(2)]
    return {one["feature_index"]: one for batch in batches for one in batch["features"]}


def test_densities_are_the_same(ours, theirs):
    assert set(theirs) == set(LATENTS)
    for latent in LATENTS:
        assert theirs[latent]["frac_nonzero"] == pytest.approx(ours[latent].density, rel=1e-12)
    assert theirs[5]["frac_nonzero"] == 0.0


def test_top_and_bottom_tokens_are_the_same(ours, theirs):
    """Ten tokens at either end: values to half of the third digit, the tokens themselves where values differ."""
    for latent in LATENTS:
        mine = feature(ours[latent], ours.meta, "d")
        for end in ("pos", "neg"):
            values = np.array(mine[f"{end}_values"])
            assert np.abs(values - theirs[latent][f"{end}_values"]).max() < HALF
            apart = np.abs(np.diff(values, append=np.inf)) > 1e-5
            apart &= np.abs(np.diff(values, prepend=np.inf)) > 1e-5
            apart[-1] = False  # its rival is not listed
            same = np.array(mine[f"{end}_str"]) == np.array(theirs[latent][f"{end}_str"])
            assert same[apart].all()
            assert apart.sum() >= 5


def test_top_activations_are_the_same(ours, theirs):
    """The largest activation of every study among their 200 largest tokens is that of our context of the study."""
    compared = 0
    for latent in LATENTS:
        largest: dict[str, float] = {}
        for one in theirs[latent]["activations"]:
            if one["bin_min"] == -1 and one["values"][one["qualifying_token_index"]] > 0:
                value = one["values"][one["qualifying_token_index"]]
                study = one["tokens"][0][len("⟦study ") : -1]
                largest[study] = max(value, largest.get(study, 0.0))
        mine = {context.study: context for context in ours[latent].top}
        for study, value in largest.items():
            assert value == pytest.approx(mine[study].value, abs=HALF, rel=1e-4)
        if largest:
            assert max(largest.values()) == pytest.approx(ours[latent].max, abs=HALF, rel=1e-4)
        compared += len(largest)
    assert compared > 40


def test_hits_are_the_tokens_that_the_records_name(ours, theirs):
    """A patch is named by view, row and column as in our contexts; a word is the same word."""
    kinds = set()
    for latent in LATENTS:
        if not ours[latent].top:
            continue
        best = ours[latent].top[0]
        one = next(
            a
            for a in theirs[latent]["activations"]
            if a["bin_min"] == -1 and a["tokens"][0] == f"⟦study {best.study}⟧"
            and a["values"][a["qualifying_token_index"]] == pytest.approx(best.value, abs=HALF, rel=1e-4)
        )  # fmt: skip
        token = one["tokens"][one["qualifying_token_index"]]
        if best.patch:
            assert token == f"<{best.patch[0]} r{best.patch[1]:02d}c{best.patch[2]:02d}>"
        else:
            assert token == best.tokens[best.peak]
        kinds.add(best.modality)
    assert kinds


def test_the_files_pass_validation_with_their_own_classes_as_judge(folder):
    kind, issues = validate(folder)
    assert kind == "saedashboard"
    assert [issue for issue in issues if issue.severity == "error"] == []


def test_the_classic_page_shows_every_latent_and_parses_no_token_as_markup(folder):
    page = (folder / "page-0.html").read_text(encoding="utf-8")
    assert (folder / "page-1.html").is_file()
    assert '"7"' in page
    for token in ("</s>", "<s>", "<0x", "<frontal", "<unk>"):
        assert token not in page
    assert "\\u2039frontal" in page


def test_a_page_of_credentialed_studies_is_refused_and_their_files_have_none(
    blocks, studies, sae, phantom, tmp_path
):
    closed = [(study.study_id, "credentialed") for study in studies]
    common = (sae, Readout.of(phantom), Target(set_name="a"), 3, tmp_path / "out")
    with pytest.raises(PrivacyError, match="14 'credentialed'"):
        run_saedashboard(blocks, closed, *common, AdapterConfig(latents=[0]))
    with pytest.raises(PrivacyError, match=r"d3js\.org"):
        run_saedashboard(
            blocks, closed, *common, AdapterConfig(latents=[0], page=True, allow_credentialed=True)
        )
    assert not (tmp_path / "out").exists()
    run_saedashboard(blocks, closed, *common, AdapterConfig(latents=[0], allow_credentialed=True))
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json"}


def test_latents_that_do_not_exist_are_refused(blocks, studies, sae, phantom, tmp_path):
    with pytest.raises(ConfigError, match="the SAE has 48"):
        run_saedashboard(
            blocks, [], sae, Readout.of(phantom), Target(set_name="a"), 3, tmp_path / "o", AdapterConfig(latents=[48])
        )  # fmt: skip


def test_the_copy_computes_what_the_sae_does_and_shares_nothing(sae, blocks):
    values = blocks[0][0].values
    copied = plain_copy(sae)
    assert torch.equal(copied.encode(values), sae.encode(values))
    assert {p.data_ptr() for p in copied.parameters()}.isdisjoint(p.data_ptr() for p in sae.parameters())


def test_the_command_writes_files_and_page(sae, tmp_path, capsys):
    from sae_lens_maira.cli import main

    sae.save_model(tmp_path / "sae")
    words = ["--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "out"), "--set-name", "res-1k"]
    words += ["--latents", "0-2,7", "--studies", "4", "--model-id", "phantom", "--json"]
    assert main(["dashboards", "saedashboard", *words]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (printed["latents"], printed["studies"], printed["issues"]) == (4, 4, 0)
    assert (tmp_path / "out" / "page-0.html").stat().st_size > 50_000
