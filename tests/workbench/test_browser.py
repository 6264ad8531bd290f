"""The workbench in a real browser: an experiment from opening the page to the exported files."""

import contextlib
import io
import json
import os
import runpy
import shutil
import threading
from typing import Any

import pytest

from sae_lens_maira.workbench.run import RunningWorkbench
from sae_lens_maira.workbench.session import Cancelled

selenium = pytest.importorskip("selenium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromium") is None or shutil.which("chromedriver") is None, reason="no Chromium here"
    ),
]

from selenium import webdriver  # noqa: E402
from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

HOSTILE = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
SCREENSHOTS = os.environ.get("WORKBENCH_SCREENSHOTS")


@pytest.fixture(scope="module", params=["light", "dark"])
def driver(request, tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    profile = tmp_path_factory.mktemp("profile")
    for word in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1500,1300",
    ):
        options.add_argument(word)
    options.add_argument(f"--user-data-dir={profile}")
    if request.param == "dark":
        options.add_argument("--force-dark-mode")
        options.add_argument("--blink-settings=preferredColorScheme=0")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found: Any = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(shutil.which("chromedriver"), env=dict(os.environ))
    )
    found.scheme = request.param
    yield found
    found.quit()


@pytest.fixture
def page(session, driver):
    """A workbench whose latents carry hostile text."""
    names = dict(session.catalogue.sae.latent_names)
    session.catalogue.sae.latent_names = {latent: f"{text} {HOSTILE}" for latent, text in names.items()}
    running = RunningWorkbench(session)
    driver.get(running.url)
    yield driver, running
    session.catalogue.sae.latent_names = names
    running.close()


def wait(driver, script, seconds=60):
    """Wait until a JavaScript expression is true."""
    return WebDriverWait(driver, seconds, 0.05).until(lambda d: d.execute_script(f"return {script}"))


def idle(driver):
    wait(driver, "document.body.getAttribute('aria-busy') === 'false' && !workbench.running")


def problem(driver):
    return driver.execute_script("return document.getElementById('problem').textContent")


