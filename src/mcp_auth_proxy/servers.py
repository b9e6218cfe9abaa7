"""The servers that are configured now: one mapping that all layers read and a reload replaces."""

from collections.abc import Callable, Iterator, Mapping

from mcp_auth_proxy.config.changes import ServerChange, compare_servers
from mcp_auth_proxy.config.settings import ServerSettings

__all__ = ["ServerChange", "ServerRegistry"]

Callback = Callable[[ServerChange], None]


class ServerRegistry(Mapping[str, ServerSettings]):
    """The one owner of the server map. Belongs to one event loop.

    Look a server up each time it is needed, and expect a name to be gone: it may be removed between two awaits.
    """

    def __init__(self, servers: Mapping[str, ServerSettings]) -> None:
        self._servers = dict(servers)
        self._callbacks: dict[object, Callback] = {}

    def __getitem__(self, name: str) -> ServerSettings:
        return self._servers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)

    def replace(self, servers: Mapping[str, ServerSettings]) -> ServerChange:
        """Replace all servers; return what has changed.

        The mapping is replaced before the first callback is called. If nothing has changed, none is called.
        """
        change = compare_servers(self._servers, servers)
        # Even if no server has changed, their order may be different.
        self._servers = dict(servers)
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
