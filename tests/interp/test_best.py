"""The best latent of each finding: chosen on train patients alone, by the lower limit, over several record sets."""

import pytest

from sae_lens_maira.cli import main
from sae_lens_maira.errors import RecordError
from sae_lens_maira.interp.best import agreement, best_latents, best_table, paired_detection
from sae_lens_maira.interp.examples import split_examples, train_patients
from sae_lens_maira.interp.run import interpret_offline

SIDED = ("pleural_effusion_left", "pleural_effusion_right", "pacemaker", "nodule")


def test_each_finding_gets_its_latent_from_the_set_that_holds_it(hand_made, tmp_path, capsys):
    text = hand_made(SIDED[:2], name="text")
    image = hand_made(SIDED[2:], kind="image", name="image")
    for records in (text, image):
        interpret_offline(records)
    best = {b.finding: b for b in best_latents({"text": text.folder, "image": image.folder})}
    for i, key in enumerate(SIDED):
        found = best[key]
        assert (found.place, found.latent) == (("text", "image")[i // 2], i % 2)
        assert found.named
        assert found.exact
        assert found.agreement == 1.0 > found.low
        assert found.detection is not None
        assert found.detection.balanced_accuracy == 1.0
    # No latent follows a pneumothorax: what is best there by chance is not called by its name.
    assert not best["pneumothorax_left"].named
    table = best_table(list(best.values()))
    assert table["control"].notna().sum() >= 4
    worse = table.assign(detection=table["detection"] - [0.1, 0.2, 0.3, 0.4, 0.5, 0.6][: len(table)])
    mean, low, high, n = paired_detection(table, worse) or (0, 0, 0, 0)
    assert n == table["named"].sum()
    assert mean == pytest.approx((table["detection"] - worse["detection"])[table["named"]].mean())
    assert 0 < low <= mean <= high
    words = ["--records", f"[{text.folder}, {image.folder}]", "--frozen-decoder", f"[{text.folder}]"]
    assert main(["interpret", "findings", *words, "--out", str(tmp_path / "best")]) == 0
    printed = capsys.readouterr().out
    assert "4 of 6 findings named" in printed
    assert "trained minus frozen decoder: +0.000 (+0.000 to +0.000, 2 findings" in printed
    assert (tmp_path / "best" / "best_latents.png").stat().st_size > 10_000


def test_agreement_by_hand_and_its_limit_grows_with_studies(hand_made):
    records = hand_made(SIDED)
    train = train_patients(records.studies.values())
    examples = split_examples(records[2], records.studies, train).train
    values, lows = agreement(examples, records.meta.findings)
    n = sum(e.active for e in examples)
    other = [e for e in examples if "nodule" in e.study.findings]
    expected = (
        sum(e.active for e in other) / n
        + sum(not e.active and "nodule" not in e.study.findings for e in examples) / (len(examples) - n)
    ) / 2
    keys = records.meta.findings
    assert values[keys.index("nodule")] == pytest.approx(expected)
    assert values[keys.index("pacemaker")] == 1.0
    fewer = [e for e in examples if e.active][:6] + [e for e in examples if not e.active][:6]
    assert agreement(fewer, keys)[1][keys.index("pacemaker")] < lows[keys.index("pacemaker")] < 1
    assert not agreement(fewer, keys, least=7)[0].any()


def test_sets_without_interpretations_are_refused(hand_made):
    with pytest.raises(RecordError, match="interpret run"):
        best_latents({"text": hand_made(SIDED).folder})
