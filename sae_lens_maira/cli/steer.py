"""`sae-lens-maira steer`: steer one finding of the phantom by several methods, beside controls.

Latents are chosen and strengths tuned on the patients of one half, and effects are counted on those of the other. It
composes rooms and computes nothing of its own.
"""

import json
import sys
from pathlib import Path


def steer(
    sae: Path,
    finding: str = "cardiomegaly",
    out: Path = Path("steer_out"),
    studies: int = 600,
    steered: int = 32,
    n_latents: int = 16,
    strengths: tuple[float, ...] = (1.0, 2.0, 3.0),
    remove: bool = False,
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Steer a finding into phantom reports (or out of them) by latents, and show what else it changes.

    Example: sae-lens-maira steer --sae quickstart_out/sae_image --finding cardiomegaly --out steer_out

    Args:
        sae: folder of an SAE of the phantom, trained with image positions.
        finding: what to put into reports, or to take out of them.
        out: folder of the page (index.html), the Parquet tables and the figure; made if missing.
        studies: phantom studies from which latents are chosen.
        steered: studies of each half that are steered.
        n_latents: latents a method uses.
        strengths: the sweep of maps; other methods have their own.
        remove: take the finding out of reports that have it.
        seed: of everything that is drawn: phantom studies, halves and controls.
        as_json: print the summary as JSON instead of a table.
    """
    from sae_lens_maira.activations import harvest_rows
    from sae_lens_maira.cli.steering_learned import encoder_of, learn
    from sae_lens_maira.cli.steering_methods import Bench
    from sae_lens_maira.cli.steering_subjects import MAX_NEW_TOKENS, Subjects
    from sae_lens_maira.errors import InterventionError
    from sae_lens_maira.phantom import FINDING_KEYS, load_phantom, read_report
    from sae_lens_maira.sae import load_matryoshka
    from sae_lens_maira.steering.evaluate import evaluate_steering
    from sae_lens_maira.steering.page import write_page

    if finding not in FINDING_KEYS:
        raise InterventionError(
            f"There is no finding {finding!r}; the phantom has {', '.join(FINDING_KEYS)}."
        )
    maira, dictionary = load_phantom(), load_matryoshka(sae)
    hook_name = dictionary.cfg.metadata.hook_name
    if not hook_name:
        raise InterventionError("The SAE's metadata name no hook point; train it with one.")
    subjects = Subjects(maira, studies, hook_name, seed, pool=(8 * steered, 8 * steered))
    rows = harvest_rows(maira, subjects.studies, hook_name, roles="image_only")
    learned = learn(
        rows,
        encoder_of(dictionary),
        subjects.studies,
        subjects.truth,
        subjects.halves.choose,
        maira,
        findings=(finding,),
    )
    bench = Bench(dictionary, learned, n_latents, seed=seed, strengths=strengths)
    has, lacks = ([finding], []) if remove else ([], [finding])
    choose, report = (subjects.pick(half, has, lacks, steered) for half in ("choose", "report"))
    tables = evaluate_steering(
        maira,
        dictionary,
        hook_name,
        bench.removal(finding) if remove else bench.insertion(finding),
        choose,
        report,
        finding,
        lambda text: read_report(text).present,
        FINDING_KEYS,
        remove=remove,
        p99=learned.p99,
        max_new_tokens=MAX_NEW_TOKENS,
        seed=seed,
        prompts=subjects.prompts,
    )
    tables.save(out)
    write_page(out, finding, [subjects.study(number) for number in report])
    shown = tables.summary.loc[
        :, ["method", "strength", "n", "on_target", "off_target", "kl", "perplexity", "repetition", "length"]
    ]
    if as_json:
        sys.stdout.write(json.dumps(tables.summary.to_dict("records")) + "\n")
    else:
        sys.stdout.write(shown.to_string(index=False, float_format=lambda x: f"{x:.3f}") + f"\n{out}\n")
