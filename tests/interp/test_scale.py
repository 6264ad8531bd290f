"""What a run of many latents costs: bytes held at once, and controls of 16,384 latents."""

import gc
import json
import sys
import time
import weakref

import pytest

from sae_lens_maira.interp import run
from sae_lens_maira.interp.examples import LatentTask, Plan, Tasks
from sae_lens_maira.interp.offline import named_findings
from sae_lens_maira.interp.run import interpret_offline, pick_controls

pytest.importorskip("httpx")
from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.protocol import Completion
from sae_lens_maira.interp.transport import Transport

KEYS = ("pleural_effusion_left", "pneumothorax_right", "pacemaker", "nodule")


class Tracker:
    """Bytes of the contexts of all latents that are alive, and their peak.

    Attributes:
        peak: largest number of bytes at once.
        largest: most bytes of one latent.
    """

    def __init__(self) -> None:
        self.peak = self.largest = self._now = 0

    def add(self, task: LatentTask) -> LatentTask:
        contexts = [example.context for half in (task.train, task.test) for example in half]
        size = sum(
            sys.getsizeof(c.token_indices) + sys.getsizeof(c.token_values) + sys.getsizeof(c.patches)
            for c in contexts
        )
        self._now += size
        self.peak, self.largest = max(self.peak, self._now), max(self.largest, size)
        weakref.finalize(task, self._remove, size)
        return task

    def _remove(self, size: int) -> None:
        self._now -= size


@pytest.fixture
def tracker(monkeypatch) -> Tracker:
    found = Tracker()
    read = Tasks.__getitem__
    monkeypatch.setattr(Tasks, "__getitem__", lambda self, latent: found.add(read(self, latent)))
    return found


@pytest.mark.parametrize("many", [8, 40])
def test_an_offline_run_holds_two_latents_whatever_their_number(hand_made, tracker, many):
    records = hand_made(KEYS * (many // 4))
    gc.collect()
    assert len(interpret_offline(records)) == many
    assert 0 < tracker.peak <= 2 * tracker.largest


@pytest.mark.parametrize("many", [8, 40])
def test_a_run_with_a_judge_holds_the_latents_in_work_only(hand_made, tracker, monkeypatch, many):
    async def post(self: Transport, request: dict) -> tuple[Completion, None]:
        user = request["messages"][1]["content"]
        form = request["response_format"]["json_schema"]["name"]
        answer = (
            {
                "explanation": next(
                    k for k in ("effusion", "pneumothorax", "pacemaker", "nodule") if f"<<{k}" in user
                )
            }
            if form == "Sentence"
            else {"verdicts": [True] * (len(user.splitlines()) - 2)}
        )
        return Completion(json.dumps(answer)), None

    monkeypatch.setattr(Transport, "post", post)
    records = hand_made(KEYS * (many // 4))
    server = Server(model="m", base_url="http://127.0.0.1:9/v1", concurrency=2)
    plan = Plan(methods=("detection",), n_train=5, n_test=5)
    monkeypatch.setattr(run, "estimate", lambda *_: "")
    done, usage = run.interpret(records, server, plan)
    assert (len(done), usage.unusable) == (many, 0)
    # Two latents per question in flight, and one that is being started.
    assert 0 < tracker.peak <= (2 * server.concurrency + 1) * tracker.largest


def test_controls_of_16384_latents():
    """Another text and none of the same findings; the time grows with the number of latents, not its square."""
    keys = [f"finding {i}_{side}".replace(" ", "_") for i in range(15) for side in ("left", "right")]
    texts = [
        f"Left finding {i % 15}, word {i % 700}." if i % 3 else f"Word {i % 900}." for i in range(16_384)
    ]
    texts[7], texts[8] = "", "Left finding 1, word 1."
    began = time.process_time()
    picked = pick_controls({i: text or None for i, text in enumerate(texts)}, keys)
    assert time.process_time() - began < 30
    assert picked.keys() == {i for i, text in enumerate(texts) if text}
    named = {text: named_findings(text, keys) for text in set(texts)}
    for latent, other in picked.items():
        assert other is not None
        assert texts[other]
        assert texts[latent] != texts[other]
        assert not named[texts[latent]] & named[texts[other]]
    assert len(set(picked.values())) > 8_000
    assert pick_controls({0: "A nodule.", 1: "A nodule.", 2: None}, ["nodule"]) == {0: None, 1: None}
