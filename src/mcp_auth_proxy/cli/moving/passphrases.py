"""Secrets that a command is given by the name of their place, never by themselves."""

import json
import os
from pathlib import Path

from mcp_auth_proxy import secret_values
from mcp_auth_proxy.config.imports import passphrase_problem
from mcp_auth_proxy.config.settings import Secret
from mcp_auth_proxy.errors import ConfigError, ConfigurationError

_LARGEST = 64 * 1024


def read(source: str) -> Secret:
    """Return the passphrase that ``env:NAME`` or ``file:PATH`` names. Raises ConfigurationError."""
    text = _read("--passphrase", source)
    if problem := passphrase_problem(text):
        raise _refused("--passphrase", f"the passphrase in {source} {problem}")
    return Secret(text)


def read_object(source: str) -> dict[str, str]:
    """Return the JSON object of texts that ``env:NAME`` or ``file:PATH`` names. Raises ConfigurationError."""
    try:
        found = json.loads(_read("--headers", source))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise _refused("--headers", f'{source} has no JSON object of texts, such as {{"X-Tenant": "acme"}}')
    secret_values.remember(*found.values())
    return found


def _read(option: str, source: str) -> str:
    kind, _, name = source.partition(":")
    if kind not in ("env", "file") or not name:
        raise _refused(option, "must be env:NAME or file:PATH. A secret itself would be seen by every user here.")
    if kind == "env":
        text = os.environ.get(name)
        if text is None:
            raise _refused(option, f"the environment variable {name!r} is not set")
    else:
        try:
            with Path(name).expanduser().open(encoding="utf-8") as file:
                text = file.read(_LARGEST)
        except (OSError, ValueError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or "it is not text"
            raise _refused(option, f"the file {name} can't be read ({reason})") from None
    return text.rstrip("\r\n")


def _refused(option: str, problem: str) -> ConfigurationError:
    return ConfigurationError([ConfigError(option, problem)])
