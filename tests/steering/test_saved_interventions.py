"""Interventions as a file: exact after a round trip, bound to their SAE, refused where they do not fit."""

import json
from dataclasses import fields

import pytest
import torch

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.sae import MatryoshkaSAE, MatryoshkaSAEConfig
from sae_lens_maira.steering import (
    Ablate,
    Add,
    AddVectors,
    AtLeast,
    AtMost,
    Direction,
    Intervention,
    Scale,
    SetTo,
    load_interventions,
    save_interventions,
    steering,
)
from sae_lens_maira.steering.positions import Both, Either, everywhere, patches, prompt, report, roles, window

HOOK = "blocks.3.hook_resid_post"


def all_kinds() -> list:
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(8, 8, generator=generator) / 3
    return [
        Add(latents=(3, 40), strength=1 / 3, where=patches("frontal", grid)),
        SetTo(latents=(1,), strength=(0.1, 2.0), where=report(2, 20) & everywhere()),
        AtLeast(level=1, strength=1.5, where=patches(None) | prompt(), unit="raw"),
        AtMost(latents=(7,), strength=0.7, if_active=True, where=roles("indication")),
        Scale(latents=(9,), strength=2.0, if_latent=(5, 0.25), where=window(4)),
        Ablate(latents=(2,)),
        AddVectors(latents=(4, 6), vectors=torch.randn(2, 128, generator=generator), where=patches()),
        Direction(vector=torch.randn(128, generator=generator), strength=-0.2, relative=True),
    ]


def same(left, right) -> bool:
    """Equal in type and in every field, tensors bit for bit."""
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, (Both, Either, Intervention)) or hasattr(left, "weights"):
        return type(left) is type(right) and all(
            same(getattr(left, f.name), getattr(right, f.name)) for f in fields(left)
        )
    return type(left) is type(right) and left == right


def test_round_trip_is_exact(tmp_path, steering_sae, p99):
    """Every kind of intervention and schedule comes back with every bit of its numbers, and so do the units."""
    items = all_kinds()
    file = tmp_path / "intervention.json"
    save_interventions(file, items, steering_sae, HOOK, p99, note="all kinds")
    saved = load_interventions(file, steering_sae)
    assert len(saved.interventions) == len(items)
    for before, after in zip(items, saved.interventions, strict=True):
        assert same(before, after), before
    assert (saved.hook_name, saved.note) == (HOOK, "all kinds")
    assert torch.equal(saved.units(64), p99)  # a level is named, so every unit is kept
    save_interventions(
        tmp_path / "again.json", saved.interventions, steering_sae, HOOK, p99, note="all kinds"
    )
    assert (tmp_path / "again.json").read_bytes() == file.read_bytes()


def test_reports_are_the_same_after_a_round_trip(tmp_path, phantom, few, steering_sae, p99):
    """Loaded interventions with their own units write the tokens that the originals write."""
    items = [Add(latents=(3, 40), strength=4.0, where=patches()), Ablate(latents=(5,))]
    save_interventions(tmp_path / "i.json", items, steering_sae, HOOK, p99)
    saved = load_interventions(tmp_path / "i.json", steering_sae)
    assert set(saved.p99) == {3, 5, 40}
    encoding = phantom.processor.encode(few[:2])
    ids = []
    for what, units in ((items, p99), (saved.interventions, saved.units(64))):
        with steering(phantom, steering_sae, saved.hook_name, what, encoding, units) as run:
            ids.append(run.generate(max_new_tokens=20))
    assert torch.equal(*ids)


def test_another_sae_is_refused(tmp_path, steering_sae, p99):
    """The same shape with other weights is another SAE; directions alone belong to none."""
    file = tmp_path / "i.json"
    save_interventions(file, Add(latents=(3,)), steering_sae, HOOK, p99)
    other = MatryoshkaSAE(
        MatryoshkaSAEConfig(d_in=128, d_sae=64, matryoshka_widths=[8, 24, 64], device="cpu")
    )
    with pytest.raises(InterventionError, match="saved for the SAE"):
        load_interventions(file, other)
    with pytest.raises(InterventionError, match="no SAE was given"):
        save_interventions(file, Add(latents=(3,)), None, HOOK)
    save_interventions(file, Direction(vector=torch.ones(128)), None, HOOK)
    assert load_interventions(file, other).sae is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"is": "Add"', '"is": "Multiply"'),
        lambda text: text.replace('"strength"', '"strong"'),
        lambda text: json.dumps([json.loads(text)]),
        lambda text: text.replace("interventions 1", "interventions 9"),
        lambda text: text.replace("1.0", "NaN"),
        lambda text: json.dumps(json.loads(text) | {"interventions": [{"is": "Window"}]}),
    ],
)
def test_damaged_files_are_refused(tmp_path, steering_sae, p99, damage):
    """Cut, of unknown kinds or fields, of another format: one message that names the file."""
    file = tmp_path / "i.json"
    save_interventions(file, Add(latents=(3,)), steering_sae, HOOK, p99)
    text = file.read_text(encoding="utf-8")
    assert damage(text) != text
    file.write_text(damage(text), encoding="utf-8")
    with pytest.raises(InterventionError):
        load_interventions(file, steering_sae)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InterventionError, match=r"none\.json"):
        load_interventions(tmp_path / "none.json")
