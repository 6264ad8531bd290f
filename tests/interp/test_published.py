"""Interpretation tables with columns of any name become one frame."""

import json
import math

import pandas as pd
import pytest

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.published import read_interpretations, read_published

pytestmark = pytest.mark.compat

TEXTS = ["pacemaker leads over the left chest", "small right pleural effusion", "no finding"]
SCORES = [0.91, 0.74, 0.5]
ROWS = [
    {"latent": 3 * i, "interpretation": text, "score": s}
    for i, (text, s) in enumerate(zip(TEXTS, SCORES, strict=True))
]


def renamed(latent="latent", interpretation="interpretation", score="score"):
    return [{latent: r["latent"], interpretation: r["interpretation"], score: r["score"]} for r in ROWS]


def write(path, records):
    frame = pd.DataFrame(records)
    writers = {
        ".csv": lambda: frame.to_csv(path, index=False),
        ".tsv": lambda: frame.to_csv(path, index=False, sep="\t"),
        ".parquet": lambda: frame.to_parquet(path),
        ".json": lambda: path.write_text(json.dumps(records)),
        ".jsonl": lambda: path.write_text("\n".join(map(json.dumps, records))),
    }
    writers[path.suffix]()
    return path


def check(frame):
    assert list(frame.columns[:4]) == ["latent", "interpretation", "score", "source"]
    assert frame["latent"].tolist() == [0, 3, 6]
    assert frame["latent"].dtype == "int64"
    assert frame["interpretation"].tolist() == TEXTS
    assert frame["score"].tolist() == SCORES


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet", "json", "jsonl"])
@pytest.mark.parametrize(
    "names",
    [
        ("latent", "interpretation", "score"),
        ("Feature ID", "Explanation", "Detection Score"),
        ("feature_idx", "llm_description", "f1"),
        ("index", "label", "balanced_accuracy"),
        ("zz", "qq", "detection_score_mean"),
        ("FeatureID", "shortLabel", "fuzzScore"),
    ],
    ids=lambda names: names[0],
)
def test_column_names(suffix, names, tmp_path):
    """Usual names of columns are found in every format."""
    check(read_interpretations(write(tmp_path / f"table.{suffix}", renamed(*names))))


@pytest.mark.parametrize(
    "value",
    [
        {str(r["latent"]): {"text": r["interpretation"], "score": r["score"]} for r in ROWS},
        {f"latent_{r['latent']}": {"explanation": r["interpretation"], "f1": r["score"]} for r in ROWS},
        {"meta": {"model": "m"}, "interpretations": ROWS},
        {"feature": [0, 3, 6], "explanation": TEXTS, "score": SCORES},
        {"sae": {"layer_15": {"latents": ROWS}}},
        [{"id": r["latent"], "text": r["interpretation"], "scores": {"detection": r["score"]}} for r in ROWS],
    ],
    ids=["by latent", "by named latent", "below a key", "columns", "below a layer", "scores in a mapping"],
)
def test_shapes_of_json(value, tmp_path):
    """Every layout of JSON gives the same frame."""
    (tmp_path / "table.json").write_text(json.dumps(value))
    check(read_interpretations(tmp_path / "table.json"))


def test_plain_mapping_has_no_scores(tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"5": "a text", "2": "another"}))
    frame = read_interpretations(tmp_path / "table.json")
    assert frame["latent"].tolist() == [2, 5]
    assert all(map(math.isnan, frame["score"]))


def test_latents_written_as_words(tmp_path):
    records = [
        {"id": f"feature {r['latent']}", "text": r["interpretation"], "score": r["score"]} for r in ROWS
    ]
    check(read_interpretations(write(tmp_path / "t.csv", records)))


def test_other_columns_stay(tmp_path):
    """Further columns are kept; one called `source` is renamed."""
    records = [row | {"frequency": 0.1, "source": "x"} for row in ROWS]
    frame = read_interpretations(write(tmp_path / "t.csv", records))
    check(frame)
    assert frame["frequency"].tolist() == [0.1] * 3
    assert frame["source_original"].tolist() == ["x"] * 3


def test_a_folder_gives_one_frame(tmp_path):
    (tmp_path / "ef2").mkdir()
    write(tmp_path / "ef2" / "a.csv", ROWS[:1])
    write(tmp_path / "b.parquet", renamed("feature", "explanation")[1:])
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"k": 3}}))
    frame = read_interpretations(tmp_path)
    assert frame["source"].tolist() == ["b.parquet", "b.parquet", "ef2/a.csv"]
    assert sorted(frame["latent"]) == [0, 3, 6]


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    """Excel writes UTF-8 with a mark, and semicolons where the comma is the decimal sign."""
    frame = pd.DataFrame(renamed("zz", "qq"))
    frame.to_csv(tmp_path / "t.csv", index=False, sep=";", encoding="utf-8-sig")
    check(read_interpretations(tmp_path / "t.csv", latent="zz"))


def test_columns_can_be_named(tmp_path):
    records = [{"a": 7, "b": 1, "good": "x", "longer but wrong": "xxxxxxxx", "s1": 0.1, "s2": 0.9}] * 2
    frame = read_interpretations(
        write(tmp_path / "t.csv", records), latent="b", interpretation="good", score="s2"
    )
    assert frame.iloc[0][["latent", "interpretation", "score"]].tolist() == [1, "x", 0.9]
    with pytest.raises(RecordError, match="not nope"):
        read_interpretations(tmp_path / "t.csv", latent="nope")


