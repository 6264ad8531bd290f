"""A damaged SAE folder is one message and exit code 2 in every command that takes --sae: damages times commands."""

import inspect
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lens_maira.checksums import SUMS
from sae_lens_maira.cli import COMMANDS, main
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig

HOOK = "blocks.3.hook_resid_post"
# Arguments beyond --sae that each command requires. A command with --sae and without a row here fails the test below.
# Key: the command, and the option that names the damaged SAE where that is not --sae.
REQUIRED = {
    "evaluate": [],
    "match": ["--other", "phantom-image"],
    "locate": [],
    "latents": ["--out", "{out}"],
    "attribute": ["--out", "{out}"],
    "steer": ["--out", "{out}", "--finding", "cardiomegaly"],
    "match --other": ["--sae", "phantom-image"],
    "attribute --text-sae": ["--sae", "phantom-image", "--out", "{out}"],
    "dashboards saedashboard": ["--out", "{out}", "--set-name", "res-1k"],
    "dashboards neuronpedia": ["--out", "{out}", "--set-name", "res-1k", "--records", "{records}"],
}


def edit_config(**changes):
    def damage(folder):
        config = json.loads((folder / "cfg.json").read_text())
        config.update(changes)
        (folder / "cfg.json").write_text(json.dumps({k: v for k, v in config.items() if v != "REMOVED"}))

    return damage


def edit_weights(change):
    def damage(folder):
        state = load_file(folder / "sae_weights.safetensors")
        change(state)
        save_file(state, folder / "sae_weights.safetensors")

    return damage


def put(name, value):
    def change(state):
        state[name][..., 0] = value

    return edit_weights(change)


def cut(name, kept):
    def damage(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


DAMAGES = {
    "no folder": shutil.rmtree,
    "no configuration": lambda folder: (folder / "cfg.json").unlink(),
    "no weights": lambda folder: (folder / "sae_weights.safetensors").unlink(),
    "cut configuration": cut("cfg.json", 0.5),
    "empty configuration": write("cfg.json", b""),
    "configuration is a list": write("cfg.json", b"[1, 2]"),
    "configuration is not UTF-8": write("cfg.json", b'{"d_in": "\xff\xfe"}'),
    "configuration of absurd depth": write("cfg.json", b"[" * 100_000),
    "metadata is a word": edit_config(metadata="mine"),
    "cut weights": cut("sae_weights.safetensors", 0.7),
    "weights of zero bytes": write("sae_weights.safetensors", b""),
    "weights are a web page": write("sae_weights.safetensors", b"<html>not found</html>" * 100),
    "NaN decoder": put("W_dec", float("nan")),
    "NaN threshold": put("threshold", float("nan")),
    "infinite bias": put("b_enc", float("inf")),
    "another width": edit_config(d_sae=512),
    "another input": edit_config(d_in=64),
    "width is a word": edit_config(d_sae="many"),
    "no width": edit_config(d_sae="REMOVED"),
    "unknown architecture": edit_config(architecture="crosscoder_of_tomorrow"),
    "unknown type of number": edit_config(dtype="float13"),
    "levels exceed the width": edit_config(
        metadata={"hook_name": HOOK, "matryoshka": {"level_widths": [64, 999]}}
    ),
    "levels are words": edit_config(metadata={"hook_name": HOOK, "matryoshka": {"level_widths": ["a", "b"]}}),
    "weights are integers": edit_weights(
        lambda state: state.update({name: value.int() for name, value in state.items()})
    ),
    "a tensor is missing": edit_weights(lambda state: state.pop("b_enc")),
    "a tensor is short": edit_weights(lambda state: state.update(b_enc=state["b_enc"][:7].clone())),
    "a tensor is of another kind": edit_weights(lambda state: state.update(gate=torch.ones(3))),
}


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sae") / "sae"
    config = MatryoshkaSAEConfig(d_in=128, d_sae=256, matryoshka_widths=[64, 256], k=4.0)
    config.metadata.hook_name = HOOK
    sae = MatryoshkaSAE(config)
    torch.nn.init.normal_(sae.W_enc, generator=torch.Generator().manual_seed(0))
    sae.save_model(folder)
    (
        folder / SUMS
    ).unlink()  # as SAELens writes it; with checksums every damage is found at once, see test_faults
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory, make_recorded):
    return make_recorded(tmp_path_factory.mktemp("records") / "records")


@pytest.fixture(scope="module")
def make_recorded():
    """An empty record set of an SAE of this size."""
    from sae_lens_maira.latents.records import RecordsMeta
    from sae_lens_maira.latents.writing import write_records

    def make(folder):
        meta = RecordsMeta(
            model="phantom", hook_name=HOOK, layer=3, sae="sae", control="trained", d_in=128, d_sae=256,
            level_widths=(64, 256), rows_text=1, rows_image=1, studies=1, findings=(), seed=0, versions={},
        )  # fmt: skip
        write_records(folder, meta, [], [], [])
        return folder

    return make


