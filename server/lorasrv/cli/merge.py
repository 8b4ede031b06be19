"""`lorasrv merge`: an adapter and its base as one model folder."""

import argparse
from typing import TYPE_CHECKING

from lorasrv.cli.console import print_json, print_table, say, show_progress
from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.cli.layers import add_flags
from lorasrv.merge.config import MergeConfig

if TYPE_CHECKING:
    from lorasrv.merge.app import Outcome


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
    from lorasrv.merge.app import merge

    with show_progress("merging") as progress:
        outcome = merge(config, progress=progress)
    if arguments.json:
        print_json(outcome.summary())
        return ExitCode.OK
    if config.output == "adapter":
        _report_adapter(outcome)
        base = f"{config.base} " if config.base else ""
        say(f"to serve it: lorasrv serve {base}--adapter {outcome.folder.name}={outcome.folder}")
        return ExitCode.OK
    columns = ("module", "update", "kept", "error")
    rows = [
        (figures["module"], *(f"{100 * figures[key]:.2f} %" for key in ("size", "kept", "error")))
        for figures in outcome.record["modules"]
    ]
    print_table(columns, rows)
    say(f"to serve it: lorasrv serve {outcome.folder}")
    return ExitCode.OK


def _report_adapter(outcome: "Outcome") -> None:
    rows = [
        (figures["module"], str(figures["rank"]), f"{100 * figures['energy']:.2f} %", f"{figures['error']:.1e}")
        for figures in outcome.record["modules"]
    ]
    print_table(("module", "rank", "energy kept", "error"), rows)
