"""What a log line looks like."""

import io
import json
import logging

import pytest
from lorasrv.logs import configure_logging


@pytest.fixture
def log():
    """Configures logging into a buffer and gives back what was there; yields (configure, logger, lines)."""
    root = logging.getLogger()
    ours = [logging.getLogger(name) for name in ("lorasrv", "lorasrv_adapters", "lorasrv_kernels")]
    handlers, levels = root.handlers[:], [logger.level for logger in (root, *ours)]
    stream = io.StringIO()

    def configure(**options):
        configure_logging(stream=stream, **options)
        return logging.getLogger("lorasrv.test")

    yield configure, stream
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    for logger, level in zip((root, *ours), levels, strict=True):
        logger.setLevel(level)


def test_text_is_one_line_with_its_fields(log):
    configure, stream = log
    fields = {"request_id": "r-1", "reason": "not so good", "empty": ""}
    configure().info("request %s", "finished", extra=fields)
    time, _, rest = stream.getvalue().partition(" ")
    assert time.endswith("Z")
    assert rest == 'INFO    lorasrv.test: request finished request_id=r-1 reason="not so good" empty=""\n'


def test_json_is_one_object_a_line(log):
    configure, stream = log
    logger = configure(format="json")
    logger.info("first", extra={"request_id": "r-1", "num_tokens": 3, "level": "mine"})
    logger.info("second\nline")
    first, second = map(json.loads, stream.getvalue().splitlines())
    del first["time"]
    expected = {"level": "INFO", "logger": "lorasrv.test", "message": "first", "request_id": "r-1", "num_tokens": 3}
    assert first == expected
    assert second["message"] == "second\nline"


@pytest.mark.parametrize("format", ["text", "json"])
def test_what_users_wrote_is_not_logged(log, format):
    configure, stream = log
    configure(format=format).info("request", extra={"prompt": "my secret", "text": "my secret", "token_ids": [4242]})
    assert "secret" not in stream.getvalue()
    assert "4242" not in stream.getvalue()
    assert stream.getvalue().count("[redacted]") == 3


def test_a_message_cannot_pass_for_two_events(log):
    configure, stream = log
    configure().warning("load of %s failed", "x\n2026-01-01T00:00:00.000Z ERROR lorasrv: forged")
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize("format", ["text", "json"])
def test_a_trace_belongs_to_its_event(log, format):
    configure, stream = log
    logger = configure(format=format)
    try:
        raise ValueError("broken")
    except ValueError:
        logger.exception("step failed", extra={"error_id": "e-1"})
    first, *more = stream.getvalue().splitlines()
    assert "e-1" in first
    if format == "json":
        assert not more
        assert json.loads(first)["trace"].endswith("ValueError: broken")
    else:
        assert more[-1] == "    ValueError: broken"
        assert all(line.startswith("    ") for line in more)


def test_level_is_ours_and_others_only_warn(log):
    configure, stream = log
    configure(level="debug").debug("ours")
    logging.getLogger("someone.else").info("theirs")
    logging.getLogger("someone.else").warning("theirs, and serious")
    messages = [line.partition(": ")[2] for line in stream.getvalue().splitlines()]
    assert messages == ["ours", "theirs, and serious"]


def test_configuring_again_replaces(log):
    configure, stream = log
    configure()
    configure().info("once")
    assert stream.getvalue().count("once") == 1
    with pytest.raises(ValueError, match="LOUD"):
        configure(level="loud")