def test_every_command_that_takes_an_sae_is_covered():
    taking = {
        name
        for name in COMMANDS
        if "sae" in inspect.signature(COMMANDS[name]).parameters and name not in ("train",)
    }
    # The workbench loads as `attribute` does, and would serve for ever if it did not refuse.
    assert taking - {"quickstart", "workbench"} == {name.partition(" --")[0] for name in REQUIRED}


@pytest.mark.parametrize("command", REQUIRED)
@pytest.mark.parametrize("damage", DAMAGES)
def test_one_message_and_code_2(damage, command, healthy, records, tmp_path, capsys):
    folder = tmp_path / "sae"
    shutil.copytree(healthy, folder)
    DAMAGES[damage](folder)
    words = [word.format(out=tmp_path / "out", records=records) for word in REQUIRED[command]]
    command, _, option = command.partition(" --")
    code = main([*command.split(), f"--{option or 'sae'}", str(folder), *words])
    captured = capsys.readouterr()
    if command == "locate" and damage.startswith("levels"):
        assert code == 0, captured.err  # it does not use the metadata
        return
    assert code == 2, captured.err
    assert captured.out == ""
    message = [line for line in captured.err.splitlines() if line.strip()]
    assert len(message) == 1, captured.err
    assert message[0].startswith(f"sae-lens-maira {command}: ")
    assert str(folder) in message[0] or damage.startswith("levels")
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Rows of two phantom studies at the hook point of the SAE."""
    folder = tmp_path_factory.mktemp("rows") / "store"
    words = ["--hooks", HOOK, "--studies", "2", "--rates", "{image: 0.2}", "--store", str(folder)]
    assert main(["harvest", *words]) == 0
    return folder


@pytest.mark.parametrize("damage", [None, *DAMAGES])
def test_a_training_from_a_damaged_sae_is_refused(damage, healthy, store, tmp_path, capsys):
    """`train --init`: one message that names the folder, and no SAE is written."""
    folder, out = tmp_path / "sae", tmp_path / "out"
    shutil.copytree(healthy, folder)
    DAMAGES.get(damage, lambda _: None)(folder)
    steps = {"total_training_samples": 64, "train_batch_size_samples": 64, "lr": 0.001}
    words = [
        "--hooks",
        HOOK,
        "--studies",
        "2",
        "--rates",
        "{image: 0.2}",
        "--store",
        str(store),
        "--out",
        str(out),
    ]
    words += ["--sae", "{d_sae: 256, k: 4, matryoshka_widths: [64, 256]}", "--trainer", json.dumps(steps)]
    code = main(["train", *words, "--init", str(folder)])
    printed = capsys.readouterr().err.splitlines()
    if damage is None:
        assert code == 0
        return
    assert code == 2
    message = [line for line in printed if line.startswith("sae-lens-maira train: ")]
    assert len(message) == 1, printed
    assert str(folder) in message[0] or damage.startswith(("levels", "another width"))
    assert not out.exists()


def test_records_of_another_sae_are_refused(healthy, tmp_path):
    """By the hash of its weights, its width and its hook point; also the records in the SAE's own folder."""
    from sae_lens_maira.errors import RecordError
    from sae_lens_maira.interface import load_sae
    from sae_lens_maira.latents.records import RecordsMeta
    from sae_lens_maira.latents.writing import write_records
    from sae_lens_maira.sae import fingerprint

    facts = {
        "model": "phantom", "hook_name": HOOK, "layer": 3, "sae": "mine", "control": "trained", "d_in": 128,
        "d_sae": 256, "level_widths": (64, 256), "rows_text": 1, "rows_image": 1, "studies": 1, "findings": (),
        "seed": 0, "versions": {}, "sae_fingerprint": fingerprint(load_sae(healthy)),
    }  # fmt: skip
    wrong = {"sae_fingerprint": "0" * 64, "d_sae": 512, "hook_name": "blocks.2.hook_resid_post"}
    for name, value in {"right": None, **wrong}.items():
        changed = facts if value is None else facts | {name: value}
        write_records(tmp_path / name, RecordsMeta(**changed), [], [], [])
        if value is None:
            p99 = load_sae(healthy, records=tmp_path / name).p99
            assert p99 is not None
            assert p99.tolist() == [0.0] * 256
            assert load_sae(healthy, records=tmp_path / name, dtype="bfloat16").dtype is torch.bfloat16
            continue
        with pytest.raises(RecordError, match="has records of"):
            load_sae(healthy, records=tmp_path / name)
        inside = tmp_path / f"sae {name}"
        shutil.copytree(healthy, inside)
        shutil.copytree(tmp_path / name, inside / "records")
        with pytest.raises(RecordError, match="has records of"):
            load_sae(inside)
