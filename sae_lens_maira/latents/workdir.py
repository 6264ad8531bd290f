"""The folder of a collection under way: what a killed process continues from, and where processes meet.

    plan.json                  what is collected, by how many processes; another plan is refused
    counted-0.pt               statistics of rank 0 up to some unit
    contexts-0/                hits and texts of rank 0, with progress.json

Processes need no network between them: each leaves a file when it is done and waits for the others' files. The
folder vanishes with the end of the collection, and the salt of the pseudonyms with it. It knows nothing about what is
counted.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import atomic_write

NAME = ".collecting"


class Workdir:
    """One process's view of the folder.

    Attributes:
        folder: where it lies.
        rank, world: this process, and how many there are.
        salt: of the pseudonyms, the same in all processes and after a restart.
    """

    def __init__(self, out: Path, plan: dict[str, Any], rank: int, world: int, salt: str | None) -> None:
        """Make the folder or continue in it.

        Args:
            out: folder of the record set.
            plan: what decides the records, as JSON values.
            rank: this process, from 0.
            world: how many there are.
            salt: given, or drawn once by rank 0.

        Raises:
            RecordError: the folder holds an unfinished collection of another plan.
        """
        if not 0 <= rank < world:
            raise RecordError(f"Rank {rank} of {world} does not exist; ranks count from 0.")
        self.folder, self.rank, self.world = out / NAME, rank, world
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "plan.json"
        plan = json.loads(json.dumps(plan | {"world": world}))
        if rank == 0 and not path.exists():
            self.write(path, plan | {"salt": secrets.token_hex(16) if salt is None else salt})
        self.wait(path.exists)
        there = json.loads(path.read_text(encoding="utf-8"))
        self.salt: str = there.pop("salt")
        differ = sorted(name for name in plan.keys() | there.keys() if plan.get(name) != there.get(name))
        if differ:
            raise RecordError(
                f"{self.folder} holds an unfinished collection whose {', '.join(differ)} differ from what was asked. "
                "Use the same arguments and as many processes to continue it, or remove that folder to start anew."
            )

    def counted(self, rank: int) -> Path:
        """File of a rank's statistics."""
        return self.folder / f"counted-{rank}.pt"

    def contexts(self, rank: int) -> Path:
        """Folder of a rank's hits and texts."""
        return self.folder / f"contexts-{rank}"

    def finish(self, what: str) -> None:
        """Say that this process is done with a part."""
        (self.folder / f"{what}-{self.rank}.done").touch()

    def finished(self, what: str) -> bool:
        """Whether this process was done with a part, perhaps before a restart."""
        return (self.folder / f"{what}-{self.rank}.done").exists()

    def wait_for_all(self, what: str) -> None:
        """Wait until every process is done with a part."""
        paths = [self.folder / f"{what}-{rank}.done" for rank in range(self.world)]
        # Rank 0 may have gone on and removed the folder before this process looked again.
        self.wait(lambda: all(path.exists() for path in paths) or not self.folder.exists())

    def close(self) -> None:
        """Rank 0 removes the folder once no process reads from it any more; the others wait until it has."""
        self.finish("read")
        if self.rank == 0:
            self.wait_for_all("read")
            shutil.rmtree(self.folder)
        self.wait(lambda: not self.folder.exists())

    @staticmethod
    def wait(until: Callable[[], bool]) -> None:
        """Look five times a second."""
        while not until():
            time.sleep(0.2)

    @staticmethod
    def write(path: Path, values: dict[str, Any]) -> None:
        """Write JSON in one piece or not at all."""
        atomic_write(path, json.dumps(values))


def fingerprint_of_ids(ids: list[str]) -> str:
    """SHA-256 of a list of ids."""
    return hashlib.sha256("\0".join(ids).encode()).hexdigest()
