"""`lorasrv quantize`: the NF4 version of a base model, in a folder that servers open without quantizing."""

import argparse
from dataclasses import asdict
from typing import TYPE_CHECKING

from lorasrv.cli.console import print_json, print_table, say, show_progress
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.settings import folder

if TYPE_CHECKING:
    from lorasrv.model.quantize_folder import QuantizedFolder

_DTYPES = ("auto", "bfloat16", "float16", "float32")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "quantize",
        help="write a base model in 4 bits, ready to be served",
        description="Write a base model in NF4 with double quantization, in bitsandbytes' format. A server that is "
        "given the folder does not quantize, and servers on one machine share its memory.",
        allow_abbrev=False,
    )
    parser.add_argument("base", metavar="BASE", help="The base model: a folder or a Hub id, org/name@revision.")
    parser.add_argument("--out", metavar="DIR", type=folder, required=True, help="The new folder.")
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="auto",
        help="The type of embedding, norms and head, which stay wide. Default: auto, as they are.",
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Quantize, and report what was written."""
    # torch comes with these
    import torch

    from lorasrv.model.hub import model_folder
    from lorasrv.model.new_folder import check_absent
    from lorasrv.model.quantize_folder import quantize_folder

    # before anything is downloaded
    check_absent(arguments.out)
    dtype = None if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    source = model_folder(arguments.base)
    say(f"reading {source}")
    with show_progress("quantizing") as progress:
        written = quantize_folder(source, arguments.out, dtype=dtype, progress=progress)
    _report(written, as_json=arguments.json)
    return ExitCode.OK


def _report(written: "QuantizedFolder", *, as_json: bool) -> None:
    values = asdict(written) | {"bits_per_parameter": round(written.bits_per_parameter, 3)}
    if as_json:
        print_json(values)
        return
    # one line each: side by side they are wider than a terminal
    print_table(("figure", "value"), [(name, str(value)) for name, value in values.items()])
    say(f"to serve it: lorasrv serve {written.folder}")
