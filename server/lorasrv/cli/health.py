"""`lorasrv health`: whether a server lives, or takes requests; for people, scripts and container health checks."""

import argparse

from lorasrv.cli.console import print_json
from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.cli.layers import add_flags
from lorasrv.config import ConnectConfig

_TIMEOUT_SECONDS = 5.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "health",
        help="ask whether a server is live or ready",
        description="Ask whether a server is live or ready; exit status 5 if it is not, or does not answer.",
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--live", dest="service", action="store_const", const="live", help="Whether it works at all.")
    which.add_argument(
        "--ready", dest="service", action="store_const", const="ready", help="Whether it takes requests (default)."
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    add_flags(parser, ConnectConfig)
    parser.set_defaults(run=run, service="ready")


def run(arguments: argparse.Namespace) -> int:
    """Ask, and write what the server says."""
    config = resolve_from_process(ConnectConfig, arguments)
    from lorasrv_client import Client, ClientError
    from lorasrv_client.types import HealthStatus

    detail = ""
    with Client(config.server) as client:
        try:
            timeout_seconds = config.timeout_seconds or _TIMEOUT_SECONDS
            status = client.health(arguments.service, timeout_seconds=timeout_seconds)
        except ClientError as error:
            status, detail = HealthStatus.UNKNOWN, str(error)
    if arguments.json:
        print_json({"service": arguments.service, "status": status, "detail": detail})
    else:
        print(f"{arguments.service}: {status}" + (f" ({detail})" if detail else ""))
    return ExitCode.OK if status is HealthStatus.SERVING else ExitCode.UNAVAILABLE
