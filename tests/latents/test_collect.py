"""From studies to a record set on the phantom: contexts, relations and entries against brute force."""

import dataclasses

import numpy as np
import pytest
import torch

from sae_lens_maira.activations import ActivationStore, RowSettings, harvest
from sae_lens_maira.activations.store_spec import SEGMENT
from sae_lens_maira.errors import RecordError
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.latents.recordset import RecordSet
from sae_lens_maira.latents.source import ModelSource, StoreSource, encode_sparse, rows_of_studies
from sae_lens_maira.phantom import FINDING_KEYS, truth_labels
from sae_lens_maira.stats import wilson_arrays
from sae_lens_maira.studies import Licence

CONFIG = CollectConfig(
    sample_rows=10_000,
    top=4,
    zero=3,
    per_interval=2,
    intervals=3,
    min_studies=3,
    sae="u",
    control="untrained",
)


@pytest.fixture(scope="module")
def records(rows, studies, sae, phantom, tmp_path_factory):
    blocks = [[rows.where((rows.study >= start) & (rows.study < start + 16))] for start in range(0, 40, 16)]
    out = tmp_path_factory.mktemp("records")
    return collect_records(blocks, studies, sae, phantom, out, CONFIG, findings=FINDING_KEYS)


def test_meta_and_numbers(records, rows, acts):
    """Sizes, levels, densities and means of every latent equal those of the whole table."""
    assert records.meta.layer == 3
    assert records.meta.level_widths == (16, 48, 96)
    assert (records.meta.rows_text, records.meta.rows_image) == ((~rows.is_image).sum(), rows.is_image.sum())
    table = acts.numpy().astype(np.float64)
    for record in records.stream():
        column = table[:, record.latent]
        assert record.level == (record.latent >= 16) + (record.latent >= 48)
        assert record.density == pytest.approx((column > 0).mean())
        assert record.max == pytest.approx(column.max())
        assert sum(record.histogram.counts) == (column > 0).sum()
        for kind, mask in (("text", ~rows.is_image), ("image", rows.is_image)):
            part = column[mask]
            assert record.at(kind).density == pytest.approx((part > 0).mean())
            assert record.at(kind).mean == pytest.approx(part[part > 0].mean() if part.any() else 0)
        fractions = [((column >= i.low) & (column < i.high)).mean() for i in record.intervals]
        assert [i.fraction for i in record.intervals] == pytest.approx(fractions)


def every_fifth(records):
    """Every fifth record, of which there must be some."""
    some = list(records.stream())[::5]
    assert len(some) > 2
    return some


def test_contexts_hold_the_activations_of_their_study(records, rows, acts, studies, phantom):
    """Peak, patch, token values and map of each context equal the table's; intervals hold what they say."""
    number = {study.study_id: i for i, study in enumerate(studies)}
    tokenizer = phantom.processor.tokenizer
    for record in every_fifth(records):
        column = acts[:, record.latent].numpy()
        peaks = [column[rows.study == s].max() for s in range(40)]
        assert [c.value for c in record.top] == pytest.approx(
            [p for p in sorted(peaks, reverse=True)[:4] if p > 0], rel=1e-5
        )
        for interval in record.intervals:
            assert all(interval.low <= c.value < interval.high for c in interval.contexts)
        for context in (*record.top, *record.zero):
            mine = rows.study == number[context.study]
            text, image = mine & ~rows.is_image, mine & rows.is_image
            value_at = dict(zip(rows.position[text].tolist(), column[text].tolist(), strict=True))
            token_at = dict(zip(rows.position[text].tolist(), rows.token[text].tolist(), strict=True))
            for position, token, value in zip(
                context.positions, context.tokens, context.activations, strict=True
            ):
                assert value == pytest.approx(value_at[position], rel=1e-5)
                spelled = tokenizer.convert_ids_to_tokens([token_at[position]])[0]
                assert token == spelled.replace("\u2581", " ")
            activation = {
                (("frontal", "lateral", "prior").index(h.view), p): v
                for h in context.maps
                for p, v in zip(h.patches, h.values, strict=True)
            }
            on = image & (column > 0)
            patch = rows.patch_row[on].astype(int) * 8 + rows.patch_col[on]
            expected = dict(
                zip(zip(rows.view[on].tolist(), patch.tolist(), strict=True), column[on], strict=True)
            )
            assert activation.keys() == expected.keys()
            assert all(activation[key] == pytest.approx(expected[key], rel=1e-5) for key in activation)
            if context.modality == "text" and context.value:
                assert context.activations[context.peak] == context.value
                assert context.patch is None
            elif context.value:
                assert context.peak == -1
                assert context.value == pytest.approx(column[mine].max(), rel=1e-5)
        assert all(c.value == 0 and not any(v for v in c.activations) for c in record.zero)


