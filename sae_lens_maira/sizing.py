"""Estimate memory, disk and time of a command before it runs, from a model's configuration and a table's studies.

    tokens      counted: every prompt is built and tokenized (or a sample of them), no image is opened
    bytes       of tensors that the code allocates: weights, one layer's work, keys and values, rows, shards
    FLOPs       2 per weight and token, plus attention; time = FLOPs / (0.4 x the GPU's dense bfloat16 peak)

Bytes follow from shapes. A test compares the memory of one layer and of a gradient with the tensors that the published
decoder allocates. Times are computed and not measured: 0.4 of the peak is an assumption.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from sae_lens_maira.activations.sampling import role_rates
from sae_lens_maira.maira2 import Maira2Config, TokenRole
from sae_lens_maira.maira2.tokenization import append_reports, tokenize_prompts
from sae_lens_maira.token_roles import LAST_IMAGE_PRESET

GPUS: dict[str, float] = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "L40S": 362e12}
"""Dense bfloat16 peak by NVIDIA's data sheets, FLOPs per second."""
EFFICIENCY = 0.4
SAMPLE = 200
"""Number of studies that are tokenized, as a sample of all."""


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


@dataclass(frozen=True)
class ModelSize:
    """Sizes of a model, from its configuration.

    Attributes:
        config: Configuration of the model.
        bytes_per_number: 2 for bfloat16 and float16, 4 for float32.
    """

    config: Maira2Config
    bytes_per_number: int = 2

    @property
    def _text(self) -> Any:
        return self.config.text_config

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return int(self._text.num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self._text.hidden_size)

    @property
    def layer_parameters(self) -> int:
        """Number of parameters of one decoder layer."""
        d, heads = self.width, self._text.num_attention_heads
        kv = d // heads * (self._text.num_key_value_heads or heads)
        return 2 * d * d + 2 * d * kv + 3 * d * self._text.intermediate_size + 2 * d

    @property
    def image_parameters(self) -> int:
        """Number of parameters of the vision tower and the projector."""
        vision = self.config.vision_config
        v, n = vision.hidden_size, vision.num_hidden_layers
        ratio = int(vision.mlp_ratio)
        tower = n * ((4 + 2 * ratio) * v * v + (11 + ratio) * v)
        embeddings = v * (self.patches + 6 + 3 * vision.patch_size**2)
        linears = self.config.projector_n_layers
        projector = v * self.width + (linears - 1) * self.width**2 + linears * self.width
        return tower + embeddings + projector

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return self.config.patches_per_side**2

    def weights(self, layers: int | None = None) -> int:
        """Bytes of the weights with the first `layers` decoder layers; None for all."""
        layers = self.layers if layers is None else layers
        numbers = layers * self.layer_parameters + self.image_parameters + self.width
        return (numbers + 2 * self._text.vocab_size * self.width) * self.bytes_per_number

    def work(self, tokens: int) -> int:
        """Bytes that one layer needs for a batch with this number of positions: residual stream, its copies and the
        MLP.
        """
        return tokens * (6 * self.width + 3 * self._text.intermediate_size) * self.bytes_per_number

    def graph(self, tokens: int, layers: int) -> int:
        """Bytes that autograd keeps for some layers with frozen weights, and for the last layer's backward pass."""
        mlp = 3 * self._text.intermediate_size
        return tokens * (layers * (9 * self.width + mlp) + 5 * self.width + mlp) * self.bytes_per_number

    def readout(self) -> int:
        """Bytes of the unembedding in float32, and of its copy while it is scaled."""
        return 2 * self._text.vocab_size * self.width * 4

    def cache(self, tokens: int) -> int:
        """Bytes of the keys and values of all layers for this number of positions."""
        heads = self._text.num_attention_heads
        kv = self.width // heads * (self._text.num_key_value_heads or heads)
        return 2 * tokens * self.layers * kv * self.bytes_per_number

    def flops(self, tokens: float, images: float, squares: float, layers: int, logits: float = 0) -> float:
        """Number of floating-point operations of a forward.

        Args:
            tokens: Total number of positions.
            images: Total number of images.
            squares: Sum over studies of the squared number of positions.
            layers: Number of decoder layers that run.
            logits: Number of positions whose logits are computed.
        """
        vision = self.config.vision_config
        tower = 2 * self.image_parameters * self.patches + 4 * vision.num_hidden_layers * (
            self.patches**2 * vision.hidden_size
        )
        decoder = layers * (2 * self.layer_parameters * tokens + 2 * squares * self.width)
        return images * tower + decoder + 2 * logits * self._text.vocab_size * self.width


@dataclass(frozen=True)
class StudySizes:
    """Sizes of a table's studies.

    Attributes:
        studies: Number of studies in the table.
        images: (n,) number of images of each sampled study.
        roles: (n, roles) number of tokens by role of each sampled study, including the report.
    """

    studies: int
    images: np.ndarray
    roles: np.ndarray

    @classmethod
    def count(cls, processor: Any, config: Maira2Config, studies: Sequence[Any]) -> "StudySizes":
        """Build and tokenize the prompts of an even sample of studies; images are not opened."""
        chosen = np.linspace(0, len(studies) - 1, min(len(studies), SAMPLE)).round().astype(int)
        images, roles = [], []
        for number in chosen:
            study = studies[int(number)]
            prompt = processor.build_prompt(study)
            rows = tokenize_prompts(
                processor.tokenizer, [prompt], processor.image_token_id, config.patches_per_side
            )
            if study.report:
                rows = append_reports(processor.tokenizer, rows, [study.report])
            images.append(len(prompt.images))
            roles.append(np.bincount(rows[0].roles, minlength=len(TokenRole)))
        return cls(len(studies), np.array(images), np.array(roles))

    @property
    def scale(self) -> float:
        """Number of studies in the table per sampled study."""
        return self.studies / len(self.images)

    @property
    def lengths(self) -> np.ndarray:
        """(n,) number of positions of each sampled study."""
        return self.roles.sum(1)

    def sources(self, reports: str, max_new_tokens: int) -> dict[str, "StudySizes"]:
        """Make the sizes of each source of rows, which differ in the text after the prompt.

        Args:
            reports: As in `RowSettings`: "teacher", "generated", "both" or "prompt".
            max_new_tokens: Assumed length of a generated report.
        """
        names = ("teacher", "generated") if reports == "both" else (reports,)
        lengths = {"generated": max_new_tokens, "prompt": 0}
        found = {}
        for name in names:
            roles = self.roles.copy()
            if name in lengths:
                roles[:, TokenRole.REPORT] = lengths[name]
            found[name] = replace(self, roles=roles)
        return found

    def rows(self, roles: Any, rates: Mapping[str, float] | None = None) -> float:
        """Expected number of rows of the whole table that a filter keeps."""
        kept = role_rates(roles, rates)
        counted = sum(self.roles[:, role].sum() * rate for role, rate in kept.items())
        if roles == LAST_IMAGE_PRESET:  # the last token of each image, regardless of sampling
            counted += self.images.sum() * (1 - kept.get(TokenRole.IMAGE, 0.0))
        return float(counted * self.scale)


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
