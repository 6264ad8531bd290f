"""`train` says what it does: other stores and checkpoints, wrong settings, logging, a start from weights, locks."""

import json
import os
from dataclasses import fields, replace
from typing import get_args, get_origin, get_type_hints

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig, SAETrainerConfig

from sae_lens_maira.activations import ActivationStore, StoreProvider
from sae_lens_maira.cli import main
from sae_lens_maira.cli.options import HarvestOptions, checked_fields
from sae_lens_maira.errors import ConfigError, StoreError, StudyError
from sae_lens_maira.io import locked
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaTrainingSAEConfig, load_matryoshka
from sae_lens_maira.studies import StudyTable, table_of_studies

HOOK = "blocks.1.hook_resid_post"
HARVEST = [
    "--hooks",
    HOOK,
    "--studies",
    "6",
    "--roles",
    "content",
    "--rates",
    "{image: 0.2}",
    "--device",
    "cpu",
]
SAE_PART = "{d_sae: 64, k: 4, matryoshka_widths: [16, 64]}"
STEPS = {"total_training_samples": 1024, "train_batch_size_samples": 128, "lr": 0.001}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Rows of six phantom studies."""
    folder = tmp_path_factory.mktemp("rows") / "store"
    assert main(["harvest", *HARVEST, "--store", str(folder)]) == 0
    return folder


def train(store, out, *more, sae=SAE_PART, **steps):
    words = ["train", *HARVEST, "--store", str(store), "--out", str(out), "--sae", sae]
    return main([*words, "--trainer", json.dumps(STEPS | steps), *more])


# Every option of `harvest`: another value, and what train says of a complete store. None: it has no effect there.
OPTIONS = {
    "hooks": ("blocks.2.hook_resid_post", "name one of these"),
    "store": (None, None),
    "model": ("FOLDER", "model checkpoint is"),
    "studies": (7, "the store has 6 studies and 7 are given"),
    "study_seed": (1, "study 0 is phantom-0-0 in the store and phantom-1-0 here"),
    "table": ("TABLE", "study 0 is phantom-0-0"),
    "root": (None, None),
    "split": (None, None),
    "roles": ("text_only", "rates.separator is None in the store and 1.0 here"),
    "rates": ({"image": 0.1}, "rates.image is 0.2 in the store and 0.1 here"),
    "reports": ("generated", "settings.reports is 'teacher'"),
    "max_new_tokens": (20, None),
    "task": ("grounded", "settings.task is 'findings'"),
    "shard_studies": (2, None),
    "shard_bytes": (1e6, None),
    "batch_size": (3, None),
    "dtype": ("float32", "note: --dtype float32 has no effect"),
    "model_dtype": ("bfloat16", "model dtype is 'float32'"),
    "max_norm": (5.0, "settings.max_norm is None"),
    "max_norm_ratio": (5.0, "settings.max_norm_ratio is None"),
    "seed": (1, "note: sampled with seed 0"),
    "device": ("meta", None),
    "workers": (1, None),
    "rank": (None, None),
    "world": (None, None),
    "rank_timeout": (5.0, None),
}


def test_every_option_of_harvest_is_listed_here():
    """A new option needs a line that says what it means for a store that is complete."""
    assert set(OPTIONS) == {field.name for field in fields(HarvestOptions)}


@pytest.mark.parametrize("name", [name for name, (value, _) in OPTIONS.items() if value is not None])
def test_a_complete_store_is_used_only_if_it_holds_what_is_asked(name, store, phantom, tmp_path):
    asked = HarvestOptions(hooks=HOOK, studies=6, rates={"image": 0.2}, device="cpu")
    opened = ActivationStore(store)
    assert asked.check_store(opened) == []
    value, printed = OPTIONS[name]
    if value == "FOLDER":
        phantom.model.save_pretrained(tmp_path)
        value = str(tmp_path)
    if value == "TABLE":
        made = table_of_studies(generate_studies(6, seed=9), tmp_path)
        value = StudyTable.from_frame(made.frame, tmp_path).save(tmp_path / "studies.parquet")
    other = replace(asked, **{name: value})
    if printed is None:
        assert other.check_store(opened) == []
    elif printed.startswith("note: "):
        assert any(printed[6:] in note for note in other.check_store(opened))
    else:
        with pytest.raises(StoreError) as error:
            other.check_store(opened)
        assert printed in str(error.value)


def test_a_split_of_the_table_is_other_studies(tmp_path):
    """--split chooses studies of the table, so a store of all of them is refused; without a table it has no effect."""
    frame = table_of_studies(generate_studies(2, seed=9), tmp_path).frame.assign(split=["train", "test"])
    table = StudyTable.from_frame(frame, tmp_path).save(tmp_path / "studies.parquet")
    asked = HarvestOptions(hooks=HOOK, table=table, store=tmp_path / "store", device="cpu")
    assert main(["harvest", "--hooks", HOOK, "--table", str(table), "--store", str(asked.store)]) == 0
    opened = ActivationStore(tmp_path / "store")
    assert asked.check_store(opened) == []
    with pytest.raises(StoreError, match="the store has 2 studies and 1 are given here"):
        replace(asked, split="train").check_store(opened)
    with pytest.raises(StudyError, match="none of them in the split validate"):
        replace(asked, split="validate").check_store(opened)


def test_texts_and_images_changed_since_the_harvest_are_refused(tmp_path, capsys):
    """By train on a complete store, and by harvest that continues: the study is named."""
    folder = tmp_path / "studies"
    folder.mkdir()
    table = table_of_studies(generate_studies(4, seed=9), folder).save(folder / "studies.parquet")
    words = [
        "--hooks",
        HOOK,
        "--table",
        str(table),
        "--store",
        str(tmp_path / "store"),
        "--shard-studies",
        "2",
    ]
    steps = ["--out", str(tmp_path / "sae"), "--sae", SAE_PART, "--trainer", json.dumps(STEPS)]
    assert main(["train", *words, *steps]) == 0
    image = sorted(folder.rglob("*.png"))[0]
    before = image.read_bytes()
    image.write_bytes(sorted(folder.rglob("*.png"))[1].read_bytes())
    capsys.readouterr()
    assert main(["train", *words, *steps]) == 2
    assert "has other texts or images" in capsys.readouterr().err
    asked = HarvestOptions(hooks=HOOK, table=table, shard_studies=2)
    assert (
        asked.check_store(ActivationStore(tmp_path / "store"), inputs=False) == []
    )  # ranks other than the first
    untold = ["--hooks", HOOK, "--store", str(tmp_path / "store")]
    assert main(["train", *untold, *steps]) == 0
    assert "the store's 4 studies are used without comparing them" in capsys.readouterr().err
    (tmp_path / "store" / "shard-000001.json").unlink()
    assert main(["harvest", *words]) == 2
    assert "phantom-9-0 has other texts or images" in capsys.readouterr().err
    image.write_bytes(before)
    assert main(["train", *words, *steps]) == 0


@pytest.mark.parametrize(
    ("more", "printed"),
    [
        ({"lr": -1}, "trainer.lr is -1"),
        ({"total_training_samples": "many"}, "total_training_samples is 'many'"),
        ({"lr_scheduler_name": "zigzag"}, "zigzag"),
        ({"learning_rate": 1}, "learning_rate"),
        ({"device": "gpu0"}, "gpu0"),
        ({"logger": {"project": "x"}}, "project"),
        ({"logger": "wandb"}, "trainer.logger is 'wandb'"),
    ],
)
def test_wrong_settings_are_one_message(more, printed, store, tmp_path, capsys):
    """What SAELens raises or asserts ends with exit code 2, not with a traceback."""
    assert train(store, tmp_path / "sae", **more) == 2
    error = capsys.readouterr().err
    assert printed in error
    assert "Traceback" not in error


PARTS = {
    "trainer": SAETrainerConfig,
    "trainer.logger": LoggingConfig,
    "sae": MatryoshkaTrainingSAEConfig,
    "provider": StoreProvider,
}


@pytest.mark.parametrize("part", PARTS)
def test_a_value_of_another_type_names_its_field(part):
    """Every field of every part of a recipe, with values that no field of another type takes."""
    hints = get_type_hints(PARTS[part].__init__)
    checked = 0
    for name, hint in hints.items():
        if name in ("return", "logger"):
            continue
        inner = {str(one) for one in (get_args(hint) or (hint,))}
        wrong = {"two", (1.5, "x"), -0.5} if "str" not in str(hint) and "Literal" not in str(hint) else {-0.5}
        for value in wrong - ({-0.5} if {str(float)} & inner and get_origin(hint) is not list else set()):
            given = list(value) if isinstance(value, tuple) else value
            with pytest.raises(ConfigError, match=rf"^{part}\.{name} is .*; expected "):
                checked_fields(part, {name: given}, PARTS[part])
            checked += 1
    assert checked > len(hints)
    assert checked_fields("trainer", {"lr_warm_up_steps": 1e2}, SAETrainerConfig) == {"lr_warm_up_steps": 100}


def test_wrong_types_end_before_a_model_is_loaded(store, tmp_path, capsys):
    assert train(store, tmp_path / "sae", adam_beta1="two") == 2
    assert "trainer.adam_beta1 is 'two'; expected a number." in capsys.readouterr().err
    assert train(store, tmp_path / "sae", sae=SAE_PART.replace("k: 4", "k: four")) == 2
    assert "sae.k is 'four'; expected a number." in capsys.readouterr().err
    assert train(store, tmp_path / "sae", "--provider", "{buffer_rows: few}") == 2
    assert "provider.buffer_rows is 'few'; expected a whole number or null." in capsys.readouterr().err
    assert not (tmp_path / "sae").exists()


@pytest.mark.parametrize("sae", ["{d_sae: 64}", "{d_sae: 64, k: 4, matryoshka_widths: [16, 64], width: 3}"])
def test_wrong_settings_of_the_sae_are_one_message(sae, store, tmp_path, capsys):
    assert train(store, tmp_path / "sae", sae=sae) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("given", [None, "frozen_encoder"])
def test_two_different_controls_are_refused(given, store, tmp_path, capsys):
    """A recipe's `control: null` does not silently override --control; without --control it is a plain training."""
    sae = json.dumps({"d_sae": 64, "k": 4, "matryoshka_widths": [16, 64], "control": given})
    assert train(store, tmp_path / "sae", "--control", "frozen_decoder", sae=sae) == 2
    assert f"--control is 'frozen_decoder' and sae.control is {given!r}" in capsys.readouterr().err
    assert not (tmp_path / "sae").exists()


