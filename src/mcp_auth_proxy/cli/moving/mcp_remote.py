"""What mcp-remote keeps: ``{hash}_tokens.json`` and ``{hash}_client_info.json`` in each folder ``mcp-remote-*``.

Up to 0.1 the folder has the version in its name; later ones write ``mcp-remote-v1``, and note the issuer and when the
tokens end. The hash is the MD5 of the server's URL and of the options that it was used with, joined by ``|``.
"""

import hashlib
import itertools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mcp_auth_proxy.cli.moving.found_logins import FoundLogin, client_of, modified, number, tokens_of
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.store import plain_files

VARIABLE = "MCP_REMOTE_CONFIG_DIR"

_TOKENS = "_tokens.json"
_CLIENT = "_client_info.json"
_MILLISECONDS = 1000.0


def default_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return where mcp-remote keeps its files."""
    named = environ.get(VARIABLE)
    return Path(named) if named else Path.home() / ".mcp-auth"


def find(folder: Path, server: ServerSettings, headers: Mapping[str, str] | None) -> FoundLogin | None:
    """Return the newest login that mcp-remote has for a server; None if there is none."""
    wanted = set(hashes(server, headers))
    found = [login for path in token_files(folder) if _hash(path) in wanted and (login := _read(path)) is not None]
    return max(found, key=lambda login: login.granted_at, default=None)


def unmatched(folder: Path, servers: Sequence[ServerSettings], headers: Mapping[str, str] | None) -> int:
    """Return how many logins there are that are not for one of these servers."""
    known = {name for server in servers for name in hashes(server, headers)}
    return len({_hash(path) for path in token_files(folder)} - known)


def token_files(folder: Path) -> list[Path]:
    """Return the files with tokens, of all versions. ``folder`` may also be that of one version."""
    places = [place for place in sorted(folder.glob("mcp-remote-*")) if place.is_dir()]
    return [path for place in (places or [folder]) for path in sorted(place.glob(f"*{_TOKENS}"))]


def hashes(server: ServerSettings, headers: Mapping[str, str] | None) -> Iterator[str]:
    """Return under which names mcp-remote may keep what belongs to a server.

    It takes URLs as they are typed, and splits what it keeps by ``--resource``, ``--authorize-param``, ``--header`` and
    ``--client-metadata-url``, in this order.
    """
    url = server.url
    urls = dict.fromkeys((url, url.rstrip("/"), f"{url.rstrip('/')}/"))
    oauth = server.oauth
    exact = () if oauth.resource in ("auto", "omit") else (oauth.resource,)
    resources = dict.fromkeys((None, *exact, *urls))
    params = (None, _as_json(dict(oauth.authorization_params))) if oauth.authorization_params else (None,)
    given = (_as_json(headers),) if headers else (None,)
    documents = dict.fromkeys((None, oauth.client_metadata_url))
    for parts in itertools.product(urls, resources, params, given, documents):
        text = "|".join(part for part in parts if part is not None)
        # The name of a file, not a protection.
        yield hashlib.md5(text.encode(), usedforsecurity=False).hexdigest()


def _as_json(values: Mapping[str, str]) -> str:
    return json.dumps({name: values[name] for name in sorted(values)}, separators=(",", ":"), ensure_ascii=False)


def _hash(path: Path) -> str:
    return path.name.removesuffix(_TOKENS)


def _read(path: Path) -> FoundLogin | None:
    values = plain_files.read_object(path)
    written_at = modified(path)
    expires_at = number(values, "expires_at")
    ends = None if expires_at is None else expires_at / _MILLISECONDS
    tokens = tokens_of(values, written_at=written_at, expires_at=ends)
    if tokens is None:
        return None
    client = plain_files.read_object(path.with_name(f"{_hash(path)}{_CLIENT}"))
    # A token that mcp-remote itself has renewed lacks it; its client does not.
    issuer = values.get("issuer") or client.get("issuer")
    return FoundLogin(
        path=path,
        tokens=tokens,
        client=client_of(client, created_at=written_at),
        granted_at=written_at,
        issuer=issuer if isinstance(issuer, str) else "",
    )
