"""Scratch folder from which a collection of latent records resumes.

    plan.json                  settings of the collection and number of ranks; other settings are refused
    counted-0.pt               statistics of rank 0 up to a unit
    contexts-0/                activations and texts of rank 0, with progress.json; one file per shard of latents holds
                               16 bytes (study, latent, place, value) per activation, see `contexts` for `place`

Rank 0 reads the parts of all ranks from the folder. At the end of the collection the folder is removed, including the
salt of the pseudonyms.
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from sae_lens_maira.distributed import Ranks
from sae_lens_maira.errors import ConfigError, RecordError
from sae_lens_maira.io import atomic_write
from sae_lens_maira.privacy import private_files

NAME = ".collecting"


class Workdir:
    """One process's view of the folder.

    Attributes:
        folder: Path of the folder.
        ranks: This process and the others.
        rank, world: Number of this process, and number of processes.
        salt: Salt of the pseudonyms, the same in all processes and after a restart.
    """

    def __init__(self, out: Path, plan: dict[str, Any], ranks: Ranks, salt: str | None) -> None:
        """Create the folder, or continue in it.

        Args:
            out: Folder of the record set.
            plan: Settings that determine the records, as JSON values.
            ranks: This process and the others.
            salt: Salt of the pseudonyms; rank 0 draws one if not given.

        Raises:
            ConfigError: There are several ranks and no rendezvous address.
            RecordError: The folder contains an unfinished collection with other settings.
        """
        if not ranks.connected:
            raise ConfigError(
                f"{ranks.size} ranks that share a collection need a rendezvous address, and there is none. Start "
                "them with torchrun or srun, or set MASTER_ADDR and MASTER_PORT to a host and free port of rank 0."
            )
        self.ranks, rank, world = ranks, ranks.rank, ranks.size
        self.folder, self.rank, self.world = out / NAME, rank, world
        with private_files(out):
            self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps(plan | {"world": world}))
        if rank == 0 and not path.exists():
            self.write(path, plan | {"salt": secrets.token_hex(16) if salt is None else salt})
        ranks.barrier("plan of the collection")
        there = json.loads(path.read_text(encoding="utf-8"))
        self.salt: str = there.pop("salt")
        differ = sorted(name for name in plan.keys() | there.keys() if plan.get(name) != there.get(name))
        if differ:
            raise RecordError(
                f"{self.folder} contains an unfinished collection of other inputs: {', '.join(differ)} differ. "
                "Use the same arguments and as many processes to continue it, or remove that folder to start again."
            )

    def counted(self, rank: int) -> Path:
        """File of a rank's statistics."""
        return self.folder / f"counted-{rank}.pt"

    def contexts(self, rank: int) -> Path:
        """Folder of a rank's activations and texts."""
        return self.folder / f"contexts-{rank}"

    def finish(self, what: str) -> None:
        """Mark a part as finished by this process."""
        (self.folder / f"{what}-{self.rank}.done").touch()

    def finished(self, what: str) -> bool:
        """Whether this process has finished a part, perhaps before a restart."""
        return (self.folder / f"{what}-{self.rank}.done").exists()

    def close(self) -> None:
        """Remove the folder when no rank reads from it; return when it is removed."""
        self.ranks.barrier("records read")
        if self.rank == 0:
            shutil.rmtree(self.folder)
        self.ranks.barrier("records written")

    @staticmethod
    def write(path: Path, values: dict[str, Any]) -> None:
        """Write JSON atomically."""
        atomic_write(path, json.dumps(values))
