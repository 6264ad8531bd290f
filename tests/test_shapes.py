"""Shapes at the borders between packages: tensors of the same studies keep the same axes from package to package.

An axis is bound to a size by the first tensor that has it (jaxtyping); a later tensor of another size is an error.
Axes: studies, positions (L), images, patches, d_model, latents (d_sae), rows (kept tokens).
"""

from typing import Any

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import RowProvider, RowSettings, read_rows
from sae_lens_maira.attribution.entries import active_entries
from sae_lens_maira.attribution.residual import ResidualRun
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.interface import load_sae
from sae_lens_maira.latents import study_firing
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.steering.maps import frontal_rows, mean_patch_maps, random_direction, recorded_map
from sae_lens_maira.steering.statistics import encoder_of

jaxtyping = pytest.importorskip("jaxtyping")
pytestmark = pytest.mark.compat

HOOK = "blocks.3.hook_resid_post"


def has(value: Any, kind: str, axes: str) -> None:
    """Fail unless a tensor or array has this kind of numbers and these axes, each of the size it had before."""
    array = torch.Tensor if isinstance(value, torch.Tensor) else np.ndarray
    wanted = getattr(jaxtyping, kind)[array, axes]
    assert isinstance(value, wanted), f"{tuple(value.shape)} {value.dtype} is not {kind} {axes!r}"


def test_axes_are_the_same_in_every_package(phantom: Any) -> None:
    """maira2 -> hooks -> activations -> sae -> latents -> steering and attribution, on two studies."""
    studies = generate_studies(2, seed=3)
    hooked, sae = HookedMaira2(phantom), load_sae("phantom-image")
    with jaxtyping.jaxtyped("context"):
        encoding = phantom.processor.encode(studies, report="teacher")
        has(encoding.input_ids, "Int", "studies positions")
        has(encoding.roles, "Int", "studies positions")
        has(encoding.pixel_values, "Float", "images 3 side side")

        names = [HOOK, "vision_projector.hook_out"]
        _, cache = hooked.run_with_cache(encoding, names_filter=names)
        has(cache[HOOK], "Float", "studies positions d_model")
        has(cache[names[1]], "Float", "images patches d_model")

        rows = read_rows(phantom, studies, HOOK, RowSettings(roles="image_only"))
        has(rows.values, "Float", "rows d_model")
        for column in (rows.study, rows.position, rows.role, rows.token, rows.patch_row):
            has(column, "Int", "rows")
        assert len(rows) == cache[names[1]].shape[0] * cache[names[1]].shape[1]
        has(next(RowProvider(rows.values, 16)), "Float", "16 d_model")

        acts = sae.encode(rows.values)
        has(acts, "Float", "rows latents")
        has(sae.decode(acts), "Float", "rows d_model")
        has(sae.W_dec, "Float", "latents d_model")
        has(sae.p99, "Float", "latents")

        fires, _ = study_firing(encoder_of(sae), rows, len(studies))
        has(fires, "Bool", "studies latents")

        _, (height, width) = frontal_rows(rows)
        assert height * width == cache[names[1]].shape[1]
        for mean in mean_patch_maps(rows, encoder_of(sae), np.array([True, False]), np.array([False, True])):
            has(mean, "Float", "patches latents")
        delta = recorded_map(sae.records, "cardiomegaly", sae.W_dec, n_latents=4).delta(sae.W_dec)
        has(delta, "Float", "patches d_model")
        control = random_direction(delta, (height, width), strength=1.0)
        has(control.vector, "Float", "d_model")

        run = ResidualRun(hooked, phantom.processor.encode(studies[0], report="teacher"), HOOK)
        has(run.hidden, "Float", "length d_model")
        entries, errors = active_entries(sae, run.hidden, torch.arange(5, 15))
        has(errors, "Float", "10 d_model")
        for column in (entries.position, entries.latent):
            has(column, "Int", "entries")
        has(entries.delta(torch.arange(2)), "Float", "length d_model")

        with pytest.raises(AssertionError, match="is not Float 'rows latents'"):
            has(acts[:-1], "Float", "rows latents")
