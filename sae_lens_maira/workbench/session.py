"""Model, SAE and studies of one workbench, and the runs that the page can ask for.

Runs hold the model for themselves (`HookedMaira2.exclusive`), so a notebook's own calls wait for them. They stop before
the next forward pass when the page has gone.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sae_lens_maira.attribution import attribute
from sae_lens_maira.attribution.counterfactual import counterfactual
from sae_lens_maira.attribution.page import sentence_data
from sae_lens_maira.attribution.sentences import split_sentences
from sae_lens_maira.errors import WorkbenchError
from sae_lens_maira.hooks import HookedMaira2
from sae_lens_maira.interface import finding_reader
from sae_lens_maira.maira2 import MAX_NEW_TOKENS, Maira2Encoding
from sae_lens_maira.stats import perplexity
from sae_lens_maira.steering import Intervention, save_interventions, steering
from sae_lens_maira.studies import Study
from sae_lens_maira.studies.words import compare_words
from sae_lens_maira.workbench.catalogue import Catalogue
from sae_lens_maira.workbench.export import Opening, python_code, session_text
from sae_lens_maira.workbench.shelf import Shelf
from sae_lens_maira.workbench.spec import RunSpec

CACHED_REPORTS = 64
HELD = {"prior_image": "prior_frontal"}
"""Names of a study's fields that differ from those of `spec.PARTS`."""

Event = Callable[[dict[str, Any]], None]
Stopped = Callable[[], bool]


class Cancelled(Exception):
    """The page that started a run was closed, or cancelled it."""


