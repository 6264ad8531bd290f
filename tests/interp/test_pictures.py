"""Radiographs with outlined patches reach a vision model as image parts, first examples first; texts are unchanged."""

import base64
import dataclasses
import io
import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.examples import split_examples, train_patients
from sae_lens_maira.interp.published import read_published
from sae_lens_maira.interp.score import COLOUR, outlined

pytest.importorskip("httpx")
from sae_lens_maira.interp.prompts import PICTURE_TOKENS, question, tokens_of, with_text


@pytest.fixture
def examples(hand_made):
    """Train examples of an image latent whose patch 54 of 8 x 8 fires, the radiographs of half of them kept."""
    records = hand_made(("nodule",), kind="image")
    Image.new("L", (80, 80), 90).save(records.folder / "radiograph.png")
    train = train_patients(records.studies.values())
    found = split_examples(records[0], records.studies, train).train
    kept = []
    for number, example in enumerate(found):
        images = (("frontal", "radiograph.png"),) if number % 2 else ()
        kept.append(dataclasses.replace(example, study=dataclasses.replace(example.study, images=images)))
    return records, kept


def test_the_firing_patch_is_outlined(examples):
    records, found = examples
    radiograph = outlined(found[1], records.folder)
    assert radiograph is not None
    marked = np.argwhere((np.asarray(radiograph) == COLOUR).all(-1))
    assert marked.min(0).tolist() == [60, 60]
    assert marked.max(0).tolist() == [69, 69]
    assert outlined(found[0], records.folder) is None


def test_parts_follow_the_text_in_its_order(examples):
    records, found = examples
    system, user = question(found, (), pictures=2, folder=records.folder)
    text, *radiographs = user["content"]
    assert [part["type"] for part in radiographs] == ["image_url"] * 2
    data = radiographs[0]["image_url"]["url"].removeprefix("data:image/png;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (80, 80)
    plain = question(found, ())[1]["content"]
    lines = text["text"].splitlines()
    assert sorted(lines[: len(plain.splitlines())])[:5] == sorted(plain.splitlines())[:5]
    assert "images of the first 2 active" in text["text"]
    assert "right lower zone" in plain or "left lower zone" in plain
    assert tokens_of([system, user]) > 2 * PICTURE_TOKENS
    assert tokens_of([system, user]) < 2 * PICTURE_TOKENS + len(json.dumps([system, text]))
    longer = with_text([system, user], "more")
    assert longer[-1]["content"][-1] == {"type": "text", "text": "more"}
    assert with_text([system, {"role": "user", "content": "a"}], "b")[-1]["content"] == "a\n\nb"


@pytest.mark.parametrize("ending", ["csv", "jsonl", "json", "parquet"])
def test_published_tables_are_read_by_their_columns(tmp_path, ending):
    frame = pd.DataFrame(
        {
            "Feature": [3, 5, 9],
            "Interpretation": ["a pacemaker", None, "since the prior"],
            "score": [0.8, 0.1, None],
        }
    )
    path = tmp_path / f"published.{ending}"
    if ending == "csv":
        frame.to_csv(path, index=False)
    elif ending == "parquet":
        frame.to_parquet(path)
    else:
        frame.to_json(path, orient="records", lines=ending == "jsonl")
    found, _ = read_published(path)
    assert [(one.latent, one.explanation) for one in found] == [(3, "a pacemaker"), (9, "since the prior")]
    assert [one.category for one in found] == ["device", "longitudinal change"]
    assert found[0].scores[0].balanced_accuracy == 0.8
    assert not found[1].scores
    with pytest.raises(RecordError, match="--text-column"):
        read_published(path, text="sentence")
