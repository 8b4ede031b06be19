"""`lorasrv doctor`: what of lorasrv runs on this machine, on what, and why not faster."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lorasrv.cli.console import print_json, print_table, say
from lorasrv.cli.exit_codes import ExitCode

if TYPE_CHECKING:
    from lorasrv.doctor import Diagnosis


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "doctor",
        help="tell what runs on this machine, and why not faster",
        description="Tell what a server would run on here: versions, processor, native kernels, CUDA, memory. Exit "
        "status 1 if it could not run.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Look, and report."""
    from lorasrv.doctor import diagnose

    found = diagnose()
    if arguments.json:
        problems = [asdict(problem) for problem in found.problems]
        print_json({"serves": found.serves, "problems": problems, **found.facts})
    else:
        _show(found)
    return ExitCode.OK if found.serves else ExitCode.FAILURE


def _show(found: "Diagnosis") -> None:
    print_table(("what", "", "value"), [row for about, facts in found.facts.items() for row in _rows(about, facts)])
    for problem in found.problems:
        say(f"{'error' if problem.fatal else 'warning'}: {problem.what}\n  remedy: {problem.remedy}")
    say("a server can run here" if found.serves else "no server can run here")


def _rows(about: str, facts: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, value in facts.items():
        yield about.replace("_", " "), name.removesuffix("_bytes").replace("_", " "), _text(name, value)


def _text(name: str, value: Any) -> str:
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB"
    if isinstance(value, Mapping):
        return ", ".join(_text(key, part) for key, part in value.items())
    if isinstance(value, list):
        return "; ".join(_text("", part) for part in value) or "none"
    return "none" if value is None else str(value)
