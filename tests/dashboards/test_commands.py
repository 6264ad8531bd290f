"""The three commands over a real record set, as a user types them."""

import json

from sae_lens_maira.cli import main


def test_write_check_and_dry_run(make_set, tmp_path, capsys):
    records = str(make_set().folder)
    for kind in ("export", "saedashboard", "api"):
        out = str(tmp_path / kind)
        words = ["--records", records, "--out", out, "--set-name", "res-16k", "--kind", kind, "--json"]
        assert main(["dashboards", "neuronpedia", *words]) == 0
        output = json.loads(capsys.readouterr().out)
        assert (output["neuronpedia_id"], output["latents"], output["issues"]) == ("maira-2/15-res-16k", 6, 0)
        assert main(["dashboards", "validate", "--folder", out]) == 0
        assert "0 errors" in capsys.readouterr().out
    assert main(["dashboards", "upload", "--records", records, "--set-name", "res-16k"]) == 0
    assert "Dry run: would send 5 latents" in capsys.readouterr().out


def test_an_error_ends_with_code_2_and_its_place(make_set, tmp_path, capsys):
    out = tmp_path / "api"
    main(["dashboards", "neuronpedia", "--records", str(make_set().folder), "--out", str(out),
          "--set-name", "res-16k", "--kind", "api"])  # fmt: skip
    path = out / "payloads.jsonl"
    path.write_text(path.read_text() + "{\n")
    assert main(["dashboards", "validate", "--folder", str(out)]) == 2
    output = capsys.readouterr()
    assert "payloads.jsonl:2: error: not valid JSON" in output.out
    assert "payloads.jsonl:0: error: the file is missing or was changed" in output.out
    assert "2 errors" in output.err


def test_credentialed_records_are_not_even_planned(make_set, capsys):
    records = str(make_set(licence="credentialed").folder)
    assert (
        main(["dashboards", "upload", "--records", records, "--set-name", "res-16k", "--confirm", "true"])
        == 2
    )
    assert "credentialed" in capsys.readouterr().err
