"""A fake server as a program, and what runs a demo against it."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lorasrv.demo.app import DemoConfig, run_demo


@pytest.fixture
def command():
    """The fake server's command line, in one of its modes."""
    program = f"import sys; sys.path[:0] = {sys.path!r}; from fake_server import main; main()"
    return lambda *mode: (sys.executable, "-c", program, *mode)


@pytest.fixture
def demo(command):
    """Run a demo; returns its report and what it said."""

    def run(*mode, show_report=None, **options):
        adapters = {name: Path("/adapters") / name for name in ("adalora", "dora", "lora")}
        outcome = SimpleNamespace(reports=[], said=[])

        def show(report):
            outcome.reports.append(report)
            if show_report:
                show_report()

        config = DemoConfig(command=command(*mode), environ={}, adapters=adapters, **options)
        run_demo(config, say=outcome.said.append, show_report=show)
        return outcome

    return run
