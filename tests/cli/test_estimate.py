"""Estimates: counts are exact where they can be, and every command prints them before anything is loaded."""

import json

import pytest
import torch
from transformers import AutoModel

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.cli import main
from sae_lens_maira.cli.options import HarvestOptions
from sae_lens_maira.maira2 import Maira2Config, TokenRole
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sizing import ModelSize, StudySizes

HOOK = "blocks.3.hook_resid_post"


def test_parameters_are_those_of_the_published_checkpoint_and_of_the_phantom(phantom):
    assert ModelSize(Maira2Config(), 1).weights() == 6_880_185_600
    counted = sum(p.numel() for p in phantom.model.parameters())
    assert ModelSize(phantom.model.config, 1).weights() == counted


def test_tokens_are_those_of_the_encoding(phantom):
    studies = generate_studies(5, seed=99)
    sizes = StudySizes.count(phantom.processor, phantom.model.config, studies)
    for number, study in enumerate(studies):
        roles = phantom.processor.encode([study], report="teacher").roles[0]
        for role in TokenRole:
            assert sizes.roles[number, role] == int((roles == role).sum()), role
    for roles in ("paper", "paper_last_image"):
        rows = read_rows(phantom, studies, HOOK, RowSettings(roles=roles), progress=False)
        assert sizes.rows(roles) == len(rows)
    prompts = RowSettings(roles="all", rates={"image": 0}, reports="prompt")
    rows = read_rows(phantom, studies, HOOK, prompts, progress=False)
    (source,) = sizes.sources("prompt", 300).values()
    assert source.rows("all", {"image": 0}) == len(rows)
    half = sizes.rows("paper_last_image", {"image": 0.5}) - sizes.rows("paper")
    assert half == sizes.images.sum() + (sizes.roles[:, TokenRole.IMAGE].sum() - sizes.images.sum()) / 2


def test_generated_reports_take_the_whole_model_and_their_limit(phantom, capsys):
    """Of both sources the rows are those of each; a prompt alone needs the layers up to the hook point."""
    words = ["harvest", "--hooks", f"[{HOOK}]", "--studies", "20", "--estimate", "true", "--json"]
    found = {}
    for reports in ("teacher", "generated", "both", "prompt"):
        assert main([*words, "--reports", reports, "--max-new-tokens", "50"]) == 0
        found[reports] = json.loads(capsys.readouterr().out)
    row = 2 * 128
    rows = {name: cost["disk_bytes"] // row for name, cost in found.items()}
    assert rows["generated"] == rows["prompt"] + 20 * 50
    assert rows["both"] == rows["teacher"] + rows["generated"]
    layers = {name: cost["notes"][1].split()[0] for name, cost in found.items()}
    assert layers == {"teacher": "4", "generated": "8", "both": "8", "prompt": "4"}
    assert found["both"]["flops"] == pytest.approx(found["teacher"]["flops"] + found["generated"]["flops"])
    options = HarvestOptions(hooks=HOOK, studies=1, reports="prompt", device="cpu")
    assert len(options.load()[0].model.model.language_model.layers) == 4


@pytest.mark.parametrize(
    "words",
    [
        ["harvest", "--hooks", f"[{HOOK}]", "--studies", "20"],
        ["train", "--config", "recipes/phantom.yaml", "--studies", "20"],
        ["latents", "--sae", "phantom-image", "--out", "nothing", "--studies", "20"],
        ["steer", "--sae", "phantom-image", "--finding", "cardiomegaly", "--studies", "20"],
    ],
    ids=lambda words: words[0],
)
def test_commands_print_an_estimate_and_run_nothing(words, capsys, monkeypatch):
    def refused(*_args, **_keywords):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(
        "sae_lens_maira.maira2.loading.Maira2ForConditionalGeneration.from_pretrained", refused
    )
    assert main([*words, "--estimate", "true", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["command"] == words[0]
    assert found["device_bytes"] > 0
    assert found["flops"] > 0
    assert set(found["seconds"]) == {"A100", "H100", "H200", "L40S"}
    assert main([*words, "--estimate", "true"]) == 0
    assert "device memory" in capsys.readouterr().out


def test_processes_divide_batch_buffer_and_with_an_option_the_moments(capsys):
    words = ["train", "--config", "recipes/phantom.yaml", "--studies", "20", "--estimate", "true", "--json"]
    found = []
    for more in (
        [],
        ["--rank", "0", "--world", "8"],
        ["--rank", "0", "--world", "8", "--shard-optimizer", "true"],
        ["--rank", "0", "--world", "8", "--shard-latents", "true"],
    ):
        assert main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out))
    alone, plain, divided, shares = found
    weights = alone["disk_bytes"]
    assert plain["device_bytes"] - divided["device_bytes"] == 2 * weights * 7 // 8
    assert alone["device_bytes"] > plain["device_bytes"]
    assert plain["host_bytes"] == alone["host_bytes"] // 8
    assert "over 8" in alone["notes"][1]
    assert "divided over 8 processes" in divided["notes"][0]
    more_rows = 1024 * 128 * (12 + 8 * 4) - 1024 // 8 * 128 * 12  # all rows, and errors of four levels
    assert shares["device_bytes"] == plain["device_bytes"] - 5 * weights * 7 // 8 + more_rows


def test_bytes_of_a_forward_and_of_a_gradient_are_those_of_the_published_decoder(monkeypatch, rehearsal):
    """Tensors without values, of the published sizes: what lives at once is at most the estimate, and at least 80 %."""
    from torch._subclasses import FakeTensorMode

    from sae_lens_maira.hooks._upper import frozen_weights, only_blocks

    monkeypatch.setattr("transformers.PreTrainedModel.init_weights", lambda self: None)
    config = Maira2Config().text_config
    config.num_hidden_layers = 4
    tokens, size = 1590, ModelSize(Maira2Config())
    TensorBytes = rehearsal("tracker").TensorBytes
    with FakeTensorMode():
        decoder = AutoModel.from_config(config, dtype=torch.bfloat16).eval()
        stream = torch.empty(1, tokens, size.width, dtype=torch.bfloat16)
        with torch.no_grad(), only_blocks(decoder, 0, 3, norm=False), TensorBytes() as tracker:
            tracker.start()
            decoder(inputs_embeds=stream, use_cache=False)
        assert 0.8 * size.work(tokens) < tracker.peak <= size.work(tokens)
        for layers in (1, 3):
            leaf = stream.clone().requires_grad_()
            with frozen_weights(decoder), only_blocks(decoder, 4 - layers), TensorBytes() as tracker:
                tracker.start()
                last = decoder(inputs_embeds=leaf, use_cache=False).last_hidden_state
                torch.autograd.grad(last[:, -1].float().sum(), leaf)
            assert 0.8 * size.graph(tokens, layers) < tracker.peak <= size.graph(tokens, layers)
