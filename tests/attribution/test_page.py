"""The pages of `attribute`: what they hold, who may be on them, and how they behave in a real browser."""

import dataclasses
import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.edges import Edge, Node, SentenceGraph
from sae_lens_maira.attribution.page import StudyPage, page_data, write_pages
from sae_lens_maira.attribution.regenerate import Removal
from sae_lens_maira.cli import main
from sae_lens_maira.errors import PrivacyError
from sae_lens_maira.phantom import generate_studies

HOOK = "blocks.3.hook_resid_post"
HOSTILE = "<script>document.title='owned'</script></script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def page(hooked, study, sae):
    found = attribute(
        hooked, study, sae, [0, 1], report="teacher", roles="image_only", candidates=32, n_check=8
    )
    names = {int(j): HOSTILE for j in found.sentences[0].latent}
    first = dataclasses.replace(
        found.sentences[0], sentence=dataclasses.replace(found.sentences[0].sentence, text=HOSTILE)
    )
    found = dataclasses.replace(found, names=names, sentences=(first, found.sentences[1]))
    nothing = torch.zeros(8, dtype=torch.int64)
    removal = Removal(f"{found.report} {HOSTILE}", True, 2, nothing, nothing, torch.zeros(1, 128))
    node = Node(5, HOSTILE, 3, 1.0, 0.5, 0.0)
    graph = SentenceGraph(HOSTILE, -3.0, HOOK, HOOK, (node,), (node,), (Edge(5, 5, 0.5, 0.4, 0.0, True),))
    return StudyPage(study, found, [removal, None], [graph, None])


def test_maps_of_the_page_are_the_attributions(page):
    """Summed over patches, what the page draws is the sentence's positive attribution at patches."""
    data = page_data(page)
    encoding = page.found.encoding
    patches = (encoding.view[0] >= 0).numpy()
    for sentence, item in zip(data["sentences"], page.found.sentences, strict=True):
        drawn = sum(value for view in sentence["map"].values() for _, value in view)
        assert drawn == pytest.approx(float(item.by_position[patches].sum()), abs=1e-3)
        assert sum(one["share"] for one in sentence["latents"]) <= 1 + 1e-6
    assert {image["view"] for image in data["images"]} == {"frontal"} | (
        {"lateral"} if page.study.has_lateral else set()
    )
    assert data["sentences"][0]["regenerated"]["n"] == 8
    assert data["sentences"][1]["regenerated"] is None


def test_a_run_over_fewer_studies_leaves_no_page_of_the_others(page, tmp_path):
    """Pages and graphs of the earlier run go; what the user put into the folder stays."""
    write_pages(tmp_path, [page, page, page])
    for name in ("notes.txt", "study-plan.html"):
        (tmp_path / name).write_text("mine")
    write_pages(tmp_path, [dataclasses.replace(page, graphs=())])
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"index.html", "study-0000.html", "notes.txt", "study-plan.html"}
    assert "study-0001" not in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("licence", ["credentialed", "unknown", None])
def test_studies_that_may_not_be_shared_are_refused(page, licence, tmp_path):
    """Every class but public and synthetic is refused before a file is written; on request the folder is marked."""
    study = dataclasses.replace(page.study)
    object.__setattr__(study, "licence", licence)
    closed = dataclasses.replace(page, study=study)
    with pytest.raises(PrivacyError, match="attribution pages"):
        write_pages(tmp_path / "out", [page, closed])
    assert not (tmp_path / "out").exists()
    written = write_pages(tmp_path / "out", [closed], allow_credentialed=True)
    assert (tmp_path / "out" / "CREDENTIALED.json").exists()
    assert stat.S_IMODE(written.stat().st_mode) == 0o600


def test_the_command_writes_pages_of_the_studies_asked_for(sae, tmp_path, capsys):
    """`attribute` on the phantom: one page per study, the checks as JSON, an unknown study refused."""
    sae.save_model(tmp_path / "sae")
    words = [
        "attribute",
        "--sae",
        str(tmp_path / "sae"),
        "--out",
        str(tmp_path / "out"),
        "--candidates",
        "16",
    ]
    words += ["--n-check", "8", "--sentences", "[0]", "--max-new-tokens", "40", "--max-rounds", "1"]
    name = generate_studies(200, 10_000)[1].study_id
    assert main([*words, "--study", f"[{name}]", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [one["study"] for one in printed["studies"]] == [name]
    assert printed["studies"][0]["sentences"][0]["drop"] is not None
    assert Path(printed["page"]).is_file()
    assert main([*words, "--study", "[nobody]"]) == 2
    assert "nobody is not among" in capsys.readouterr().err


@pytest.mark.browser
@pytest.mark.skipif(
    shutil.which("chromium") is None or shutil.which("chromedriver") is None, reason="no chromium"
)
def test_the_page_in_a_browser(page, tmp_path):
    """A sentence and a latent are chosen by keyboard, text of the study is inert, and nothing is requested."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    written = write_pages(tmp_path, [page])
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--window-size=1200,1400",
    ):
        options.add_argument(argument)
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={tmp_path / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver: Any = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"), env=dict(os.environ))
    )
    try:
        driver.get(written.as_uri())
        buttons = driver.find_elements(By.CSS_SELECTOR, "#sentences button")
        assert [b.get_attribute("aria-pressed") for b in buttons] == ["true", "false"]
        assert HOSTILE in buttons[0].text
        drawing = driver.find_element(By.CSS_SELECTOR, "img.graph")
        assert (
            driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth", drawing) == 900
        )
        assert "40 % of text latent 5" in (drawing.get_attribute("alt") or "")
        assert "The statement is gone" in driver.find_element(By.ID, "detail").text
        assert "Marked words" in driver.find_element(By.ID, "detail").text
        buttons[0].send_keys(Keys.ARROW_DOWN)
        assert buttons[1].get_attribute("aria-pressed") == "true"
        assert driver.switch_to.active_element == buttons[1]
        assert "Check by ablation" in driver.find_element(By.ID, "detail").text
        row = driver.find_element(By.CSS_SELECTOR, "tr.pick")
        row.send_keys(Keys.ENTER)
        assert "of latent" in driver.find_element(By.ID, "maplabel").text
        drawn = "return [...document.getElementById('map').getContext('2d').getImageData(0,0,99,99).data].some(x=>x>0)"
        assert driver.execute_script(drawn)
        assert driver.title == "Attribution of a report"
        assert [line for line in driver.get_log("browser") if line["level"] == "SEVERE"] == []
        events = [json.loads(line["message"])["message"] for line in driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        assert [url for url in asked if not url.startswith(("file:", "data:", "chrome:"))] == []
    finally:
        driver.quit()
