"""Model, SAE and studies of one workbench, and what the page can ask of them.

Every method runs on the one worker thread of the server; nothing here knows HTTP. Films that were dropped on the page
stay in memory and count as credentialed.
"""

import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import torch

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.counterfactual import counterfactual
from sae_lens_maira.attribution.page import sentence_data
from sae_lens_maira.attribution.sentences import split_sentences
from sae_lens_maira.errors import ImageError, RecordError, WorkbenchError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.interface import finding_reader
from sae_lens_maira.latents import RecordSet
from sae_lens_maira.maira2.images import read_grey
from sae_lens_maira.privacy import is_shareable
from sae_lens_maira.sae import MatryoshkaSAE
from sae_lens_maira.stats import perplexity
from sae_lens_maira.steering import save_interventions, steering
from sae_lens_maira.steering.positions import VIEWS, mask_grid
from sae_lens_maira.studies import Licence, Study
from sae_lens_maira.studies.words import compare_words
from sae_lens_maira.workbench.spec import RunSpec, python_code, quoted

SHOWN = 50
CACHED_REPORTS = 64
UPLOADS = 8

Event = Callable[[dict[str, Any]], None]
Stopped = Callable[[], bool]


class Cancelled(Exception):
    """The page that asked for a run has gone, or cancelled it."""


