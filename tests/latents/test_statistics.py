"""The streaming pass against brute force over the whole table of activations, in uneven blocks."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from sae_lens_maira import stats
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.statistics import OCTAVES, LatentStatistics, RowSample, priority
from sae_lens_maira.phantom import truth_labels
from sae_lens_maira.stats import EDGES, LOWEST_OCTAVE
from sae_lens_maira.token_roles import VIEWS

TOP, PER_OCTAVE, ZERO, GRID = 4, 3, 5, (8, 8)


def stream(rows, acts, truth, cuts=(0, 1, 7, 8, 25, 40), sparse=True, seed=3):
    statistics = LatentStatistics(
        acts.shape[1], GRID, truth, top=TOP, per_octave=PER_OCTAVE, zero=ZERO, seed=seed
    )
    for start, stop in pairwise(cuts):
        mask = (rows.study >= start) & (rows.study < stop)
        part = acts[torch.from_numpy(mask)]
        statistics.update(rows.where(mask), part.to_sparse() if sparse else part)
    return statistics


@pytest.fixture(scope="module")
def truth(studies):
    return np.stack([truth_labels(study) for study in studies])


@pytest.fixture(scope="module")
def done(rows, acts, truth):
    return stream(rows, acts, truth)


@pytest.fixture(scope="module")
def peaks(rows, acts):
    """(40, 2, 96) largest activation of each latent in each study, by plain loops."""
    table = acts.numpy()
    return np.stack(
        [
            [table[(rows.study == s) & (rows.is_image == bool(k))].max(0, initial=0) for k in (0, 1)]
            for s in range(40)
        ]
    )


def test_counts_sums_maxima_and_histogram(done, rows, acts):
    for k in (0, 1):
        part = acts.numpy()[rows.is_image == bool(k)]
        assert done.rows[k] == len(part)
        assert (done.fired[k].numpy() == (part > 0).sum(0)).all()
        assert (done.max[k].numpy() == part.max(0)).all()
        np.testing.assert_allclose(done.sum[k].numpy(), part.astype(np.float64).sum(0), rtol=1e-12)
        for latent in range(0, 96, 7):
            values = part[:, latent][part[:, latent] > 0]
            values = values.clip(EDGES[0], EDGES[-1] * 0.999)
            expected = np.histogram(values, EDGES.astype(np.float32))[0]
            assert (done.histogram[k, latent].numpy() == expected).all()


def test_p99_is_exact_to_one_percent(done, rows, acts):
    """Within 1 % of the exact percentile, never above the maximum, and the same as steering's unit."""
    p99, both = done.p99()
    for latent in range(96):
        values = acts.numpy()[rows.is_image, latent]
        values = values[values > 0]
        if len(values):
            exact = np.sort(values)[int(np.ceil(0.99 * len(values))) - 1]
            assert abs(p99[1, latent] - exact) <= 0.01 * exact
            assert p99[1, latent] <= values.max()
        else:
            assert p99[1, latent] == 0
    assert (stats.p99(acts[torch.from_numpy(rows.is_image)]).numpy() == p99[1]).all()
    assert (stats.p99(acts).numpy() == both).all()


def test_studies_and_agreement(done, peaks, truth):
    """Studies fired and the true positives of every latent and finding, text and image apart."""
    fires = peaks > 0
    assert (done.studies_fired.numpy() == fires.sum(0)).all()
    assert (done.any_fired.numpy() == fires.any(1).sum(0)).all()
    assert done.studies.tolist() == [40, 40]
    for k in (0, 1):
        expected = (fires[:, k, :, None] & truth[:, None, :]).sum(0)
        assert (done.true_positive[k].numpy() == expected).all()
        assert (done.positives[k] == truth.sum(0)).all()
        assert (done.labelled_fired[k].numpy() == fires[:, k].sum(0)).all()


