"""``stdio``: a bridge between a client that starts programs and a server behind the proxy."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from mcp_auth_proxy.cli.stdio_bridge.endpoint import Endpoint, ProxySource, RemoteEndpoint
from mcp_auth_proxy.cli.stdio_bridge.local_proxy import LocalProxy
from mcp_auth_proxy.config.settings import LimitSettings, Settings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.net import urls

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


async def over_local_proxy(
    settings: Settings, server: str, *, options: Sequence[str], file: Path | None, key_source: str | None
) -> int:
    """Run until the input ends or a signal comes. Return the exit code.

    ``server`` is a name, with its account, or a URL if there is no configuration ``file``. ``options`` are those of
    the proxy that is started if none is running. ``key_source`` is where the key is, if callers are identified.
    """
    url = None
    if file is None:
        (only,) = settings.servers.values()
        server, url = only.name, only.url
        options = [url, *options]
    else:
        options = ["--config", str(file), *options]
    key = _key(key_source)
    proxy = LocalProxy(settings, target=_target(server), url=url, options=options)
    proxy.begin()
    # The environment's forward proxy is for others than this machine.
    return await _carry(proxy, {}, key=key, limit=settings.limits.body)


async def over_remote_proxy(url: str, server: str, *, key_source: str | None) -> int:
    """Run over a proxy that runs elsewhere, or was started by somebody else. Raises ConfigurationError."""
    from mcp_auth_proxy.cli.remote_proxy import checked_url

    base = urls.parse(checked_url(url))
    # The address for clients, as the dashboard has it, is as good as the public URL.
    path = base.path.rstrip("/").removesuffix(_target(server).decode())
    target = urls.Url(base.origin, path, "").target.rstrip(b"/") + _target(server)
    endpoint = RemoteEndpoint(Endpoint(base.origin, target))
    return await _carry(endpoint, os.environ, key=_key(key_source), limit=LimitSettings().body)


def _target(server: str) -> bytes:
    return f"/{server}/mcp".encode()


def _key(source: str | None) -> str | None:
    if source is None:
        return None
    from mcp_auth_proxy import secret_values
    from mcp_auth_proxy.cli.remote_proxy import read_key

    key = read_key(source)
    secret_values.remember(key)
    return key


async def _carry(proxies: ProxySource, environ: Mapping[str, str], *, key: str | None, limit: int) -> int:
    """Carry messages between standard input and output and the proxy. ``environ`` names the forward proxy."""
    # Imported while the proxy starts.
    from mcp_auth_proxy.cli.stdio_bridge.bridge import Bridge
    from mcp_auth_proxy.cli.stdio_bridge.channel import Channel
    from mcp_auth_proxy.cli.stdio_bridge.lines import LineReader, LineWriter, OutputClosed
    from mcp_auth_proxy.net.dial import Dialer

    output = LineWriter(_own_output())
    channel = Channel(proxies, Dialer(environ=environ), key=key)
    bridge = Bridge(channel, output, limit=limit)
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        if not stopped.done():
            stopped.set_result(None)

    for sign in _SIGNALS:
        loop.add_signal_handler(sign, stop)
    work = loop.create_task(bridge.run(LineReader(0, limit=limit)))
    connecting = loop.create_task(_connect(proxies))
    try:
        await asyncio.wait({work, stopped, output.closed}, return_when=asyncio.FIRST_COMPLETED)
        connecting.cancel()
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, OutputClosed):
            await work
    finally:
        await bridge.aclose()
        await channel.aclose()
    return 0


async def _connect(proxies: ProxySource) -> None:
    """Find the proxy before the first request needs it."""
    # Each request that comes tries again, and is answered with the error.
    with contextlib.suppress(McpAuthProxyError):
        await proxies.endpoint()


def _own_output() -> int:
    """Return a descriptor for what was standard output. Whatever else is printed goes to standard error from now on."""
    descriptor = os.dup(1)
    os.dup2(2, 1)
    return descriptor