def test_agreement_and_maps(records, rows, acts, studies):
    """F1, precision and recall of the best finding, and the mean map, by plain counting."""
    truth = np.stack([truth_labels(study) for study in studies])
    for record in every_fifth(records):
        column = acts[:, record.latent].numpy()
        for kind, mask in (("text", ~rows.is_image), ("image", rows.is_image)):
            fires = np.array([(column[mask & (rows.study == s)] > 0).any() for s in range(40)])
            hits = (fires[:, None] & truth).sum(0)
            f1 = 2 * hits / np.maximum(fires.sum() + truth.sum(0), 1)
            mine = [a for a in record.agreement if a.modality == kind]
            if f1.max() == 0:
                assert not mine
                continue
            assert mine[0].f1 == pytest.approx(f1.max())
            i = FINDING_KEYS.index(mine[0].finding)
            assert (mine[0].precision, mine[0].recall) == (hits[i] / fires.sum(), hits[i] / truth[:, i].sum())
            assert mine[0].low < mine[0].f1 <= mine[0].high
        for mean in record.maps:
            here = rows.view == ("frontal", "lateral", "prior").index(mean.view)
            total = sum(column[here]) / len(set(rows.study[here]))
            assert sum(mean.values) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("budget", [2 << 30, 4 * 96 * 16 * (len(FINDING_KEYS) + 1)], ids=["full", "pooled"])
def test_maps_per_finding(budget, rows, acts, studies, sae, phantom, tmp_path):
    """Means over studies with and without a finding, by plain counting; pooled 2 by 2 where bytes are scarce.

    Every third study has no labels and must not count.
    """
    known = [dataclasses.replace(s, truth=None) if i % 3 == 0 else s for i, s in enumerate(studies)]
    config = dataclasses.replace(CONFIG, map_bytes=budget)
    records = collect_records([[rows]], known, sae, phantom, tmp_path, config, findings=FINDING_KEYS)
    side = phantom.processor.patches_per_side
    assert records.grid == (side, side)
    frontal = rows.view == 0
    assert records.mean_maps([5, 3]).shape == (2, side * side)
    finding = max(FINDING_KEYS, key=lambda key: sum(key in s.present_keys for s in studies))
    labelled = np.array([s.truth is not None for s in known])
    has = np.array([finding in s.present_keys for s in studies])
    pool = 1 if budget > 1 << 20 else side // 4
    for present in (True, False):
        inside = labelled & (has == present)
        assert inside.sum() >= 3
        wanted = torch.zeros(96, side, side)
        for study in np.flatnonzero(inside):
            mine = torch.from_numpy(frontal & (rows.study == study))
            wanted[:, rows.patch_row[mine], rows.patch_col[mine]] += acts[mine].T / inside.sum()
        pooled = torch.nn.functional.avg_pool2d(wanted, pool).repeat_interleave(pool, 1)
        wanted = pooled.repeat_interleave(pool, 2).flatten(1)
        found = records.mean_maps(finding=finding, present=present)
        assert float((found - wanted).abs().max()) < 2e-3 * float(wanted.max())
        assert float(wanted.max()) > 0
    with pytest.raises(RecordError, match="measles"):
        records.mean_maps([0], "measles")


def test_neighbours_and_tokens(records, acts, sae, phantom):
    """Jaccard, cosine and "refines" on all rows (the sample holds them all); tokens by the plain product."""
    fires = (acts > 0).float()
    both = fires.T @ fires
    count = fires.sum(0)
    unit = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    model = phantom.model
    logits = (sae.W_dec.detach() * model.model.language_model.norm.weight) @ model.lm_head.weight.T
    for record in every_fifth(records):
        i = record.latent
        for near in record.neighbours:
            j = near.latent
            expected = {
                "co-fires": both[i, j] / (count[i] + count[j] - both[i, j]),
                "similar": unit[i] @ unit[j],
                "refines": both[i, j] / count[i],
            }[near.relation]
            assert near.value == pytest.approx(float(expected), abs=1e-5)
        others = [(both[i, j] / (count[i] + count[j] - both[i, j]), j) for j in range(96) if j != i]
        best = max(float(value) for value, _ in others)
        got = [n.value for n in record.neighbours if n.relation == "co-fires"]
        assert (got[0] if got else 0) == pytest.approx(best if best >= 0.1 else 0, abs=1e-5)
        assert record.top_tokens[0].weight == pytest.approx(float(logits[i].max()), rel=1e-4)
        assert record.bottom_tokens[0].token_id == int(logits[i].argmin())


def test_entries_name_findings_and_images(records, studies):
    """Truth, boxes and readable images of the synthetic studies."""
    by_id = {study.study_id: study for study in studies}
    assert records.studies
    for entry in records.studies.values():
        assert set(entry.findings) == by_id[entry.study].present_keys
        assert (entry.labelled_by, entry.licence) == ("truth", "synthetic")
        assert entry.images[0][0] == "frontal"
        assert (records.folder / entry.images[0][1]).is_file()


