"""`lorasrv demo`: the embedded base and its adapters answering one mixed batch."""

import argparse
from pathlib import Path

from lorasrv.cli.console import print_json, say
from lorasrv.cli.environment import environment_without_settings
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.settings import folder, pair


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "demo",
        help="see several adapters answer out of one batch",
        description="Start a server on the embedded base model, load its adapters while it runs, send one mixed "
        "batch through gRPC, and show who answered what.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--adapter",
        metavar="ID=DIR",
        type=_named_folder,
        action="append",
        default=[],
        help="An adapter of the embedded base to show too, under the id of an embedded one in its place. Repeatable.",
    )
    parser.add_argument("--keep", action="store_true", help="Leave the server running until Ctrl-C.")
    parser.add_argument("--json", action="store_true", help="Write the answers as JSON.")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="Where the model runs.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the demo and write its report to stdout."""
    from lorasrv.demo.app import embedded_demo, run_demo
    from lorasrv.demo.display import print_report

    config = embedded_demo(
        device=arguments.device,
        environ=environment_without_settings(),
        keep=arguments.keep,
        adapters=dict(arguments.adapter),
    )
    run_demo(
        config,
        say=say,
        show_report=(lambda report: print_json(report.as_json())) if arguments.json else print_report,
    )
    return ExitCode.OK


def _named_folder(text: str) -> tuple[str, Path]:
    try:
        adapter_id, source = pair(text)
        path = folder(source).resolve()
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{source} is not a folder")
    return adapter_id, path
