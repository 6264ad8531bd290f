"""sae-dashboard's own engine over a MAIRA-2 SAE: its batch files, and its classic page, for some latents.

It judges our records and serves who wants that page; at the scale of a model the writers over latent records do the
work. `SaeVisRunner` and `NeuronpediaConverter` run as they are, over activations in their cache. It knows nothing
about how rows were read.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_lens import SAE

from sae_lens_maira.dashboards.saedashboard import line, new_folder
from sae_lens_maira.dashboards.saedashboard_input import Prompts, Readout, plain_copy, write_prompts
from sae_lens_maira.dashboards.saedashboard_mend import exact_densities, mend, strip
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.errors import ConfigError, PrivacyError

if TYPE_CHECKING:
    from sae_lens_maira.latents.source import ActivationSource

PROMPTS_PER_FILE = 8
MOST_ACTIVATIONS = 2**27
"""Latents times positions that are held at once: 512 MB."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What sae-dashboard is asked for.

    Attributes:
        latents: their numbers.
        batch_size: latents per batch file and page.
        before, behind: tokens of context on either side of a hit.
        top: sequences of largest activation.
        intervals, per_interval: intervals of activation, and sequences of each.
        page: write the classic page too. It loads scripts from two other hosts: None writes it only if no study is
            credentialed.
        seed: of the draws from intervals.
    """

    latents: Sequence[int]
    batch_size: int = 32
    before: int = 12
    behind: int = 12
    top: int = 20
    intervals: int = 5
    per_interval: int = 5
    page: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse sizes that the runner fails on.

        Raises:
            ConfigError: a size is too small, or a latent is named twice.
        """
        if min(self.batch_size, self.before, self.behind, self.top) < 1:
            raise ConfigError(
                "batch_size, before, behind and top must be at least 1; sae-dashboard has no empty windows. Give "
                "larger numbers."
            )
        if not self.latents or len(set(self.latents)) != len(self.latents):
            raise ConfigError(f"{len(self.latents)} latents were named; name some, each once.")


def run_saedashboard(
    blocks: ActivationSource,
    studies: Sequence[tuple[str, str]],
    sae: SAE[Any],
    readout: Readout,
    target: Target,
    layer: int,
    out: Path | str,
    config: AdapterConfig,
) -> Path:
    """Write `batch-N.json`, `page-N.html`, `run_settings.json` and `skipped_indexes.json`.

    Args:
        blocks: units of rows, whole studies in ascending order; read twice.
        studies: name and licence class by number.
        sae: any SAELens SAE; it is copied.
        readout: words of the model.
        target: names.
        layer: decoder layer of the rows.
        out: folder to make; it must not exist or be empty.
        config: what to ask for.

    Returns:
        The folder.

    Raises:
        ConfigError: sae-dashboard is not installed.
        PrivacyError: a page of credentialed studies was asked for.
        ConfigError: there is no such latent.
        RecordError: the rows do not fit, or the folder has files.
    """
    closed = any(licence == "credentialed" for _, licence in studies)
    if closed and config.page:
        raise PrivacyError(
            "The classic page of sae-dashboard loads scripts from d3js.org and cdn.plot.ly, which could read the text "
            "in it, and some of these studies are credentialed. Write the batch files alone (--page false), or use "
            "`dashboards html`, whose page loads nothing."
        )
    if not 0 <= min(config.latents) <= max(config.latents) < sae.cfg.d_sae:
        raise ConfigError(
            f"Latents {min(config.latents)} to {max(config.latents)} were asked of an SAE of {sae.cfg.d_sae}; give "
            f"numbers from 0 to {sae.cfg.d_sae - 1}."
        )
    theirs = _theirs()
    source = target.source(layer)
    with new_folder(out) as folder, tempfile.TemporaryDirectory(prefix="saedashboard-") as cache:
        copied = plain_copy(sae)
        prompts = write_prompts(
            blocks,
            [name for name, _ in studies],
            readout,
            copied.b_dec.detach(),
            Path(cache),
            (config.before, config.behind),
            PROMPTS_PER_FILE,
        )
        latents = sorted(config.latents)
        settings = theirs.RunnerConfig(
            sae_set=target.set_name,
            sae_path=source,
            outputs_dir=str(out),
            np_set_name=target.set_name,
            huggingface_dataset_path=target.dataset,
            n_prompts_total=len(prompts.names),
            n_tokens_in_prompt=prompts.rows // len(prompts.names),
            n_prompts_in_forward_pass=PROMPTS_PER_FILE,
            n_features_at_a_time=config.batch_size,
            n_quantiles=config.intervals,
            top_acts_group_size=config.top,
            quantile_group_size=config.per_interval,
            model_id=target.model_id,
            layer=layer,
        )
        for number, start in enumerate(range(0, len(latents), config.batch_size)):
            asked = latents[start : start + config.batch_size]
            # A fresh copy for each run: the runner leaves tensors behind that no gradient can pass.
            found = theirs.run(plain_copy(sae), prompts, readout, asked, Path(cache), config)
            mend(found, prompts, readout, theirs.logits_table, theirs.LogitsHistogram)
            if config.page or (config.page is None and not closed):
                theirs.save_page(found, folder / f"page-{number}.html")
            strip(found, prompts)
            batch = json.loads(
                theirs.Converter.convert_to_np_json(prompts.model(readout), found, settings, prompts.texts)
            )
            exact_densities(batch, found, prompts)
            head = {key: value for key, value in batch.items() if key != "features"}
            rows = ",\n".join(line(feature) for feature in batch["features"])
            text = line(head)[:-1] + ',"features":[\n' + rows + "\n]}\n"
            (folder / f"batch-{number}.json").write_text(text, encoding="utf-8", newline="\n")
        (folder / "run_settings.json").write_text(json.dumps(vars(settings), indent=4), encoding="utf-8")
        skipped = {
            "model_id": target.model_id,
            "layer": str(layer),
            "sae_set": target.set_name,
            "log_sparsity": settings.sparsity_threshold,
            "skipped_indexes": sorted(set(range(sae.cfg.d_sae)) - set(latents)),
        }
        (folder / "skipped_indexes.json").write_text(json.dumps(skipped), encoding="utf-8")
    return Path(out)


