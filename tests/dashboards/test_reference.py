"""Our schema and our files held against real outputs of sae-dashboard and of Neuronpedia's converter."""

import gzip
import importlib.util
import json
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest

from sae_lens_maira.cli import main
from sae_lens_maira.dashboards.export import write_export
from sae_lens_maira.dashboards.saedashboard import write_saedashboard
from sae_lens_maira.dashboards.validate import validate

REFERENCE = Path(__file__).parent / "reference"
KNOWN = ("two sequences with the same tokens", "sequences without activation", "index = -1")
"""What real outputs contain and importers accept: a prompt per peak, no zero contexts, a peak on the first token."""


def first(path: Path):
    return json.loads(gzip.decompress(path.read_bytes()).splitlines()[0])


def kinds(row: dict) -> dict[str, set[str]]:
    """Kind of every field; an empty list is of any kind."""
    found = {}
    for name, value in row.items():
        inner = value if isinstance(value, list) else [value]
        found[name] = {
            {"int": "number", "float": "number"}.get(type(v).__name__, type(v).__name__) for v in inner
        }
    return found


@pytest.mark.parametrize("name", ["saedashboard", "export"])
def test_real_outputs_have_no_error_and_only_known_warnings(name, capsys):
    kind, issues = validate(REFERENCE / name)
    assert kind == name
    assert {issue.severity for issue in issues} == {"warning"}
    texts = [str(issue).replace("Index", "index") for issue in issues]
    assert all(any(known in one for known in KNOWN) for one in texts)
    assert all(any(known in one for one in texts) for known in KNOWN)
    assert main(["dashboards", "validate", "--folder", str(REFERENCE / name)]) == 0
    assert "0 errors" in capsys.readouterr().out


def test_a_real_output_with_nan_is_an_error(tmp_path):
    """What sae-dashboard writes where a residual dimension has a large mean, and no importer reads."""
    shutil.copytree(REFERENCE / "saedashboard", tmp_path / "out")
    path = tmp_path / "out" / "batch-0.json"
    text = path.read_text()
    path.write_text(
        re.sub(r'"correlated_neurons_pearson": \[[^,\]]+', '"correlated_neurons_pearson": [NaN', text)
    )
    assert any("NaN is not a JSON number" in f.message for f in validate(tmp_path / "out")[1])


def test_features_have_the_shape_of_real_ones(make_set, target, tmp_path):
    """Same keys; the same kinds of value in every list that both fill."""
    folder = write_saedashboard(make_set(), target, tmp_path / "out", batch_size=4)
    mine = json.loads((folder / "batch-0.json").read_text(encoding="utf-8"))
    real = json.loads((REFERENCE / "saedashboard" / "batch-0.json").read_text())
    assert set(mine) == set(real)
    for one, other in (
        (mine["features"][0], real["features"][0]),
        (mine["features"][0]["activations"][0], real["features"][0]["activations"][0]),
    ):
        assert set(one) == set(other)
        left, right = kinds(one), kinds(other)
        assert {n for n in left if left[n] and right[n] and left[n] != right[n]} == set()


@pytest.mark.parametrize("table", ["features", "activations"])
def test_rows_of_the_export_have_the_shape_of_real_ones(make_set, target, tmp_path, table):
    folder = write_export(make_set(), target, tmp_path / "out")
    mine, real = (
        first(folder / table / "batch-0.jsonl.gz"),
        first(REFERENCE / "export" / table / "batch-0.jsonl.gz"),
    )
    assert set(mine) == set(real)
    left, right = kinds(mine), kinds(real)
    apart = {
        n
        for n in left
        if left[n] and right[n] and left[n] != right[n] and "NoneType" not in left[n] | right[n]
    }
    assert apart <= {"index"}  # a number in ours, text or number in theirs


def test_meaning_of_groups_is_that_of_real_ones(make_set, target, tmp_path):
    """Top group -1, largest value, -1; intervals from high to low within the largest; hits within their interval."""
    folder = write_saedashboard(make_set(), target, tmp_path / "out")
    for path in (folder / "batch-0.json", REFERENCE / "saedashboard" / "batch-0.json"):
        for feature in json.loads(path.read_text(encoding="utf-8"))["features"]:
            bins = [(a["bin_min"], a["bin_max"], a["bin_contains"]) for a in feature["activations"]]
            if not feature["frac_nonzero"]:
                continue
            top, rest = [b for b in bins if b[0] == -1], [b for b in bins if b[0] != -1]
            assert len(Counter(top)) == 1
            assert top[0][2] == -1
            largest = max(max(a["values"]) for a in feature["activations"])
            assert top[0][1] == pytest.approx(largest, abs=2e-3)
            assert [b[0] for b in rest] == sorted((b[0] for b in rest), reverse=True)
            assert all(0 <= share <= 1 and high <= top[0][1] + 2e-3 for _, high, share in rest)


@pytest.mark.compat
@pytest.mark.skipif(
    importlib.util.find_spec("sae_dashboard") is None, reason="sae-dashboard is not installed"
)
def test_sae_dashboards_own_classes_read_every_batch_unchanged(make_set, target, tmp_path):
    """`NeuronpediaDashboardBatch(**json).to_dict() == json`, for our batches and for real ones."""
    from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch

    folder = write_saedashboard(make_set(latents=20), target, tmp_path / "out", batch_size=4)
    paths = [*folder.glob("batch-*.json"), *(REFERENCE / "saedashboard").glob("batch-*.json")]
    assert len(paths) == 7
    for path in paths:
        plain = json.loads(path.read_text(encoding="utf-8"))
        assert NeuronpediaDashboardBatch(**plain).to_dict() == plain
