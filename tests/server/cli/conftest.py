"""The command line as the tests call it, and the fake server of `tests/clients`."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from lorasrv.cli.main import main


@pytest.fixture(scope="session")
def fake():
    """The module `tests/clients/fake_server.py`."""
    name = "lorasrv_fake_server"
    if name not in sys.modules:
        path = Path(__file__).parents[2] / "clients" / "fake_server.py"
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def server(fake, monkeypatch):
    """A running fake server, which the commands find through the environment."""
    with fake.FakeServer() as running:
        monkeypatch.setenv("LORASRV_SERVER", running.target)
        yield running


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in os.environ:
        if name.startswith("LORASRV_"):
            monkeypatch.delenv(name)


@pytest.fixture
def lorasrv(capsys):
    """Run a command line; returns code, out, err and the JSON of out, if it is any."""

    def run(*argv):
        capsys.readouterr()
        try:
            code = main([str(word) for word in argv])
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        try:
            parsed = json.loads(out)
        except ValueError:
            parsed = None
        return SimpleNamespace(code=code, out=out, err=err, json=parsed)

    return run
