"""Write logs to stderr, one line for each event, as text or JSON. Secrets are masked in all of them."""

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Literal

from mcp_auth_proxy.observability.redaction import redact

Format = Literal["text", "json"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

ACCESS_LOGGER = "mcp_auth_proxy.access"
"""The logger of the access log; its level does not follow ``--log-level``."""

Fields = Mapping[str, str | int | float]
"""The fields of a line besides its message, by name: ``logger.info("…", extra={"fields": …})``."""

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
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
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        fields = "".join(f" {name}={_bare_or_quoted(value)}" for name, value in _fields(record).items())
        lines = [f"{clock} {record.levelname.lower():<7} {_on_one_line(_message(record))}{fields}"]
        if record.exc_info:
            lines += redact(self.formatException(record.exc_info)).split("\n")
        return "\n    ".join([lines[0], *map(_on_one_line, lines[1:])])


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
            entry["exception"] = redact(self.formatException(record.exc_info))
        # In ASCII: whatever the encoding of stderr is, the line is JSON.
        return json.dumps(entry)


def _message(record: logging.LogRecord) -> str:
    try:
        return redact(record.getMessage())
    except (TypeError, ValueError, KeyError):
        # logging itself would print the arguments as they are.
        return f"{redact(str(record.msg))} (with arguments that do not fit)"


def _fields(record: logging.LogRecord) -> dict[str, str | int | float]:
    """Return the fields of a line, texts redacted."""
    given: Fields = getattr(record, "fields", {})
    return {name: redact(value) if isinstance(value, str) else value for name, value in given.items()}


def _bare_or_quoted(value: str | float) -> str:
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)


def _on_one_line(text: str) -> str:
    """Escape what would start another line or control a terminal: messages contain texts from servers."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)
