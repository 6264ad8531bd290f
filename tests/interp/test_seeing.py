"""A judge that sees: detection and outlines on images, by a scripted model that looks at the pixels."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from sae_lens_maira.cli import main
from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.examples import Plan
from sae_lens_maira.interp.records import FILE, load
from sae_lens_maira.interp.score import COLOUR

pytest.importorskip("httpx")
from werkzeug import Request, Response

from sae_lens_maira.interp.judge import Server
from sae_lens_maira.interp.run import interpret

SIDES = {"nodule": slice(61, 64), "pacemaker": slice(66, 69)}
METHODS = ("image_detection", "image_fuzzing")


def pixels_of(part: dict) -> np.ndarray:
    """(80, 80, 3) of an image part."""
    data = part["image_url"]["url"].removeprefix("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def verdict(description: str, radiograph: np.ndarray, outlined: bool) -> bool:
    """Whether the place that the description names is bright, and within the outline if there is one."""
    bright = bool((radiograph[62:68, SIDES[description], 0] > 150).all())
    if not outlined:
        assert not (radiograph == COLOUR).all(-1).any()
        return bright
    low, high = (edge(np.argwhere((radiograph == COLOUR).all(-1)), axis=0) for edge in (np.min, np.max))
    return bright and tuple(low) == (60, 60) and tuple(high) == (69, 69)


class Seeing:
    """A server with eyes; counts the images that it was sent."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, request: Request) -> Response:
        body = request.get_json()
        system, user = (message["content"] for message in body["messages"])
        if body["response_format"]["json_schema"]["name"] == "Sentence":
            text = user if isinstance(user, str) else user[0]["text"]
            active = text.split("Silent in:")[0]
            answer: dict = {"explanation": max(SIDES, key=lambda word: active.count(word))}
        else:
            description = user[0]["text"].removeprefix("Description: ")
            radiographs = [pixels_of(part) for part in user if part["type"] == "image_url"]
            self.images += len(radiographs)
            answer = {
                "verdicts": [
                    verdict(description, radiograph, "outlined patches" in system)
                    for radiograph in radiographs
                ]
            }
        message = {"role": "assistant", "content": json.dumps(answer)}
        return Response(json.dumps({"choices": [{"message": message}]}), content_type="application/json")


@pytest.fixture
def seeing(httpserver) -> Seeing:
    judge = Seeing()
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(judge)
    return judge


def test_a_judge_that_sees_scores_high_and_the_control_does_not(hand_made, httpserver, seeing):
    """Two image latents, two places: the description decides where the judge looks."""
    records = hand_made(("nodule", "pacemaker"), kind="image", images=True)
    server = Server(model="seeing", base_url=httpserver.url_for("/v1"))
    printed: list[str] = []
    done, usage = interpret(records, server, Plan(methods=METHODS, n_test=20), say=printed.append)
    assert usage.unusable == 0
    assert usage.requests <= int(printed[0].split("at most ")[1].split()[0])
    for one, word in zip(done, ("nodule", "pacemaker"), strict=True):
        assert one.explanation == word
        assert [score.method for score in one.scores] == list(METHODS)
        for score, control in zip(one.scores, one.control, strict=True):
            assert score.balanced_accuracy == 1.0
            assert control.balanced_accuracy is not None
            assert control.balanced_accuracy < 0.8
        assert one.scores[0].asked == 40
    asked = [score.asked for one in done for score in (*one.scores, *one.control)]
    # Some radiographs are equal, and so are some questions: they are asked once.
    assert 0.9 * sum(asked) < seeing.images <= sum(asked)
    before = seeing.images
    again, usage = interpret(records, server, Plan(methods=METHODS, n_test=20))
    assert (again, usage.requests, seeing.images) == (done, 0, before)
    # The journal holds hashes of the images, never the images.
    assert "base64" not in (records.folder / "journal.jsonl").read_text()


def test_image_scorers_of_the_command(hand_made, httpserver, seeing, capsys):
    records = hand_made(("nodule", "pacemaker"), kind="image", images=True)
    words = ["interpret", "run", "--records", str(records.folder), "--judge", "seeing", "--n-test", "20"]
    words += ["--base-url", httpserver.url_for("/v1")]
    assert main([*words, "--methods", "image_detection, image_fuzzing"]) == 0
    assert "image_fuzzing" in capsys.readouterr().out
    assert {one.explainer for one in load(records.folder)} == {"seeing"}


def test_a_record_set_without_images_is_refused_before_anything_is_asked(hand_made, httpserver, seeing):
    records = hand_made(("nodule", "pacemaker"), kind="image")
    with pytest.raises(RecordError, match="keeps no images, which image_detection need"):
        interpret(
            records, Server(model="seeing", base_url=httpserver.url_for("/v1")), Plan(methods=METHODS[:1])
        )
    assert not (records.folder / "journal.jsonl").exists()


def test_a_server_without_eyes_stops_the_run(hand_made, httpserver, capsys):
    """It refuses image parts: exit code 2 with its own words, and nothing is stored."""

    def blind(request: Request) -> Response:
        if "image_url" in request.get_data(as_text=True):
            error = {"error": {"message": "This model does not support image_url content"}}
            return Response(json.dumps(error), 400, content_type="application/json")
        return Seeing()(request)

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(blind)
    records = hand_made(("nodule", "pacemaker"), kind="image", images=True)
    words = ["interpret", "run", "--records", str(records.folder), "--judge", "blind", "--n-test", "20"]
    words += ["--base-url", httpserver.url_for("/v1"), "--methods", "image_detection"]
    assert main(words) == 2
    assert "does not support image_url content" in capsys.readouterr().err.splitlines()[0]
    assert not (records.folder / FILE).exists()


def test_a_text_latent_has_no_images_to_show(hand_made, httpserver, seeing):
    records = hand_made(("nodule", "pacemaker"), kind="text", images=True)
    done, _ = interpret(
        records, Server(model="seeing", base_url=httpserver.url_for("/v1")), Plan(methods=METHODS)
    )
    assert [one.scores for one in done] == [(), ()]
    assert seeing.images == 0