def test_a_rerun_with_other_settings_is_refused_or_starts_again(store, tmp_path, capsys):
    """Another learning rate or seed is named; --resume false sets the checkpoints aside."""
    places = {"checkpoint_path": str(tmp_path / "checkpoints"), "n_checkpoints": 2}
    assert train(store, tmp_path / "sae", **places) == 0
    assert train(store, tmp_path / "sae", **(places | {"lr": 0.002})) == 2
    assert "trainer.lr is 0.001 in the checkpoint and 0.002 here" in capsys.readouterr().err
    assert train(store, tmp_path / "sae", "--seed", "5", **places) == 2
    assert "run.seed is 0 in the checkpoint and 5 here" in capsys.readouterr().err
    assert train(store, tmp_path / "sae", "--resume", "false", **(places | {"lr": 0.002})) == 0
    assert "were moved to" in capsys.readouterr().err


def test_a_run_is_logged_to_weights_and_biases(store, tmp_path, monkeypatch):
    """With WANDB_MODE=offline, a run with its metrics is written."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    logger = {"wandb_project": "tests", "wandb_log_frequency": 1}
    assert train(store, tmp_path / "sae", logger=logger) == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    assert b"overall_loss" in run.read_bytes()


@pytest.mark.parametrize(
    ("harvested", "provider", "named"),
    [
        ("content", {}, ["IMAGE", "INDICATION", "REPORT"]),
        ("content", {"roles": ["report"]}, ["REPORT"]),
        ("content", {"rates": {"image": 0}}, ["INDICATION", "REPORT"]),
        ("paper_last_image", {}, "paper_last_image"),
        ("paper_last_image", {"rates": {"report": 0.5}}, "paper_last_image"),
        ("paper_last_image", {"roles": ["image", "report"]}, ["IMAGE", "REPORT"]),
        ("paper_last_image", {"rates": {"image": 0}}, ["INDICATION", "REPORT"]),
    ],
)
def test_the_metadata_name_the_roles_that_were_trained_on(harvested, provider, named, tmp_path):
    """What the provider leaves out of a store is not named; `latents` reads the same roles."""
    words = [
        "--hooks",
        HOOK,
        "--studies",
        "2",
        "--roles",
        harvested,
        "--rates",
        "{prior_report: 0, technique: 0, ",
    ]
    words[-1] += "comparison: 0, phrase: 0}"
    words += ["--store", str(tmp_path / "store"), "--out", str(tmp_path / "sae"), "--device", "cpu"]
    steps = STEPS | {"total_training_samples": 64, "train_batch_size_samples": 64}
    parts = ["--sae", SAE_PART, "--trainer", json.dumps(steps), "--provider", json.dumps(provider)]
    assert main(["train", *words, *parts]) == 0
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.token_roles == named


def test_training_starts_from_an_existing_sae(store, tmp_path, capsys):
    """--init: before the first step the reconstruction is the given SAE's; another width, k or level is refused."""
    assert train(store, tmp_path / "first") == 0
    first = load_matryoshka(tmp_path / "first")
    init = ["--init", str(tmp_path / "first")]
    nothing = {"lr": 1e-12, "lr_end": 1e-12, "total_training_samples": 128}
    assert train(store, tmp_path / "second", *init, **nothing) == 0
    second = load_matryoshka(tmp_path / "second")
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        torch.testing.assert_close(getattr(second, name), getattr(first, name), rtol=1e-4, atol=1e-5)
    scaled = SAE_PART.replace("}", ", normalize_activations: expected_average_only_in}")
    dictionary = SAE_PART.replace("}", ", loss_convention: dictionary_learning}")
    rows = next(ActivationStore(store).blocks(HOOK)).values
    for number, sae in enumerate((scaled, dictionary)):
        out = tmp_path / f"other_{number}"
        assert train(store, out, *init, sae=sae, n_batches_for_norm_estimate=2, **nothing) == 0
        other = load_matryoshka(out)
        torch.testing.assert_close(other.W_dec, first.W_dec, rtol=1e-4, atol=1e-5)
        hidden = rows @ other.W_enc + other.b_enc - other.b_dec @ other.W_enc
        expected = rows @ first.W_enc + first.b_enc - first.b_dec @ first.W_enc
        torch.testing.assert_close(hidden, expected, rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    assert train(store, tmp_path / "wider", *init, sae="{d_sae: 96, k: 5, matryoshka_widths: [16, 96]}") == 2
    error = capsys.readouterr().err
    assert "d_sae is 64 there and 96 here" in error
    assert "k is 4" in error
    places = {"checkpoint_path": str(tmp_path / "checkpoints"), "n_checkpoints": 1}
    assert train(store, tmp_path / "fifth", **places) == 0
    before = sorted((tmp_path / "checkpoints").iterdir())
    again = ["--resume", "false", "--init", str(tmp_path / "nowhere")]
    assert train(store, tmp_path / "fifth", *again, **places) == 2
    assert sorted((tmp_path / "checkpoints").iterdir()) == before, (
        "checkpoints were moved for an SAE that is not there"
    )


def test_a_rerun_with_another_buffer_names_the_option(store, tmp_path, capsys):
    places = {"checkpoint_path": str(tmp_path / "checkpoints"), "n_checkpoints": 1}
    assert train(store, tmp_path / "sae", "--provider", "{buffer_rows: 1024}", **places) == 0
    assert train(store, tmp_path / "sae", "--provider", "{buffer_rows: 2048}", **places) == 2
    error = capsys.readouterr().err
    assert "buffer_rows is 1024 there and 2048 here" in error
    assert "--resume false" in error


def test_a_folder_in_use_is_refused(store, tmp_path, capsys):
    """Of the SAE, its checkpoints and the store: the message gives the host and the process."""
    with locked(tmp_path / "sae"):
        assert train(store, tmp_path / "sae") == 2
        assert f"process {os.getpid()} on" in capsys.readouterr().err
    with locked(tmp_path / "store"):
        assert main(["harvest", *HARVEST, "--store", str(tmp_path / "store")]) == 2
        assert "is in use" in capsys.readouterr().err
    assert train(store, tmp_path / "sae") == 0


def test_an_incomplete_store_is_not_exported(store, tmp_path, capsys):
    words = ["harvest", *HARVEST, "--store", str(tmp_path / "store"), "--shard-studies", "3"]
    assert main(words) == 0
    (tmp_path / "store" / "shard-000001.json").unlink()
    export = ["store", "export", "--store", str(tmp_path / "store"), "--out", str(tmp_path / "cached")]
    for command in (export, ["store", "validate", "--store", str(tmp_path / "store")]):
        capsys.readouterr()
        assert main(command) == 2
        assert "1 of 2 shards are missing (1)" in capsys.readouterr().err


def test_published_metadata_name_no_local_path(phantom, store, tmp_path):
    """A model folder is recorded by its name alone."""
    folder = tmp_path / "secret" / "model"
    phantom.model.save_pretrained(folder)
    phantom.processor.save_pretrained(folder)
    rows = tmp_path / "rows"
    words = ["train", *HARVEST, "--model", str(folder), "--model-dtype", "float32", "--store", str(rows)]
    words += ["--out", str(tmp_path / "sae"), "--sae", SAE_PART, "--trainer", json.dumps(STEPS)]
    assert main(words) == 0
    assert SAE.load_from_disk(tmp_path / "sae").cfg.metadata.model_name == "model"
    for path in (tmp_path / "sae" / "cfg.json", rows / "store.json"):
        assert "secret" not in path.read_text()
