"""The demo from beginning to end: server up, conversation, report, server down."""

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorasrv_client.errors import CancelledError, UnavailableError

from lorasrv.demo.display import progress_display
from lorasrv.demo.errors import NoAdaptersError
from lorasrv.demo.process import ServerProcess, signals_unwind
from lorasrv.demo.session import Report, converse
from lorasrv.embedded import embedded_adapter_root, embedded_adapters


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoConfig:
    """What the demo runs.

    Attributes:
        command: The server's program and arguments.
        environ: The server's whole environment.
        adapters: The adapters to load, by id.
        keep: Leave the server running after the report, until Ctrl-C.
    """

    command: Sequence[str]
    environ: Mapping[str, str]
    adapters: Mapping[str, Path]
    keep: bool = False


def embedded_demo(
    *, device: str, environ: Mapping[str, str], keep: bool, adapters: Mapping[str, Path] | None = None
) -> DemoConfig:
    """The demo of the embedded base and adapters, on free ports of this machine.

    Args:
        device: Where the model runs.
        environ: The server's whole environment.
        keep: Leave the server running after the report, until Ctrl-C.
        adapters: Folders of more adapters, by id; one with an embedded adapter's id stands in its place.

    Raises:
        NoAdaptersError: The package carries none.
    """
    embedded, own = embedded_adapters(), dict(adapters or {})
    if not embedded:
        raise NoAdaptersError(embedded_adapter_root())
    options = [("--port", "0"), ("--metrics-port", "0"), ("--device", device)]
    options += [("--adapter-root", str(root)) for root in (embedded_adapter_root(), *own.values())]
    flags = [word for option in options for word in option]
    return DemoConfig(
        command=(sys.executable, "-m", "lorasrv", "serve", *flags),
        environ=environ,
        adapters=embedded | own,
        keep=keep,
    )


def run_demo(config: DemoConfig, *, say: Callable[[str], None], show_report: Callable[[Report], None]) -> None:
    """Run the demo; must be called on the main thread. Whatever happens, the server is gone afterwards.

    Args:
        config: What to run.
        say: Is given lines of progress.
        show_report: Is given the report, before the server is kept or ended.

    Raises:
        ServerEndedError: The server did not come up, or died.
        ClientError: A request failed.
    """
    say("starting a server on the embedded base model")
    with signals_unwind(), ServerProcess(config.command, environ=config.environ) as server:
        say(f"the server listens on {server.target}")
        try:
            with progress_display() as display:
                report = asyncio.run(converse(server.target, config.adapters, display))
        except (UnavailableError, CancelledError):
            if server.is_running():
                raise
            raise server.ended_error() from None
        show_report(report)
        if config.keep:
            _keep(server, config, say)


def _keep(server: ServerProcess, config: DemoConfig, say: Callable[[str], None]) -> None:
    adapter_id = next(iter(config.adapters))
    say(f"the server stays at {server.target} until Ctrl-C; talk to it with")
    say(f'  lorasrv generate --server {server.target} --adapter {adapter_id} --stream "The sea"')
    say(f"  lorasrv adapters ls --server {server.target}")
    try:
        server.wait()
    except KeyboardInterrupt:
        say("stopping the server")
