"""The page in a real headless Chromium: search, keys, heatmap, hostile text, speed, and no request that leaves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.dashboards.html import _write_call, write_page
from sae_lens_maira.interp.records import Interpretation, Score
from sae_lens_maira.latents.records import (
    Context,
    FindingAgreement,
    Firing,
    Histogram,
    Interval,
    LatentRecord,
    MeanMap,
    Neighbour,
    RecordsMeta,
    StudyInfo,
    StudyText,
    TokenWeight,
)
from sae_lens_maira.latents.writing import write_records

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None, reason="no chromium"
    ),
]
selenium = pytest.importorskip("selenium")

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

SIDE, ROW, COL = 37, 20, 9
HOSTILE = "<script>document.title='owned'</script>"


def _context(kind: str, value: float) -> Context:
    hit = ROW * SIDE + COL
    return Context(
        study="s0",
        start=0,
        end=6,
        modality=kind,
        token_indices=(1, 2, 3) if value else (),
        token_values=(0.1, 2.0, 8.0) if value else (),
        patches=(((hit, hit + 1), (value, value / 2)) if value else ((), ()), ((), ())),
        texts={"s0": TEXT},
    )


TEXT = StudyText(
    "s0",
    tokens=("▁Small", "▁right", "▁pleural", "▁effusion", ".", HOSTILE),
    positions=tuple(range(6)),
    roles=("indication",) + ("report",) * 5,
    read=(False,) + (True,) * 5,
    span=(0, 6),
    views=(("frontal", SIDE, SIDE), ("lateral", SIDE, SIDE)),
)


def _record(latent: int) -> LatentRecord:
    finding = "pleural_effusion_right" if latent == 7 else "cardiomegaly"
    return LatentRecord(
        latent=latent,
        level=latent % 2,
        status="alive",
        density=0.02,
        max=8.0,
        p99=7.5,
        histogram=Histogram(
            tuple(np.linspace(0, 8, 21).tolist()), tuple(int(900 * 0.7**i) for i in range(20))
        ),
        firing=(
            Firing("text", 900, 20, 40, 9, 2.0, 8.0, 7.5),
            Firing("image", 9000, 90, 40, 12, 1.0, 8.0, 7.0),
        ),
        top_tokens=(TokenWeight("▁effusion", 5, 1.5), TokenWeight("<0x0A>", 6, 1.1)),
        bottom_tokens=(TokenWeight("▁clear", 8, -1.2),),
        agreement=(FindingAgreement(finding, "image", 0.8, 0.6, 0.9, 0.7, 0.9, 12, 40),),
        neighbours=(Neighbour((latent + 1) % 12, "refines", 0.95),),
        maps=(MeanMap("frontal", SIDE, SIDE, tuple(np.linspace(0, 1, SIDE * SIDE).tolist()), 40),),
        top=(_context("image", 8.0), _context("text", 8.0)),
        intervals=(Interval(4.0, 8.0, 0.01, (_context("text", 5.0),)),),
        zero=(_context("text", 0.0),),
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    y, x = np.mgrid[0:112, 0:112]
    Image.fromarray((127 + 100 * np.sin(x / 20) * np.cos(y / 25)).astype(np.uint8)).save(folder / "f.png")
    study = StudyInfo(
        "s0", "p0", "synthetic", findings=("pleural_effusion_right",), labelled_by="truth",
        boxes=(("pleural_effusion_right", 0.15, 0.4, 0.4, 0.7),), images=(("frontal", "f.png"), ("lateral", "f.png")),
    )  # fmt: skip
    meta = RecordsMeta(
        "phantom",
        "blocks.3.hook_resid_post",
        3,
        "sae",
        "untrained",
        64,
        12,
        (6, 12),
        900,
        9000,
        40,
        (),
        0,
        {},
    )
    return write_page(
        write_records(folder / "records", meta, [study], [TEXT], map(_record, range(12))),
        [],
        folder / "out",
        image_root=folder,
    )


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1500,1000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def _until(driver: Any, script: str) -> None:
    end = time.monotonic() + 20
    while not driver.execute_script(f"return {script}"):
        assert time.monotonic() < end, script
        time.sleep(0.05)


def _press(driver: Any, key: str) -> None:
    """A key as a user gives it: to whatever has the focus, also where that is about to be hidden."""
    ActionChains(driver).send_keys(key).perform()


def _shown(driver: Any, latent: int) -> None:
    """Wait until the page of a latent is drawn and has the focus."""
    _until(
        driver,
        f"document.title === 'Latent {latent}' && !document.getElementById('latent').hidden"
        " && document.activeElement.closest('#latent') !== null"
        f" && document.querySelector('#latent h1 .id').textContent.trim() === '#{latent}'",
    )


def test_search_keys_heatmap_hostile_text_and_silence_on_the_network(page: Path, browser: Any) -> None:
    browser.get(page.as_uri())
    _until(browser, "page.ready > 0")
    banners = browser.find_element(By.ID, "banners").text
    assert "Test bench" in banners
    assert "A control" in banners
    _press(browser, "/")
    _until(browser, "document.activeElement.id === 'query'")
    _press(browser, "effusion right")
    assert "of 12 latents" in browser.find_element(By.ID, "count").text
    browser.find_element(By.ID, "query").clear()
    browser.find_element(By.ID, "query").send_keys("pleural")
    assert browser.find_element(By.ID, "count").text == "1 of 12 latents"
    _press(browser, Keys.ENTER)
    _shown(browser, 7)
    assert browser.execute_script("return location.hash") == "#/latent/7"
    # One patch of 8 by 8 canvas pixels: its centre is painted, the patch above it is not.
    alpha = browser.execute_script(
        "const c = document.querySelector('#latent .context canvas').getContext('2d');"
        "return [[arguments[1], arguments[0]], [arguments[1], arguments[0] - 2], [arguments[0], arguments[1]]]"
        ".map(([x, y]) => c.getImageData(x * 8 + 4, y * 8 + 4, 1, 1).data[3])", ROW, COL,
    )  # fmt: skip
    assert alpha[0] > 150
    assert alpha[1:] == [0, 0]
    assert HOSTILE in browser.find_element(By.CSS_SELECTOR, "#latent .context .text").text
    assert browser.title == "Latent 7"
    assert browser.execute_script("return document.querySelector('.context img').naturalWidth") == 112
    pair = "return [...document.querySelectorAll('.context .pair')[0].children].map((f) => f.clientWidth)"
    assert browser.execute_script(pair) == [320, 320]
    near = browser.find_element(By.XPATH, "//h2[text()='Neighbours']/..").text
    assert "refines #8" in near
    assert "refined by #6" in near
    left, width = browser.execute_script(
        "const b = document.querySelector('.context .box').style; return [b.left, b.width]"
    )
    assert (left, width) == ("15%", "25%")
    shown = "return document.querySelectorAll('details .context').length"
    assert browser.execute_script(shown) == 0
    for fold in browser.find_elements(By.CSS_SELECTOR, "#latent summary"):
        fold.click()
    _until(browser, "document.querySelectorAll('details .context').length === 2")
    browser.save_screenshot(str(page.parent.parent / "latent.png"))
    _press(browser, Keys.ESCAPE)
    _until(browser, "!document.getElementById('index').hidden && document.activeElement.id === 'scroll'")
    browser.execute_script("document.getElementById('query').value = ''; refresh()")
    _press(browser, "j")
    _press(browser, "j")
    _press(browser, "k")
    _press(browser, Keys.ENTER)
    _shown(browser, 1)
    _press(browser, Keys.ARROW_RIGHT)
    _shown(browser, 2)
    # Reading a canvas back, as this test does, is a warning; anything of the page itself would be SEVERE.
    assert [e for e in browser.get_log("browser") if e["level"] == "SEVERE"] == []
    sent = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in sent if m["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert all(url.startswith(("file:", "data:", "chrome:")) for url in urls), urls


def test_the_index_opens_with_the_best_scores_and_explains_its_columns(tmp_path: Path, browser: Any) -> None:
    """Sorted by score, dead latents hidden, empty columns left out, a help line per column, licences in sight."""
    records = [dataclasses.replace(_record(i), status="dead" if i == 2 else "alive") for i in range(5)]
    studies = [StudyInfo("s0", "p0", "credentialed", findings=(), labelled_by="truth", boxes=(), images=())]
    meta = RecordsMeta("m", "blocks.3.hook_resid_post", 3, "s", "trained", 64, 5, (5,), 9, 9, 4, (), 0, {})
    named = [
        Interpretation(
            latent, f"{'a long name of an opacity ' * 3}{latent}", "e", "acts_top20", "",
            (Score("detection", "j", 20, 20, 0, 10, 0, 9, 1, score, 0.5, 1.0),), (), None, "ok", 20, 20, "1",
        )
        for latent, score in ((1, 0.7), (3, 0.9), (4, 0.8))
    ]  # fmt: skip
    source = write_records(tmp_path / "records", meta, studies, [TEXT], records)
    page = write_page(source, named, tmp_path / "out", allow_credentialed=True)
    browser.get(page.as_uri())
    _until(browser, "page.ready > 0")
    assert browser.find_element(By.ID, "count").text == "4 of 5 latents, 1 dead hidden"
    rows = browser.execute_script(
        "return [...document.querySelectorAll('.row')].map((r) => r.dataset.latent)"
    )
    assert rows == ["3", "4", "1", "0"]
    heads = browser.execute_script("return page.heads.map((head) => head[1])")
    assert "Category" not in heads
    browser.find_element(By.CSS_SELECTOR, ".help summary").click()
    help_lines = [e.text for e in browser.find_elements(By.CSS_SELECTOR, "#help dd")]
    assert len(help_lines) == len(heads)
    assert all(line.endswith(".") for line in help_lines)
    cut = "const n = document.querySelector('.row .name'); return n.scrollHeight > n.clientHeight + 1"
    assert not browser.execute_script(cut)
    assert "Credentialed data" in browser.find_element(By.ID, "banners").text
    browser.execute_script("location.hash = '#/latent/3'")
    _shown(browser, 3)
    note = browser.find_element(By.CSS_SELECTOR, ".context .licence").text
    assert note == "Credentialed study: its text and images stay on this machine."


def test_sixteen_thousand_latents_are_interactive_within_a_second(page: Path, browser: Any) -> None:
    path = page.parent / "data" / "index.js"
    text = path.read_text()
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    n = 16_384
    columns = {key: [column[i % 12] for i in range(n)] for key, column in index["columns"].items()}
    columns["latent"] = list(range(n))
    columns["name"] = [f"opacity at the base of lung number {i}" for i in range(n)]
    try:
        _write_call(path, "saeIndex", index | {"columns": columns})
        # Another process may hold the cores: then the main thread's own time is what tells.
        browser.execute_cdp_cmd("Performance.disable", {})
        browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
        loads: list[float] = []
        worked: list[float] = []
        busy = os.getloadavg()[0] > (os.cpu_count() or 1)
        while len(loads) < (1 if busy else 3) and min(loads, default=1e9) >= 1000:
            browser.get("about:blank")
            browser.get(page.as_uri())
            _until(browser, "page.ready > 0")
            loads.append(browser.execute_script("return page.ready"))
            metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
            worked.append(next(m["value"] for m in metrics if m["name"] == "TaskDuration"))
        assert browser.find_element(By.ID, "count").text == "16,384 of 16,384 latents"
        assert browser.execute_script("return document.querySelectorAll('#space .row').length") < 100
        search = browser.execute_script(
            "const t = performance.now(); document.getElementById('query').value = '12345'; refresh();"
            "return performance.now() - t"
        )
        browser.save_screenshot(str(page.parent.parent / "index.png"))
    finally:
        path.write_text(text)
    assert browser.find_element(By.ID, "count").text == "1 of 16,384 latents"
    assert 0 < min(worked) < 1, worked
    assert busy or (min(loads) < 1000 and search < 1000), (loads, search)