class _Theirs:
    """sae-dashboard's classes, imported when they are wanted."""

    def __init__(self) -> None:
        from sae_dashboard import components, components_config, data_parsing_fns, data_writing_fns, layout
        from sae_dashboard.neuronpedia.neuronpedia_converter import NeuronpediaConverter
        from sae_dashboard.neuronpedia.neuronpedia_runner_config import NeuronpediaRunnerConfig
        from sae_dashboard.sae_vis_data import SaeVisConfig
        from sae_dashboard.sae_vis_runner import SaeVisRunner

        self.Converter, self.RunnerConfig = NeuronpediaConverter, NeuronpediaRunnerConfig
        self.LogitsHistogram = components.LogitsHistogramData
        self.logits_table = data_parsing_fns.get_logits_table_data
        self._save = data_writing_fns.save_feature_centric_vis
        self._layout, self._parts = layout, components_config
        self._config, self._runner = SaeVisConfig, SaeVisRunner

    def run(
        self,
        sae: SAE[Any],
        prompts: Prompts,
        readout: Readout,
        latents: list[int],
        cache: Path,
        config: AdapterConfig,
    ) -> Any:
        """The runner's data of some latents."""
        parts = self._parts
        sequences = parts.SequencesConfig(
            stack_mode="stack-all",
            buffer=(config.before, config.behind),
            compute_buffer=True,
            n_quantiles=config.intervals,
            top_acts_group_size=min(config.top, prompts.rows),
            quantile_group_size=config.per_interval,
        )
        columns = [
            self._layout.Column(parts.FeatureTablesConfig(n_rows=3)),
            self._layout.Column(
                parts.ActsHistogramConfig(), parts.LogitsTableConfig(), parts.LogitsHistogramConfig()
            ),
            self._layout.Column(sequences),
        ]
        asked = self._config(
            hook_point=prompts.hook_name,
            features=latents,
            minibatch_size_features=max(1, min(64, MOST_ACTIVATIONS // prompts.tokens.numel())),
            minibatch_size_tokens=PROMPTS_PER_FILE,
            ignore_tokens=prompts.silent,
            feature_centric_layout=self._layout.SaeVisLayoutConfig(columns=columns),
            seed=config.seed,
            cache_dir=cache,
        )
        model = prompts.model(readout, harmless=True)
        return self._runner(asked).run(encoder=sae, model=model, tokens=prompts.tokens)

    def save_page(self, found: Any, path: Path) -> None:
        """The classic page."""
        self._save(found, path)


def _theirs() -> _Theirs:
    try:
        return _Theirs()
    except ImportError as error:
        raise ConfigError(
            f"sae-dashboard can not be imported ({error}). Install the extra `dashboard` in an environment of its own, "
            "or beside transformers 5 without its pins: pip install --no-deps sae-dashboard==0.8.0 dataclasses-json "
            "eindex-callum 'marshmallow<4' typing-inspect mypy-extensions."
        ) from None
