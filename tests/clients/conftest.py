"""The fake server as fixtures."""

import fake_server
import pytest


@pytest.fixture
def fake():
    """The module `fake_server`."""
    return fake_server


@pytest.fixture
def server():
    """A running fake server."""
    with fake_server.FakeServer() as running:
        yield running
