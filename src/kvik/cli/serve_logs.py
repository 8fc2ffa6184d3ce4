"""Lines of the server's log, for people or for programs, on stderr."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Literal

EXTRAS = (
    *("request_id", "client", "seconds"),
    *("model", "finish_reason", "prompt_tokens", "cached_tokens", "completion_tokens"),
)


class JsonFormatter(logging.Formatter):
    """An object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **{name: getattr(record, name) for name in EXTRAS if hasattr(record, name)},
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """A line with what an access log has."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as text."""
        told = [time.strftime("%H:%M:%S", time.localtime(record.created)), record.levelname.lower()]
        text = " ".join(told) + " " + record.getMessage()
        given = record.__dict__
        if "seconds" in given:
            text += f" {given['seconds'] * 1000:.0f} ms"
        if "request_id" in given:
            text += f" {given['request_id']}"
        return text + ("\n" + self.formatException(record.exc_info) if record.exc_info else "")


def set_up_logs(form: Literal["text", "json"]) -> None:
    """Have kvik's loggers, and uvicorn's warnings, write to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if form == "json" else TextFormatter())
    for name, level in (("kvik", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.setLevel(level)
        logger.handlers = [handler]
        logger.propagate = False
