"""Match the latents of one SAE with those of another: other seed, level, release, layer or token kind.

    correlation[i, j]   Pearson correlation of the activations of latent i and latent j on the same rows
    cosine[i, j]        cosine of their decoder directions
    score               mean of the two

Both SAEs read the same positions, each at its own hook point. Latents that never fire there are left out. The
assignment pairs every latent with at most one of the other SAE and maximises the total score
(`scipy.optimize.linear_sum_assignment`). It is repeated for two references:

    shuffled     the other SAE's rows in random order and the dimensions of its decoder permuted: coincidence
    untrained    random directions, as many and as sparse as the other SAE: what the geometry of the rows alone gives

A pair counts as found if it scores above the 99th percentile of both.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csr_matrix, vstack
from torch import Tensor

from sae_lens_maira.errors import SAEError
from sae_lens_maira.sae.controls import make_control
from sae_lens_maira.sae.levels import level_widths_of

MATRIX_BYTES = 4 << 30
"""Default limit for the matrix of scores: 16,384 by 16,384 latents in float64 take half of it."""
_BLOCK = 512


@dataclass(frozen=True)
class MatchSummary:
    """Counts and means of a match.

    Attributes:
        rows: Number of rows that both SAEs read.
        active, active_other: Latents that fire on one or more of them.
        pairs: Pairs of the assignment.
        found: Pairs whose score exceeds `threshold`.
        threshold: 99th percentile of the references' scores, the larger of the two.
        means: Mean score, correlation and cosine over the pairs of "matched", "shuffled" and "untrained".
    """

    rows: int
    active: int
    active_other: int
    pairs: int
    found: int
    threshold: float
    means: dict[str, dict[str, float]]


@dataclass(frozen=True)
class LatentMatch:
    """Latents of one SAE and what was found for each in another.

    Attributes:
        pairs: One row per active latent of the first SAE: latent, level, its partner `match` (-1 where the other SAE
            has fewer latents) with correlation, cosine and score, `found`, and `nearest`, the latent of the other SAE
            with the highest score whichever other latent is paired with it, with `nearest_score`.
        references: Scores of the pairs of each reference, "shuffled" and "untrained".
        summary: Counts and means.
    """

    pairs: pd.DataFrame
    references: dict[str, np.ndarray]
    summary: MatchSummary

    def __str__(self) -> str:
        s = self.summary
        share = s.found / max(s.pairs, 1)
        means = pd.DataFrame(s.means).T.rename_axis("mean over pairs")
        columns = [
            "latent",
            "level",
            "match",
            "score",
            "correlation",
            "cosine",
            "found",
            "nearest",
            "nearest_score",
        ]
        best = self.pairs.sort_values("score", ascending=False).head(10)[columns]
        return (
            f"{s.active:,} and {s.active_other:,} latents fire on {s.rows:,} rows; {s.found:,} of {s.pairs:,} pairs "
            f"({share:.0%}) score above {s.threshold:.2f}, which at most 1 % of the pairs of a reference do\n"
            f"{means.to_string(float_format=lambda x: f'{x:.3f}')}\n"
            f"{best.to_string(index=False, float_format=lambda x: f'{x:.3f}')}"
        )

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self.summary)


def match_latents(
    sae: SAE[Any],
    other: SAE[Any],
    rows: Tensor,
    other_rows: Tensor | None = None,
    *,
    seed: int = 0,
    chunk: int = 2048,
    matrix_bytes: int = MATRIX_BYTES,
) -> LatentMatch:
    """Find the latents of one SAE in another.

    Args:
        sae: The SAE whose latents are looked for.
        other: The SAE that is searched.
        rows: (n, d_in) rows at the hook point of `sae`.
        other_rows: (n, d_in) rows of the same positions at the hook point of `other`; `rows` if not given.
        seed: Random seed of the references.
        chunk: Rows encoded at once.
        matrix_bytes: Limit for the matrix of scores.

    Raises:
        SAEError: The rows do not fit the SAEs or each other, no latent fires, or the matrix would be too large.
    """
    other_rows = rows if other_rows is None else other_rows
    if len(rows) != len(other_rows) or len(rows) < 2:
        raise SAEError(
            f"{len(rows)} and {len(other_rows)} rows were given; matching needs two or more rows of the same positions "
            "for both SAEs."
        )
    if sae.cfg.d_in != other.cfg.d_in:
        raise SAEError(
            f"The SAEs read {sae.cfg.d_in} and {other.cfg.d_in} dimensions, so their decoders cannot be compared. Give "
            "two SAEs of one model."
        )
    first, second = _Active(sae, rows, chunk), _Active(other, other_rows, chunk)
    needed = 8 * len(first.latents) * len(second.latents)
    if not needed:
        raise SAEError(
            f"{len(first.latents)} and {len(second.latents)} latents fire on these {len(rows)} rows; nothing can be "
            "matched. Read the positions that both SAEs were trained on, or more studies."
        )
    if needed > matrix_bytes:
        raise SAEError(
            f"Scores of {len(first.latents):,} by {len(second.latents):,} latents take {needed / 2**30:.1f} GiB; the "
            f"limit is {matrix_bytes / 2**30:.1f} GiB. Match a level (`sae.truncate`), or raise matrix_bytes."
        )
    pairs = _assign(first, second)
    generator = np.random.default_rng(seed)
    shuffled = second.shuffled(generator.permutation(len(rows)), generator.permutation(sae.cfg.d_in))
    untrained = _Active(make_control("untrained", other, other_rows, seed), other_rows, chunk)
    references = {"shuffled": _assign(first, shuffled), "untrained": _assign(first, untrained)}
    made = {"matched": pairs, **references}
    made = {name: frame[frame["match"] >= 0] for name, frame in made.items()}
    scores = {name: np.asarray(made[name]["score"]) for name in references}
    threshold = max(float(np.quantile(score, 0.99)) for score in scores.values())
    pairs["found"] = pairs["score"] > threshold
    widths = level_widths_of(sae)
    pairs.insert(1, "level", np.searchsorted(widths, pairs["latent"], side="right"))
    means = {
        name: {str(k): float(v) for k, v in frame[["score", "correlation", "cosine"]].mean().items()}
        for name, frame in made.items()
    }
    counts = (len(rows), len(first.latents), len(second.latents), len(made["matched"]))
    return LatentMatch(pairs, scores, MatchSummary(*counts, int(pairs["found"].sum()), threshold, means))


class _Active:
    """Sparse, standardised activations and decoder directions of the latents that fire.

    Attributes:
        latents: (m,) their indices.
        acts: (n, m) sparse activations divided by n times their standard deviation.
        mean: (m,) mean over standard deviation.
        decoder: (m, d_in) float32 unit directions.
    """

    def __init__(self, sae: SAE[Any], rows: Tensor, chunk: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != sae.cfg.d_in:
            raise SAEError(
                f"Rows of shape {tuple(rows.shape)} were given; (n, {sae.cfg.d_in}) was expected. Check that they come "
                "from the hook point the SAE was trained on."
            )
        parts = []
        with torch.no_grad():
            for part in rows.split(chunk):
                acts = sae.encode(part.to(sae.W_dec.device, sae.W_dec.dtype)).float().cpu()
                parts.append(csr_matrix(acts.numpy()))
        stacked: Any = vstack(parts, format="csr")
        n = stacked.shape[0]
        total = np.asarray(stacked.sum(0), dtype=np.float64).ravel()
        square = np.asarray(stacked.multiply(stacked).sum(0), dtype=np.float64).ravel()
        variance = square / n - (total / n) ** 2
        self.latents = np.flatnonzero(variance > 1e-12 * np.maximum(square / n, 1e-300))
        deviation = np.sqrt(variance[self.latents])
        self.acts: Any = (
            stacked[:, self.latents].astype(np.float64).multiply(1 / (deviation * np.sqrt(n))).tocsr()
        )
        self.mean = total[self.latents] / n / deviation
        directions = sae.W_dec.detach().float().cpu()[torch.from_numpy(self.latents)]
        self.decoder = torch.nn.functional.normalize(directions, dim=1).numpy()

    def shuffled(self, rows: np.ndarray, dimensions: np.ndarray) -> "_Active":
        """The same latents with rows in another order and decoder dimensions permuted."""
        other = object.__new__(_Active)
        other.latents, other.mean = self.latents, self.mean
        other.acts, other.decoder = self.acts[rows], np.ascontiguousarray(self.decoder[:, dimensions])
        return other


def _assign(first: _Active, second: _Active) -> pd.DataFrame:
    """Partner and nearest latent of every latent of `first`. One float64 matrix of scores is held."""
    turned = len(first.latents) > len(second.latents)
    low, high = (second, first) if turned else (first, second)  # scipy copies the matrix of a tall problem
    cost = np.empty((len(low.latents), len(high.latents)))
    columns = low.acts.tocsc()
    for start in range(0, len(low.latents), _BLOCK):
        part = slice(start, start + _BLOCK)
        correlation = (columns[:, part].T @ high.acts).toarray()
        correlation -= np.outer(low.mean[part], high.mean)
        cost[part] = -(correlation + low.decoder[part] @ high.decoder.T) / 2
    of_low, of_high = linear_sum_assignment(cost)
    axis = 0 if turned else 1
    nearest, nearest_score = cost.argmin(axis), -cost.min(axis)
    score = -cost[of_low, of_high]
    del cost
    at, to = (of_high, of_low) if turned else (of_low, of_high)
    cosine = (first.decoder[at] * second.decoder[to]).sum(1)
    frame = pd.DataFrame(
        {
            "latent": first.latents,
            "match": -1,
            "score": np.nan,
            "correlation": np.nan,
            "cosine": np.nan,
            "nearest": second.latents[nearest],
            "nearest_score": nearest_score,
        }
    )
    frame.loc[at, "match"] = second.latents[to]
    frame.loc[at, "score"], frame.loc[at, "cosine"] = score, cosine
    frame.loc[at, "correlation"] = 2 * score - cosine
    return frame