@pytest.mark.parametrize(
    ("records", "words"),
    [
        ([{"alpha": 0.5, "beta": "t"}], ["alpha", "latent indices"]),
        ([{"latent": 1, "score": 0.5}], ["no column of texts"]),
        ([{"m": 1, "n": 2, "text": "a"}, {"m": 2, "n": 3, "text": "b"}], ["m", "n", "Pass latent="]),
    ],
    ids=["no index", "no text", "two indices"],
)
def test_ambiguity_is_named(records, words, tmp_path):
    """Columns that cannot be distinguished are an error that lists them."""
    with pytest.raises(RecordError) as error:
        read_interpretations(write(tmp_path / "t.csv", records))
    assert all(word in str(error.value) for word in words)


def test_no_table(tmp_path):
    """A folder without a table, and a file that is not JSON, are errors."""
    with pytest.raises(RecordError, match="no table"):
        read_interpretations(tmp_path)
    (tmp_path / "t.json").write_text("{")
    with pytest.raises(RecordError, match="not a readable"):
        read_interpretations(tmp_path / "t.json")


@pytest.mark.parametrize("orient", ["split", "records", "index", "columns", "values", "table"])
@pytest.mark.parametrize("by_row_label", [False, True])
def test_every_orientation_of_to_json(orient, by_row_label, tmp_path):
    """Latents as a column, or as the frame's row labels, which "records" and "values" do not write."""
    frame = pd.DataFrame(ROWS)
    if by_row_label:
        if orient in ("records", "values"):
            return
        frame = frame.set_index("latent").rename_axis(None)
    frame.to_json(tmp_path / "t.json", orient=orient)
    # "values" writes no names of columns, so a score is taken only if it is named.
    check(read_interpretations(tmp_path / "t.json", score="2" if orient == "values" else None))


def test_a_csv_with_its_row_labels_as_latents(tmp_path):
    """pandas writes the index under an empty name, and reads it as "Unnamed: 0"."""
    pd.DataFrame(ROWS).set_index("latent").rename_axis(None).to_csv(tmp_path / "t.csv")
    assert "Unnamed: 0" in pd.read_csv(tmp_path / "t.csv").columns
    check(read_interpretations(tmp_path / "t.csv"))
    pd.DataFrame(ROWS).set_index("latent").rename_axis(None).to_parquet(tmp_path / "t.parquet")
    check(read_interpretations(tmp_path / "t.parquet"))


@pytest.mark.parametrize("latent", ["Feature ID", "feature_number", "Unnamed: 0", "latent_id"])
@pytest.mark.parametrize("value", [lambda i: i, lambda i: f"latent_{i}", float])
def test_latents_by_name_and_form(latent, value, tmp_path):
    records = [
        {latent: value(r["latent"]), "text": r["interpretation"], "interpretability_score": r["score"]}
        for r in ROWS
    ]
    check(read_interpretations(write(tmp_path / "t.csv", records)))


@pytest.mark.parametrize("score", [lambda s: 100 * s, lambda s: f"{100 * s:g}%", lambda s: f"{100 * s:g} %"])
def test_percentages_are_divided_and_said(score, tmp_path):
    records = [r | {"score": score(r["score"])} for r in ROWS]
    found, notes = read_published(write(tmp_path / "t.csv", records))
    assert [one.scores[0].balanced_accuracy for one in found] == pytest.approx(SCORES)
    assert any("divided by 100" in note for note in notes)


def test_small_percentages_are_known_by_their_columns_name(tmp_path):
    records = [{"latent": i, "text": "a text", "accuracy_percent": 0.5 * i} for i in range(3)]
    frame = read_interpretations(write(tmp_path / "t.csv", records))
    assert frame["score"].tolist() == [0.0, 0.005, 0.01]


@pytest.mark.parametrize("scores", [(1, 5, 3), (0.5, 250, 90), (-3, 0.5, 0.2)])
def test_unknown_scales_are_refused(scores, tmp_path):
    """Ratings from 1 to 5 are neither shares nor percentages."""
    path = write(tmp_path / "t.csv", [r | {"score": s} for r, s in zip(ROWS, scores, strict=True)])
    with pytest.raises(RecordError, match="--score-column"):
        read_interpretations(path)
    assert read_interpretations(path, score="none")["score"].isna().all()


def test_several_scores_are_named(tmp_path):
    records = [r | {"f1": 0.3, "auroc": 0.9} for r in ROWS]
    _, notes = read_published(write(tmp_path / "t.csv", records))
    (note,) = notes
    assert "score from 'score'" in note
    assert "'f1', 'auroc'" in note


def test_deep_and_foreign_json_is_one_message(tmp_path):
    (tmp_path / "t.json").write_text("[" * 100_000)
    with pytest.raises(RecordError, match="not a readable"):
        read_interpretations(tmp_path / "t.json")
    (tmp_path / "t.json").write_text(json.dumps({"release": {"files": {"latents": {"12": "a text"}}}}))
    assert read_interpretations(tmp_path / "t.json")["latent"].tolist() == [12]
