"""Latents of the workbench's SAE: found by number, name, finding or raised token, with their mean maps."""

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sae_lens_maira.errors import WorkbenchError
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.steering.positions import mask_grid

SHOWN = 50


class Catalogue:
    """Names, maps and tokens of the latents.

    Args:
        sae: The SAE; `sae.latent_names` holds names, if there are any.
        records: Its latent records; None if there are none.
    """

    def __init__(self, sae: MatryoshkaSAE, records: RecordSet | None) -> None:
        self.sae, self.records = sae, records
        self._rows: list[dict[str, Any]] | None = None
        self._lock = threading.Lock()

    @property
    def names(self) -> dict[int, str]:
        """Latent -> name."""
        return getattr(self.sae, "latent_names", {})

    def search(self, query: str) -> list[dict[str, Any]]:
        """Latents whose number, name, finding or raised tokens hold all words of a query.

        The latent of that very number comes first, then those that agree best with a finding, dead ones last.
        """
        words = query.lower().split()
        found = [row for row in self._all() if all(word in row["text"] for word in words)]
        found.sort(key=lambda row: str(row["latent"]) != query.strip())
        shown = [{key: value for key, value in row.items() if key != "text"} for row in found[:SHOWN]]
        return [{key: value for key, value in row.items() if value is not None} for row in shown]

    def check(self, number: int) -> None:
        """Raise WorkbenchError if there is no such latent."""
        if not 0 <= number < self.sae.cfg.d_sae:
            raise WorkbenchError(f"There is no latent {number}; the SAE has {self.sae.cfg.d_sae:,}.")

    def latent(self, number: int, view: str = "frontal") -> dict[str, Any]:
        """Name, raised tokens and mean map of one latent."""
        self.check(number)
        found: dict[str, Any] = {
            "latent": number,
            "name": self.names.get(number, ""),
            "tokens": [],
            "map": None,
        }
        if self.records is not None and number in self.records:
            record = self.records[number]
            found["tokens"] = [one.token for one in record.top_tokens[:8]]
            for one in record.maps:
                if one.view == view:
                    found["map"] = {"rows": one.rows, "cols": one.cols, "values": list(one.values)}
        return found

    def map(self, number: int, view: str, grid: tuple[int, int]) -> torch.Tensor | None:
        """(rows, cols) mean map of a latent on a grid of patches; None if the records have none.

        Raises:
            WorkbenchError: There are no records.
        """
        if self.records is None:
            raise WorkbenchError(
                "There are no latent records, so latents have no maps. Start with --records FOLDER."
            )
        one = self.latent(number, view)["map"]
        if one is None:
            return None
        return mask_grid(np.array(one["values"], dtype=np.float32).reshape(one["rows"], one["cols"]), grid)

    def _all(self) -> list[dict[str, Any]]:
        """Every latent once, with the text that is searched; read at the first search."""
        with self._lock:
            if self._rows is None:
                self._rows = self._read()
            return self._rows

    def _read(self) -> list[dict[str, Any]]:
        if self.records is None:
            numbers = sorted(self.names) or list(range(self.sae.cfg.d_sae))
            rows = [{"latent": j, "name": self.names.get(j, ""), "finding": "", "f1": None} for j in numbers]
        else:
            rows = [self._row(row) for row in self.records.table.to_dict("records")]
            rows.sort(key=lambda row: (row["status"] == "dead", -(row["f1"] or 0)))
            tokens = {
                one.latent: " ".join(token.token.strip() for token in one.top_tokens)
                for one in self.records.stream()
            }
            rows = [row | {"tokens": tokens.get(row["latent"], "")} for row in rows]
        searched = ("latent", "name", "finding", "tokens")
        for row in rows:
            text = " ".join(str(row.get(key, "")) for key in searched)
            row["text"] = f"{text} {row['finding'].replace('_', ' ')}".lower()
        return rows

    def _row(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        best = max(("text", "image"), key=lambda kind: finite(row.get(f"f1_{kind}")) or 0.0)
        latent = int(row["latent"])
        return {
            "latent": latent,
            "name": self.names.get(latent, ""),
            "finding": str(row.get(f"finding_{best}") or ""),
            "f1": finite(row.get(f"f1_{best}")),
            "status": str(row["status"]),
            "density": finite(row["density"]),
            "p99": finite(row["p99"]),
        }


def finite(value: Any) -> float | None:
    """A number, or None for anything else, infinities and NaN included."""
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def open_records(sae: Any, folder: Path | None) -> RecordSet | None:
    """The records of an SAE: those of a folder, or those that were loaded with it.

    Raises:
        RecordError: The folder holds no records, or records of another SAE.
    """
    if folder is None:
        held = getattr(sae, "records", None)
        return held if isinstance(held, RecordSet) else None
    records = RecordSet.open(folder)
    records.require_sae(sae)
    return records


__all__ = ["Catalogue", "finite", "open_records"]
