"""The servers that are made at run time: by the API, or by a URL alone. They are served at once.

The store has their settings, the registry serves them. What another process makes is seen by ``reload``.
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace

from mcp_auth_proxy.config.made_servers import check_address, read_made_server
from mcp_auth_proxy.config.servers import RESERVED, server_url, single_name
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, ServerConflict, excerpt
from mcp_auth_proxy.models import MadeServer, Principal
from mcp_auth_proxy.observability.metrics import ADHOC
from mcp_auth_proxy.servers import ServerRegistry
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.servers import KEPT_ADHOC, Servers

logger = logging.getLogger(__name__)

MAX_URL = 2000
"""Characters of the URL of a server."""

_SECRET = "client_secret"
_LEADS = ("client_id", "issuer", "metadata")
"""Keys of ``oauth`` that say for which client a secret is, and where it is sent."""


class MadeServers:
    """Make, change and delete servers at run time. Belongs to one event loop. Raises StoreError."""

    def __init__(
        self,
        *,
        database: Engine,
        servers: ServerRegistry,
        allow_private: tuple[str, ...],
        clock: Callable[[], float],
        check_loop: Callable[[str], None] = lambda url: None,
    ) -> None:
        """``allow_private``: private hosts and networks that URLs may lead to. ``check_loop`` raises ValueError for
        URLs of this proxy.
        """
        self._store = Servers(database)
        self._table = self._store.table()
        self._servers = servers
        self._allow_private = allow_private
        self._clock = clock
        self._check_loop = check_loop
        self._stored: dict[str, MadeServer] = {}

    # What there is

    async def reload(self) -> None:
        """Read all servers of the store."""
        stored = sorted(await self._table.all(), key=lambda server: (server.created_at, server.id))
        self._stored = {server.id: server for server in stored}
        self._publish()

    async def purge(self) -> None:
        """Delete the ad-hoc servers that nobody has connected."""
        for server in await self._store.purge(self._clock()):
            self._stored.pop(server.id, None)
            await self._store.forget(server.name)
        self._publish()

    def set_allow_private(self, hosts: tuple[str, ...]) -> None:
        """Change the private hosts and networks that the URLs may lead to."""
        self._allow_private = hosts
        self._publish()

    def get(self, server_id: str) -> MadeServer | None:
        """Return a server by its id, also one whose name the configuration uses."""
        return self._stored.get(server_id)

    def all(self) -> list[MadeServer]:
        """Return all servers, oldest first."""
        return list(self._stored.values())

    # By the API

    async def add(self, name: str, document: Mapping[str, object], *, project: str) -> MadeServer:
        """Make a server; ``document`` has the keys of the configuration, ``url`` included.

        Raises ConfigurationError with all errors, and ServerConflict if the name is taken.
        """
        self._check(name, document)
        self._check_name(name)
        now = self._clock()
        server = MadeServer(
            id=_new_id(),
            name=name,
            project_id=project,
            url=str(document["url"]),
            document=_without_url(document),
            created_at=now,
            updated_at=now,
        )
        if not await self._store.add(server):
            raise _taken(name)
        self._put(server)
        return server

    async def change(
        self, server: MadeServer, name: str, patch: Mapping[str, object], *, unchanged_since: float | None = None
    ) -> MadeServer:
        """Change a server by a merge patch (RFC 7396) of its document.

        Raises ConfigurationError, and ServerConflict if the name is taken, or if the server was changed after
        ``unchanged_since``. Whoever sends the stored secret elsewhere must know it.
        """
        before = {"url": server.url, **server.document}
        after = merged(before, patch)
        self._check(name, after, more=_secret_errors(before, after, patch))
        if name != server.name:
            self._check_name(name)
        # Never the same time twice: it is what changes are noticed by.
        now = max(self._clock(), server.updated_at + 0.001)
        changed = replace(server, name=name, url=str(after["url"]), document=_without_url(after), updated_at=now)
        outcome = await self._store.change(changed, unchanged_since=unchanged_since)
        if outcome is None:
            raise ServerConflict("changed", f"Server {server.name} was changed or deleted by somebody else.")
        if not outcome:
            raise _taken(name)
        self._put(changed)
        return changed

    async def delete(self, server: MadeServer) -> bool:
        """Delete a server: it is not served any more. Return False if it was gone. Grants are the broker's."""
        deleted = await self._store.delete(server.id)
        self._stored.pop(server.id, None)
        self._publish()
        return deleted

    async def forget(self, name: str) -> None:
        """Delete all that is stored for the name of a deleted server, once its grants are revoked."""
        await self._store.forget(name)

    # By a URL alone

    async def adhoc(self, owner: Principal, url: str) -> ServerSettings:
        """Return the ad-hoc server that a principal has for a URL; make it if there is none.

        Raises ConfigurationError if the URL can't be used, and ServerConflict if the principal has too many.
        """
        self.check_url(url)
        now = self._clock()
        wanted = MadeServer(
            id=_new_id(),
            name=f"{ADHOC}-{single_name(url)[:40].strip('-')}-{secrets.token_hex(4)}",
            project_id=owner.project_id,
            origin="adhoc",
            owner=owner.id,
            url=url,
            created_at=now,
            updated_at=now,
        )
        stored = await self._store.add_adhoc(wanted)
        if stored is None:
            raise ServerConflict("too-many", f"You have {KEPT_ADHOC} ad-hoc servers already. Delete some of them.")
        self._put(stored)
        return self._servers[stored.name]

    async def connected(self, server: ServerSettings) -> None:
        """Note that an ad-hoc server was connected, or needs no authorization."""
        if server.origin == "adhoc":
            await self._store.connected(server.id, self._clock())

    def check_url(self, url: str) -> None:
        """Raise ConfigurationError if a URL can't be that of a server, as far as that is seen without a look-up."""
        try:
            self._check_url(url)
        except ValueError as error:
            raise ConfigurationError([ConfigError("url", str(error))]) from None

    def preview(self, owner: Principal, url: str) -> ServerSettings:
        """Return what an ad-hoc server for a URL would be, without making it. Raises ConfigurationError.

        It is called NAME, so that hints name the keys of the server that somebody may configure.
        """
        self.check_url(url)
        made = MadeServer(id="", name=f"{ADHOC}-preview", origin="adhoc", owner=owner.id, url=url)
        server = self._settings(made)
        assert server is not None, "the URL was checked"
        return replace(server, name="NAME")

    # Rules

    def _check_url(self, url: str, *, allow_http: bool = False) -> None:
        if len(url) > MAX_URL:
            raise ValueError(f"must have at most {MAX_URL} characters")
        server_url(url, allow_http=allow_http)
        check_address(url, self._allow_private)
        self._check_loop(url)

    def _check(self, name: str, document: Mapping[str, object], *, more: tuple[ConfigError, ...] = ()) -> None:
        """Raise ConfigurationError with everything that is wrong with a server."""
        errors = self.errors(name, document)
        faulty = {error.path for error in errors}
        errors += [error for error in more if error.path not in faulty]
        if errors:
            raise ConfigurationError(errors)

    def errors(self, name: str, document: Mapping[str, object]) -> list[ConfigError]:
        """Return everything that is wrong with the settings of a server; a path is relative to ``document``."""
        _, errors = read_made_server(name, document)
        url = document.get("url")
        faulty = {error.path for error in errors}
        if isinstance(url, str) and "url" not in faulty:
            try:
                self._check_url(url, allow_http=document.get("allow_http") is True)
            except ValueError as error:
                errors.append(ConfigError("url", str(error)))
        if name.startswith(f"{ADHOC}-") and "name" not in faulty:
            errors.append(ConfigError("name", f"names that begin with {ADHOC}- are for servers made by their URL"))
        return errors

    def _check_name(self, name: str) -> None:
        if name in self._servers.configured or name in RESERVED:
            raise ServerConflict("config-owned", f"The configuration file defines a server {excerpt(name)}.")

    # The registry

    def _put(self, server: MadeServer) -> None:
        self._stored[server.id] = server
        self._publish()

    def _publish(self) -> None:
        made = [settings for server in self._stored.values() if (settings := self._settings(server)) is not None]
        self._servers.replace_made({server.name: server for server in made})

    def _settings(self, made: MadeServer) -> ServerSettings | None:
        known = self._servers.made.get(made.name)
        if known is not None and known.id == made.id and known.version == made.updated_at:
            return replace(known, allow_private=self._allow_private)
        server, errors = read_made_server(made.name, {"url": made.url, **made.document})
        if server is None or errors:
            # Another version of the proxy has stored it.
            logger.error("server %s is not served: %s", made.name, "; ".join(map(str, errors)))
            return None
        return replace(
            server,
            id=made.id,
            project=made.project_id,
            origin=made.origin,
            owner=made.owner,
            version=made.updated_at,
            allow_private=self._allow_private,
        )


