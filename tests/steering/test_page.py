"""The page of a run: numbers of its tables, differences marked, text escaped, credentialed studies left out."""

import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from sae_lens_maira.errors import InterventionError
from sae_lens_maira.steering.page import PageOptions, write_page
from sae_lens_maira.studies import Licence

pytestmark = pytest.mark.compat

HOSTILE = '<script>document.title="owned"</script>'


@pytest.fixture
def run(tmp_path):
    """The tables of a small run, as `SteeringTables.save` writes them: two methods, four studies a half."""
    rows = []
    for method, hits in (("latents", [1, 1, 0, 1]), ("random <direction>", [0, 0, 0, 0])):
        for half in ("choose", "report"):
            rows += [
                {
                    "study": i,
                    "method": method,
                    "half": half,
                    "strength": 2.0,
                    "on_target": float(hit),
                    "off_target": 0.1,
                    "kl": 0.5,
                    "unsteered": f"No effusion, study {i}.",
                    "text": f"Large effusion {HOSTILE}, study {i}.",
                }
                for i, hit in enumerate(hits)
            ]
    summary = [
        {
            "method": method,
            "strength": 2.0,
            "n": 4,
            "unsteered": 0.0,
            "on_target": on,
            "on_target_low": on / 2,
            "on_target_high": on,
            "off_target": 0.1,
            "off_target_low": 0.0,
            "off_target_high": 0.2,
            "kl": 0.5,
            "perplexity": np.nan,
        }
        for method, on in (("latents", 0.75), ("random <direction>", 0.0))
    ]
    pd.DataFrame(rows).to_parquet(tmp_path / "studies.parquet")
    pd.DataFrame(summary).to_parquet(tmp_path / "summary.parquet")
    Image.new("RGB", (40, 20), "white").save(tmp_path / "dose_response.png")
    return tmp_path


def test_numbers_marks_and_escapes(run, few):
    """Shares have intervals and the control; words that came and went are marked; nothing is markup."""
    text = write_page(run, "pleural_effusion_left", few).read_text(encoding="utf-8")
    assert "75 %<small>38 % to 75 %</small>" in text
    assert "random &lt;direction&gt;" in text
    assert "<del>No</del>" in text
    assert "<ins>Large</ins> effusion" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert text.count('class="image"') == 4
    assert "3 and 1 in all" in text
    assert "–" in text  # a perplexity that is not there


def test_nothing_is_loaded(run, few):
    """Every source is in the file, and the policy forbids any other."""
    text = write_page(run, "oedema", few).read_text(encoding="utf-8")
    assert not re.search(r"(src|href)=\"(?!data:)", text)
    assert "default-src 'none'; img-src data:" in text


def test_credentialed_studies_are_left_out(run, few):
    """Neither image, id nor text of a credentialed study is on the page, unless asked for; a synthetic one is."""
    private = [replace(study, licence=Licence.CREDENTIALED) for study in few[:3]] + [few[3]]
    text = write_page(run, "oedema", private).read_text(encoding="utf-8")
    assert text.count('class="image"') == 1
    assert all(study.study_id not in text for study in private[:3])
    assert all(f"study {i}." not in text for i in range(3))
    assert "study 3." in text
    assert few[3].study_id in text
    asked = write_page(run, "oedema", private, PageOptions(credentialed=True)).read_text(encoding="utf-8")
    assert asked.count('class="image"') == 4
    assert "study 0." in asked


def test_without_studies_nothing_is_known_to_be_free(run):
    """A study of unknown licence counts as credentialed."""
    text = write_page(run, "oedema").read_text(encoding="utf-8")
    assert "study 0." not in text
    assert 'class="image"' not in text


def test_bad_input(run, few, tmp_path_factory):
    """Another folder, another method and other studies are refused."""
    with pytest.raises(InterventionError, match=r"has no studies\.parquet"):
        write_page(tmp_path_factory.mktemp("empty"), "oedema")
    with pytest.raises(InterventionError, match="There is no method"):
        write_page(run, "oedema", few, PageOptions(method="prayer"))
    with pytest.raises(InterventionError, match="reports on 4"):
        write_page(run, "oedema", few[:2])