def test_an_experiment_from_opening_to_export(page, tmp_path):
    """Generate, ask why, add a latent, paint, steer, control, undo, cancel, export; the exported code agrees."""
    driver, running = page

    def find(selector):
        return driver.find_element(By.CSS_SELECTOR, selector)

    wait(
        driver,
        "globalThis.workbench && workbench.about && document.querySelectorAll('#found button').length > 5",
    )
    find("#run").click()
    idle(driver)
    assert problem(driver) == ""
    before = find("#before").text
    assert len(before) > 40

    find("#before button").click()  # why this sentence?
    idle(driver)
    assert problem(driver) == ""
    assert "Why this sentence?" in find("#why").text
    assert driver.execute_script("return workbench.overlay.views.frontal.length") > 0
    driver.find_elements(By.CSS_SELECTOR, "#why td button")[0].click()
    assert len(driver.find_elements(By.CSS_SELECTOR, ".slider")) == 1

    find("#search").send_keys("cardiomegaly")
    wait(driver, "[...document.querySelectorAll('#found button')].every(b => /cardiomegaly/i.test(b.title))")
    find("#found button").click()
    sliders = driver.find_elements(By.CSS_SELECTOR, ".slider input")
    assert len(sliders) == 2
    sliders[1].send_keys(*[Keys.ARROW_RIGHT] * 30)
    assert driver.execute_script("return workbench.sliders[1].strength") == pytest.approx(4.0)

    find("#brush").click()
    radiograph = find("#radiograph")
    ActionChains(driver).move_to_element_with_offset(radiograph, -60, 40).click_and_hold().move_by_offset(
        90, 30
    ).release().perform()
    painted = driver.execute_script("return workbench.masks.frontal.filter(Boolean).length")
    assert painted > 3
    radiograph.send_keys(
        Keys.ARROW_LEFT, Keys.ARROW_LEFT, Keys.ARROW_UP, Keys.ARROW_UP, Keys.ARROW_UP, " "
    )  # by keyboard too
    assert driver.execute_script("return workbench.masks.frontal.filter(Boolean).length") > painted
    assert find("#place").get_attribute("value") == "painted"

    find("#run").click()
    idle(driver)
    assert problem(driver) == ""
    after = find("#after").text
    shown = driver.execute_script("return workbench.shown")
    assert shown["after"]["text"].split() == after.split()
    assert shown["after"]["effect"]["changed"] > 0

    find("#export").click()
    files = wait(driver, "workbench.exported")
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        runpy.run_path(str(tmp_path / "run.py"))
    assert output.getvalue().removesuffix("\n") == shown["after"]["text"]

    find("#control").click()
    idle(driver)
    assert problem(driver) == ""
    assert "random direction" in find("#afterhead").text
    assert len(driver.find_elements(By.CSS_SELECTOR, "#history button")) == 3
    if SCREENSHOTS:
        driver.save_screenshot(f"{SCREENSHOTS}/workbench_{driver.scheme}.png")

    strengths = driver.execute_script("return workbench.sliders.length")
    names = driver.execute_script("return workbench.sliders.map(one => one.name)")
    assert "Cardiomegaly" in names[1]
    driver.find_elements(By.CSS_SELECTOR, ".slider button")[0].click()
    find("#undo").click()
    wait(driver, f"workbench.sliders.length === {strengths}")
    assert driver.execute_script("return workbench.sliders.map(one => one.name)") == names
    assert driver.execute_script("return workbench.masks.frontal.filter(Boolean).length") > painted
    driver.find_elements(By.CSS_SELECTOR, "#history button")[0].click()
    wait(driver, "workbench.sliders.length === 0 && workbench.shown.after === null")

    # What the browser saw: no error, no request elsewhere, no script of a text ran.
    severe = [entry for entry in driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    urls = {
        event["params"]["request"]["url"]
        for event in (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
        if event["method"] == "Network.requestWillBeSent"
    }
    foreign = {
        url
        for url in urls
        if not url.startswith((f"http://127.0.0.1:{running.port}/", "blob:", "data:", "chrome"))
    }
    assert foreign == set()
    assert driver.title == "Workbench"


def test_a_session_opens_again_and_errors_are_shown(page, tmp_path):
    """A session file restores study, sliders and mask; unreadable files give a message."""
    driver, _running = page
    wait(driver, "globalThis.workbench && workbench.about")
    other = driver.execute_script("return workbench.studies[2].id")
    grid = [[1.0 if (r, c) == (1, 2) else 0.0 for c in range(8)] for r in range(8)]
    spec = {
        "study": other,
        "without": [],
        "sliders": [[5, 2.0]],
        "place": "painted",
        "view": "frontal",
        "grid": grid,
    }
    spec |= {"control_seed": None, "max_new_tokens": None}
    path = tmp_path / "session.json"
    run = {"spec": spec, "before": "Text before.", "after": "Text after."}
    path.write_text(json.dumps({"format": "workbench-1", "spec": spec, "history": [run]}), encoding="utf-8")
    driver.find_element(By.ID, "session").send_keys(str(path))
    wait(driver, f"workbench.about.id === '{other}' && workbench.sliders.length === 1")
    assert driver.execute_script("return workbench.masks.frontal.indexOf(1)") == 10
    driver.find_elements(By.CSS_SELECTOR, "#history button")[0].click()
    wait(driver, "document.getElementById('after').textContent === 'Text after.'")
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}", encoding="utf-8")
    driver.find_element(By.ID, "session").send_keys(str(wrong))
    wait(driver, "document.getElementById('problem').textContent.includes('not a session')")
    driver.find_element(By.ID, "file").send_keys(str(wrong))
    wait(driver, "document.getElementById('problem').textContent.includes('dropped file')")


def test_another_study_ends_the_run_and_hostile_reports_are_text(page, session, monkeypatch):
    """A report never appears over another study's image; a script that a model writes is shown, not run."""
    driver, _running = page
    wait(driver, "globalThis.workbench && workbench.about")
    begun, stopped = threading.Event(), threading.Event()

    def slow(spec, emit, is_stopped):
        begun.set()
        while not is_stopped():
            emit({"event": "text", "side": "before", "text": "REPORT OF THE FIRST"})
            stopped.wait(0.02)
        stopped.set()
        raise Cancelled

    write = session.write
    monkeypatch.setattr(session, "write", slow)
    driver.find_element(By.ID, "run").click()
    assert begun.wait(20)
    wait(driver, "document.getElementById('before').textContent.includes('FIRST')")
    other = driver.execute_script("return workbench.studies[1].id")
    driver.execute_script(f"const s = document.getElementById('study'); s.value = '{other}'; s.onchange();")
    assert stopped.wait(20)
    idle(driver)
    wait(driver, f"workbench.about.id === '{other}' && document.getElementById('before').textContent === ''")

    def hostile(spec, emit, is_stopped):
        result = write(spec, emit, is_stopped)
        result["before"] |= {"text": HOSTILE, "sentences": [[0, len(HOSTILE)]], "labels": [HOSTILE]}
        emit({"event": "text", "side": "before", "text": HOSTILE})
        return result

    monkeypatch.setattr(session, "write", hostile)
    driver.find_element(By.ID, "run").click()
    idle(driver)
    assert problem(driver) == ""
    assert driver.execute_script("return document.getElementById('before').textContent") == HOSTILE
    assert driver.title == "Workbench"
    assert driver.find_elements(By.CSS_SELECTOR, "main img") == driver.find_elements(
        By.CSS_SELECTOR, "#image"
    )
