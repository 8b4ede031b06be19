"""The `lorasrv` command's entry: the tree of commands, and how every one of them ends.

What the commands take and do is in the modules beside this one; none of them loads anything heavy before it runs.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from lorasrv import __version__
from lorasrv.cli import adapters, check, convert, demo, doctor, generate, health, merge, quantize, serve, train
from lorasrv.cli.console import print_error
from lorasrv.cli.exit_codes import ExitCode, exit_code_for
from lorasrv.cli.layers import suggestion

_DESCRIPTION = """\
One base model, held once in 4 bits, and hundreds of adapters (LoRA, rsLoRA, DoRA, AdaLoRA)
on top of it, mixed freely in one batch and loaded or replaced while it serves."""

_EPILOG = """\
examples:
  lorasrv demo
  lorasrv serve ~/models/llama --adapter poet=~/adapters/poet
  lorasrv generate --adapter poet --max-new-tokens 40 "The sea"
  lorasrv adapters load clerk=~/adapters/clerk
  lorasrv check ~/adapters/clerk --base ~/models/llama
  lorasrv train --base ~/models/llama --data poems.jsonl --method dora --out ~/adapters/poet
  lorasrv merge --base ~/models/llama --adapter ~/adapters/poet --out ~/models/llama-poet
  lorasrv train --recommend 24GB --base ~/models/llama > poet.yaml
  lorasrv train poet.yaml --data poems.jsonl --out ~/adapters/poet --publish 127.0.0.1:50051
  lorasrv convert ~/adapters/old --out ~/adapters/new
  lorasrv quantize ~/models/llama --out ~/models/llama-nf4
  lorasrv doctor

configuration:
  Each flag of serve, train and merge is also a key of the YAML file (--config) and an environment
  variable: --max-rank 16 is max_rank: 16 and LORASRV_MAX_RANK=16. A flag wins over the
  environment, the environment over the file, the file over the default.

exit status:
  0 ok, 1 failure, 2 usage, 3 bad config or data, 4 not found, 5 unavailable,
  6 not allowed, 7 out of memory or disk, 130 interrupted"""

_COMMANDS = (serve, demo, generate, adapters, check, train, merge, convert, quantize, health, doctor)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Args:
        argv: The arguments after the program's name; None takes them from the process.

    Raises:
        SystemExit: With status 2 for wrong usage, 0 after a help page.
    """
    arguments = build_parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except BrokenPipeError:
        # the reader is gone; keep the interpreter from failing on its last flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILURE
    except (Exception, KeyboardInterrupt) as error:
        code = exit_code_for(error)
        if code is None:
            raise
        if code is not ExitCode.INTERRUPTED:
            print_error(error)
        return code


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = _Parser(
        prog="lorasrv",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"lorasrv {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.add_parser(commands)
    return parser


class _Parser(argparse.ArgumentParser):
    """An argument parser that proposes the flag or command that was probably meant."""

    def error(self, message: str) -> NoReturn:
        if match := re.match(r"unrecognized arguments: (\S+)", message):
            message += suggestion(match[1].partition("=")[0], self._flags())
        elif match := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            message += suggestion(match[1], re.findall(r"[\w-]+", match[2]))
        super().error(message)

    def _flags(self) -> list[str]:
        flags = [flag for action in self._actions for flag in action.option_strings]
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                flags += [flag for parser in action.choices.values() for flag in parser._flags()]
        return flags
