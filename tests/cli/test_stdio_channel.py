"""To which proxy a request goes if one ends: nothing is lost that was not read, and no call is made twice."""

from contextlib import AsyncExitStack

import pytest

from fakes.raw_server import Peer, RawServer, answers, ok
from mcp_auth_proxy.cli.stdio_bridge.channel import Channel
from mcp_auth_proxy.cli.stdio_bridge.endpoint import Endpoint
from mcp_auth_proxy.errors import UpstreamProtocolError, UpstreamUnreachable
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.dial import Dialer


async def unread(peer: Peer) -> None:
    peer.reset()


async def lost(peer: Peer) -> None:
    await peer.request()


class Proxies:
    """One proxy after the other."""

    def __init__(self, *servers: RawServer, is_local: bool = True) -> None:
        self.is_local = is_local
        self._endpoints = [Endpoint(urls.parse(server.url).origin, b"/notes/mcp") for server in servers]

    async def endpoint(self, *, urgent: bool = True) -> Endpoint:
        return self._endpoints[0]

    async def replace(self, failed: Endpoint) -> bool:
        if self._endpoints[0] is failed and len(self._endpoints) > 1:
            del self._endpoints[0]
            return True
        return False


async def status_of(proxies: Proxies, *, harmless: bool = False) -> int:
    channel = Channel(proxies, Dialer(environ={}), key="the-key")
    try:
        response = await channel.send(b"POST", [(b"mcp-method", b"x")], b"{}", harmless=harmless)
        return response.status
    finally:
        await channel.aclose()


async def test_a_request_goes_to_the_next_proxy_if_one_refuses_connections() -> None:
    async with AsyncExitStack() as stack:
        ended = RawServer(lost)
        async with ended:
            pass
        running = await stack.enter_async_context(RawServer(answers(ok())))
        assert await status_of(Proxies(ended, running)) == 200
        assert running.requests[0].startswith(b"POST /notes/mcp HTTP/1.1\r\nhost: 127.0.0.1:")
        assert b"authorization: Bearer the-key\r\n" in running.requests[0]
        with pytest.raises(UpstreamUnreachable):
            await status_of(Proxies(ended))


async def test_what_an_ended_proxy_of_this_machine_has_not_read_is_sent_again() -> None:
    for is_local in (True, False):
        connections = 0

        async def first_unread(peer: Peer) -> None:
            nonlocal connections
            connections += 1
            await (unread if connections == 1 else answers(ok()))(peer)

        async with RawServer(first_unread) as server:
            if is_local:
                assert await status_of(Proxies(server)) == 200
            else:
                with pytest.raises(UpstreamProtocolError):
                    await status_of(Proxies(server, is_local=False))


async def test_only_what_is_harmless_is_sent_again_once_it_may_have_been_read() -> None:
    async with RawServer(lost) as server:
        with pytest.raises(UpstreamProtocolError):
            await status_of(Proxies(server))
        assert len(server.requests) == 1
        with pytest.raises(UpstreamProtocolError):
            await status_of(Proxies(server), harmless=True)
        assert len(server.requests) == 3
