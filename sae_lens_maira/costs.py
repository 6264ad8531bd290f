"""Estimate memory, disk and time of a command before it runs, from `sizing`.

    bytes       weights, one layer's work, keys and values, rows, shards
    time        FLOPs / (0.4 x the GPU's dense bfloat16 peak)

Times are computed and not measured: 0.4 of the peak is an assumption.
"""

from dataclasses import dataclass
from typing import Any

from sae_lens_maira.sizing import ModelSize, StudySizes

GPUS: dict[str, float] = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12}
"""Dense bfloat16 peak by NVIDIA's data sheets, FLOPs per second."""
EFFICIENCY = 0.4


@dataclass(frozen=True)
class Cost:
    """Estimated cost of one command.

    Attributes:
        command: Name of the command.
        gpu: Peak bytes on the model's device.
        host: Peak bytes of main memory, without Python and its libraries (about 0.7 GB); None if not estimated.
        disk: Bytes written; None if not estimated.
        flops: Floating-point operations; 0 if disk reads determine the time.
        notes: Further facts, one line each.
    """

    command: str
    gpu: float
    host: float | None
    disk: float | None
    flops: float
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Format the cost as lines for a terminal."""
        times = ", ".join(f"{name} {_time(self.flops / (EFFICIENCY * peak))}" for name, peak in GPUS.items())
        lines = [
            f"estimate of `{self.command}` (nothing was run)",
            f"  device memory  {_gb(self.gpu)}",
            f"  host memory    {_gb(self.host)}",
            f"  disk           {_gb(self.disk)}",
            f"  compute        {self.flops:.2g} FLOPs; on one GPU at {EFFICIENCY:.0%} of its peak: {times}",
        ]
        return "\n".join(lines + [f"  {note}" for note in self.notes]) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values: bytes, FLOPs and seconds per GPU."""
        seconds = {name: self.flops / (EFFICIENCY * peak) for name, peak in GPUS.items()}
        return {
            "command": self.command,
            "device_bytes": int(self.gpu),
            "host_bytes": None if self.host is None else int(self.host),
            "disk_bytes": None if self.disk is None else int(self.disk),
            "flops": self.flops,
            "seconds": seconds,
            "notes": list(self.notes),
        }


def harvest_cost(
    size: ModelSize,
    studies: StudySizes,
    *,
    layers: int,
    hooks: int,
    roles: Any,
    rates: dict[str, float] | None,
    batch_size: int,
    shard_studies: int | None,
    shard_bytes: float,
    row_bytes: int = 2,
    reports: str = "teacher",
    max_new_tokens: int = 300,
) -> Cost:
    """Estimate the cost of `harvest` on one process, for rows in bfloat16 (`row_bytes` 2) at some hook points.

    Generated reports need the whole model, and are assumed to have their largest length.
    """
    sources = studies.sources(reports, max_new_tokens)
    written = sources.get("generated")
    loaded = layers if written is None else size.layers
    rows = sum(source.rows(roles, rates) for source in sources.values())
    stored = rows * size.width * row_bytes * hooks
    share = 1.0 if shard_studies is None else min(1.0, shard_studies / studies.studies)
    shard = min(stored, shard_bytes) if shard_studies is None else stored * share
    longest = max(int(source.lengths.max()) for source in sources.values()) * batch_size
    flops = sum(_forward(size, source, layers) for source in sources.values())
    cache = 0
    if written is not None:
        logits = written.studies * max_new_tokens
        flops += (
            _forward(size, written, size.layers)
            + 2.0 * logits * size.config.text_config.vocab_size * size.width
        )
        cache = size.cache(int(written.lengths.max()) * batch_size)
    notes: tuple[str, ...] = (
        f"{rows:,.0f} rows of {studies.studies:,} studies, {stored / studies.studies / 1e6:.2f} MB per study",
        f"{loaded} of {size.layers} decoder layers are loaded and run, {size.weights(loaded) / 1e9:.1f} GB of weights",
        f"a shard has {_gb(shard)}, and a process has two in memory",
    )
    if written is not None:
        notes += (f"a generated report is assumed to have {max_new_tokens} tokens, its limit",)
    device = size.weights(loaded) + size.work(longest) + cache
    device += longest * size.width * size.bytes_per_number * hooks
    return Cost("harvest", device, 2 * shard, stored, flops, notes)


