"""The command line as the tests call it, and a fake server."""

import json
import os
from types import SimpleNamespace

import fake_server
import pytest
from lorasrv.cli.main import main


@pytest.fixture
def fake():
    """The module `fake_server`."""
    return fake_server


@pytest.fixture
def server(monkeypatch):
    """A running fake server, which the commands find through the environment."""
    with fake_server.FakeServer() as running:
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
