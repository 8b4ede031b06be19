"""`lorasrv check`: whether an adapter would be served on a base, module by module, without a server."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from lorasrv.cli.console import print_error, print_json, print_table, say
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.settings import folder

if TYPE_CHECKING:
    from lorasrv_adapters.normalize import NormalizedAdapter


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "check",
        help="tell whether an adapter would be served, and why not",
        description="Tell whether an adapter would be served; if not, exit status 3 and every reason.",
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=folder, help="The adapter's folder.")
    parser.add_argument(
        "--base", metavar="BASE", help="The base model: a folder or a Hub id. Default: the embedded tiny model."
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read the adapter as a server would, and report."""
    # torch comes with these
    from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError

    try:
        adapter = _read(arguments.adapter, arguments.base)
    except (AdapterIncompatibleError, AdapterCorruptError) as error:
        if arguments.json:
            print_json({"served": False, "reasons": error.reasons})
        else:
            print_error(error)
        return ExitCode.INVALID
    _report(adapter, as_json=arguments.json)
    return ExitCode.OK


def _read(adapter: Path, base: str | None) -> "NormalizedAdapter":
    import torch
    from lorasrv_adapters.checkpoint import read_checkpoint

    from lorasrv.model.loader import load_model

    base_folder = _base_folder(base)
    say(f"reading {base_folder}")
    return read_checkpoint(adapter, load_model(base_folder, dtype=torch.float32).base)


def _base_folder(base: str | None) -> Path:
    from lorasrv.embedded import embedded_base
    from lorasrv.model.hub import model_folder

    return embedded_base() if base is None else model_folder(base)


def _report(adapter: "NormalizedAdapter", *, as_json: bool) -> None:
    modules = [
        {
            "module": name,
            "kind": adapter.kind,
            "rank": module.a.shape[0],
            "out_features": module.b.shape[0],
            "in_features": module.a.shape[1],
        }
        for name, module in adapter.modules.items()
    ]
    if as_json:
        names = ("digest", "kind", "base_model", "max_rank", "num_bytes")
        print_json({"served": True} | {name: getattr(adapter, name) for name in names} | {"modules": modules})
        return
    columns = ("module", "kind", "rank", "out_features", "in_features")
    print_table(columns, [tuple(str(module[column]) for column in columns) for module in modules])
    say(f"it would be served: {len(modules)} modules, {adapter.num_bytes} bytes, digest {adapter.digest[:12]}")