def train_cost(
    d_in: int,
    d_sae: int,
    samples: int,
    batch: int,
    rows: float,
    *,
    buffer_rows: float,
    row_bytes: int = 2,
    ranks: int = 1,
    shard_optimizer: bool = False,
    shard_latents: bool = False,
    levels: int = 1,
) -> Cost:
    """Estimate the cost of `train`, per process.

    It has weights, gradients, two moments and one work matrix in float32, the rows of the batch, and two buffers of
    rows in main memory.

    Args:
        d_in: Width of the rows.
        d_sae: Number of latents.
        samples: Total number of rows.
        batch: Number of rows per batch of all processes.
        rows: Number of rows of the table.
        buffer_rows: Number of rows that are mixed.
        row_bytes: Bytes of a stored number.
        ranks: Number of processes.
        shard_optimizer: Whether the moments are divided over them.
        shard_latents: Whether the latents are; each process then has all rows, and errors of all levels.
        levels: Number of levels.
    """
    weights = 2 * d_in * d_sae * 4
    owners = ranks if shard_optimizer or shard_latents else 1
    moments, own = 2 * weights / owners, weights / ranks if shard_latents else weights
    of_rows = batch * (12 + 8 * levels) * d_in if shard_latents else batch / ranks * 12 * d_in
    device = 3 * own + moments + batch / ranks * 4 * d_sae + of_rows
    buffers = 2 * buffer_rows * d_in * row_bytes / ranks
    read = samples * d_in * row_bytes
    divided = [f"{_gb(2 * weights / n)} over {n}" for n in (2, 4, 8) if ranks == 1]
    shares = f"divided over {ranks} processes" if owners > 1 else "not divided"
    notes = (
        f"weights and gradients {_gb(2 * own)}, the optimizer's moments {_gb(moments)} ({shares})",
        *(
            [f"with --shard-optimizer true the moments of a process take {', '.join(divided)}"]
            if divided
            else ()
        ),
        f"{samples:,} rows of {d_in:,} numbers are read, {_gb(read)}",
        f"that is {samples / max(rows, 1):.1f} passes over the rows of the table",
        f"at 2 GB per second the reading alone takes {_time(read / 2e9)}",
        f"host memory is two buffers of {buffer_rows:,.0f} rows{'' if ranks == 1 else ', divided over the processes'}; "
        "unless given, at most a quarter of what is free",
    )
    return Cost("train", device, buffers, weights, 2.0 * d_in * d_sae * samples, notes)


def latents_cost(
    size: ModelSize,
    studies: StudySizes,
    *,
    layers: int,
    d_sae: int,
    roles: Any,
    stored: bool,
    batch_size: int = 4,
) -> Cost:
    """Estimate the cost of `latents`: two passes over the rows, from a store or through the model."""
    rows = studies.rows(roles)
    sae = 2 * size.width * d_sae * 4
    encode = 4.0 * size.width * d_sae * rows
    chunk = int(studies.lengths.max()) * batch_size
    # Rows are encoded; then decoder rows are multiplied with the unembedding, 512 at once.
    device = sae + max(4096 * d_sae * 4, size.readout() + 512 * size.config.text_config.vocab_size * 4)
    flops = encode
    if not stored:
        device += size.weights(layers) + size.work(chunk)
        flops += 2 * _forward(size, studies, layers)
    note = (
        "rows come from the store; the model's tokenizer, final norm and head are read"
        if stored
        else f"the model runs twice over {studies.studies:,} studies; with --store it does not run"
    )
    return Cost("latents", device, None, None, flops, (f"{rows:,.0f} rows", note))


def steer_cost(
    size: ModelSize,
    studies: StudySizes,
    *,
    layers: int,
    d_sae: int,
    steered: int,
    reports: int,
    max_new_tokens: int,
) -> Cost:
    """Estimate the cost of `steer`: prompts once up to the hook point, and the upper layers once per report.

    Args:
        size: Sizes of the model.
        studies: Sizes of the table's studies.
        layers: Number of decoder layers up to the hook point.
        d_sae: Number of latents of the SAE and of its controls together.
        steered: Number of studies that are steered.
        reports: Number of reports that are generated.
        max_new_tokens: Length of a report.
    """
    length = float(studies.lengths.mean())
    longest = int(studies.lengths.max()) + max_new_tokens
    squares = float((studies.lengths.astype(float) ** 2).mean())
    images = float(studies.images.mean())
    flops = steered * size.flops(length, images, squares, layers)
    flops += reports * size.flops(length + max_new_tokens, 0, squares, size.layers - layers, max_new_tokens)
    flops += reports * max_new_tokens * 2.0 * size.layer_parameters * layers
    scores = 20 * max_new_tokens * size.config.text_config.vocab_size
    one = size.cache(longest) + size.work(longest) + scores
    gradient = size.graph(int(studies.lengths.max()), size.layers - layers)
    device = size.weights() + 2 * size.width * d_sae * 4 + max(one, gradient)
    notes = (
        f"about {reports:,} reports; one report of the longest study needs {_gb(one)} next to weights and SAE",
        f"latents are ranked by a gradient, one study at a time: {_gb(gradient)}; not with --records",
        "memory above that is used for larger batches, up to half of what is free",
        "decoding is bound by memory bandwidth at small batches: expect more time than estimated from FLOPs",
    )
    return Cost("steer", device, None, None, flops, notes)


def _forward(size: ModelSize, studies: StudySizes, layers: int) -> float:
    lengths = studies.lengths.astype(float)
    return studies.scale * size.flops(lengths.sum(), studies.images.sum(), (lengths**2).sum(), layers)


def _gb(number: float | None) -> str:
    if number is None:
        return "not estimated"
    return f"{number / 1e9:,.2f} GB" if number < 1e12 else f"{number / 1e12:,.2f} TB"


def _time(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.1f} s"
