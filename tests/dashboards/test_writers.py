"""sae-dashboard's files, the bulk export and the API payloads: shape, meaning, and every trap of their importers."""

import dataclasses
import gzip
import json
import math
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from sae_lens_maira.activations import RowSettings, read_rows
from sae_lens_maira.dashboards.export import write_export
from sae_lens_maira.dashboards.saedashboard import feature, write_saedashboard
from sae_lens_maira.dashboards.sequences import Window, bars, sequences
from sae_lens_maira.dashboards.target import PUBLIC_CREATOR, Target
from sae_lens_maira.dashboards.upload import payloads, write_payloads
from sae_lens_maira.dashboards.validate import validate
from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.interp.records import Interpretation, Score
from sae_lens_maira.latents.collect import CollectConfig, collect_records
from sae_lens_maira.latents.records import Context, Histogram, StudyText
from sae_lens_maira.maira2 import resolve_roles
from sae_lens_maira.phantom import generate_studies
from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control

# Keys of a real output of sae-dashboard 0.8.0 and of Neuronpedia's own exporter.
BATCH = "model_id layer sae_set sae_id_suffix features"
FEATURE = """feature_index neuron_alignment_indices neuron_alignment_values neuron_alignment_l1
    correlated_neurons_indices correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices
    correlated_features_l1 correlated_features_pearson neg_str neg_values pos_str pos_values frac_nonzero
    freq_hist_data_bar_values freq_hist_data_bar_heights logits_hist_data_bar_heights logits_hist_data_bar_values
    n_prompts_total n_tokens_in_prompt dataset decoder_weights_dist activations vector"""
ACTIVATION = """bin_min bin_max bin_contains tokens values qualifying_token_index dfa_values dfa_maxValue
    dfa_targetIndex"""
ROWS = {
    "model": """id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName
        defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website""",
    "release": """name description creatorName creatorId visibility isNewUi featured descriptionShort urls creatorEmail
        creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt""",
    "source": """id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig
        saelensRelease saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity
        hasUmapClusters num_prompts num_tokens_in_prompt dataset notes createdAt""",
    "sourceset": """modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail
        releaseName defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution
        showUmap createdAt""",
    "features": """modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel
        vectorDefaultSteerStrength hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices
        neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson
        correlated_neurons_l1 correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str
        neg_values pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values
        logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist sourceSetName""",
    "activations": """id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
        dataIndex dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax
        binContains qualifyingTokenIndex zIndices zValues""",
}


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not valid JSON")

    return json.loads(text, parse_constant=refuse)


