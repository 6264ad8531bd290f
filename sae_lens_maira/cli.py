"""The command line: `sae-lens-maira COMMAND --help` says what each command does.

Results go to stdout, progress to stderr. Errors that a user can mend are one paragraph on stderr and exit code 2;
anything else is a fault of ours and shows its traceback. Every command's options are the arguments of one function
below; a YAML file of them can be given with `--config`. Heavy modules are imported when their command runs.
"""

import difflib
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import sys
import textwrap
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from sae_lens_maira import __version__, commands
from sae_lens_maira.errors import MairaError

HELP_WIDTH = 110


def quickstart(
    out: Path = Path("quickstart_out"),
    studies: int = 1200,
    layer: int = 3,
    finding: str = "cardiomegaly",
    seed: int = 0,
    as_json: bool = False,
) -> None:
    """Train a Matryoshka SAE on the phantom and show what it found, in about five minutes.

    Example: sae-lens-maira quickstart --out quickstart_out

    Args:
        out: folder of the report; made if missing.
        studies: phantom studies to read.
        layer: decoder layer whose output is read and steered, 0 to 7.
        finding: finding to steer into reports that do not have it.
        seed: of everything that is drawn.
        as_json: print the main figures as JSON instead of the report's path.
    """
    from sae_lens_maira.quickstart import QuickstartConfig, run_quickstart
    from sae_lens_maira.quickstart.report import summary

    config = QuickstartConfig(out=out, studies=studies, layer=layer, finding=finding, seed=seed)
    result = run_quickstart(config)
    _say(json.dumps(summary(result)) if as_json else str(result.folder / "report.md"))


def measure_phantom(
    studies: int = 500, seed: int = 10_000, model: Path | None = None, as_json: bool = False
) -> None:
    """Measure what the phantom can do: findings, change words and boxes on held-out studies.

    Example: sae-lens-maira measure-phantom --studies 500

    Args:
        studies: held-out studies.
        seed: of the studies; the phantom was trained on seed 0.
        model: folder of another phantom; the shipped one if not given.
        as_json: print JSON instead of a table.
    """
    from dataclasses import asdict

    import torch

    from sae_lens_maira.maira2 import load_maira2
    from sae_lens_maira.phantom import generate_studies, load_phantom
    from sae_lens_maira.phantom.measure import measure

    maira = load_phantom() if model is None else load_maira2(model, dtype=torch.float32)
    score = measure(maira, generate_studies(studies, seed=seed))
    if as_json:
        _say(json.dumps(asdict(score) | {"mean_accuracy": score.mean_accuracy}))
        return
    _say(score.to_frame().to_string(float_format=lambda x: f"{x:.3f}"))
    _say(f"mean accuracy {score.mean_accuracy:.3f} (n = {score.n}, greedy)")
    _say(f"change words {score.change_accuracy:.3f} (n = {score.n_changes})")
    _say(f"grounded boxes, mean IoU {score.box_iou:.3f} (n = {score.n_boxes})")
    _say(f"reports that ended by themselves {score.complete:.3f}")


def evaluate(
    sae: Path,
    model: str = "phantom",
    studies: int = 100,
    seed: int = 10_000,
    hook: str | None = None,
    as_json: bool = False,
) -> None:
    """Judge an SAE: explained variance, L0, dead latents and loss recovered, per level and role.

    Example: sae-lens-maira evaluate --sae quickstart_out/sae_text --studies 100

    Args:
        sae: folder of the SAE.
        model: the model it was trained on: "phantom", a folder or a hub id.
        studies: phantom studies to read.
        seed: of the studies; the phantom was trained on seed 0.
        hook: hook point, if the SAE does not name its own.
        as_json: print JSON instead of tables.
    """
    import torch

    from sae_lens_maira.commands.evaluate import evaluate as run
    from sae_lens_maira.maira2 import load_maira2
    from sae_lens_maira.phantom import generate_studies, load_phantom

    maira = load_phantom() if model == "phantom" else load_maira2(model, dtype=torch.float32)
    side = maira.processor.recipe.crop
    tables = run(maira, sae, generate_studies(studies, seed=seed, size=side), hook)
    if as_json:
        _say(json.dumps({"rows": tables.rows.to_dict("records"), "splice": tables.splice.to_dict("records")}))
        return
    for name, table in (("reconstruction", tables.rows), ("spliced into the model", tables.splice)):
        _say(f"{name} at {tables.hook_name}, {tables.n_studies} studies")
        _say(table.to_string(index=False, float_format=lambda x: f"{x:.4g}"))


