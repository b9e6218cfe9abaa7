"""Read the settings of servers that were made at run time, with the readers of the configuration.

What comes from the API may name neither a file nor an environment variable: both belong to the operator.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mcp_auth_proxy.config.reader import Context, Section
from mcp_auth_proxy.config.servers import read_servers
from mcp_auth_proxy.config.settings import Secret, ServerSettings
from mcp_auth_proxy.errors import ConfigError
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.addresses import AddressPolicy, AddressRefused

_UPSTREAM_TIMEOUT = ServerSettings(name="", url="").upstream_timeout


class _Remote(Context):
    """A context without files and environment variables."""

    def path(self, text: str) -> Path:
        raise ValueError("can't be a file here: only the configuration file may name files")

    def variable(self, name: str) -> str:
        raise ValueError("can't be an environment variable here: only the configuration file may name them")

    def file_text(self, name: str) -> str:
        raise ValueError("can't be a file here: only the configuration file may name files")

    def secret(self, text: str) -> Secret:
        if text.startswith(("env:", "file:")):
            raise ValueError("must be the secret itself: only the configuration file may name files and variables")
        return Secret(text)


def read_made_server(name: str, document: Mapping[str, object]) -> tuple[ServerSettings | None, list[ConfigError]]:
    """Return the settings of a server and all errors; a path among those is relative to ``document``.

    ``document`` has the keys that a server has in the configuration file, ``url`` included, as a JSON object. The
    settings are None only if there is an error.
    """
    context = _Remote({}, Path("/"))
    section = Section({name: _as_text(document)}, "", context)
    server = read_servers(section, _UPSTREAM_TIMEOUT).get(name)
    if server is not None and server.oauth.grant is GrantType.TOKEN_EXCHANGE:
        problem = "can't be token_exchange here: where callers' tokens are sent is for the configuration file to say"
        context.errors.append(ConfigError(f"{name}.oauth.grant", problem))
    errors = [replace(error, path=_below(error.path, name)) for error in context.errors]
    return server, errors


def check_address(url: str, allow_private: tuple[str, ...]) -> None:
    """Raise ValueError if a URL names an address or a name of this machine that such a server must not have.

    Other names are looked up, and checked, when they are dialed.
    """
    try:
        AddressPolicy.only(allow_private).check_literal(urls.parse(url).origin)
    except AddressRefused as refused:
        raise ValueError(f"{refused}; if that is intended, list the host in the key admin.allow_private") from None


def _below(path: str, name: str) -> str:
    return path.removeprefix(name).removeprefix(".") or "name"


def _as_text(value: object) -> object:
    """Return a JSON value as the reader of YAML gives it: each scalar is the text that means it."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value)
        case Mapping():
            return {str(key): _as_text(item) for key, item in value.items()}
        case list() | tuple():
            return [_as_text(item) for item in value]
        case _:
            return value
