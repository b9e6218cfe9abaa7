"""The servers that there are now: one mapping that all layers read.

A reload replaces those of the configuration, the API those that were made at run time.
"""

from collections.abc import Callable, Iterator, Mapping

from mcp_auth_proxy.config.changes import ServerChange, compare_servers
from mcp_auth_proxy.config.settings import ServerSettings

__all__ = ["ServerChange", "ServerRegistry"]

Callback = Callable[[ServerChange], None]


class ServerRegistry(Mapping[str, ServerSettings]):
    """The one owner of the server map. Belongs to one event loop.

    Look a server up each time it is needed, and expect a name to be gone: it may be removed between two awaits. If a
    server of the configuration and one that was made at run time have the same name, the configuration's is used.
    """

    def __init__(self, servers: Mapping[str, ServerSettings]) -> None:
        self._configured = dict(servers)
        self._made: dict[str, ServerSettings] = {}
        self._servers = dict(servers)
        self._callbacks: dict[object, Callback] = {}

    def __getitem__(self, name: str) -> ServerSettings:
        return self._servers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)

    @property
    def configured(self) -> Mapping[str, ServerSettings]:
        """The servers of the configuration."""
        return self._configured

    @property
    def made(self) -> Mapping[str, ServerSettings]:
        """The servers that were made at run time, also those whose name the configuration uses."""
        return self._made

    def by_id(self, server_id: str) -> ServerSettings | None:
        """Return the server with an id of the API."""
        configured = self._configured.get(server_id)
        if configured is not None:
            return configured
        return next((server for server in self._servers.values() if server.id == server_id and server.id), None)

    def replace(self, servers: Mapping[str, ServerSettings]) -> ServerChange:
        """Replace the servers of the configuration; return what has changed.

        The mapping is replaced before the first callback is called. If nothing has changed, none is called.
        """
        self._configured = dict(servers)
        return self._merge()

    def replace_made(self, servers: Mapping[str, ServerSettings]) -> ServerChange:
        """Replace the servers that were made at run time, as ``replace`` does."""
        self._made = dict(servers)
        return self._merge()

    def _merge(self) -> ServerChange:
        servers = {**self._configured, **{name: it for name, it in self._made.items() if name not in self._configured}}
        change = compare_servers(self._servers, servers)
        # Even if no server has changed, their order may be different.
        self._servers = servers
        if change:
            for callback in tuple(self._callbacks.values()):
                callback(change)
        return change

    def on_change(self, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` after each change, in the order of subscription; return a function that unsubscribes it.

        A callback must not raise or block: the next one waits for it.
        """
        key = object()
        self._callbacks[key] = callback

        def unsubscribe() -> None:
            self._callbacks.pop(key, None)

        return unsubscribe
