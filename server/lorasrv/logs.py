"""Logging of the server: one event a line on stderr, for people or for machines, set up once by the command line.

Fields of an event go in `extra` (`log.info("request finished", extra={"request_id": ...})`). What users write is not
logged: fields that carry it are redacted here, whoever logs them. Knows no other module of the server.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

LogFormat = Literal["text", "json"]

_REDACTED = frozenset({"prompt", "text", "token_ids", "authorization"})
# what every record carries; the rest came through `extra`
_STANDARD = frozenset(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime"}


def configure_logging(*, format: LogFormat = "text", level: str = "INFO", stream: TextIO | None = None) -> None:
    """Sends all logging of the process to one stream, in place of what was set up before.

    Args:
        format: "text" for people, "json" for one JSON object a line.
        level: the lowest level of our own packages that is shown; of others, warnings and worse.
        stream: where to write; None is stderr.

    Raises:
        ValueError: the level does not exist.
    """
    for package in ("lorasrv", "lorasrv_adapters", "lorasrv_kernels"):
        logging.getLogger(package).setLevel(level.upper())
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonFormatter() if format == "json" else TextFormatter())
    root = logging.getLogger()
    for previous in root.handlers[:]:
        root.removeHandler(previous)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)


class TextFormatter(logging.Formatter):
    """`TIME LEVEL logger: message key=value ...`; the lines of a traceback follow, indented."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as text."""
        fields = "".join(f" {key}={_text_value(value)}" for key, value in _fields(record).items())
        # a message of several lines could be mistaken for several events
        message = record.getMessage().replace("\r", "\\r").replace("\n", "\\n")
        line = f"{_timestamp(record)} {record.levelname:<7} {record.name}: {message}{fields}"
        trace = self.formatException(record.exc_info) if record.exc_info else ""
        return line + "".join(f"\n    {part}" for part in trace.splitlines())


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, the event's fields, and trace if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the record as one line of JSON."""
        event: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # fields of the event cannot pass for those four
        event.update({key: value for key, value in _fields(record).items() if key not in event})
        if record.exc_info:
            event["trace"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    return {key: "[redacted]" if key in _REDACTED else value for key, value in extra.items()}


def _text_value(value: object) -> str:
    text = str(value)
    plain = text.isascii() and text.isprintable() and not set(text) & set(' "=')
    return text if plain and text else json.dumps(text)


def _timestamp(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