def test_top_octaves_and_zero_studies(done, peaks):
    """Top studies by peak; the lowest priorities of each octave and of the studies without firing."""
    highest = peaks.max(1)
    for latent in range(96):
        column = highest[:, latent]
        order = np.argsort(-column, kind="stable")[:TOP]
        order = order[column[order] > 0]
        n = len(order)
        assert done.top_study[latent, :n].tolist() == order.tolist()
        assert done.top_value[latent, :n].tolist() == column[order].tolist()
        assert (done.top_study[latent, n:] == -1).all()
        rank = priority(3, np.arange(40), np.full(40, latent))
        silent = np.flatnonzero(column == 0)
        assert set(done.zero.item[latent]) - {-1} == set(silent[np.argsort(rank[silent])[:ZERO]])
        for octave in range(OCTAVES):
            low = 2.0 ** (LOWEST_OCTAVE + octave)
            inside = np.flatnonzero((column >= low) & (column < 2 * low))
            if octave in (0, OCTAVES - 1):
                continue
            kept = done.octaves.item[latent * OCTAVES + octave]
            assert set(kept) - {-1} == set(inside[np.argsort(rank[inside])[:PER_OCTAVE]])


def test_maps(done, rows, acts):
    """Sums per patch and view, and how many studies have the view."""
    for number, view in enumerate(VIEWS):
        here = rows.view == number
        assert done.maps.studies[view] == len(set(rows.study[here]))
        expected = np.zeros((96, 64))
        patch = rows.patch_row[here].astype(int) * 8 + rows.patch_col[here]
        np.add.at(expected.T, patch, acts.numpy()[here])
        assert (done.maps.rows[view].numpy() == np.bincount(patch, minlength=64)).all()
        np.testing.assert_allclose(done.maps.views[view].numpy(), expected, rtol=1e-4, atol=1e-4)


def test_blocks_and_layout_do_not_matter(done, rows, acts, truth):
    """One dense block of all studies gives the same numbers and the same draws; another seed draws others."""
    whole = stream(rows, acts, truth, cuts=(0, 40), sparse=False)
    for name in ("fired", "max", "histogram", "top_study", "true_positive"):
        assert torch.equal(getattr(whole, name), getattr(done, name))
    assert (np.sort(whole.zero.item) == np.sort(done.zero.item)).all()
    assert (np.sort(whole.octaves.item) == np.sort(done.octaves.item)).all()
    assert (stream(rows, acts, truth, seed=4).octaves.item != done.octaves.item).any()


def test_memory_is_flat_in_studies(rows, acts, truth, done):
    """Ten studies take as many bytes as forty."""
    assert stream(rows, acts, truth, cuts=(0, 10)).nbytes == done.nbytes


def test_row_sample_is_bounded_and_independent_of_blocks():
    rng = np.random.default_rng(0)
    on = rng.random((1000, 20)) < 0.2
    order = priority(5, np.zeros(1000, dtype=int), np.arange(1000))
    expected = on[np.sort(np.argsort(order)[:64])]
    for cuts in ((0, 1000), (0, 10, 300, 301, 1000)):
        sample = RowSample(64, seed=5)
        for start, stop in pairwise(cuts):
            row, latent = np.nonzero(on[start:stop])
            sample.add(np.zeros(stop - start, dtype=int), np.arange(start, stop), row, latent)
        n, row, latent = sample.triplets()
        table = np.zeros((n, 20), dtype=bool)
        table[row, latent] = True
        assert (table == expected).all()


def test_returning_studies_wrong_sizes_and_infinity_are_refused(rows, acts, truth):
    statistics = stream(rows, acts, truth, cuts=(0, 2))
    first = rows.study < 2
    with pytest.raises(RecordError, match="ascending"):
        statistics.update(rows.where(first), acts[torch.from_numpy(first)])
    with pytest.raises(RecordError, match="shape"):
        statistics.update(rows, acts[:5])
    with pytest.raises(RecordError, match="finite"):
        LatentStatistics(96).update(rows, torch.full(acts.shape, torch.inf))