def test_credentialed_studies_are_pseudonymous(rows, studies, sae, phantom, tmp_path):
    """No file of the set holds an original id; no image is kept; patients still keep together; salts differ."""
    hidden = [dataclasses.replace(study, licence=Licence.CREDENTIALED, truth=None) for study in studies[:12]]
    few = rows.where(rows.study < 12)
    for salt in ("a", "b"):
        config = dataclasses.replace(CONFIG, salt=salt, latents=(0, 5, 60))
        collect_records([[few]], hidden, sae, phantom, tmp_path / salt, config)
    texts = [
        path.read_bytes()
        for salt in "ab"
        for path in (tmp_path / salt).iterdir()
        if path.suffix != ".parquet"
    ]
    assert not any(study.study_id.encode() in text for study in hidden for text in texts)
    assert not (tmp_path / "a" / "images").exists()
    assert len({*texts}) > 4


def test_rule_labels_and_unlabelled_studies(rows, studies, sae, phantom, tmp_path):
    """Labels may come from a function; studies that it cannot label do not count."""
    records = collect_records(
        [[rows]],
        studies,
        sae,
        phantom,
        tmp_path,
        dataclasses.replace(CONFIG, latents=(1, 2, 3)),
        labels=lambda study: None if study.study_id.endswith("0") else ["x"],
    )
    assert [r.latent for r in records] == [1, 2, 3]
    assert {a.studies for r in records for a in r.agreement} == {36}
    assert {e.labelled_by for e in records.studies.values()} <= {"", "rule_labels"}


class Shrinking:
    """One unit that holds fewer studies when it is read again."""

    def __init__(self, *reads):
        self.reads = list(reads)

    def __len__(self):
        return 1

    def __getitem__(self, unit):
        return [self.reads.pop(0)]


def test_passes_that_differ_are_refused(rows, studies, sae, phantom, tmp_path):
    units = Shrinking(rows, rows.where(rows.study < 3))
    with pytest.raises(RecordError, match="second pass"):
        collect_records(units, studies, sae, phantom, tmp_path / "a", CONFIG)
    with pytest.raises(RecordError, match="studies were given"):
        collect_records([[rows]], studies[:3], sae, phantom, tmp_path / "b", CONFIG)


def test_rows_of_another_text_are_refused(studies, rows, sae, phantom, tmp_path):
    """Reports that changed after the activations were read would put values under the wrong words."""
    changed = [dataclasses.replace(study, report=f"New words. {study.report}") for study in studies]
    with pytest.raises(RecordError, match=r"another text .* Give the table that was harvested"):
        collect_records([[rows]], changed, sae, phantom, tmp_path, CONFIG)
    with pytest.raises(RecordError, match="no latent records"):
        RecordSet.open(tmp_path)


def test_harvested_blocks_number_studies_throughout(phantom, studies, sae, rows):
    """Blocks of the model's own forward name studies as in the whole sequence, and encode to the same latents."""
    units = ModelSource(phantom, studies[:6], rows.hook_name, studies_per_block=4)
    blocks = [block for unit in range(len(units)) for block in units[unit]]
    assert [sorted(set(b.study)) for b in blocks] == [[0, 1, 2, 3], [4, 5]]
    sparse = encode_sparse(sae, blocks[0].values, 100)
    with torch.no_grad():
        assert torch.equal(sparse.to_dense(), sae.encode(blocks[0].values))


def test_a_source_reads_only_the_studies_that_are_needed(phantom, studies, rows, tmp_path, monkeypatch):
    """From the model whole forwards with the values of the first pass; from a store no value of other studies."""
    units = ModelSource(
        phantom, studies[:12], rows.hook_name, "image_only", studies_per_block=8, batch_size=2
    )
    need = np.array([1, 6, 9])
    whole = next(iter(units[0]))
    (some,) = rows_of_studies(units, 0, need)
    assert set(some.study) == {1, 6}
    assert torch.equal(some.values, whole.where(np.isin(whole.study, need)).values)
    assert len(set(next(iter(units.of_studies(0, need))).study)) <= 4
    assert list(rows_of_studies(units, 0, np.array([9]))) == []
    harvest(
        phantom,
        studies[:12],
        tmp_path,
        [rows.hook_name],
        RowSettings(roles="image_only"),
        shard_studies=8,
        progress=False,
    )
    stored, read = StoreSource(tmp_path, rows.hook_name), []
    plain = ActivationStore.read_into
    monkeypatch.setattr(
        ActivationStore,
        "read_into",
        lambda self, place, *words: (read.append(len(place)), plain(self, place, *words))[1],
    )
    blocks = [block for unit in range(len(stored)) for block in rows_of_studies(stored, unit, need)]
    assert [sorted(set(block.study)) for block in blocks] == [[1, 6], [9]]
    assert sum(map(len, blocks)) == int(np.isin(rows.study[rows.is_image], need).sum())
    assert (
        max(map(len, blocks)) < SEGMENT >= max(read)
    )  # a segment at a time, of which only these studies are kept


def test_wilson_by_hand():
    """8 of 10: the textbook interval."""
    low, high = wilson_arrays(np.array([8]), np.array([10]))
    assert (low[0], high[0]) == pytest.approx((0.4902, 0.9433), abs=1e-4)
