"""The fake server of this folder, as fixtures."""

import importlib.util
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fake():
    """The module `fake_server`, loaded once however many folders use it."""
    name = "lorasrv_fake_server"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name("fake_server.py"))
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def server(fake):
    """A running fake server."""
    with fake.FakeServer() as running:
        yield running
