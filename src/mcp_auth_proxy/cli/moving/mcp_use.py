"""What mcp-use keeps: ``{netloc}_{path}.json``, and its clients in ``registrations/``."""

from pathlib import Path

from mcp_auth_proxy.cli.moving.found_logins import FoundLogin, client_of, modified, number, tokens_of
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.store import plain_files


def default_folder() -> Path:
    """Return where mcp-use keeps its files."""
    return Path.home() / ".mcp_use" / "tokens"


def find(folder: Path, server: ServerSettings) -> FoundLogin | None:
    """Return the login that mcp-use has for a server; None if there is none."""
    path = plain_files.mcp_use_tokens(folder, server.url)
    values = plain_files.read_object(path)
    if not values:
        return None
    written_at = modified(path)
    tokens = tokens_of(values, written_at=written_at, expires_at=number(values, "expires_at"))
    client = plain_files.read_object(plain_files.mcp_use_registration(folder, server.url))
    if tokens is None:
        return None
    return FoundLogin(
        path=path, tokens=tokens, client=client_of(client, created_at=written_at), granted_at=written_at, issuer=""
    )
