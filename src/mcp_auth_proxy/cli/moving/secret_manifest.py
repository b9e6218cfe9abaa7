"""An export as a Secret of Kubernetes."""

import base64
import re

from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError

DATA_KEY = "logins"
"""The key of the sealed file in the Secret, which becomes the name of the mounted file."""

MAX_SECRET = 1024 * 1024
"""Bytes of the data of a Secret, as Kubernetes limits it."""

_NAME = re.compile(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?")


def check_name(name: str) -> str:
    """Return a name that a Secret may have. Raises ConfigurationError."""
    if _NAME.fullmatch(name) is None:
        raise ConfigurationError([ConfigError("--name", "must be a name of Kubernetes: a-z, 0-9, '-' and '.'")])
    return name


def manifest(name: str, sealed: bytes) -> str:
    """Return the Secret in YAML. The passphrase is not in it. Raises McpAuthProxyError if the file is too large."""
    if len(sealed) > MAX_SECRET:
        raise McpAuthProxyError("This is more than a Secret may hold (1 MiB). Name fewer servers.")
    lines = (
        "# Logins of mcp-auth-proxy, sealed with a passphrase that is not in here. See docs/store.md, Moving logins.",
        "apiVersion: v1",
        "kind: Secret",
        "metadata:",
        f'  name: "{name}"',
        "type: Opaque",
        "data:",
        f"  {DATA_KEY}: {base64.b64encode(sealed).decode()}",
    )
    return "\n".join(lines) + "\n"


def what_next(name: str, passphrase_source: str) -> list[str]:
    """Return how to go on, in lines for the terminal. ``passphrase_source`` is ``env:NAME`` or ``file:PATH``."""
    kind, _, place = passphrase_source.partition(":")
    create = "kubectl create secret generic mcp-auth-proxy-passphrase --from-file=passphrase="
    make = f"{create}{place}" if kind == "file" else f'printf %s "${place}" | {create}/dev/stdin'
    return [
        f"The passphrase belongs in a Secret of its own: {make}",
        f"Mount both, and set store.import: [file:…/{DATA_KEY}] and store.import_passphrase: file:…/passphrase. "
        f"{name} is taken into the store once, so the store must outlast the pod.",
    ]
