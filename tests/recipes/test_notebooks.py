"""Every notebook runs on the phantom from top to bottom, shows figures, and says what a result does not mean."""

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

FOLDER = Path(__file__).parents[2] / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """One working folder, so that the phantom's SAE is trained by the first notebook only."""
    return tmp_path_factory.mktemp("notebooks")


def cells(notebook, kind):
    return ["".join(cell.source) for cell in notebook.cells if cell.cell_type == kind]


def test_all_four_are_there():
    assert [file.stem for file in NOTEBOOKS] == [
        "compare_models_with_and_without_a_latent",
        "explore_a_latent",
        "nnsight_and_transformer_lens",
        "steer_a_report",
    ]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_one_line_names_the_model(file):
    """The material is opened once, with MAIRA-2's line beside it, and nothing else names a model or a path."""
    notebook = nbformat.read(file, as_version=4)
    code = "\n".join(cells(notebook, "code"))
    assert code.count('open_material("phantom")') == 1
    assert code.count('open_material("microsoft/maira-2", sae="microsoft/maira-2-sae"') == 1
    assert "load_phantom" not in code
    assert "generate_studies" not in code
    assert "## What this does not mean" in cells(notebook, "markdown")[-1]
    text = file.read_text(encoding="utf-8")
    assert "/root/" not in text
    assert "/home/" not in text


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_runs_and_shows_figures(file, shared):
    """No cell raises, and at least one figure is drawn."""
    notebook = nbformat.read(file, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(shared)}}
    )
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    if file.stem == "nnsight_and_transformer_lens":
        shown = " ".join(output.get("data", {}).get("text/plain", "") for output in outputs)
        assert "'transformers': True, 'TransformerLens': True, 'nnsight': True" in shown