@dataclass
class Session:
    """What one workbench works on.

    Attributes:
        hooked: The model, with its processor.
        shelf: The studies.
        catalogue: The SAE and its latents.
        opening: How model, SAE and studies are opened, for the exported code.
        allow_credentialed: Let exports hold texts of studies that are not public or synthetic.
    """

    hooked: HookedMaira2
    shelf: Shelf
    catalogue: Catalogue
    opening: Opening
    allow_credentialed: bool = False
    _unsteered: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def _sae(self) -> Any:
        return self.catalogue.sae

    @property
    def _hook_name(self) -> str:
        return str(self._sae.cfg.metadata.hook_name)

    def overview(self) -> dict[str, Any]:
        """Model, SAE and studies, for the page's first screen."""
        return {
            "hook": self._hook_name,
            "d_sae": self._sae.cfg.d_sae,
            "studies": [self.shelf.about(name) for name in self.shelf],
        }

    def write(self, spec: RunSpec, emit: Event, stopped: Stopped) -> dict[str, Any]:
        """Write the report of a run, streaming it, and compare it with the unsteered one.

        Args:
            spec: The run.
            emit: Called with {"event": "text", "side": "before" or "after", "text": all text so far}.
            stopped: Asked before every forward pass; True ends the run.

        Returns:
            "before" and "after" (None without interventions), each with text, sentences, labels and perplexity under
            the unsteered model; "pieces" of both texts.

        Raises:
            WorkbenchError: An unknown study or latent, a mask of another shape, no p99, or a control of nothing.
            Cancelled: `stopped` returned True.
        """
        study, about = self.shelf[spec.study], self.shelf.about(spec.study)
        items = self._interventions(spec)
        if spec.control_seed is not None and not items:
            raise WorkbenchError("A random direction replaces interventions. Add a latent first.")
        read = _reader(study)
        version = _version(spec, study)
        with self._running(stopped):
            before = self._before(spec, version, read, emit)
            result: dict[str, Any] = {"spec": spec.plain(), "before": before, "after": None, "about": about}
            if items:
                after = self._after(spec, version, items, read, emit)
                left, right = compare_words(before["text"], after["text"])
                pieces = [[[piece.text, piece.marked] for piece in side] for side in (left, right)]
                result |= {"after": after, "pieces": pieces}
        return result

    def explain(self, spec: RunSpec, text: str, sentence: int, stopped: Stopped) -> dict[str, Any]:
        """Attribute one sentence of a report under the unsteered model, with its check.

        Raises:
            WorkbenchError: An unknown study.
            PromptError: There is no such sentence.
            Cancelled: `stopped` returned True.
        """
        version = _version(spec, self.shelf[spec.study])
        with self._running(stopped):
            found = attribute(
                self.hooked, version, self._sae, sentence, report=text, names=dict(self.catalogue.names)
            )
        return sentence_data(found, found.sentences[0], None)

    def export(self, spec: RunSpec, history: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Files that reproduce a run, by name, and how many texts were left out of the session.

        Texts of studies that are not public or synthetic are left out unless the workbench was started with
        `allow_credentialed`; images are in none of the files.
        """
        study, items = self.shelf[spec.study], self._interventions(spec)
        uploaded = self.shelf.is_upload(spec.study)
        files = {"run.py": python_code(spec, self.opening, study, uploaded, bool(items))}
        if items:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "intervention.json"
                save_interventions(path, items, self._sae, self._hook_name, getattr(self._sae, "p99", None))
                files[path.name] = path.read_text(encoding="utf-8")
        text, left_out = session_text(
            spec, history, lambda name: self.allow_credentialed or self.shelf.is_shareable(name)
        )
        return {"files": files | {"session.json": text}, "texts_left_out": left_out}

    def _interventions(self, spec: RunSpec) -> list[Intervention]:
        """What a run does to the stream, after everything that it names was checked."""
        for latent, _ in spec.sliders:
            self.catalogue.check(latent)
        grid = self.shelf.grid
        if spec.place in ("image", "map", "painted") and spec.view not in self.shelf.grids(spec.study):
            raise WorkbenchError(f"Study {spec.study} has no {spec.view} image.")
        if spec.place == "painted" and (len(spec.grid), len(spec.grid[0])) != grid:
            raise WorkbenchError(f"The painted mask does not have the image's {grid[0]} x {grid[1]} patches.")
        maps = {}
        if spec.place == "map":
            found = {latent: self.catalogue.map(latent, spec.view, grid) for latent, _ in spec.sliders}
            maps = {latent: one for latent, one in found.items() if one is not None}
        items = spec.interventions(maps)
        if items and getattr(self._sae, "p99", None) is None:
            raise WorkbenchError(
                "Strengths are in units of p99, and this SAE records none. Start with --records FOLDER."
            )
        return items

    @contextmanager
    def _running(self, stopped: Stopped) -> Iterator[None]:
        """Hold the model; raise Cancelled at the next forward pass of the decoder after `stopped` returned True."""

        def check(*_: Any) -> None:
            if stopped():
                raise Cancelled

        model: Any = self.hooked.model
        with self.hooked.exclusive():
            handle = model.model.language_model.register_forward_pre_hook(check)
            try:
                yield
            finally:
                handle.remove()

    def _before(self, spec: RunSpec, study: Study, read: Any, emit: Event) -> dict[str, Any]:
        key = (spec.study, spec.without, spec.max_new_tokens)
        if key not in self._unsteered:
            prompt = self.hooked.encode(study, report=None)
            ids = self.hooked.generate(
                prompt, max_new_tokens=self._budget(spec), streamer=self._streamer("before", emit)
            )
            side = self._side(prompt, ids, read)
            for gone in [one for one in self._unsteered if one[0] not in set(self.shelf)]:
                del self._unsteered[gone]
            while len(self._unsteered) >= CACHED_REPORTS:
                del self._unsteered[next(iter(self._unsteered))]
            self._unsteered[key] = side
        emit({"event": "text", "side": "before", "text": self._unsteered[key]["text"]})
        return self._unsteered[key]

    def _after(
        self, spec: RunSpec, study: Study, items: Sequence[Intervention], read: Any, emit: Event
    ) -> dict[str, Any]:
        prompt = self.hooked.encode(study, report=None)
        with steering(
            self.hooked,
            self._sae,
            self._hook_name,
            items,
            prompt,
            self._sae.p99,
            control_seed=spec.control_seed,
        ) as run:
            ids = run.generate(self._budget(spec), streamer=self._streamer("after", emit))
        side = self._side(prompt, ids, read)
        emit({"event": "text", "side": "after", "text": side["text"]})
        return side | {"effect": {"changed": run.effect.changed, "ratio": run.effect.ratio}}

    def _budget(self, spec: RunSpec) -> int:
        return spec.max_new_tokens or MAX_NEW_TOKENS["findings"]

    def _streamer(self, side: str, emit: Event) -> "_Streamer":
        return _Streamer(self.hooked.processor, side, emit)

    def _side(self, prompt: Maira2Encoding, ids: torch.Tensor, read: Any) -> dict[str, Any]:
        new = ids[:, prompt.input_ids.shape[1] :].cpu()
        processor: Any = self.hooked.processor
        text = processor.decode_report(new[0]).text
        return {
            "text": text,
            "sentences": [list(span) for span in split_sentences(text)],
            "labels": sorted(read.read(text)),
            "reader": read.source,
            "perplexity": self._perplexity(prompt, new),
            "effect": None,
        }

    @torch.no_grad()
    def _perplexity(self, prompt: Maira2Encoding, new: torch.Tensor) -> float:
        """Perplexity of the written tokens under the unsteered model."""
        model: Any = self.hooked.model
        encoding = prompt.extend(new).to(model.device, model.dtype)
        kept = new.shape[1] + 1
        logits = model(**encoding.model_inputs(), use_cache=False, logits_to_keep=kept).logits[0, :-1].float()
        logp = logits.log_softmax(-1).gather(-1, new[0, :, None].to(logits.device))[:, 0]
        return float(perplexity(logp, torch.ones_like(logp, dtype=torch.bool)))


class _Streamer:
    """A streamer of transformers' `generate` that emits the text so far."""

    def __init__(self, processor: Any, side: str, emit: Event) -> None:
        self._processor, self._side, self._emit = processor, side, emit
        self._ids: list[int] | None = None

    def put(self, value: torch.Tensor) -> None:
        """Receive the prompt first, then one token at a time."""
        if self._ids is None:
            self._ids = []
            return
        self._ids.extend(value.flatten().tolist())
        text = self._processor.decode_report(torch.tensor(self._ids)).text
        self._emit({"event": "text", "side": self._side, "text": text})

    def end(self) -> None:
        """Nothing is left to emit: the finished report follows."""


def _reader(study: Study) -> Any:
    """The reader of findings that fits a study; its versions have no truth, which would mean another reader."""
    return finding_reader([study])


def _version(spec: RunSpec, study: Study) -> Study:
    """The study without the parts that a run leaves out."""
    parts: dict[str, Any] = {
        part: None for part in spec.without if getattr(study, HELD.get(part, part)) is not None
    }
    return counterfactual(study, **parts) if parts else study


__all__ = ["Cancelled", "Session"]
