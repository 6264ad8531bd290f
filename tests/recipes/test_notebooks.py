"""Every notebook runs on the phantom from top to bottom, shows figures, and says what a result does not mean."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[2] / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook, kind):
    return ["".join(cell.source) for cell in notebook.cells if cell.cell_type == kind]


def test_all_are_there():
    """The glob finds exactly these notebooks, so that none is skipped silently."""
    assert [file.stem for file in NOTEBOOKS] == [
        "attribute_a_sentence",
        "compare_models_with_and_without_a_latent",
        "explore_a_latent",
        "nnsight_and_transformer_lens",
        "steer_a_report",
    ]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_the_interface_is_the_one_import(file):
    """At most three imports, all in the first cell; of this package only `sm`, whose lines for MAIRA-2 are shown."""
    notebook = nbformat.read(file, as_version=4)
    first, second, *rest = cells(notebook, "code")
    lines = [line for line in first.splitlines() if "import " in line]
    assert len(lines) <= 3
    assert [line for line in lines if "sae_lens_maira" in line] == ["import sae_lens_maira as sm"]
    assert not any("import " in cell for cell in (second, *rest))
    assert 'sm.load("phantom")  # sm.load("microsoft/maira-2", device="cuda")' in second
    assert 'sm.load_sae("phantom-image")  # sm.load_sae(' in second
    assert "sm.read_studies(" in second
    assert "## What this does not mean" in cells(notebook, "markdown")[-1]
    text = file.read_text(encoding="utf-8")
    assert "/root/" not in text
    assert "/home/" not in text


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_and_shows_figures(file, tmp_path):
    """No cell raises, and at least one figure is drawn."""
    notebook = nbformat.read(file, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=1000, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if file.stem == "nnsight_and_transformer_lens":
        shown = " ".join(output.get("data", {}).get("text/plain", "") for output in outputs)
        assert "'transformers': True, 'TransformerLens': True, 'nnsight': True" in shown
