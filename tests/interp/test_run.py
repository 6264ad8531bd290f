"""Runs end to end: offline against the truth, through a server, killed and resumed, over budget."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

from sae_lens_maira.cli import main
from sae_lens_maira.errors import ConfigError, PrivacyError
from sae_lens_maira.interp.examples import Plan
from sae_lens_maira.interp.offline import EXPLAINER, named_findings
from sae_lens_maira.interp.records import load
from sae_lens_maira.interp.run import JOURNAL, interpret_offline

pytest.importorskip("httpx")
from werkzeug import Request, Response

from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.run import interpret

KEYS = (
    "pleural_effusion_left",
    "pleural_effusion_right",
    "pneumothorax_left",
    "pneumothorax_right",
    "pacemaker",
    "nodule",
)


@pytest.mark.parametrize("kind", ["text", "image"])
def test_offline_explanations_hold_on_unseen_patients_and_their_controls_do_not(hand_made, kind):
    records = hand_made(KEYS, kind=kind)
    done = interpret_offline(records)
    assert load(records.folder) == done
    means = []
    for one, key in zip(done, KEYS, strict=True):
        assert named_findings(one.explanation or "", KEYS) == {key}
        truth, control = one.scores[0], one.control[0]
        assert truth.judge == control.judge == "truth"
        assert truth.balanced_accuracy == 1.0
        assert truth.asked == truth.answered == one.n_test
        assert truth.recall_by_interval[0][1] == 1.0
        assert one.control_latent not in (None, one.latent)
        assert control.balanced_accuracy is not None
        means.append(control.balanced_accuracy)
        assert one.explainer == EXPLAINER
    assert abs(sum(means) / len(means) - 0.5) < 0.1


def test_another_explainers_lines_stay_and_ones_own_are_replaced(hand_made):
    records = hand_made(KEYS)
    interpret_offline(records)
    interpret_offline(records, Plan(latents=(1, 2), seed=3))
    assert sorted(one.latent for one in load(records.folder)) == list(range(6))


def test_a_rare_latent_is_not_explained(hand_made):
    done = interpret_offline(hand_made(KEYS[:2]), Plan(least=1000, n_train=1000, n_test=1000))
    assert {one.status for one in done} == {"too_rare"}
    assert all(one.explanation is None and not one.scores for one in done)
    with pytest.raises(ConfigError, match="intruder"):
        Plan(methods=("guess",))


def reading_model(request: Request) -> Response:
    """A model that explains by the marked word and answers detection by looking for the description's words."""
    body = request.get_json()
    form = body["response_format"]["json_schema"]["name"]
    user = body["messages"][1]["content"]
    if form == "Sentence":
        marked = Counter(part.split(">>")[0] for part in user.split("<<")[1:])
        answer = {"explanation": marked.most_common(1)[0][0]}
    elif form == "Verdicts":
        description, *texts = user.splitlines()
        word = description.removeprefix("Description: ")
        fuzz = "<<" in user
        answer = {"verdicts": [(f"<<{word}>>" if fuzz else word) in text for text in texts if text]}
    else:
        answer = {"number": 1}
    message = {"role": "assistant", "content": json.dumps(answer)}
    return Response(
        json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "reader",
                "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
                "usage": {"prompt_tokens": len(user) // 4, "completion_tokens": 20, "total_tokens": 0},
            }
        ),
        content_type="application/json",
    )


def test_a_model_that_reads_scores_high_and_the_control_low(hand_made, httpserver):
    """The estimate comes before the first request and no fewer calls are announced than made."""
    printed = []

    def handle(request: Request) -> Response:
        assert printed
        return reading_model(request)

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(handle)
    records = hand_made(
        ("pleural_effusion_left", "pneumothorax_left", "pacemaker", "nodule"), licence="credentialed"
    )
    server = Server(model="reader", base_url=httpserver.url_for("/v1"), usd_per_mtok=(1.0, 2.0))
    plan = Plan(methods=("detection", "fuzzing", "intruder"), n_test=20)
    done, usage = interpret(records, server, plan, say=printed.append)
    assert "this machine" in printed[0]
    assert usage.requests <= int(printed[0].split("at most ")[1].split()[0])
    assert usage.unusable == 0
    for one, word in zip(done, ("effusion", "pneumothorax", "pacemaker", "nodule"), strict=True):
        assert one.explanation == word
        detection, fuzzing, intruder = one.scores
        # Effusions and pneumothoraces of the other side deceive a reader of single words.
        assert detection.balanced_accuracy is not None
        assert detection.balanced_accuracy > 0.85
        # A wrong mark may fall on the same word of the other side.
        assert fuzzing.balanced_accuracy is not None
        assert fuzzing.balanced_accuracy >= 0.9
        assert intruder.balanced_accuracy is not None
        assert one.control[1].balanced_accuracy == pytest.approx(0.5, abs=0.2)
        assert len(one.journal_keys) >= 5
    again, usage = interpret(records, server, plan)
    assert again == done
    assert usage.requests == 0


