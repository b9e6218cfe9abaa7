"""Configuration files."""

import os
import tempfile
from pathlib import Path

from mcp_auth_proxy.config.document import parse
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Settings
from mcp_auth_proxy.errors import ConfigurationError
from mcp_auth_proxy.net import urls

SECRET = "the-secret-in-the-environment"
ENVIRONMENT = {"SECRET": SECRET, "NUMBER": "0"}

_FOLDER = tempfile.TemporaryDirectory(prefix="fuzz-config-", dir="/dev/shm" if os.path.isdir("/dev/shm") else None)
_FILE = Path(_FOLDER.name, "mcp-auth-proxy.yaml")


def config(data: bytes) -> None:
    """Check what is read of a file, as a YAML document and as the configuration."""
    try:
        document = parse(data)
    except ConfigurationError as error:
        _check_errors(error)
    else:
        assert all(1 <= line <= len(data) + 1 for line in document.lines.values())
        _check_content(document.content)
    _FILE.write_bytes(data)
    try:
        settings = load(_FILE, environ=ENVIRONMENT)
    except ConfigurationError as error:
        _check_errors(error)
        return
    _check_settings(settings)


def _check_content(content: object) -> None:
    """Check that a document has texts, lists and mappings only. An alias is one more way to what was seen already."""
    seen: set[int] = set()
    left = [content]
    while left:
        value = left.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list):
            left += value
        else:
            assert value is None or isinstance(value, str), f"a {type(value).__name__}"


def _check_errors(error: ConfigurationError) -> None:
    assert error.errors, "an error that says nothing"
    for one in error.errors:
        assert one.problem
        assert SECRET not in str(one), "an error with a secret"


def _check_settings(settings: Settings) -> None:
    assert settings.servers, "no server"
    assert SECRET not in repr(settings), "a repr with a secret"
    for name, server in settings.servers.items():
        assert name == server.name and name.isascii() and name.isprintable()
        assert (
            urls.parse(server.url).origin.scheme == "https"
            or server.allow_http
            or urls.is_loopback(urls.parse(server.url).origin.host)
        )
        assert server.upstream_timeout > 0
    assert 0 <= settings.listen.port <= 65535
