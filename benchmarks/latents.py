"""Latent records against sae-dashboard on the same activations: `python benchmarks/latents.py --json`.

    ms per latent = seconds / latents       ours: both passes and the record set on disk, all latents
                                            theirs: `SaeVisRunner.run` alone, over activations in its cache

Rows of phantom studies at one hook point are held in memory for us and in the runner's cache for it, so neither
runs the model. CPU seconds of one thread, so that a busy machine counts less. sae-dashboard is asked in its own
settings; its time does not include writing.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
HOOK = "blocks.3.hook_resid_post"


def main() -> int:
    """Time both and print one table or one JSON object."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--studies", type=int, default=64)
    parser.add_argument("--d-sae", type=int, default=1024)
    parser.add_argument("--l0", type=float, default=8.0)
    parser.add_argument("--theirs", type=int, default=64, help="latents that sae-dashboard is asked for")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()

    import torch

    from sae_lens_maira.activations import RowSettings, read_rows
    from sae_lens_maira.phantom import generate_studies, load_phantom
    from sae_lens_maira.sae import MatryoshkaTrainingSAE, MatryoshkaTrainingSAEConfig, make_control

    torch.set_num_threads(1)
    maira = load_phantom()
    studies = generate_studies(options.studies, seed=10_000)
    rows = read_rows(maira, studies, HOOK, RowSettings(batch_size=16), progress=False)
    shape = MatryoshkaTrainingSAEConfig(
        d_in=rows.values.shape[1], d_sae=options.d_sae, k=8, matryoshka_widths=[options.d_sae], device="cpu"
    )
    shape.metadata.hook_name = HOOK
    sae = make_control("untrained", MatryoshkaTrainingSAE(shape), rows.values, l0=options.l0)
    result = {"studies": len(studies), "rows": len(rows), "d_sae": options.d_sae, "l0": options.l0}
    with tempfile.TemporaryDirectory() as scratch:
        ours = _ours(rows, studies, sae, maira, Path(scratch) / "records")
        theirs = _theirs(rows, studies, sae, maira, Path(scratch) / "cache", options.theirs)
    result |= {"ours_ms": 1e3 * ours / options.d_sae, "theirs_latents": options.theirs}
    result |= {"theirs_ms": None if theirs is None else 1e3 * theirs / options.theirs}
    result |= {"ratio": None if theirs is None else result["theirs_ms"] / result["ours_ms"]}
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return 0
    sys.stdout.write(
        f"{len(rows):,} rows of {len(studies)} studies, {options.d_sae} latents, L0 {options.l0}\n"
    )
    sys.stdout.write(f"record set      {result['ours_ms']:8.2f} ms of CPU per latent\n")
    if theirs is None:
        sys.stdout.write("sae-dashboard   not installed here\n")
        return 0
    sys.stdout.write(
        f"sae-dashboard   {result['theirs_ms']:8.2f} ms of CPU per latent ({options.theirs} latents)\n"
    )
    sys.stdout.write(f"ratio           {result['ratio']:8.1f}\n")
    return 0


def _ours(rows: object, studies: object, sae: object, maira: object, out: Path) -> float:
    from sae_lens_maira.latents.collect import CollectConfig, collect_records

    config = CollectConfig(keep_images=False, control="untrained")
    began = time.process_time()
    collect_records([[rows]], studies, sae, maira, out, config)  # pyright: ignore[reportArgumentType]: as main made
    return time.process_time() - began


def _theirs(
    rows: object, studies: object, sae: object, maira: object, cache: Path, latents: int
) -> float | None:
    try:
        from sae_dashboard.sae_vis_data import SaeVisConfig
        from sae_dashboard.sae_vis_runner import SaeVisRunner
    except ImportError:
        return None
    from sae_lens_maira.dashboards.prompts import Readout, plain_copy, write_prompts

    cache.mkdir()
    readout, names = Readout.of(maira), [study.study_id for study in studies]  # pyright: ignore[reportGeneralTypeIssues]
    copied = plain_copy(sae)  # pyright: ignore[reportArgumentType]: as main made
    prompts = write_prompts([[rows]], names, readout, copied.b_dec.detach(), cache, (12, 12), 8)  # pyright: ignore[reportArgumentType]
    config = SaeVisConfig(
        hook_point=prompts.hook_name,
        features=list(range(latents)),
        minibatch_size_features=64,
        minibatch_size_tokens=8,
        ignore_tokens=prompts.silent,
        cache_dir=cache,
    )
    model = prompts.model(readout)
    began = time.process_time()
    SaeVisRunner(config).run(encoder=copied, model=model, tokens=prompts.tokens)
    return time.process_time() - began


if __name__ == "__main__":
    sys.exit(main())
