"""`lorasrv merge`: an adapter and its base as one model folder."""

import argparse

from lorasrv.cli.console import print_json, print_table, say, show_progress
from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.cli.layers import add_flags
from lorasrv.merge.config import MergeConfig


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "merge",
        help="write an adapter and its base as one model",
        description="Add an adapter's update to its base's weights, and write the result as a Hugging Face folder.",
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
    columns = ("module", "update", "kept", "error")
    rows = [
        (figures["module"], *(f"{100 * figures[key]:.2f} %" for key in ("size", "kept", "error")))
        for figures in outcome.record["modules"]
    ]
    print_table(columns, rows)
    say(f"to serve it: lorasrv serve {outcome.folder}")
    return ExitCode.OK
