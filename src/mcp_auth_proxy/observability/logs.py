"""Logs: one line for each event, on stderr, as text or JSON, with secrets taken out whatever their source."""

import json
import logging
import re
import sys
import time
from typing import Literal

Format = Literal["text", "json"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_SECRET_PARAMS = re.compile(
    r"(?i)\b((?:access_|refresh_|id_|subject_)?token|code|code_verifier|client_secret|client_assertion|state|assertion|device_code"
    r"|password|authorization)(\"?\s*[=:]\s*\"?)(?!//)((?:Bearer|Basic|DPoP)\s+)?[^\s&\"',;}]+"
)
_SCHEMES = re.compile(r"(?i)\b(Bearer|Basic|DPoP)(\s+)[A-Za-z0-9\-._~+/]{6,}=*")


def redact(text: str) -> str:
    """Return the text with the values of secret parameters and Authorization headers masked.

    This is the second line: nothing of ours logs a secret, but libraries put URLs into their messages.
    """
    return _SCHEMES.sub(r"\1\2****", _SECRET_PARAMS.sub(r"\1\2****", text))


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock} {record.levelname.lower():<7} {redact(record.getMessage())}"
        return f"{line}\n{redact(self.formatException(record.exc_info))}" if record.exc_info else line


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        return json.dumps(entry, ensure_ascii=False)


class _NotExpected(logging.Filter):
    """Drops uvicorn's report of an answer that was cut short on purpose, when the upstream's broke off."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.getMessage() != "ASGI callable returned without completing response."


def configure(level: str, format: Format) -> None:
    """Send every log to stderr; ``level`` is debug, info or warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mcp_auth_proxy").setLevel(LEVELS[level])
    uvicorn_errors = logging.getLogger("uvicorn.error")
    uvicorn_errors.setLevel(logging.WARNING)
    uvicorn_errors.addFilter(_NotExpected())
