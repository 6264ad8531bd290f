"""Read a set of latent records from disk, one record at a time.

    meta.json            version and origin of the records; written last, so a folder without it is incomplete
    latents.parquet      one row of numbers per latent, and where its record begins
    records-00000.jsonl  256 records per file, one per line; contexts are sparse and refer to texts.jsonl
    maps-00000.npz       mean activation maps of the same latents, overall and per finding
    texts.jsonl          tokens and views of every study, once per study
    studies.jsonl        the studies that contexts refer to, under pseudonyms

Interpretations are stored next to them in `interpretations.jsonl`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import pyarrow as pa

from sae_lens_maira.checksums import take_checksum
from sae_lens_maira.errors import RecordError
from sae_lens_maira.io import sha256_of
from sae_lens_maira.latents.contexts import TEXTS, StudyTexts, from_plain, record_from_plain
from sae_lens_maira.latents.maps import MapFile
from sae_lens_maira.latents.records import LatentRecord, RecordsMeta, StudyInfo

if TYPE_CHECKING:
    import torch
    from sae_lens import SAE

META, TABLE, STUDIES = "meta.json", "latents.parquet", "studies.jsonl"
FORMAT = 2
"""Version of the folder's format; a folder of another version is refused."""

T = TypeVar("T")


class RecordSet:
    """Records of one SAE at one hook point, opened with `RecordSet.open(folder)`.

    `records[latent]` reads one record, `records.stream()` reads all in ascending order, `len(records)` is their number.
    Every file is checked against its SHA-256 when it is first read.

    Attributes:
        folder: Folder of the record set.
        meta: Origin of the records.
        table: One row per latent: number, level, status, density, max, p99, then per modality the columns of `Firing`
            and the finding of highest F1; `file`, `offset` and `length` locate the record.
        fingerprint: SHA-256 of the whole set: of `meta.json`, which contains the hashes of all other files.
        texts: Tokens and views of the studies, by pseudonym.
    """

    def __init__(
        self, folder: Path, meta: RecordsMeta, table: pd.DataFrame, fingerprint: str, files: dict[str, str]
    ) -> None:
        self.folder, self.meta, self.table, self.fingerprint = folder, meta, table, fingerprint
        self._files, self._checked_files = files, set[str]()
        self._row = {int(latent): i for i, latent in enumerate(table["latent"])}
        self._map_file = lru_cache(2)(lambda name: MapFile(self._file(name)))

    @classmethod
    def open(cls, folder: Path | str) -> RecordSet:
        """Open a folder that `write_records` wrote.

        Raises:
            RecordError: The folder contains no records, or they are incomplete, damaged or of another version.
        """
        folder = Path(folder)
        path = folder / META
        if not path.is_file():
            raise RecordError(
                f"{folder} has no {META}: it contains no latent records, or writing them was interrupted. Give the "
                "folder that `sae-lens-maira latents --out` wrote, or run that command again."
            )
        content = path.read_bytes()
        plain = _plain(content, path, RecordsMeta)
        intact = take_checksum(plain)
        found = plain.pop("format", 1)
        if found != FORMAT:
            raise RecordError(
                f"{folder} contains latent records of format {found}; this version reads format {FORMAT}. Run "
                "`sae-lens-maira latents` again."
            )
        if not intact:
            raise RecordError(f"{path} has changed since it was written. Write the records again.")
        files = plain.pop("files", None)
        if not isinstance(files, dict) or TABLE not in files:
            raise RecordError(f"{path} lists no files; it is damaged. Write the records again.")
        records = cls(
            folder,
            from_plain(RecordsMeta, plain),
            pd.DataFrame({"latent": []}),
            hashlib.sha256(content).hexdigest(),
            files,
        )
        try:
            table = pd.read_parquet(records._file(TABLE))
        except (OSError, pa.ArrowException) as error:
            raise RecordError(
                f"{folder / TABLE} cannot be read ({error}); the records are incomplete or damaged. Write them again."
            ) from error
        return cls(folder, records.meta, table, records.fingerprint, files)

    def _file(self, name: str) -> Path:
        """Path of a file of the set, checked against its hash on first use."""
        path = self.folder / name
        if name not in self._checked_files:
            if name not in self._files:
                raise RecordError(
                    f"{path} is not a file of this record set; the files belong to different record sets. Write the "
                    "records again."
                )
            try:
                found = sha256_of(path)
            except OSError as error:
                raise RecordError(
                    f"{path} cannot be read ({error.strerror}); the record set is incomplete. Write the records again."
                ) from None
            if found != self._files[name]:
                raise RecordError(
                    f"{path} has changed since it was written; it is damaged, truncated or belongs to another "
                    "record set. Write the records again."
                )
            self._checked_files.add(name)
        return path

    def check(self) -> None:
        """Check every file of the set against its hash. Raises RecordError for the first that differs."""
        for name in self._files:
            self._file(name)

    @cached_property
    def studies(self) -> dict[str, StudyInfo]:
        """Studies by pseudonym. Raises RecordError if the file is missing or damaged."""
        path = self._file(STUDIES)
        entries = [_parsed(StudyInfo, line, path) for line in path.read_bytes().splitlines() if line]
        return {entry.study: entry for entry in entries}

    @cached_property
    def texts(self) -> StudyTexts:
        """Tokens and views of the studies. Raises RecordError if the file is missing or damaged."""
        return StudyTexts(self._file(TEXTS))

    @cached_property
    def p99(self) -> torch.Tensor:
        """(d_sae,) 99th percentile of the activations above zero of every latent; NaN for latents without a record."""
        import torch

        values = torch.full((self.meta.d_sae,), float("nan"))
        values[torch.from_numpy(self.table["latent"].to_numpy(dtype="int64", copy=True))] = torch.from_numpy(
            self.table["p99"].to_numpy(dtype="float32", copy=True)
        )
        return values

    def mean_maps(
        self,
        latents: Sequence[int] | None = None,
        finding: str | None = None,
        present: bool = True,
        view: str = "frontal",
    ) -> torch.Tensor:
        """Read the mean activation per patch, over all studies or over labelled studies with or without a finding.

        Args:
            latents: Indices of recorded latents; all of them if not given.
            finding: Key of a finding; maps per finding exist for the frontal view only.
            present: Whether to average over studies with the finding or over those without it.
            view: "frontal", "lateral" or "prior".

        Returns:
            (latents, patches) float32, patches row-major; 0 where a latent never fires.

        Raises:
            RecordError: A latent or finding is not in the set, or no such maps were recorded.
        """
        import torch

        wanted = list(self._row) if latents is None else [int(latent) for latent in latents]
        for latent in wanted:
            self._position(latent)
        if finding is not None and (finding not in self.meta.findings or view != "frontal"):
            raise RecordError(
                f"Maps of {finding!r} in the {view} view were requested; the record set has maps of the frontal view "
                f"for {', '.join(self.meta.findings) or 'no finding'}. Choose one of these."
            )
        at = {latent: i for i, latent in enumerate(wanted)}
        result: torch.Tensor | None = None
        files = self.table.iloc[[self._row[latent] for latent in wanted]].groupby("file", sort=True)["latent"]
        for name, group in files:
            own = [int(latent) for latent in group]
            file = self._map_file(maps_name(str(name)))
            if finding is None:
                means = file.view(own, view)
            else:
                means = file.finding(own, self.meta.findings.index(finding), present)
            if means is not None:
                if result is None:
                    result = torch.zeros(len(wanted), means.shape[1])
                result[[at[latent] for latent in own]] = torch.from_numpy(means)
        if result is None:
            raise RecordError(
                f"{self.folder} has no activation maps of the {view} view"
                f"{'' if finding is None else f' for {finding}'}; collect the records over rows of image patches."
            )
        return result

    @cached_property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of the activation maps; (0, 0) if no image was read."""
        for name in self.table["file"].unique():
            shape = self._map_file(maps_name(str(name))).shape
            if shape is not None:
                return shape
        return 0, 0

    def require_sae(self, sae: SAE[Any]) -> None:
        """Raise RecordError unless these records belong to `sae`, by its weights and its hook point.

        Weights of lower precision than float32 are rounded; then only the number of latents and the hook point are
        compared.
        """
        import torch

        from sae_lens_maira.sae import fingerprint

        ours, theirs = self.meta, (int(sae.cfg.d_sae), str(sae.cfg.metadata.hook_name))
        if (ours.d_sae, ours.hook_name) != theirs:
            raise RecordError(
                f"{self.folder} has records of {ours.d_sae} latents at {ours.hook_name}, but the SAE has {theirs[0]} "
                f"at {theirs[1]}. Give the records of this SAE."
            )
        exact = sae.W_dec.dtype == torch.float32 and ours.sae_fingerprint
        if exact and ours.sae_fingerprint != fingerprint(sae):
            raise RecordError(
                f"{self.folder} has records of an SAE with other weights ({ours.sae}). Give the records of this SAE, "
                "or write them with `sae-lens-maira latents`."
            )

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return (
            f"RecordSet({str(self.folder)!r}: {len(self):,} latents at {self.meta.hook_name}, "
            f"{self.meta.studies:,} studies)"
        )

    def _repr_html_(self) -> str:
        """Table of the ten latents that agree best with a finding, for notebooks."""
        best = self.table.assign(f1=self.table[["f1_text", "f1_image"]].max(axis=1)).nlargest(10, "f1")
        columns = [
            "latent",
            "status",
            "density",
            "p99",
            "finding_text",
            "f1_text",
            "finding_image",
            "f1_image",
        ]
        shown = best[columns].to_html(index=False, escape=True, na_rep="", float_format=lambda x: f"{x:.3g}")
        return f"<p>{escape(repr(self))}</p>{shown}"

    def __contains__(self, latent: object) -> bool:
        return latent in self._row

    def __iter__(self) -> Iterator[LatentRecord]:
        return self.stream()

    def _position(self, latent: int) -> int:
        if latent not in self._row:
            numbers = self.table["latent"]
            span = f"{numbers.min()} to {numbers.max()}" if len(self) else "none"
            raise RecordError(
                f"Latent {latent} is not in the record set, which has {len(self)} latents ({span}). Choose one of "
                "these, or write records that include it."
            )
        return self._row[latent]

    def __getitem__(self, latent: int) -> LatentRecord:
        """Read the record of one latent. Raises RecordError if there is none or it is damaged."""
        row = self.table.iloc[self._position(latent)]
        path = self._file(str(row["file"]))
        with path.open("rb") as file:
            file.seek(int(row["offset"]))
            line = file.read(int(row["length"]))
        return self._read(line, latent, path)

    def stream(self) -> Iterator[LatentRecord]:
        """Yield all records in ascending order, with one in memory at a time.

        Raises:
            RecordError: A file is missing, truncated or damaged.
        """
        for name, group in self.table.groupby("file", sort=True):
            path = self._file(str(name))
            with path.open("rb") as file:
                for latent, length in zip(group["latent"], group["length"], strict=True):
                    yield self._read(file.read(int(length)), int(latent), path)

    def _read(self, line: bytes, latent: int, path: Path) -> LatentRecord:
        maps = self._map_file(maps_name(path.name)).of(latent)
        return record_from_plain(_plain(line, path, LatentRecord), self.texts, maps)


def maps_name(records_name: str) -> str:
    """Name of the file with the mean maps of the latents of a record file."""
    return records_name.replace("records-", "maps-").replace(".jsonl", ".npz")


def _parsed(kind: type[T], line: bytes, path: Path) -> T:
    return from_plain(kind, _plain(line, path, kind))


def _plain(line: bytes, path: Path, kind: type) -> dict[str, Any]:
    try:
        plain = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RecordError(
            f"{path} is cut off or damaged: a {kind.__name__} of {len(line)} bytes is not JSON "
            f"({type(error).__name__}: {error}). Write the records again."
        ) from None
    if not isinstance(plain, dict):
        raise RecordError(
            f"{path} contains a {type(plain).__name__} where a {kind.__name__} was expected; it is damaged. Write the "
            "records again."
        )
    return plain
