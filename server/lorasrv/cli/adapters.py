"""`lorasrv adapters ls|show|load|unload`: the adapters of a running server."""

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from lorasrv.cli.console import print_columns, print_json, print_table
from lorasrv.cli.environment import resolve_from_process
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.cli.layers import add_flags
from lorasrv.config import HUB_PREFIX, ConnectConfig
from lorasrv.settings import pair

if TYPE_CHECKING:
    from lorasrv_client import Client
    from lorasrv_client.types import Adapter

Action = Callable[["Client", argparse.Namespace, float | None], None]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command and its four actions to the command line."""
    text = "list, show, load and unload adapters of a running server"
    parser = commands.add_parser("adapters", help=text, description=text.capitalize() + ".", allow_abbrev=False)
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)

    _add_action(actions, "ls", "list all adapters", _list)

    show = _add_action(actions, "show", "show one adapter", _show)
    show.add_argument("adapter_id", metavar="ID", help="The adapter's id.")

    load = _add_action(actions, "load", "load an adapter while the server works", _load)
    load.add_argument(
        "adapter",
        metavar="ID=SOURCE",
        type=_pair,
        help="The id, and a folder below one of the server's adapter roots or hf:org/name@revision.",
    )
    load.add_argument("--replace", action="store_true", help="Put it in the place of other weights under this id.")
    load.add_argument("--digest", metavar="HEX", default="", help="Refuse it unless its digest begins so.")

    unload = _add_action(actions, "unload", "withdraw an adapter; running requests finish", _unload)
    unload.add_argument("adapter_id", metavar="ID", help="The adapter's id.")
    unload.add_argument("--if-idle", action="store_true", help="Refuse while any request holds it.")


def run(arguments: argparse.Namespace) -> int:
    """Do the action against the server."""
    config = resolve_from_process(ConnectConfig, arguments)
    from lorasrv_client import Client

    with Client(config.server) as client:
        arguments.action(client, arguments, config.timeout_seconds)
    return ExitCode.OK


def ranks_text(min_rank: int, max_rank: int) -> str:
    """`8`, or `2-12` where the modules differ."""
    return str(max_rank) if min_rank == max_rank else f"{min_rank}-{max_rank}"


def _add_action(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str, action: Action
) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text.capitalize() + ".", allow_abbrev=False)
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    add_flags(parser, ConnectConfig)
    parser.set_defaults(run=run, action=action)
    return parser


def _list(client: "Client", arguments: argparse.Namespace, timeout_seconds: float | None) -> None:
    adapters = list(client.list_adapters(timeout_seconds=timeout_seconds))
    if arguments.json:
        print_json({"adapters": [asdict(adapter) for adapter in adapters]})
        return
    rows = [
        (
            adapter.adapter_id,
            adapter.kind,
            ranks_text(adapter.min_rank, adapter.max_rank),
            str(adapter.num_modules),
            f"{adapter.num_bytes / 1024**2:.1f} MiB",
            str(adapter.num_in_use),
            adapter.digest[:12],
        )
        for adapter in adapters
    ]
    print_table(("adapter", "kind", "ranks", "modules", "size", "in use", "digest"), rows)


def _show(client: "Client", arguments: argparse.Namespace, timeout_seconds: float | None) -> None:
    _write(client.get_adapter(arguments.adapter_id, timeout_seconds=timeout_seconds), arguments)


def _load(client: "Client", arguments: argparse.Namespace, timeout_seconds: float | None) -> None:
    adapter_id, source = arguments.adapter
    adapter = client.load_adapter(
        adapter_id,
        _absolute(source),
        replace=arguments.replace,
        expected_digest=arguments.digest,
        timeout_seconds=timeout_seconds,
    )
    _write(adapter, arguments)


def _unload(client: "Client", arguments: argparse.Namespace, timeout_seconds: float | None) -> None:
    adapter = client.unload_adapter(arguments.adapter_id, if_idle=arguments.if_idle, timeout_seconds=timeout_seconds)
    _write(adapter, arguments)


def _write(adapter: "Adapter", arguments: argparse.Namespace) -> None:
    if arguments.json:
        print_json(asdict(adapter))
    else:
        print_columns(("field", "value"), [(name, str(value)) for name, value in asdict(adapter).items()])


def _absolute(source: str) -> str:
    """A folder that exists here, as an absolute path; the server has another working folder."""
    path = Path(source).expanduser()
    return str(path.resolve()) if not source.startswith(HUB_PREFIX) and path.is_dir() else source


def _pair(text: str) -> tuple[str, str]:
    try:
        return pair(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
