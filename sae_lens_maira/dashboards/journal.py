"""What an upload has done, on disk: one JSON line a step, flushed before the next request leaves.

    {"upload": where to}  {"steps": {"source-set": "asked"}}  {"features": {"7": digest}}

It resumes an upload that was cut, and refuses a latent that changed since it was sent. It knows nothing about servers.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from sae_lens_maira.dashboards.saedashboard import line
from sae_lens_maira.errors import RecordError


class Journal:
    """What an upload has done, a JSON line each, flushed to disk before the next request.

    The first line says where to; another destination needs another journal.

    Raises:
        RecordError: the file belongs to another upload, or is damaged.
    """

    def __init__(self, path: Path, upload: dict[str, str]) -> None:
        self.path, self.upload = path, upload
        self.features: dict[int, str] = {}
        self.steps: dict[str, str] = {}
        if not path.exists():
            return
        whole = path.read_text(encoding="utf-8")
        lines = whole[: whole.rfind("\n") + 1].splitlines()  # a line that was cut off was never acted on
        for number, text in enumerate(lines, 1):
            try:
                entry = json.loads(text)
                if number == 1 and entry["upload"] != upload:
                    raise RecordError(
                        f"{path} is the journal of an upload to {entry['upload']}, this one goes to {upload}. Give "
                        "another journal."
                    )
                self.features |= {int(index): digest for index, digest in entry.get("features", {}).items()}
                self.steps |= entry.get("steps", {})
            except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
                raise RecordError(
                    f"{path}, line {number} is damaged ({error}); what was sent is not known. Restore the file, or "
                    "upload under another source set."
                ) from None
        if whole and not whole.endswith("\n"):
            self._cut = len(whole[: whole.rfind("\n") + 1].encode())

    def start(self) -> None:
        """Make the file, or cut off a half-written last line."""
        if hasattr(self, "_cut"):
            os.truncate(self.path, self._cut)
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write({"upload": self.upload})

    def holds(self, feature: dict[str, Any]) -> bool:
        """Whether a feature was sent before.

        Raises:
            RecordError: another version of it was.
        """
        before = self.features.get(feature["index"])
        if before is not None and before != _digest(feature):
            raise RecordError(
                f"Latent {feature['index']} was sent before and has changed since; the site keeps the first version. "
                "Upload under another source set with another journal."
            )
        return before is not None

    def sent(self, features: list[dict[str, Any]]) -> None:
        """Note features that the server has taken."""
        digests = {str(feature["index"]): _digest(feature) for feature in features}
        self._write({"features": digests})
        self.features |= {int(index): digest for index, digest in digests.items()}

    def step(self, name: str, state: str) -> None:
        """Note that a step was "asked" or is "done"."""
        self._write({"steps": {name: state}})
        self.steps[name] = state

    def _write(self, entry: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _digest(feature: dict[str, Any]) -> str:
    return hashlib.sha256(line(feature).encode()).hexdigest()[:16]
