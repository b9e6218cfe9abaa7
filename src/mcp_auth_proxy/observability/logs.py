"""Write logs to stderr, one line for each event, as text or JSON. Secrets are masked in all of them."""

import json
import logging
import re
import sys
import time
from bisect import bisect_right
from collections.abc import Mapping
from typing import Literal

from mcp_auth_proxy.observability.controls import escaped, escaped_json
from mcp_auth_proxy.observability.redaction import redact

Format = Literal["text", "json"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

ACCESS_LOGGER = "mcp_auth_proxy.access"
"""The logger of the access log; its level does not follow ``--log-level``."""

Fields = Mapping[str, str | int | float]
"""The fields of a line besides its message, by name: ``logger.info("…", extra={"fields": …})``."""

MAX_MESSAGE = 3000
"""Bytes of a message, counted as JSON. With its fields a line stays below 4 KiB, whatever a server says."""

MAX_FIELD = 200
"""Bytes of the value of one field, counted as JSON."""

MAX_TRACE_LINE = 1000
"""Bytes of one line of a traceback, counted as JSON: the last one may quote anything."""

_BARE = re.compile(r"[\w./:@+~-]+", re.ASCII)


def configure(level: str, format: Format, *, access_log: bool = False) -> None:
    """Send every log to stderr; ``level`` is debug, info or warning. The access log is always on at debug."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mcp_auth_proxy").setLevel(LEVELS[level])
    logging.getLogger(ACCESS_LOGGER).setLevel(logging.INFO if access_log or level == "debug" else logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_bare_or_quoted(value)}" for name, value in _fields(record).items())
        lines = [f"{clock} {record.levelname.lower():<7} {escaped(_message(record))}{fields}"]
        if record.exc_info:
            lines += _traceback(self.formatException(record.exc_info))
        return "\n    ".join([lines[0], *map(escaped, lines[1:])])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, str | int | float] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = "\n".join(_traceback(self.formatException(record.exc_info)))
        # In ASCII: whatever the encoding of stderr is, the line is JSON.
        return escaped_json(json.dumps(entry))


def _message(record: logging.LogRecord) -> str:
    try:
        return _shortened(redact(record.getMessage()), MAX_MESSAGE)
    except (TypeError, ValueError, KeyError):
        # logging itself would print the arguments as they are.
        return f"{_shortened(redact(str(record.msg)), MAX_MESSAGE)} (with arguments that do not fit)"


def _traceback(text: str) -> list[str]:
    return [_shortened(line, MAX_TRACE_LINE) for line in redact(text).split("\n")]


def _shortened(text: str, limit: int) -> str:
    """Return as much of a text as takes ``limit`` bytes in JSON, which is never less than as text; "…" marks a cut."""
    # Only after the redaction: half a credential would not look like one.
    text = text[: limit + 1]
    if len(json.dumps(text)) - 2 <= limit:
        return text
    left = limit - len(r"\u2026")
    return text[: bisect_right(range(1, limit), left, key=lambda end: len(json.dumps(text[:end])) - 2)] + "…"


def _fields(record: logging.LogRecord) -> dict[str, str | int | float]:
    """Return the fields of a line, texts redacted."""
    given: Fields = getattr(record, "fields", {})
    return {
        name: _shortened(redact(value), MAX_FIELD) if isinstance(value, str) else value for name, value in given.items()
    }


def _bare_or_quoted(value: str | float) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else escaped_json(json.dumps(text))
