"""Validation: our own output passes; every issue that importers swallow is found with its file and line."""

import gzip
import json

import pytest

from sae_lens_maira.checksums import SUMS
from sae_lens_maira.dashboards.export import write_export
from sae_lens_maira.dashboards.saedashboard import write_saedashboard
from sae_lens_maira.dashboards.upload import write_payloads
from sae_lens_maira.dashboards.validate import validate
from sae_lens_maira.errors import RecordError


@pytest.mark.parametrize(
    ("write", "name"),
    [(write_saedashboard, "saedashboard"), (write_export, "export"), (write_payloads, "api")],
)
def test_our_output_has_no_issues(make_set, target, tmp_path, write, name):
    assert validate(write(make_set(), target, tmp_path / "out")) == (name, [])


@pytest.fixture
def export(make_set, target, tmp_path):
    return editable(write_export(make_set(), target, tmp_path / "out", batch_size=3))


def editable(folder):
    """The folder without its checksums, so that only the issues of what is changed remain."""
    (folder / SUMS).unlink()
    return folder


def edit(path, number, change):
    """Change one line of a gzipped file; the change gets the row and may return other text."""
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    row = json.loads(lines[number - 1])
    text = change(row)
    lines[number - 1] = text if isinstance(text, str) else json.dumps(row)
    path.write_bytes(gzip.compress("\n".join(lines).encode()))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("values", [None], "expected number"),
        ("values", [1.0], "values"),
        ("tokens", [""], "expected name"),
        ("tokens", ["a"] * 1025, "1025 tokens"),
        ("maxValue", None, "expected number"),
        ("maxValue", 3.25, "largest value"),
        ("creatorId", "me", "only rows of"),
        ("index", "99", "does not have"),
        ("layer", "14-other", "not to the source"),
        ("qualifyingTokenIndex", 9999, "qualifyingTokenIndex"),
        ("id", 7, "expected name"),
    ],
)
def test_issues_of_an_activation(export, field, value, message):
    edit(export / "activations" / "batch-1.jsonl.gz", 4, lambda row: row.update({field: value}))
    issues = [f for f in validate(export)[1] if f.severity == "error"]
    assert any(message in f.message for f in issues)
    assert {(f.file, f.line) for f in issues} == {("activations/batch-1.jsonl.gz", 4)}


def test_nan_and_cut_lines_are_no_json(export):
    path = export / "features" / "batch-0.jsonl.gz"
    edit(path, 2, lambda row: json.dumps(row | {"frac_nonzero": float("nan")}))
    issues = validate(export)[1]
    assert any(str(f).startswith("features/batch-0.jsonl.gz:2: error: not valid JSON: NaN") for f in issues)


def test_a_cut_gzip_file_is_named(export):
    path = export / "activations" / "batch-0.jsonl.gz"
    path.write_bytes(path.read_bytes()[:-400])
    assert any("cut off" in f.message and f.file.endswith("batch-0.jsonl.gz") for f in validate(export)[1])


def test_ids_that_collide_across_shards_are_found(export):
    first = json.loads(
        gzip.decompress((export / "activations" / "batch-0.jsonl.gz").read_bytes()).splitlines()[0]
    )
    edit(export / "activations" / "batch-1.jsonl.gz", 2, lambda row: row.update(id=first["id"]))
    (issue,) = validate(export)[1]
    assert "appears twice" in issue.message
    assert (issue.file, issue.line) == ("activations/batch-1.jsonl.gz", 2)


def test_sequences_of_the_same_tokens_are_found(export):
    path = export / "activations" / "batch-0.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    edit(
        path,
        2,
        lambda row: row.update(
            {k: rows[0][k] for k in rows[0] if k != "id"} | {"tokens": rows[0]["tokens"][::-1]}
        ),
    )
    assert [f.line for f in validate(export)[1] if "same tokens" in f.message] == [2]


def test_missing_zero_contexts_are_warnings(make_set, target, tmp_path):
    import dataclasses

    records = make_set(change=lambda rs: [dataclasses.replace(r, zero=()) for r in rs])
    for write in (write_export, write_saedashboard):
        issues = validate(write(records, target, tmp_path / write.__name__))[1]
        assert len(issues) == 5
        assert {f.severity for f in issues} == {"warning"}


def test_heads_must_refer_to_each_other(export):
    row = json.loads((export / "source.jsonl").read_text())
    (export / "source.jsonl").write_text(json.dumps(row | {"setName": "other"}))
    (export / "release.jsonl").unlink()
    messages = [str(f) for f in validate(export)[1]]
    assert any(m.startswith("source.jsonl:1") and "'other'" in m for m in messages)
    assert any(m.startswith("release.jsonl:1") and "missing" in m for m in messages)


def test_issues_of_a_batch_name_the_features_line(make_set, target, tmp_path):
    folder = editable(write_saedashboard(make_set(), target, tmp_path / "out"))
    path = folder / "batch-0.json"
    batch = json.loads(path.read_text())
    batch["features"][3]["activations"][0]["qualifying_token_index"] = -1
    batch["features"][4]["feature_index"] = 1
    del batch["features"][5]["vector"]
    head, features = batch | {"features": []}, batch["features"]
    path.write_text(json.dumps(head)[:-2] + "\n" + ",\n".join(map(json.dumps, features)) + "]}")
    issues = [f for f in validate(folder)[1] if "sae-dashboard" not in f.message]
    assert [f.line for f in issues] == [5, 6, 7]
    assert ["not a token" in issues[0].message, "appears twice" in issues[1].message] == [True, True]
    assert "no vector" in issues[2].message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.update(activations=[]), "no activation"),
        (lambda f: f["activations"][0].update(quantileFraction=-1), "null for the top"),
        (lambda f: f.update(topLogits=f["topLogits"] * 2), "at most 20"),
        (lambda f: f.update(explanations=[{"text": "x" * 513}]), "512"),
        (lambda f: f["activations"][0]["tokens"].append("more"), "tokens but"),
    ],
)
def test_issues_of_a_payload(make_set, target, tmp_path, change, message):
    """Each change of a valid payload gives exactly one issue, with its message."""
    folder = editable(write_payloads(make_set(), target, tmp_path / "out"))
    path = folder / "payloads.jsonl"
    payload = json.loads(path.read_text())
    change(payload["features"][1])
    path.write_text(json.dumps(payload))
    (issue,) = validate(folder)[1]
    assert message in issue.message
    assert "feature 1" in issue.message


def test_a_folder_of_something_else_is_refused(tmp_path):
    with pytest.raises(RecordError, match="contains no dashboards"):
        validate(tmp_path)
