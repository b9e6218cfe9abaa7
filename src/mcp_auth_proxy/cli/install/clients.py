"""The MCP clients: where each has its configuration file, and what an entry for a server looks like in it."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mcp_auth_proxy.cli.install.jsonc import JsonEditor
from mcp_auth_proxy.cli.install.toml_text import TomlEditor
from mcp_auth_proxy.cli.install.undo import Editor

_TRANSPORT = frozenset(
    (
        *("type", "url", "httpUrl", "serverUrl", "command", "args", "headers"),
        *("http_headers", "env_http_headers", "bearer_token", "bearer_token_env_var"),
    )
)
"""What says how a client reaches a server, in any client. Other keys of an entry are its user's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What an entry leads to."""

    server: str
    """``SERVER`` or ``SERVER@ACCOUNT``."""
    url: str
    """Its MCP endpoint at the proxy."""
    command: tuple[str, ...]
    """The program for clients that start one, with its arguments."""
    variable: str | None = None
    """The environment variable with the key for the proxy, if it asks for one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """One MCP client."""

    name: str
    title: str
    editor: Editor
    path: Callable[["Machine"], Path]
    entry: Callable[[Target], dict[str, Any]]
    starts_programs: bool = False
    """Whether an entry is a program to start, not an address."""
    plain_names: bool = False
    """Whether the names of servers may only have letters, digits, ``-`` and ``_``."""

    def key(self, server: str) -> str:
        """Return the name of a server's entry."""
        # No server has an underscore in its name, so this is never the name of another one.
        return server.replace("@", "_") if self.plain_names else server


@dataclass(frozen=True, slots=True)
class Machine:
    """Where files of users are on this machine. ``platform`` is ``sys.platform``."""

    home: Path
    platform: str
    environ: Mapping[str, str]

    def config_folder(self, name: str) -> Path:
        """Return the folder in which a desktop program named so keeps its configuration."""
        if self.platform == "darwin":
            return self.home / "Library/Application Support" / name
        return self.moved("XDG_CONFIG_HOME", name) or self.home / ".config" / name

    def moved(self, variable: str, name: str = "") -> Path | None:
        """Return what is in the folder that a variable names, if it is there: the client has been used with it."""
        folder = self.environ.get(variable, "")
        path = Path(folder, name)
        return path if folder.startswith("/") and path.exists() else None


def is_current(found: object, entry: Mapping[str, Any]) -> bool:
    """Return whether an entry needs no change to lead where another one does."""
    if not isinstance(found, dict):
        return False
    same = all(key in found and found[key] == value for key, value in entry.items())
    return same and not _TRANSPORT & (found.keys() - entry.keys())


def is_ours(found: object, name: str) -> bool:
    """Return whether an entry leads through the proxy, wherever that runs, to the server that it is named after."""
    if not isinstance(found, dict):
        return False
    # An underscore stands for the @ of an account (``plain_names``).
    server = re.escape(name).replace("_", "[@_]")
    for address in (found.get("url"), found.get("httpUrl")):
        if isinstance(address, str) and re.search(rf"/{server}/mcp/?\Z", address.replace("%40", "@")):
            return True
    arguments = found.get("args")
    return isinstance(arguments, list) and "stdio" in arguments


def endpoint(base: str, server: str) -> str:
    """Return the address of a server, or of an account, at the proxy with this public URL."""
    return f"{base.rstrip('/')}/{quote(server, safe='@')}/mcp"


def _http(target: Target, reference: str, **first: str) -> dict[str, Any]:
    """Return an entry with an address and, if a key is needed, a header that refers to its variable."""
    entry: dict[str, Any] = dict(first)
    if target.variable is not None:
        entry["headers"] = {"Authorization": f"Bearer {reference.replace('NAME', target.variable)}"}
    return entry


def _claude_code(target: Target) -> dict[str, Any]:
    return _http(target, "${NAME}", type="http", url=target.url)


def _claude_desktop(target: Target) -> dict[str, Any]:
    return {"command": target.command[0], "args": list(target.command[1:])}


def _cursor(target: Target) -> dict[str, Any]:
    return _http(target, "${env:NAME}", url=target.url)


def _vscode(target: Target) -> dict[str, Any]:
    return _http(target, "${env:NAME}", type="http", url=target.url)


def _codex(target: Target) -> dict[str, Any]:
    key = {} if target.variable is None else {"bearer_token_env_var": target.variable}
    return {"url": target.url, **key}


def _gemini(target: Target) -> dict[str, Any]:
    return _http(target, "${NAME}", httpUrl=target.url)


CLIENTS: Mapping[str, Client] = {
    client.name: client
    for client in (
        Client(
            name="claude-code",
            title="Claude Code",
            editor=JsonEditor("mcpServers"),
            path=lambda machine: machine.moved("CLAUDE_CONFIG_DIR", ".claude.json") or machine.home / ".claude.json",
            entry=_claude_code,
        ),
        Client(
            name="claude-desktop",
            title="Claude Desktop",
            editor=JsonEditor("mcpServers"),
            path=lambda machine: machine.config_folder("Claude") / "claude_desktop_config.json",
            entry=_claude_desktop,
            starts_programs=True,
        ),
        Client(
            name="cursor",
            title="Cursor",
            editor=JsonEditor("mcpServers"),
            path=lambda machine: machine.home / ".cursor/mcp.json",
            entry=_cursor,
        ),
        Client(
            name="vscode",
            title="VS Code",
            editor=JsonEditor("servers"),
            path=lambda machine: machine.config_folder("Code") / "User/mcp.json",
            entry=_vscode,
        ),
        Client(
            name="codex",
            title="Codex",
            editor=TomlEditor("mcp_servers"),
            path=lambda machine: (machine.moved("CODEX_HOME") or machine.home / ".codex") / "config.toml",
            entry=_codex,
            plain_names=True,
        ),
        Client(
            name="gemini",
            title="Gemini CLI",
            editor=JsonEditor("mcpServers"),
            path=lambda machine: machine.home / ".gemini/settings.json",
            entry=_gemini,
        ),
    )
}
