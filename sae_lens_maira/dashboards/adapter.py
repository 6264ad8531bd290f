"""Run sae-dashboard over some latents of a MAIRA-2 SAE, for its batch files and its classic page.

`SaeVisRunner` and `NeuronpediaConverter` run unmodified, over activations in their cache. Their data are then corrected
for padding and for token ids outside the vocabulary, which our prompts contain:

    density = counts of its histogram / rows        the runner divides by positions, padding included
    share of an interval = count / rows             the lowest interval without the padding
    logits over the vocabulary only; correlations that are not finite or above one are left out

Use this to check latent records, or for the classic page. For all latents of a model, use `dashboards neuronpedia`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sae_lens import SAE

from sae_lens_maira.dashboards.prompts import Prompts, Readout, plain_copy, write_prompts
from sae_lens_maira.dashboards.target import Target
from sae_lens_maira.dashboards.writing import json_line, new_folder
from sae_lens_maira.errors import ConfigError, PrivacyError
from sae_lens_maira.privacy import SHAREABLE, check_shareable

if TYPE_CHECKING:
    from sae_lens_maira.latents.source import ActivationSource

PROMPTS_PER_FILE = 8
MOST_ACTIVATIONS = 2**27
"""Limit on latents times positions in memory at once: 512 MB."""


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Settings of a run of sae-dashboard.

    Attributes:
        latents: Latent numbers.
        batch_size: Latents per batch file and page.
        before, after: Tokens of context before and after a peak.
        top: Number of sequences with the largest activations.
        intervals, per_interval: Number of activation intervals, and of sequences per interval.
        page: Also write the classic page. It loads scripts from two other hosts; None writes it only if every study is
            public or synthetic.
        seed: Random seed for the choice of sequences within intervals.
        allow_credentialed: Write data of credentialed studies too, in a marked folder.
    """

    latents: Sequence[int]
    batch_size: int = 32
    before: int = 12
    after: int = 12
    top: int = 20
    intervals: int = 5
    per_interval: int = 5
    page: bool | None = None
    seed: int = 0
    allow_credentialed: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that make the runner fail.

        Raises:
            ConfigError: A size is too small, or a latent is listed twice.
        """
        if min(self.batch_size, self.before, self.after, self.top) < 1:
            raise ConfigError(
                "batch_size, before, after and top must be at least 1, since sae-dashboard has no empty windows. Give "
                "larger numbers."
            )
        if not self.latents or len(set(self.latents)) != len(self.latents):
            raise ConfigError(
                f"{len(self.latents)} latents are listed; expected at least one, each once. Fix --latents."
            )


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
        blocks: Source of activation rows, whole studies in ascending order; read twice.
        studies: Name and licence class of each study, by number.
        sae: Any SAELens SAE; it is copied.
        readout: Vocabulary and unembedding of the model.
        target: Names on Neuronpedia.
        layer: Decoder layer of the rows.
        out: Output folder; one that an earlier run wrote is replaced.
        config: Settings.

    Returns:
        The folder.

    Raises:
        ConfigError: sae-dashboard is not installed, or a latent does not exist.
        PrivacyError: A study is not known to be public or synthetic, and `allow_credentialed` is not set or the classic
            page was requested.
        RecordError: The rows do not match the studies, or the folder contains files.
    """
    if not 0 <= min(config.latents) <= max(config.latents) < sae.cfg.d_sae:
        raise ConfigError(
            f"Latents {min(config.latents)} to {max(config.latents)} were requested, but the SAE has {sae.cfg.d_sae}. "
            f"Give numbers from 0 to {sae.cfg.d_sae - 1}."
        )
    licence = check_shareable(
        [licence for _, licence in studies], "writing sae-dashboard's files", allow=config.allow_credentialed
    )
    closed = licence not in SHAREABLE
    if closed and config.page:
        raise PrivacyError(
            "The classic page of sae-dashboard loads scripts from d3js.org and cdn.plot.ly, which could read its text, "
            "and some of these studies are not known to be public or synthetic. Write the batch files only "
            "(--page false), or use `dashboards html`, whose page loads no remote script."
        )
    target = target.marked(licence)
    theirs = _theirs()
    source = target.source(layer)
    with new_folder(out, licence) as folder, tempfile.TemporaryDirectory(prefix="saedashboard-") as cache:
        copied = plain_copy(sae)
        prompts = write_prompts(
            blocks,
            [name for name, _ in studies],
            readout,
            copied.b_dec.detach(),
            Path(cache),
            (config.before, config.after),
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
            chosen = latents[start : start + config.batch_size]
            # A fresh copy for each run: the runner leaves inference-mode tensors in the SAE.
            data = theirs.run(plain_copy(sae), prompts, readout, chosen, Path(cache), config)
            correct_statistics(data, prompts, readout, theirs.logits_table, theirs.LogitsHistogram)
            if config.page or (config.page is None and not closed):
                theirs.save_page(data, folder / f"page-{number}.html")
            trim_sequences(data, prompts)
            batch = json.loads(
                theirs.Converter.convert_to_np_json(prompts.model(readout), data, settings, prompts.texts)
            )
            exact_densities(batch, data, prompts)
            head = {key: value for key, value in batch.items() if key != "features"}
            rows = ",\n".join(json_line(feature) for feature in batch["features"])
            text = json_line(head)[:-1] + ',"features":[\n' + rows + "\n]}\n"
            (folder / f"batch-{number}.json").write_text(text, encoding="utf-8", newline="\n")
        (folder / "run_settings.json").write_text(
            json.dumps(vars(settings) | {"licence": licence}, indent=4), encoding="utf-8"
        )
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
    """sae-dashboard's classes, imported on first use."""

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
        """Run sae-dashboard over some latents and return its data."""
        parts = self._parts
        sequences = parts.SequencesConfig(
            stack_mode="stack-all",
            buffer=(config.before, config.after),
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
        settings = self._config(
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
        return self._runner(settings).run(encoder=sae, model=model, tokens=prompts.tokens)

    def save_page(self, data: Any, path: Path) -> None:
        """Write the classic page."""
        self._save(data, path)


def _theirs() -> _Theirs:
    try:
        return _Theirs()
    except ImportError as error:
        raise ConfigError(
            f"sae-dashboard cannot be imported ({error}). Install the extra `dashboard` in its own environment, or "
            "with transformers 5 without its pins: pip install --no-deps sae-dashboard==0.8.0 dataclasses-json "
            "eindex-callum 'marshmallow<4' typing-inspect mypy-extensions."
        ) from None


def correct_statistics(
    data: Any, prompts: Prompts, readout: Readout, logits_table: Any, logits_histogram: Any
) -> None:
    """Restrict the runner's statistics to real rows and to the vocabulary.

    Args:
        data: The runner's `SaeVisData`; changed in place.
        prompts: The prompts it ran over.
        readout: Vocabulary and unembedding of the model.
        logits_table: sae-dashboard's function.
        logits_histogram: sae-dashboard's class.
    """
    positions = prompts.tokens.numel()
    bins = data.cfg.feature_centric_layout.logits_hist_cfg.n_bins
    n_rows = data.cfg.feature_centric_layout.logits_table_cfg.n_rows
    for latent, feature in data.feature_data_dict.items():
        fired = sum(feature.acts_histogram_data.bar_heights)
        if fired:
            feature.acts_histogram_data.title = f"ACTIVATIONS<br>DENSITY = {fired / prompts.rows:.3%}"
        logits = data.encoder.W_dec[latent].float() @ readout.unembed
        feature.logits_table_data = logits_table(logit_vector=logits, n_rows=n_rows)
        feature.logits_histogram_data = logits_histogram.from_data(logits, bins, "5 ticks", None)
        if (
            len(feature.logits_histogram_data.tick_vals) > 20
        ):  # its step is a millionth where logits are below 0.3
            low, high = float(logits.min()), float(logits.max())
            feature.logits_histogram_data.tick_vals = [round(low, 3), 0.0, round(high, 3)]
        tables = feature.feature_tables_data
        for name in ("correlated_neurons", "correlated_features"):
            pearson = torch.tensor(getattr(tables, f"{name}_pearson"), dtype=torch.float64)
            if not bool((pearson.abs() <= 1.001).all()):
                for column in ("indices", "pearson", "cossim"):
                    setattr(tables, f"{name}_{column}", [])
        for group in feature.sequence_data.seq_group_data:
            group.seq_data = [s for s in group.seq_data if _hit(s, prompts) not in prompts.silent]
            if group.title.startswith("INTERVAL"):
                bounds, share = group.title.split("<br>CONTAINS ")
                count = float(share.rstrip("%")) / 100 * positions
                if bounds.startswith("INTERVAL 0.000 "):  # the lowest one includes the padding
                    count -= positions - prompts.rows
                group.title = f"{bounds}<br>CONTAINS {max(0.0, min(1.0, count / prompts.rows)):.3%}"
        feature.sequence_data.seq_group_data = [g for g in feature.sequence_data.seq_group_data if g.seq_data]


def _hit(sequence: Any, prompts: Prompts) -> int:
    """Token id of the token that a sequence was chosen for."""
    return int(prompts.tokens[sequence.original_index, sequence.qualifying_token_index])


def trim_sequences(data: Any, prompts: Prompts) -> None:
    """Put the study's name first in every sequence, remove padding and duplicates, and correct the peak's index."""
    for feature in data.feature_data_dict.values():
        seen: set[tuple[int, ...]] = set()
        for group in feature.sequence_data.seq_group_data:
            kept = []
            for sequence in group.seq_data:
                study = prompts.first_study + sequence.original_index
                pairs = list(zip(sequence.token_ids, sequence.feat_acts, strict=True))
                hit = data.cfg.feature_centric_layout.seq_cfg.buffer[0]
                hit -= sum(token in prompts.silent for token, _ in pairs[:hit])
                pairs = [(study, 0.0)] + [pair for pair in pairs if pair[0] not in prompts.silent]
                sequence.token_ids = [token for token, _ in pairs]
                sequence.feat_acts = [value for _, value in pairs]
                sequence.qualifying_token_index = hit + 2  # after the study; the converter subtracts one
                bag = tuple(sorted(sequence.token_ids))
                if bag not in seen:
                    seen.add(bag)
                    kept.append(sequence)
            group.seq_data = kept


def exact_densities(batch: dict[str, Any], data: Any, prompts: Prompts) -> None:
    """Replace densities, which the converter parses from a title of five digits, by the histogram's counts."""
    for row in batch["features"]:
        feature = data.feature_data_dict[row["feature_index"]]
        row["frac_nonzero"] = sum(feature.acts_histogram_data.bar_heights) / prompts.rows
