"""Logs: one line for each event, on stderr, as text or JSON, with secrets taken out whatever their source."""

import json
import logging
import re
import sys
import time
from typing import Literal

Format = Literal["text", "json"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING}

_MASK = "****"

_START = r"(?:(?<![\w-])|(?<=%[0-9a-f]{2}))"
"""Where a name begins; also behind a percent-encoded separator, in a URL that is a parameter of another."""

_SECRETS = r"[\w-]*secret|[\w-]*password|[\w-]*api[_-]key|code_verifier|device_code"

_PARAMETERS = re.compile(
    rf"""{_START}({_SECRETS}|[\w-]*token(?:_hint)?|[\w-]*assertion|(?:\w+_)?code|state
                  |(?:proxy-)?authorization|(?:set-)?cookie|dpop)
    (\\*["']\s{{0,40}}[:,=]\s{{0,40}}b?(?=\\*["'])   # the name in quotes, and so the value: JSON, repr
     |\s{{0,3}}(?:=|%3d)\s{{0,3}}b?)                 # a query, a form, an assignment
    (?:(\\*["'])(?:\\.|.)*?(?=\3|\Z) | [^\s&"',;)\]}}]+)""",
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)
_LINES = re.compile(rf"{_START}((?:proxy-)?authorization|(?:set-)?cookie)(\s{{0,3}}:\s{{0,3}})[^\r\n]+", re.IGNORECASE)
_FIELDS = re.compile(
    rf"{_START}({_SECRETS}|[\w-]+_token|[\w-]+_assertion|dpop)(\s{{0,3}}:\s{{0,3}})[^\s&\"',;)\]}}]+", re.IGNORECASE
)
_CREDENTIALS = re.compile(
    r"\b((?:(?:Bearer|Basic|DPoP)\s{1,8}){1,3})"
    r"(?!(?:tokens?|authentication|authorization|challenge|credentials?|header|scheme)(?![\w.~+/-])|[a-z_]+=[\"\w])"
    r"[\w.~+/-]{6,}=*",
    re.IGNORECASE,
)
_USERINFO = re.compile(r"(://[^\s/?#@:]*:)[^\s/?#@]+(?=@)")
_JWT = re.compile(r"(?<![\w-])eyJ[\w-]{5,}(?:\.[\w-]*){2,4}")

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def redact(text: str) -> str:
    """Return the text with what looks like a credential masked: parameters, header fields, passwords in URLs, JWTs.

    This is the second line: nothing of ours logs a secret, but libraries put URLs and headers into their messages.
    Words such as "code" and "state" are masked as names of parameters only, so that prose stays readable.
    """
    text = _PARAMETERS.sub(rf"\1\2\3{_MASK}", text)
    text = _LINES.sub(rf"\1\2{_MASK}", text)
    text = _FIELDS.sub(rf"\1\2{_MASK}", text)
    text = _CREDENTIALS.sub(rf"\1{_MASK}", text)
    text = _USERINFO.sub(rf"\1{_MASK}", text)
    return _JWT.sub(_MASK, text)


def _message(record: logging.LogRecord) -> str:
    try:
        return redact(record.getMessage())
    except (TypeError, ValueError, KeyError):
        # logging itself would print the arguments as they are.
        return f"{redact(str(record.msg))} (with arguments that do not fit)"


def _on_one_line(text: str) -> str:
    """Escape what would begin another line or steer a terminal: texts of servers come into messages."""
    return _UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        lines = [f"{clock} {record.levelname.lower():<7} {_on_one_line(_message(record))}"]
        if record.exc_info:
            lines += redact(self.formatException(record.exc_info)).split("\n")
        return "\n    ".join([lines[0], *map(_on_one_line, lines[1:])])


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        if record.exc_info:
            entry["exception"] = redact(self.formatException(record.exc_info))
        # In ASCII: whatever the encoding of stderr is, the line is JSON.
        return json.dumps(entry)


class _NotExpected(logging.Filter):
    """Drops uvicorn's report of an answer that was cut short on purpose, when the upstream's broke off."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.msg != "ASGI callable returned without completing response."


_NOT_EXPECTED = _NotExpected()


def configure(level: str, format: Format) -> None:
    """Send every log to stderr; ``level`` is debug, info or warning."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if format == "json" else _TextFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("mcp_auth_proxy").setLevel(LEVELS[level])
    uvicorn_errors = logging.getLogger("uvicorn.error")
    uvicorn_errors.setLevel(logging.WARNING)
    uvicorn_errors.addFilter(_NOT_EXPECTED)