def test_the_command_asks_the_server_of_the_environment(hand_made, httpserver, monkeypatch, capsys):
    """`export OPENAI_BASE_URL`, then `interpret run --judge`: estimate first, scores last, and a journal."""
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(reading_model)
    monkeypatch.setenv("OPENAI_BASE_URL", httpserver.url_for("/v1"))
    records = hand_made(KEYS[:3])
    words = ["interpret", "run", "--records", str(records.folder), "--judge", "reader", "--latents", "0-1"]
    assert main([*words, "--n-test", "20"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("at most") < printed.index(" requests (") < printed.index("Statuses: 2 ok")
    assert (records.folder / JOURNAL).is_file()
    assert {one.latent for one in load(records.folder)} == {0, 1}


def test_the_client_works_after_nnsight():
    """nnsight's `save` on every object is back after the client's import, which could not have lived with it."""
    code = (
        "import nnsight, sys; assert 'anyio._backends._asyncio' not in sys.modules; "
        "import sae_lens_maira.interp.transport; assert 'anyio._backends._asyncio' in sys.modules; object().save"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_credentialed_records_do_not_leave(hand_made):
    records = hand_made(KEYS[:2], licence="credentialed")
    with pytest.raises(PrivacyError, match="--allow-remote"):
        interpret(records, Server(model="m", base_url="http://192.0.2.1/v1"))
    assert not (records.folder / JOURNAL).exists()


def test_a_spent_budget_is_a_status_and_no_score(hand_made, httpserver):
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(reading_model)
    records = hand_made(KEYS)
    server = Server(model="reader", base_url=httpserver.url_for("/v1"), max_requests=9, concurrency=1)
    done, usage = interpret(records, server, Plan(n_test=20))
    assert usage.requests == 9
    assert "over_budget" in {one.status for one in done}
    assert all(score.unusable == 0 for one in done for score in (*one.scores, *one.control))


RUN = """
import sys
from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.examples import Plan
from sae_lens_maira.interp.run import interpret
from sae_lens_maira.latents.recordset import RecordSet
server = Server(model="reader", base_url=sys.argv[2], concurrency=2)
done, usage = interpret(RecordSet.open(sys.argv[1]), server, Plan(n_test=30, batch=5))
sys.stdout.write(f"{usage.requests} {usage.cached}")
"""


def test_killed_twice_and_resumed_without_asking_anything_again(hand_made, httpserver):
    """SIGKILL twice in the middle: no answered question is asked again, and the result is that of a whole run."""
    records = hand_made(KEYS)
    seen: list[str] = []

    def handle(request: Request) -> Response:
        seen.append(request.get_data(as_text=True))
        time.sleep(0.01)
        return reading_model(request)

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(handle)
    command = [sys.executable, "-c", RUN, str(records.folder), httpserver.url_for("/v1")]
    answered: list[set[str]] = []
    journal = records.folder / JOURNAL
    for least in (10, 25):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < least):
            time.sleep(0.005)
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        rows = [json.loads(line) for line in journal.read_text().split("\n") if line.endswith("}")]
        answered.append({json.dumps(row["request"], sort_keys=True) for row in rows if "request" in row})
        seen.append("killed")
    last = subprocess.run(command, capture_output=True, text=True, check=True)
    first = seen.index("killed")
    second = seen.index("killed", first + 1)
    requests = [body if body == "killed" else json.dumps(json.loads(body), sort_keys=True) for body in seen]
    assert not answered[0] & set(requests[first + 1 :])
    assert not answered[1] & set(requests[second + 1 :])
    late = (
        len(seen) - second - 1 - int(last.stdout.split()[0])
    )  # sent by the killed process, read after its end
    assert 0 <= late <= 2, "two requests at a time"
    rows = [json.loads(row) for row in journal.read_text().splitlines() if row.endswith("}")]
    assert [row["value"] for row in rows if row.get("note") == "records"] == [
        {"fingerprint": records.fingerprint, "licence": "synthetic"}
    ]
    keys = Counter(row["key"] for row in rows if "key" in row)
    done = load(records.folder)
    assert {key for one in done for key in one.journal_keys} == set(keys)
    assert max(keys.values()) == 1