@dataclass
class Session:
    """What one workbench works on.

    Attributes:
        hooked: The model, with its processor.
        sae: The SAE, with hook point; `sae.p99` and `sae.latent_names` as `sae_lens_maira.load_sae` sets them.
        studies: Study id -> study.
        opening: Python expressions that open "model" and "sae", and "studies" as a list, for the exported code.
        records: Latent records of the SAE; None if there are none.
        allow_credentialed: Let exports hold texts of studies that are not public or synthetic.
    """

    hooked: HookedMaira2
    sae: MatryoshkaSAE
    studies: dict[str, Study]
    opening: Mapping[str, str]
    records: RecordSet | None = None
    allow_credentialed: bool = False
    _reports: dict[tuple[Any, ...], str] = field(default_factory=dict, repr=False)
    _uploads: list[str] = field(default_factory=list, repr=False)
    _tokens: dict[int, str] | None = field(default=None, repr=False)

    @property
    def _processor(self) -> Any:
        return self.hooked.processor

    @property
    def _names(self) -> dict[int, str]:
        return getattr(self.sae, "latent_names", {})

    def overview(self) -> dict[str, Any]:
        """Model, SAE and studies, for the page's first screen."""
        return {
            "hook": self.sae.cfg.metadata.hook_name,
            "d_sae": self.sae.cfg.d_sae,
            "p99": getattr(self.sae, "p99", None) is not None,
            "studies": [self.about(name) for name in self.studies],
        }

    def about(self, name: str) -> dict[str, Any]:
        """Sections, views and licence of one study."""
        study = self._study(name)
        licence = getattr(study.licence, "value", study.licence)
        return {
            "id": name,
            "licence": str(licence),
            "shareable": is_shareable(licence),
            "views": [view for view, image in zip(VIEWS, _images(study), strict=True) if image is not None],
            "indication": study.indication,
            "prior_report": study.prior_report,
            "upload": name in self._uploads,
        }

    def film(self, name: str, view: str) -> bytes:
        """One image as the model sees it (cropped, contrast stretched), as PNG."""
        image = dict(zip(VIEWS, _images(self._study(name)), strict=True)).get(view)
        if image is None:
            raise WorkbenchError(f"Study {name} has no {view} image.")
        from PIL import Image

        from sae_lens_maira.maira2.images import read_stretched

        square = self._processor.recipe.crop_square(Image.fromarray(read_stretched(image)))
        buffer = io.BytesIO()
        square.save(buffer, "PNG")
        return buffer.getvalue()

    def grids(self, name: str) -> dict[str, list[int]]:
        """View -> [rows, columns] of patches."""
        encoding = self._processor.encode([self._study(name)])
        found = {}
        for view, code in VIEWS.items():
            here = encoding.view[0] == code
            if bool(here.any()):
                found[view] = [
                    int(encoding.patch_row[0][here].max()) + 1,
                    int(encoding.patch_col[0][here].max()) + 1,
                ]
        return found

    def upload(self, content: bytes, indication: str = "") -> str:
        """Add a film that was dropped on the page; its study is treated as credentialed.

        Args:
            content: A picture or DICOM file. It is decoded in memory.
            indication: Why the image was taken.

        Returns:
            Id of the new study.

        Raises:
            ImageError: Not an image, or far too large.
        """
        while len(self._uploads) >= UPLOADS:
            del self.studies[self._uploads.pop(0)]
        number = 1 + max((int(name.split("-")[1]) for name in self._uploads), default=0)
        name = f"upload-{number}"
        self.studies[name] = Study(
            study_id=name,
            patient_id=name,
            frontal=_decoded_in_memory(content),
            indication=indication.strip() or None,
            licence=Licence.CREDENTIALED,
        )
        self._uploads.append(name)
        return name

    def search(self, query: str) -> list[dict[str, Any]]:
        """Latents by number, name, finding or raised token; the most frequent first.

        Args:
            query: Words that must all occur; "" lists the latents with the best agreement.
        """
        words = query.lower().split()
        if self.records is None:
            numbers = sorted(self._names) or list(range(self.sae.cfg.d_sae))
            rows = [{"latent": j, "name": self._names.get(j, ""), "finding": "", "f1": None} for j in numbers]
        else:
            rows = [self._row(row) for row in self.records.table.to_dict("records")]
            rows.sort(key=lambda row: (row["status"] == "dead", -(row["f1"] or 0)))
        if words:
            tokens = self._raised_tokens()
            rows = [row | {"tokens": tokens.get(row["latent"], "")} for row in rows]
        found = [row for row in rows if all(word in _searched(row) for word in words)]
        return [{key: value for key, value in row.items() if value is not None} for row in found[:SHOWN]]

    def _raised_tokens(self) -> dict[int, str]:
        """Latent -> the output tokens that it raises most, in lower case; read once, from the whole record set."""
        if self._tokens is None:
            stream = () if self.records is None else self.records.stream()
            self._tokens = {
                one.latent: " ".join(token.token.strip().lower() for token in one.top_tokens)
                for one in stream
            }
        return self._tokens

    def _row(self, row: Mapping[Any, Any]) -> dict[str, Any]:
        best = max(("text", "image"), key=lambda kind: _finite(row.get(f"f1_{kind}")) or 0.0)
        latent = int(row["latent"])
        return {
            "latent": latent,
            "name": self._names.get(latent, ""),
            "finding": str(row.get(f"finding_{best}") or ""),
            "f1": _finite(row.get(f"f1_{best}")),
            "status": str(row["status"]),
            "density": _finite(row["density"]),
            "p99": _finite(row["p99"]),
        }

    def latent(self, number: int, view: str = "frontal") -> dict[str, Any]:
        """Name, raised tokens and mean map of one latent."""
        if not 0 <= number < self.sae.cfg.d_sae:
            raise WorkbenchError(f"There is no latent {number}; the SAE has {self.sae.cfg.d_sae:,}.")
        found: dict[str, Any] = {
            "latent": number,
            "name": self._names.get(number, ""),
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

    def write(
        self, spec: RunSpec, emit: Event = lambda event: None, stopped: Stopped = lambda: False
    ) -> dict[str, Any]:
        """Write the report of a run, streaming it, and compare it with the unsteered one.

        Args:
            spec: The run.
            emit: Called with {"event": "text", "side": "before" or "after", "text": all text so far}.
            stopped: Asked before every token; True ends the run.

        Returns:
            "before" and "after" (None without interventions), each with text, sentences, labels and perplexity;
            "pieces" of both texts, "effect", "labels" that changed.

        Raises:
            WorkbenchError: An unknown study or latent, or no p99.
            Cancelled: `stopped` returned True.
        """
        study = self._version(spec)
        items = spec.interventions(self._maps(spec))
        for latent, _ in spec.sliders:
            self.latent(latent)
        plain = RunSpec(spec.study, without=spec.without, max_new_tokens=spec.max_new_tokens)
        before = self._side(study, plain, [], "before", emit, stopped)
        result: dict[str, Any] = {
            "spec": spec.plain(),
            "before": before,
            "after": None,
            "about": self.about(spec.study),
        }
        if items:
            after = self._side(study, spec, items, "after", emit, stopped)
            left, right = compare_words(before["text"], after["text"])
            result |= {
                "after": after,
                "pieces": [[[piece.text, piece.marked] for piece in side] for side in (left, right)],
            }
        return result

    def explain(self, spec: RunSpec, text: str, sentence: int) -> dict[str, Any]:
        """Attribute one sentence of a report that this model wrote, with its check."""
        found = attribute(
            self.hooked, self._version(spec), self.sae, sentence, report=text, names=dict(self._names),
            max_new_tokens=spec.max_new_tokens,
        )  # fmt: skip
        return sentence_data(found, found.sentences[0], None)

    def export(self, spec: RunSpec, history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Files that reproduce a run: {"run.py": ..., "intervention.json": ..., "session.json": ...}.

        Texts of studies that are not public or synthetic are left out of the session unless the workbench was started
        with `allow_credentialed`; images are in none of the files.
        """
        self._study(spec.study)
        items = spec.interventions(self._maps(spec))
        files = {"run.py": python_code(spec, self._open(spec.study), bool(items))}
        if items:
            with NamedTemporaryFile(suffix=".json") as file:
                save_interventions(
                    file.name,
                    items,
                    self.sae,
                    str(self.sae.cfg.metadata.hook_name),
                    getattr(self.sae, "p99", None),
                )
                files["intervention.json"] = Path(file.name).read_text(encoding="utf-8")
        kept, left_out = [], 0
        for entry in history:
            run = RunSpec.of(entry.get("spec"))
            licence = self.studies[run.study].licence if run.study in self.studies else None
            allowed = self.allow_credentialed or is_shareable(getattr(licence, "value", licence))
            texts = {side: str(entry[side]) for side in ("before", "after") if entry.get(side)}
            left_out += bool(texts) and not allowed
            kept.append({"spec": run.plain()} | (texts if allowed else {}))
        files["session.json"] = json.dumps(
            {"format": "workbench-1", "spec": spec.plain(), "history": kept}, indent=1
        )
        return {"files": files, "texts_left_out": left_out}

    def _study(self, name: str) -> Study:
        if name not in self.studies:
            raise WorkbenchError(f"There is no study {name!r} in this workbench. Choose one of the list.")
        return self.studies[name]

    def _version(self, spec: RunSpec) -> Study:
        study = self._study(spec.study)
        held = {"prior_image": "prior_frontal"}
        parts: dict[str, Any] = {
            part: None for part in spec.without if getattr(study, held.get(part, part)) is not None
        }
        return counterfactual(study, **parts) if parts else study

    def _open(self, name: str) -> dict[str, str]:
        if name in self._uploads:
            source = 'sm.Study(study_id="1", patient_id="1", frontal="FILE OF YOUR IMAGE")'
        else:
            source = f"next(s for s in {self.opening['studies']} if s.study_id == {quoted(name)})"
        return {"model": self.opening["model"], "sae": self.opening["sae"], "study": source}

    def _maps(self, spec: RunSpec) -> dict[int, torch.Tensor]:
        if spec.place != "map":
            return {}
        if self.records is None:
            raise WorkbenchError(
                "There are no latent records, so latents have no maps. Start with --records FOLDER."
            )
        shape = self.grids(spec.study).get(spec.view)
        if shape is None:
            raise WorkbenchError(f"Study {spec.study} has no {spec.view} image.")
        found = {}
        for latent, _ in spec.sliders:
            one = self.latent(latent, spec.view)["map"]
            if one is not None:
                grid = np.array(one["values"], dtype=np.float32).reshape(one["rows"], one["cols"])
                found[latent] = mask_grid(grid, (shape[0], shape[1]))
        return found

    def _side(
        self, study: Study, spec: RunSpec, items: Sequence[Any], side: str, emit: Event, stopped: Stopped
    ) -> dict[str, Any]:
        key = (spec.study, spec.without, spec.max_new_tokens, id(self.studies[spec.study]))
        effect = None
        prompt = self.hooked.encode(study, report=None)
        if not items and key in self._reports:
            text = self._reports[key]
        else:
            watcher = _Watcher(self._processor, side, emit, stopped)
            budget = {} if spec.max_new_tokens is None else {"max_new_tokens": spec.max_new_tokens}
            keywords: dict[str, Any] = {"streamer": watcher, "stopping_criteria": [watcher.stop], **budget}
            if not items:
                (report,) = self.hooked.generate(prompt, return_type="reports", **keywords)
            else:
                units = getattr(self.sae, "p99", None)
                if units is None:
                    raise WorkbenchError(
                        "Strengths are in units of p99, and this SAE records none. Start with --records FOLDER."
                    )
                hook = str(self.sae.cfg.metadata.hook_name)
                with steering(
                    self.hooked, self.sae, hook, items, prompt, units, control_seed=spec.control_seed
                ) as run:
                    (report,) = run.reports(self._processor, **keywords)
                    effect = {"changed": run.effect.changed, "ratio": run.effect.ratio}
            if stopped():
                raise Cancelled
            text = report.text
            if not items:
                self._reports[key] = text
                while len(self._reports) > CACHED_REPORTS:
                    del self._reports[next(iter(self._reports))]
        emit({"event": "text", "side": side, "text": text})
        reader = finding_reader([study] if study.truth is not None else [self._study(spec.study)])
        return {
            "text": text,
            "sentences": [list(span) for span in split_sentences(text)],
            "labels": sorted(reader.read(text)),
            "reader": reader.source,
            "perplexity": self._perplexity(study, text),
            "effect": effect,
        }

    @torch.no_grad()
    def _perplexity(self, study: Study, text: str) -> float | None:
        """Perplexity of a report under the unsteered model; None for an empty report."""
        if not text.strip():
            return None
        encoding = self.hooked.encode(study, report=text)
        ids = encoding.input_ids[0]
        start = int((encoding.roles[0] == int(_report_role())).nonzero()[0, 0])
        logits = (
            self.hooked.model(**encoding.model_inputs(), use_cache=False).logits[0, start - 1 : -1].float()
        )
        logp = logits.log_softmax(-1).gather(-1, ids[start:, None].to(logits.device))[:, 0]
        return float(perplexity(logp, torch.ones_like(logp, dtype=torch.bool)))


class _Watcher:
    """A streamer of transformers' `generate` that emits the text so far, and a criterion that stops it."""

    def __init__(self, processor: Any, side: str, emit: Event, stopped: Stopped) -> None:
        self._processor, self._side, self._emit, self._stopped = processor, side, emit, stopped
        self._ids: list[int] = []
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt first, then one token at a time."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self._ids.extend(value.flatten().tolist())
        text = self._processor.decode_report(torch.tensor(self._ids)).text
        self._emit({"event": "text", "side": self._side, "text": text})

    def end(self) -> None:
        """Nothing is left to emit: the finished report follows."""

    def stop(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """(B,) whether generation ends now."""
        return torch.full((input_ids.shape[0],), self._stopped(), device=input_ids.device)


def _report_role() -> Any:
    from sae_lens_maira.maira2 import TokenRole

    return TokenRole.REPORT


def _images(study: Study) -> tuple[Any, Any, Any]:
    return study.frontal, study.lateral, study.prior_frontal


def _searched(row: Mapping[str, Any]) -> str:
    parts = (
        row["latent"],
        row["name"],
        row["finding"],
        row["finding"].replace("_", " "),
        row.get("tokens", ""),
    )
    return " ".join(map(str, parts)).lower()


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and np.isfinite(value) else None


def _decoded_in_memory(content: bytes) -> np.ndarray:
    """Decode a picture or DICOM file without a file on a disk, where the system has files in memory."""
    if not hasattr(os, "memfd_create"):
        from PIL import Image, UnidentifiedImageError

        try:
            return read_grey(Image.open(io.BytesIO(content)))
        except (UnidentifiedImageError, OSError) as error:
            raise ImageError(
                f"The dropped file is not a picture ({error}). On this system DICOM files are opened from a table: "
                "start with --table FILE."
            ) from error
    descriptor = os.memfd_create("upload")
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(content)
        return read_grey(Path(f"/proc/self/fd/{descriptor}"))
    except ImageError as error:
        raise ImageError(str(error).replace(f"/proc/self/fd/{descriptor}", "The dropped file")) from None
    finally:
        os.close(descriptor)


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


__all__ = ["Cancelled", "RecordError", "Session", "open_records"]
