"""`lorasrv check`: whether an adapter would be served on a base, module by module, without a server."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasrv.cli.console import print_error, print_json, print_table, say
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.settings import folder

if TYPE_CHECKING:
    import torch
    from lorasrv_adapters.base import BaseModel
    from lorasrv_adapters.normalize import NormalizedAdapter, NormalizedModule


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
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "bfloat16", "float16", "float32"),
        help="Of the server's activations, which the adapter is stored in. Default: auto.",
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Read the adapter as a server would, and report."""
    # torch comes with these
    from lorasrv_adapters.errors import AdapterCorruptError, AdapterIncompatibleError

    try:
        report = examine(arguments.adapter, read_base(arguments.base, arguments.dtype))
    except (AdapterIncompatibleError, AdapterCorruptError) as error:
        if arguments.json:
            print_json({"served": False, "reasons": error.reasons})
        else:
            print_error(error)
        return ExitCode.INVALID
    _show(report, as_json=arguments.json)
    return ExitCode.OK


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedBase:
    """A base as a server would hold it on a CPU.

    Attributes:
        name: as it was given; None for the embedded one.
        folder: where it is.
        base: its weights.
        dtype: of activations, which adapters are stored in.
    """

    name: str | None
    folder: Path
    base: "BaseModel"
    dtype: "torch.dtype"


def read_base(name: str | None, dtype_name: str) -> ServedBase:
    """Load a base to examine adapters on.

    Raises:
        ModelLoadError: it cannot be served.
    """
    import torch

    from lorasrv.embedded import embedded_base
    from lorasrv.model.device import resolve_dtype
    from lorasrv.model.hub import model_folder
    from lorasrv.model.loader import load_model

    folder = embedded_base() if name is None else model_folder(name)
    say(f"reading {folder}")
    dtype = resolve_dtype(dtype_name, torch.device("cpu"))
    return ServedBase(name=name, folder=folder, base=load_model(folder, dtype=dtype).base, dtype=dtype)


def examine(folder: Path, served: ServedBase) -> dict[str, Any]:
    """What there is to say about an adapter that would be served.

    Raises:
        AdapterIncompatibleError: it would not be.
        AdapterCorruptError: it is damaged.
    """
    from lorasrv_adapters.checkpoint import read_checkpoint
    from lorasrv_adapters.image import module_bytes, pack_image

    adapter = read_checkpoint(folder, served.base)
    image = pack_image(adapter, served.base, served.dtype)
    return {
        "served": True,
        "digest": adapter.digest,
        "kind": adapter.kind,
        "base_model": adapter.base_model,
        "max_rank": adapter.max_rank,
        "dtype": str(served.dtype).removeprefix("torch."),
        "num_bytes": image.num_bytes,
        "warnings": _warnings(adapter, served.name, served.folder),
        "modules": [
            {
                "module": name,
                "kind": _kind(adapter, module),
                "rank": module.rank,
                "scale": module.scale,
                "num_bytes": module_bytes(module, served.dtype),
            }
            for name, module in adapter.modules.items()
        ],
    }


def _kind(adapter: "NormalizedAdapter", module: "NormalizedModule") -> str:
    """What the adapter does to a module, e.g. "dora + bias"."""
    parts: list[str] = [adapter.kind] if module.scale is not None else []
    if module.bias is not None:
        parts.append("bias")
    if module.rows is not None:
        parts.append("weight" if module.rows.ids is None else f"{len(module.rows.ids)} rows")
    return " + ".join(parts)


def _warnings(adapter: "NormalizedAdapter", base: str | None, base_folder: Path) -> list[str]:
    """What does not keep the adapter from being served, but may be a mistake."""
    from lorasrv.embedded import embedded_base_name
    from lorasrv.model.config import read_json

    stated = read_json(base_folder / "config.json").get("_name_or_path")
    names = {base.partition("@")[0], base_folder.name, stated} if base else {embedded_base_name()}
    known = {str(name).rstrip("/").rpartition("/")[2].lower() for name in names if name}
    trained_on = adapter.base_model.rstrip("/").rpartition("/")[2].lower()
    if not trained_on or trained_on in known:
        return []
    return [f"its config names the base {adapter.base_model}, which may be another than {base or embedded_base_name()}"]


def _show(report: dict[str, Any], *, as_json: bool) -> None:
    for warning in report["warnings"]:
        say(f"warning: {warning}")
    if as_json:
        print_json(report)
        return
    columns = ("module", "kind", "rank", "scale", "bytes")
    rows = [
        (
            module["module"],
            module["kind"],
            "-" if module["scale"] is None else str(module["rank"]),
            "-" if module["scale"] is None else f"{module['scale']:.6g}",
            str(module["num_bytes"]),
        )
        for module in report["modules"]
    ]
    print_table(columns, rows)
    say(
        f"it would be served: {len(rows)} modules, {report['num_bytes']} bytes in {report['dtype']}, "
        f"digest {report['digest'][:12]}"
    )
