"""docs/hooks.md: every line of its tables and blocks runs, and its list of points is the table's."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAEConfig, StandardSAE, StandardSAEConfig

import sae_lens_maira.hooks as hooks
from sae_lens_maira.activations import RowSettings
from sae_lens_maira.hooks import SPECS
from sae_lens_maira.maira2 import Maira2

pytestmark = pytest.mark.filterwarnings("ignore:All samples in the training dataset:UserWarning")

TEXT = (Path(__file__).parents[2] / "docs" / "hooks.md").read_text(encoding="utf-8")
NAME = "blocks.1.hook_resid_post"


def tables() -> list[list[list[str]]]:
    """The page's tables: rows of cells."""
    found: list[list[list[str]]] = [[]]
    for line in TEXT.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        elif found[-1]:
            found.append([])
    return [table for table in found if table]


def lines(table: list[list[str]]) -> list[tuple[str, str]]:
    """(operation and library, code) of each cell that is code and nothing else."""
    head, _, *rows = table
    return [
        (f"{row[0]}: {head[column]}", match.group(1))
        for row in rows
        for column, cell in enumerate(row)
        if column and (match := re.fullmatch(r"`([^`]+)`", cell))
    ]


@pytest.fixture(scope="module")
def space(eager: Maira2, studies: Any) -> dict[str, Any]:
    sae = StandardSAE(StandardSAEConfig(d_in=64, d_sae=128))
    sae.cfg.metadata.hook_name = NAME
    hooked = hooks.HookedMaira2(eager)
    space: dict[str, Any] = {name: getattr(hooks, name) for name in hooks.__all__}
    return space | {
        "RowSettings": RowSettings,
        "maira2": eager,
        "study": studies[0],
        "studies": studies,
        "encoding": eager.processor.encode(studies[0]),
        "name": NAME,
        "acts": f"{NAME}.hook_sae_acts_post",
        "edit": lambda value, hook: value * 2,
        "sae": sae,
        "sae_config": BatchTopKTrainingSAEConfig(d_in=64, d_sae=64, k=4),
        "resid": hooked.run_with_cache(studies[0], names_filter=NAME)[1][NAME].detach(),
        "vector": torch.randn(64),
    }


def test_every_line_of_the_tables_runs(space: dict[str, Any]) -> None:
    operations, sae_lens, points = tables()
    code = lines(operations) + lines(sae_lens)
    assert len(code) >= 45
    assert {operation.split(": ")[1].split(" ")[0] for operation, _ in code} == {
        "HookedMaira2",
        "TransformerBridge",
        "nnsight",
        "SAELens",
    }
    for operation, line in code:
        try:
            exec(compile(line, operation, "exec"), space)
        except Exception as error:
            raise AssertionError(f"{operation}: {line}") from error
    assert len(points) == len(SPECS) + 2


def test_the_traces_run(space: dict[str, Any], tmp_path: Path) -> None:
    """nnsight reads its caller's source, so the block is run from a file."""
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    script = tmp_path / "traces.py"
    script.write_text(block, encoding="utf-8")
    result = runpy.run_path(
        str(script), init_globals={**space, "traced": hooks.Maira2NNsight(space["maira2"])}
    )
    assert result["early"].shape[-1] == 64
    assert result["gradient"].abs().sum() > 0


def test_the_list_of_points_is_the_table() -> None:
    rows = tables()[2][2:]
    assert [row[0].strip("`") for row in rows] == [spec.name for spec in SPECS]
    for row, spec in zip(rows, SPECS, strict=True):
        module = f"`{spec.module}`" + (" (input)" if spec.tap == "input" else "")
        assert row[1:] == [spec.shape, module, spec.fires, spec.meaning]