def merged(document: Mapping[str, object], patch: Mapping[str, object]) -> dict[str, object]:
    """Return a document with a merge patch applied (RFC 7396): null removes a key, objects are merged."""
    result = dict(document)
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, Mapping):
            before = result.get(key)
            result[key] = merged(before if isinstance(before, Mapping) else {}, value)
        else:
            result[key] = value
    return result


def _secret_errors(
    before: Mapping[str, object], after: Mapping[str, object], patch: Mapping[str, object]
) -> tuple[ConfigError, ...]:
    """Return an error if a patch would send the stored client secret elsewhere without knowing it."""
    old, new, patched = (_mapping(document, "oauth") for document in (before, after, patch))
    if not old.get(_SECRET) or not new.get(_SECRET) or patched.get(_SECRET):
        return ()
    moved = [key for key in _LEADS if old.get(key) != new.get(key)]
    if before.get("url") != after.get("url"):
        moved.append("url")
    if not moved:
        return ()
    problem = f"is needed again: {', '.join(moved)} would send the stored secret elsewhere"
    return (ConfigError(f"oauth.{_SECRET}", problem),)


def _mapping(document: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = document.get(key)
    return value if isinstance(value, Mapping) else {}


def _without_url(document: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in document.items() if key != "url"}


def _taken(name: str) -> ServerConflict:
    return ServerConflict("name-taken", f"There is a server {excerpt(name)} already.")


def _new_id() -> str:
    # With an underscore, which no name has: ids of the configuration's servers are their names.
    return f"srv_{secrets.token_hex(12)}"
