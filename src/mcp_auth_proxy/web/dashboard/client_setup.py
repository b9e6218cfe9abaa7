"""How MCP clients are pointed at an address of the proxy: what to type, or what to write into which file."""

import json
import shlex
from dataclasses import dataclass

KEY_VARIABLE = "MCP_AUTH_PROXY_KEY"
"""The environment variable with the API key of a user, if callers are identified."""


@dataclass(frozen=True, slots=True)
class ClientSetup:
    """What to do for one client: ``text`` goes into ``place``."""

    client: str
    place: str
    text: str


def client_setups(server: str, public_url: str, *, keys: bool) -> tuple[ClientSetup, ...]:
    """Return how to add a server, or ``SERVER@ACCOUNT``, to each client.

    ``keys``: whether callers need one, which a variable has.
    """
    name, url = _entry_name(server), f"{public_url}/{server}/mcp"
    return (
        ClientSetup("Claude Code", "in a terminal", _claude_code(name, url, keys=keys)),
        ClientSetup("Claude Desktop", "claude_desktop_config.json", _claude_desktop(server, url, keys=keys)),
        ClientSetup("Cursor", "~/.cursor/mcp.json", _cursor(name, url, keys=keys)),
        ClientSetup("VS Code", ".vscode/mcp.json, or the user's mcp.json", _vs_code(name, url, keys=keys)),
        ClientSetup("Codex", "~/.codex/config.toml", _codex(name, url, keys=keys)),
        ClientSetup("Gemini CLI", "~/.gemini/settings.json", _gemini(name, url, keys=keys)),
    )


def _entry_name(server: str) -> str:
    # Not every client takes the @ of an account.
    return server.replace("@", "-")


def _claude_code(name: str, url: str, *, keys: bool) -> str:
    header = f' --header "Authorization: Bearer ${KEY_VARIABLE}"' if keys else ""
    return f"claude mcp add --transport http {shlex.quote(name)} {shlex.quote(url)}{header}"


def _claude_desktop(server: str, url: str, *, keys: bool) -> str:
    # It starts programs, and opens no address by itself.
    arguments = ["stdio", server, "--url", url, *(["--api-key", f"env:{KEY_VARIABLE}"] if keys else [])]
    return _json({"mcpServers": {_entry_name(server): {"command": "mcp-auth-proxy", "args": arguments}}})


def _cursor(name: str, url: str, *, keys: bool) -> str:
    return _json({"mcpServers": {name: {"url": url, **_headers(f"${{env:{KEY_VARIABLE}}}", keys=keys)}}})


def _vs_code(name: str, url: str, *, keys: bool) -> str:
    entry = {"type": "http", "url": url, **_headers(f"${{env:{KEY_VARIABLE}}}", keys=keys)}
    return _json({"servers": {name: entry}})


def _codex(name: str, url: str, *, keys: bool) -> str:
    variable = f'\nbearer_token_env_var = "{KEY_VARIABLE}"' if keys else ""
    return f'[mcp_servers.{name}]\nurl = "{url}"{variable}'


def _gemini(name: str, url: str, *, keys: bool) -> str:
    return _json({"mcpServers": {name: {"httpUrl": url, **_headers(f"${KEY_VARIABLE}", keys=keys)}}})


def _headers(value: str, *, keys: bool) -> dict[str, object]:
    return {"headers": {"Authorization": f"Bearer {value}"}} if keys else {}


def _json(document: object) -> str:
    return json.dumps(document, indent=2)
