"""`lorasrv convert`: an adapter folder rewritten in its plainest form, without a base and without a server."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorasrv.cli.adapters import ranks_text
from lorasrv.cli.console import print_columns, print_error, print_json
from lorasrv.cli.exit_codes import ExitCode
from lorasrv.settings import folder

if TYPE_CHECKING:
    from lorasrv_adapters.convert import Conversion

_DESCRIPTION = """\
Write an adapter in its plainest form, into a new folder:

  adapter_model.bin, a pickle   -> safetensors, bit for bit. The pickle is read in a process of
                                   its own, for tensors only, in bounded time and memory.
  AdaLoRA                       -> LoRA, each module with the rank that survived.
  PiSSA, OLoRA, CorDA, LoRA-GA  -> LoRA of twice the rank, for the base as it was before that
                                   initialization; needs --initial. Exact for a base in float32;
                                   a narrower or quantized one had its residual rounded.

Whatever applies is done in one go. LoRA, rsLoRA and DoRA stay what they are, and so does
everything beside the low-rank weights. If nothing applies, or anything would be lost, nothing
is written: exit status 3 and every reason."""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        help="turn pickles into safetensors, and AdaLoRA, PiSSA, OLoRA, CorDA and LoRA-GA into LoRA",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("adapter", metavar="ADAPTER", type=folder, help="The adapter's folder.")
    parser.add_argument("--out", metavar="DIR", type=_new_folder, required=True, help="Where to write; a new folder.")
    parser.add_argument(
        "--initial",
        metavar="DIR",
        type=folder,
        help="The adapter as it was before training: what save_pretrained wrote right after get_peft_model.",
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Convert, and report what was done."""
    # torch comes with these
    from lorasrv_adapters.convert import convert_checkpoint
    from lorasrv_adapters.errors import AdapterConversionError, AdapterCorruptError, AdapterIncompatibleError

    try:
        conversion = convert_checkpoint(arguments.adapter, arguments.out, initial=arguments.initial)
    except (AdapterConversionError, AdapterCorruptError, AdapterIncompatibleError) as error:
        if arguments.json:
            print_json({"converted": False, "reasons": error.reasons})
        else:
            print_error(error)
        return ExitCode.INVALID
    _report(conversion, arguments.out, as_json=arguments.json)
    return ExitCode.OK


def _report(conversion: "Conversion", out: Path, *, as_json: bool) -> None:
    if as_json:
        modules = [
            {"module": module, "rank_before": before, "rank_after": after}
            for module, (before, after) in conversion.ranks.items()
        ]
        summary = {"steps": conversion.steps, "kind": conversion.kind, "num_bytes": conversion.num_bytes}
        print_json({"converted": True, "out": out} | summary | {"modules": modules})
        return
    rows = [("done", step) for step in conversion.steps]
    rows += [("kind", conversion.kind), *_module_rows(conversion.ranks)]
    rows += [("size", f"{conversion.num_bytes / 1024**2:.1f} MiB"), ("written", str(out))]
    print_columns(("field", "value"), rows)


def _module_rows(ranks: Mapping[str, tuple[int, int]]) -> list[tuple[str, str]]:
    before = [rank for rank, _ in ranks.values()]
    after = [rank for _, rank in ranks.values() if rank]
    if not after:
        return [("modules", "none of low rank")]
    left_out = len(before) - len(after)
    return [
        ("modules", f"{len(after)}, and {left_out} of rank 0 left out" if left_out else str(len(after))),
        ("ranks", f"{ranks_text(min(before), max(before))} -> {ranks_text(min(after), max(after))}"),
    ]


def _new_folder(text: str) -> Path:
    path = folder(text)
    try:
        free = not path.exists() or (path.is_dir() and not any(path.iterdir()))
    except OSError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if not free:
        raise argparse.ArgumentTypeError(f"{path} exists and is not an empty folder")
    return path