def _discover() -> dict[str, Callable[..., None]]:
    """Commands of this file and of every module of `commands` that has a table `COMMANDS` of its own.

    A name of two words, such as "studies import", is a command of a group.
    """
    found: dict[str, Callable[..., None]] = {
        "quickstart": quickstart,
        "evaluate": evaluate,
        "measure-phantom": measure_phantom,
    }
    for module in sorted(
        pkgutil.iter_modules(commands.__path__, f"{commands.__name__}."), key=lambda m: m.name
    ):
        if _has_table(module.name):
            found |= importlib.import_module(module.name).COMMANDS
    return found


def _has_table(module: str) -> bool:
    """Whether a module sets `COMMANDS`: asked of its code, so that compositions with heavy imports stay unloaded."""
    spec = importlib.util.find_spec(module)
    code = getattr(spec and spec.loader, "get_code", lambda _: None)(module)
    return code is not None and "COMMANDS" in code.co_names


COMMANDS: dict[str, Callable[..., None]] = _discover()


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Descriptions keep their lines, words keep their hyphens, and the width is one and the same everywhere.

    argparse asks the terminal for its width and breaks at hyphens, which makes "sae-" and "lens-maira" of a command
    that someone wants to copy.
    """

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **({"max_help_position": 28} | settings | {"width": HELP_WIDTH}))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False, break_long_words=False)


class _Parser(ArgumentParser):
    """jsonargparse's parser, which also names the option that an unknown one may have meant.

    Every parser must get the formatter: a subcommand takes its parent's when it is added.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **({"formatter_class": _Formatter} | kwargs))

    def error(self, message: str, *args: Any, **kwargs: Any) -> NoReturn:
        unknown = re.search(r"(?:unrecognized arguments: |Key ')(-*[\w.-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            wanted = "--" + unknown.group(1).lstrip("-")
            close = difflib.get_close_matches(wanted, known, n=1)
            message += f" Did you mean {close[0]}?" if close else ""
        super().error(message, *args, **kwargs)
        raise SystemExit(2)  # never reached: the parser exits


def build_parser() -> ArgumentParser:
    """The parser of all commands."""
    parser = _Parser(prog="sae-lens-maira", description="MAIRA-2 under SAELens.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    top = parser.add_subcommands(metavar="COMMAND")
    groups: dict[str, dict[str, ArgumentParser]] = {}
    for name, function in COMMANDS.items():
        about = inspect.getdoc(function) or ""
        command = _Parser(description=about.split("\nArgs:")[0].strip())
        command.add_argument("--config", action="config", help="YAML file with any of the options below")
        command.add_function_arguments(function, as_group=False, skip={"as_json"})
        if "as_json" in inspect.signature(function).parameters:
            command.add_argument("--json", action="store_true", help="print JSON instead of text")
        group, _, word = name.partition(" ")
        if word:
            groups.setdefault(group, {})[word] = command
        else:
            top.add_subcommand(name, command, help=about.splitlines()[0])
    for group, members in groups.items():
        words = ", ".join(members)
        outer = _Parser(description=f"One of: {words}. `{group} WORD --help` says more.")
        top.add_subcommand(group, outer, help=f"one of: {words}")
        inner = outer.add_subcommands(metavar="WORD")  # jsonargparse wants the outer level added first
        for word, command in members.items():
            inner.add_subcommand(word, command, help=(command.description or "").splitlines()[0])
    top.add_subcommand("bench", _Parser(), help="Time one training step against SAELens: bench step --help")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: the words after the program's name; those of the process if not given.

    Returns:
        0, or 2 if the user can mend what went wrong.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words[:1] == ["bench"]:
        return _bench(words[1:])
    parser = build_parser()
    options = parser.parse_args(words)
    name, chosen = options.subcommand, dict(vars(options[options.subcommand]))
    if "subcommand" in chosen:
        word = chosen["subcommand"]
        name, chosen = f"{name} {word}", dict(vars(chosen[word]))
    chosen.pop("config", None)
    if "json" in chosen:
        chosen["as_json"] = chosen.pop("json")
    try:
        COMMANDS[name](**chosen)
    except MairaError as error:
        sys.stderr.write(f"sae-lens-maira {name}: {error}\n")
        return 2
    return 0


def _bench(words: list[str]) -> int:
    """Benchmarks have parsers of their own: they also run as scripts, where jsonargparse is not wanted."""
    if words[:1] != ["step"]:
        sys.stderr.write(
            f"sae-lens-maira bench: {' '.join(words) or 'nothing'} is no benchmark; try bench step --help.\n"
        )
        return 2
    from sae_lens_maira.training.benchmark import main as step

    return step(words[1:])


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")


__all__ = ["COMMANDS", "build_parser", "main"]

if __name__ == "__main__":
    sys.exit(main())
