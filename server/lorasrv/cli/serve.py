"""`lorasrv serve`: run a server until it is told to stop."""

import argparse

from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.layers import add_flags
from lorasrv.config import ServeConfig


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "serve",
        help="serve a base model and its adapters over gRPC",
        description="Serve a base model and its adapters over gRPC, until SIGTERM or Ctrl-C.",
        allow_abbrev=False,
    )
    add_flags(parser, ServeConfig)
    parser.add_argument("--config", metavar="FILE", default=None, help="A YAML file whose keys are these flags.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to stop; the server knows the exit status."""
    config = resolve_from_process(ServeConfig, arguments)
    # torch comes with these; a wrong flag should not wait for it
    from lorasrv.logs import configure_logging
    from lorasrv.rpc.app import serve

    configure_logging(format=config.log_format, level=config.log_level)
    return serve(config)
