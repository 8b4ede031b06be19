"""`lorasrv merge`: an adapter and its base as one model folder."""

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorasrv.cli.console import print_error, print_json, print_table, say, show_progress
from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.exit_codes import ExitCode, exit_code_for
from lorasrv.cli.layers import add_flags
from lorasrv.errors import MergeError, MergeRefusedError
from lorasrv.merge.config import MergeConfig

if TYPE_CHECKING:
    from lorasrv.merge.app import Outcome

_FIGURES = ("module", "size", "kept", "error")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "merge",
        help="write adapters and their base as one model, or as one adapter",
        description="Add an adapter's update to its base's weights, and write the result as a Hugging Face folder; or "
        "combine several adapters, each with a weight, into a model or into one more adapter.",
        allow_abbrev=False,
    )
    add_flags(parser, MergeConfig)
    parser.add_argument("--config", metavar="FILE", default=None, help="A YAML file whose keys are these flags.")
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Merge, and report what was written."""
    config = resolve_from_process(MergeConfig, arguments)
    # torch comes with this
    from lorasrv.merge.advice import advice
    from lorasrv.merge.app import merge

    try:
        with show_progress("merging") as progress:
            outcome = merge(config, progress=progress)
    except MergeError as error:
        _show_failure(error, as_json=arguments.json)
        return exit_code_for(error) or ExitCode.FAILURE
    if arguments.json:
        print_json({"merged": True, **outcome.summary()})
        return ExitCode.OK
    if config.output == "adapter":
        _show_adapter(outcome)
        base = f"{config.base} " if config.base else ""
        say(f"to serve it: lorasrv serve {base}--adapter {outcome.folder.name}={outcome.folder}")
        return ExitCode.OK
    record = outcome.record
    _show_modules([tuple(one[figure] for figure in _FIGURES) for one in record["modules"]])
    for line in advice(record):
        say(line)
    say(f"to serve it: lorasrv serve {outcome.folder}")
    return ExitCode.OK


def _show_adapter(outcome: "Outcome") -> None:
    rows = [
        (figures["module"], str(figures["rank"]), f"{100 * figures['energy']:.2f} %", f"{figures['error']:.1e}")
        for figures in outcome.record["modules"]
    ]
    print_table(("module", "rank", "energy kept", "error"), rows)


def _show_failure(error: MergeError, *, as_json: bool) -> None:
    figures = error.figures if isinstance(error, MergeRefusedError) else ()
    if as_json:
        modules = [dict(zip(_FIGURES, one, strict=True)) for one in figures]
        print_json({"merged": False, "reasons": error.reasons, "modules": modules})
        return
    if figures:
        _show_modules(figures)
    print_error(error)


def _show_modules(modules: Sequence[tuple[Any, ...]]) -> None:
    rows = [(name, *(f"{100 * figure:.2f} %" for figure in figures)) for name, *figures in modules]
    print_table(("module", "update / weight", "update kept", "error / update"), rows)
