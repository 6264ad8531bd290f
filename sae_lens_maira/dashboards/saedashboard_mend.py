"""What sae-dashboard's runner finds over our prompts, without what prompts add: pads, and ids that are no vocabulary.

    density = counts of its histogram / rows        its own divides by positions, pads included
    share of an interval = count / rows             the lowest interval without the pads
    logits over the vocabulary alone; correlations that are not finite or above one are left out

It changes the runner's data in place and imports none of its classes.
"""

from __future__ import annotations

from typing import Any

import torch

from sae_lens_maira.dashboards.saedashboard_input import Prompts, Readout


def mend(found: Any, prompts: Prompts, readout: Readout, logits_table: Any, logits_histogram: Any) -> None:
    """Numbers of rows and of the vocabulary alone, in place of those over pads and made-up ids.

    Args:
        found: the runner's `SaeVisData`; changed in place.
        prompts: what it ran over.
        readout: words of the model.
        logits_table: sae-dashboard's own function.
        logits_histogram: its own class.
    """
    positions = prompts.tokens.numel()
    bins = found.cfg.feature_centric_layout.logits_hist_cfg.n_bins
    n_rows = found.cfg.feature_centric_layout.logits_table_cfg.n_rows
    for latent, data in found.feature_data_dict.items():
        fired = sum(data.acts_histogram_data.bar_heights)
        if fired:
            data.acts_histogram_data.title = f"ACTIVATIONS<br>DENSITY = {fired / prompts.rows:.3%}"
        logits = found.encoder.W_dec[latent].float() @ readout.unembed
        data.logits_table_data = logits_table(logit_vector=logits, n_rows=n_rows)
        data.logits_histogram_data = logits_histogram.from_data(logits, bins, "5 ticks", None)
        if (
            len(data.logits_histogram_data.tick_vals) > 20
        ):  # its step is a millionth where logits are below 0.3
            low, high = float(logits.min()), float(logits.max())
            data.logits_histogram_data.tick_vals = [round(low, 3), 0.0, round(high, 3)]
        tables = data.feature_tables_data
        for name in ("correlated_neurons", "correlated_features"):
            pearson = torch.tensor(getattr(tables, f"{name}_pearson"), dtype=torch.float64)
            if not bool((pearson.abs() <= 1.001).all()):
                for column in ("indices", "pearson", "cossim"):
                    setattr(tables, f"{name}_{column}", [])
        for group in data.sequence_data.seq_group_data:
            group.seq_data = [s for s in group.seq_data if _hit(s, prompts) not in prompts.silent]
            if group.title.startswith("INTERVAL"):
                bounds, share = group.title.split("<br>CONTAINS ")
                count = float(share.rstrip("%")) / 100 * positions
                if bounds.startswith("INTERVAL 0.000 "):  # the lowest one holds the pads, which are no rows
                    count -= positions - prompts.rows
                group.title = f"{bounds}<br>CONTAINS {max(0.0, min(1.0, count / prompts.rows)):.3%}"
        data.sequence_data.seq_group_data = [g for g in data.sequence_data.seq_group_data if g.seq_data]


def _hit(sequence: Any, prompts: Prompts) -> int:
    """Token id of a sequence's hit."""
    return int(prompts.tokens[sequence.original_index, sequence.qualifying_token_index])


def strip(found: Any, prompts: Prompts) -> None:
    """Sequences as Neuronpedia wants them: the study's name first, no pads, none twice; the hit within the sequence."""
    for data in found.feature_data_dict.values():
        seen: set[tuple[int, ...]] = set()
        for group in data.sequence_data.seq_group_data:
            kept = []
            for sequence in group.seq_data:
                study = prompts.first_study + sequence.original_index
                pairs = list(zip(sequence.token_ids, sequence.feat_acts, strict=True))
                hit = found.cfg.feature_centric_layout.seq_cfg.buffer[0]
                hit -= sum(token in prompts.silent for token, _ in pairs[:hit])
                pairs = [(study, 0.0)] + [pair for pair in pairs if pair[0] not in prompts.silent]
                sequence.token_ids = [token for token, _ in pairs]
                sequence.feat_acts = [value for _, value in pairs]
                sequence.qualifying_token_index = hit + 2  # behind the study; the converter takes one off
                bag = tuple(sorted(sequence.token_ids))
                if bag not in seen:
                    seen.add(bag)
                    kept.append(sequence)
            group.seq_data = kept


def exact_densities(batch: dict[str, Any], found: Any, prompts: Prompts) -> None:
    """The converter reads the density back from a title of five digits; the histogram has the count."""
    for feature in batch["features"]:
        data = found.feature_data_dict[feature["feature_index"]]
        feature["frac_nonzero"] = sum(data.acts_histogram_data.bar_heights) / prompts.rows