def shards(folder: Path, table: str):
    return [
        [strict(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
        for path in sorted((folder / table).glob("*.jsonl.gz"))
    ]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def explained(latent: int, text: str = "fires at pleural effusion", status: str = "ok") -> Interpretation:
    def score(value: float) -> Score:
        return Score("detection", "words", 20, 20, 0, 8, 2, 8, 2, value, value - 0.1, value + 0.1)

    scores, control = (score(0.8),), (score(0.5),)
    return Interpretation(
        latent, text, "contrast (no LLM)", "", "pathology", scores, control, 3, status, 10, 20, "1"
    )


def test_batches_have_the_keys_and_types_of_a_real_output(make_set, target, tmp_path):
    folder = write_saedashboard(make_set(), target, tmp_path / "out", batch_size=4)
    batch = strict((folder / "batch-0.json").read_text(encoding="utf-8"))
    assert set(batch) == set(BATCH.split())
    assert (batch["model_id"], batch["layer"], batch["sae_id_suffix"]) == ("maira-2", 15, None)
    one = batch["features"][0]
    assert set(one) == set(FEATURE.split())
    assert set(one["activations"][0]) == set(ACTIVATION.split())
    assert one["frac_nonzero"] == 0.0123456789
    assert len(one["pos_str"]) == len(one["neg_values"]) == 10
    top = one["activations"][0]
    assert (top["bin_min"], top["bin_max"], top["bin_contains"]) == (-1, 10.0, -1)
    rest = strict((folder / "batch-1.json").read_text(encoding="utf-8"))
    assert [f["feature_index"] for b in (batch, rest) for f in b["features"]] == list(range(6))
    assert strict((folder / "skipped_indexes.json").read_text())["layer"] == "15"
    assert strict((folder / "run_settings.json").read_text())["sae_set"] == target.set_name


def test_sequences_keep_the_hit_where_the_context_has_it(make_set):
    records, groups = make_set(), set()
    for record in records.stream():
        for sequence in sequences(record, Window(text=16, patches=8)):
            groups.add(sequence.group)
            assert len(sequence.tokens) == len(sequence.values) <= 1 + 16 + 8
            assert all(sequence.tokens)
            assert sequence.tokens[0] == f"⟦study {sequence.study}⟧"
            assert sequence.values[0] == 0.0
            if sequence.group == "zero":
                assert max(sequence.values) == 0.0
                continue
            context = next(
                c
                for c in (*record.top, *(c for i in record.intervals for c in i.contexts))
                if c.study == sequence.study
            )
            assert sequence.values[sequence.hit] == round(context.value, 5)
            if context.patch:
                view, row, col = context.patch
                assert sequence.tokens[sequence.hit] == f"<{view} r{row:02d}c{col:02d}>"


def test_a_study_comes_once_per_latent_and_no_two_sequences_hold_the_same_tokens(make_set):
    """The page hides sequences of equal token multisets, here made equal but for the study."""
    records = make_set()
    record = records[0]
    first = record.top[0]
    same = dataclasses.replace(first, study="other", texts={"other": first.text})
    record = dataclasses.replace(record, top=(record.top[0], same, record.top[0]))
    found = list(sequences(record))
    assert len({s.study for s in found}) == len(found)
    assert len({tuple(sorted(s.tokens)) for s in found}) == len(found)


def test_tokens_that_a_database_refuses_are_fixed(make_set):
    record = make_set()[0]
    text = StudyText("odd", ("", "\0", "\ud800"), (0, 1, 2), ("report",) * 3, (True, True, False), (0, 3))
    odd = Context("odd", 0, 3, "text", (0,), (1.0,), (), {"odd": text})
    found = next(sequences(dataclasses.replace(record, top=(odd,))))
    assert found.tokens[1:] == ["∅", " ", "?"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_latent(make_set, value):
    records = make_set()
    record = records[1]
    broken = dataclasses.replace(record.top[0], token_indices=(0,), token_values=(value,), modality="text")
    with pytest.raises(RecordError, match="Latent 1"):
        feature(dataclasses.replace(record, top=(broken,)), records.meta, "d")
    with pytest.raises(RecordError, match="Latent 1"):
        feature(dataclasses.replace(record, max=value), records.meta, "d")


def test_bars_keep_the_count_and_the_range():
    values, heights = bars(Histogram((0.0, 0.5, 1.0, 2.0, 4.0, 8.0), (0, 5, 10, 1, 3)), 5.0)
    assert len(values) == len(heights) == 50
    assert sum(heights) == 19
    assert 0.5 < values[0] < values[-1] < 5.0
    assert bars(Histogram((0.0, 1.0), (0,)), 0.0) == ([], [])


def test_export_has_the_keys_of_a_real_one(make_set, target, tmp_path):
    folder = write_export(make_set(), target, tmp_path / "out", {0: [explained(0)]}, batch_size=4)
    rows = {
        name: strict((folder / f"{name}.jsonl").read_text())
        for name in ("model", "release", "source", "sourceset")
    }
    rows |= {table: shards(folder, table)[0][0] for table in ("features", "activations")}
    for name, row in rows.items():
        assert set(row) == set(ROWS[name].split()), name
    assert rows["source"]["id"] == "15-res-matryoshka-16k"
    assert rows["model"]["inferenceEnabled"] is False
    assert (rows["model"]["layers"], rows["model"]["dimension"]) == (32, 4096)
    printed = shards(folder, "explanations")[0][0]
    assert printed["description"] == "fires at pleural effusion"
    assert printed["typeName"] is None
    assert printed["explanationModelName"] is None
    assert "embedding" not in printed  # exactly 256 numbers, or absent
    assert "detection 0.80 [0.70, 0.90], control 0.50" in printed["notes"]


def test_export_passes_every_trap_of_the_importer(make_set, target, tmp_path):
    folder = write_export(make_set(), target, tmp_path / "out", batch_size=2)
    parts = shards(folder, "activations")
    rows = [row for part in parts for row in part]
    assert len(parts) == 3
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["creatorId"] for row in rows} == {PUBLIC_CREATOR}
    assert max(len(row["tokens"]) for row in rows) <= 1024
    features = [row for part in shards(folder, "features") for row in part]
    known = {row["index"] for row in features}
    assert {row["index"] for row in rows} == known - {"2"}
    zeros = Counter(row["index"] for row in rows if row["maxValue"] == 0)
    assert all(zeros[index] >= 5 for index in known - {"2"})
    for row in rows:
        assert row["values"][row["maxValueTokenIndex"]] == row["maxValue"] == max(row["values"])
        assert 0 <= row["qualifyingTokenIndex"] < len(row["tokens"])
    for table in ("features", "activations"):
        assert (
            len({tuple(row) for part in shards(folder, table) for row in part}) == 1
        )  # columns come from line 1


def test_long_studies_are_cut_to_what_the_site_takes(make_set, target):
    """A report of 3,000 tokens stays within 1,024 in the widest window, and a wider one is refused."""
    record = make_set(latents=2, length=3000)[1]
    widest = Window(text=959, patches=64)
    lengths = [len(sequence.tokens) for sequence in sequences(record, widest)]
    assert max(lengths) == 1024
    assert all(
        sequence.values[sequence.hit] == max(sequence.values) for sequence in sequences(record, widest)
    )
    with pytest.raises(RecordError, match="1023 tokens"):
        Window(text=960, patches=64)


@pytest.mark.parametrize("write", [write_saedashboard, write_export])
def test_any_number_of_workers_writes_the_same_bytes(make_set, target, tmp_path, write):
    records = make_set()
    one, three = (write(records, target, tmp_path / f"w{n}", batch_size=1, workers=n) for n in (1, 3))
    assert bytes_of(one) == bytes_of(three)


def test_an_error_in_a_worker_is_raised_and_leaves_nothing(make_set, target, tmp_path, monkeypatch):
    """The error of a child process reaches the caller as it was raised."""

    def fail(*_):
        raise RecordError("Latent 3 is broken.")

    monkeypatch.setattr("sae_lens_maira.dashboards.saedashboard.feature", fail)
    with pytest.raises(RecordError, match="Latent 3"):
        write_saedashboard(make_set(), target, tmp_path / "out", batch_size=1, workers=2)
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())


@pytest.mark.parametrize("write", [write_saedashboard, write_export, write_payloads])
def test_the_same_records_give_the_same_bytes(make_set, target, tmp_path, write):
    first = bytes_of(write(make_set(), target, tmp_path / "a"))
    second = bytes_of(write(make_set(), target, tmp_path / "b"))
    assert first == second


def test_shards_of_another_size_hold_the_same_rows(make_set, target, tmp_path):
    """A second import of another export of the same records adds nothing: ids do not depend on the shards."""
    records = make_set()
    one = write_export(records, target, tmp_path / "a", batch_size=2)
    two = write_export(records, target, tmp_path / "b", batch_size=100)
    assert list(chain(*shards(one, "activations"))) == list(chain(*shards(two, "activations")))


def test_api_payloads_stay_within_the_servers_limits(make_set, target):
    printed = {0: [explained(0, "word " * 300), explained(0, "not shown", status="unusable")]}
    found = list(payloads(make_set(latents=140), target, printed))
    assert max(len(p["features"]) for p in found) <= 128
    features = [f for p in found for f in p["features"]]
    assert [f["index"] for f in features] == [i for i in range(140) if i != 2]
    for one in features:
        assert one["activations"]
        assert len(one["topLogits"]) == len(one["bottomLogits"]) == 20
        for activation in one["activations"]:
            fraction = activation["quantileFraction"]
            assert fraction is None or 0 <= fraction <= 1
            assert None not in activation["values"]
        assert one["activations"][0]["quantileFraction"] is None
        assert one["activations"][-1]["quantileFraction"] is not None
    (explanation,) = features[0]["explanations"]
    assert 500 < len(explanation["text"]) <= 512
    assert "modelName" not in explanation


def test_api_payloads_are_cut_at_bytes(make_set, target):
    whole = list(payloads(make_set(), target))
    cut = list(payloads(make_set(), target, max_bytes=1))
    assert [len(p["features"]) for p in cut] == [1] * 5
    assert [f for p in cut for f in p["features"]] == [f for p in whole for f in p["features"]]


def test_a_folder_with_files_is_left_alone_and_a_failed_one_leaves_nothing(make_set, target, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(RecordError, match="'mine', which an earlier run of this command did not write"):
        write_export(make_set(), target, tmp_path / "out")
    with pytest.raises(RecordError, match="no latent"):
        write_saedashboard(make_set(latents=0), target, tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir() if not p.name.startswith("records")} == {"out"}


def test_what_an_earlier_run_wrote_is_replaced_as_a_whole(make_set, target, tmp_path):
    """So that the same command can be run again after a kill; a file that was added since stops it."""
    out = write_export(make_set(), target, tmp_path / "out")
    before = {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    (out / "model.jsonl").write_text("damaged")
    write_export(make_set(), target, out)
    assert {p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    (out / "features" / "mine").write_text("mine")
    with pytest.raises(RecordError, match="'features/mine'"):
        write_export(make_set(), target, out)
    assert (out / "features" / "mine").read_text() == "mine"


@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(
            ("set_name", name)
            for name in ("Upper", "two--hyphens", "-first", "under_score", "16k-res", "neurons", "a-", "")
        ),
        *(
            ("model_id", name)
            for name in ("2maira", "maira-", "ma--ira", "ma.-ira", "maira.", "m", "M", "m" * 33)
        ),
        *(
            ("url", url)
            for url in ("example.org", "//example.org", "ftp://example.org", "https://", "https://a b")
        ),
        ("description", "x" * 129),
    ],
)
def test_names_that_the_site_refuses_are_refused_here(field, bad):
    with pytest.raises(ConfigError):
        Target(**{"set_name": "res-16k", field: bad})


def test_names_that_the_site_accepts_are_accepted_here():
    target = Target(
        set_name="res-16k", model_id="gemma-2.5b", url="https://example.org/x", description="x" * 128
    )
    assert target.release_name == "gemma-2.5b-res-16k"  # releases are global there
    with pytest.raises(ConfigError, match="layer 15"):
        Target(set_name="a", layers=8).source(15)


@pytest.mark.parametrize("write", [write_saedashboard, write_export])
def test_no_group_stands_above_top(make_set, target, tmp_path, write):
    """The site sorts groups by their upper bound; the records' highest interval ends above the maximum."""
    records = make_set(
        change=lambda rs: [
            dataclasses.replace(r, intervals=tuple(dataclasses.replace(i, high=64.0) for i in r.intervals))
            for r in rs
        ]
    )
    for record in records.stream():
        groups = [(s.group, s.high) for s in sequences(record)]
        assert all(high <= record.max + 1e-5 for name, high in groups if name != "zero")
    folder = write(records, target, tmp_path / "out")
    assert validate(folder)[1] == []


def test_top_comes_first_for_every_latent_of_real_records(phantom, target, tmp_path):
    """Their page sorts groups by binMax; read from the files, for all latents of real records."""
    studies, hook = generate_studies(8, seed=79), "blocks.3.hook_resid_post"
    roles = resolve_roles(("image", "indication", "report"))
    rows = read_rows(phantom, studies, hook, RowSettings(roles=roles), progress=False)
    config = MatryoshkaTrainingSAEConfig(d_in=rows.values.shape[1], d_sae=192, k=8, matryoshka_widths=[192])
    config.metadata.hook_name = hook
    sae = make_control("untrained", MatryoshkaTrainingSAE(config), rows.values, l0=8.0, seed=1)
    kept = CollectConfig(top=2, zero=1, per_interval=2, progress=False)
    records = collect_records([[rows]], studies, sae, phantom, tmp_path / "records", kept)
    folder = write_export(records, target, tmp_path / "out")
    assert [i for i in validate(folder)[1] if i.severity == "error"] == []
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in chain.from_iterable(shards(folder, "activations")):
        groups.setdefault(row["index"], []).append((row["binMax"], row["binMin"]))
    tops = {index: [high for high, low in bounds if low == -1] for index, bounds in groups.items()}
    firing = {index for index, highs in tops.items() if highs}
    assert len(firing) > 100
    assert all(max(groups[index])[0] == tops[index][0] for index in firing)
    assert any(len(set(groups[index])) > 2 for index in firing)


def test_rows_are_as_the_tables_of_the_site(make_set, target, tmp_path):
    folder = write_export(make_set(), target, tmp_path / "out", {0: [explained(0)]})
    for table in ("features", "activations", "explanations"):
        assert all(isinstance(row["index"], str) for part in shards(folder, table) for row in part)
    assert shards(folder, "explanations")[0][0]["triggeredByUserId"] == PUBLIC_CREATOR
    heads = {n: strict((folder / f"{n}.jsonl").read_text()) for n in ("release", "sourceset")}
    assert heads["sourceset"]["type"] == "Residual Stream"
    assert heads["sourceset"]["releaseName"] == heads["release"]["name"] == "maira-2-res-matryoshka-16k"
