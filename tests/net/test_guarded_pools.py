"""Connections to servers that were made at run time: each address is checked before it is dialed (T69)."""

import pytest

from fakes.raw_server import RawServer, answers, ok
from mcp_auth_proxy.errors import UpstreamUnreachable
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.net.http_client import GUARDED, HttpClient
from mcp_auth_proxy.net.urls import Origin

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
PUBLIC_ONLY = AddressPolicy.only(())
LOOPBACK = AddressPolicy.only(["127.0.0.0/8"])


def origin_of(server: RawServer) -> Origin:
    return urls.parse(server.url).origin


async def send(client: HttpClient, origin: Origin, policy: AddressPolicy | None = None) -> int:
    response = await client.send(origin, HEAD, method=b"GET", head_timeout=5, policy=policy)
    while not response.complete:
        await response.read()
    return response.status


async def test_an_address_that_the_policy_refuses_is_not_dialed_and_the_key_is_named() -> None:
    async with RawServer(answers(ok())) as server:
        client = HttpClient(Dialer(environ={}), connections_per_origin=2)
        with pytest.raises(UpstreamUnreachable, match=r"a loopback address; .* in the key admin\.allow_private"):
            await send(client, origin_of(server), PUBLIC_ONLY)
        assert server.peers == []
        assert await send(client, origin_of(server), LOOPBACK) == 200
        await client.aclose()


async def test_a_name_is_checked_by_all_addresses_that_it_has_when_it_is_dialed() -> None:
    found = ["203.0.113.7"]

    async def resolve(host: str, port: int) -> list[str]:
        return found

    async with RawServer(answers(ok())) as server:
        client = HttpClient(Dialer(environ={}, resolve=resolve), connections_per_origin=2)
        origin = Origin("http", "rebind.example", server.port)
        for addresses in (["127.0.0.1"], ["192.0.2.1", "127.0.0.1"], ["169.254.169.254"], ["::ffff:127.0.0.1"]):
            found[:] = addresses
            with pytest.raises(UpstreamUnreachable, match="is not used"):
                await send(client, origin, PUBLIC_ONLY)
        assert server.peers == []
        await client.aclose()


async def test_a_connection_of_the_configuration_is_not_used_under_a_policy() -> None:
    async with RawServer(answers(ok(), ok())) as server:
        client = HttpClient(Dialer(environ={}), connections_per_origin=2)
        origin = origin_of(server)
        assert await send(client, origin) == 200
        assert client.idle_connection(origin, PUBLIC_ONLY) is None
        with pytest.raises(UpstreamUnreachable):
            await send(client, origin, PUBLIC_ONLY)
        assert await send(client, origin, LOOPBACK) == 200
        assert len(server.peers) == 2
        await client.aclose()


async def test_guarded_connections_are_counted_together_and_forgotten_when_no_server_needs_them() -> None:
    async with RawServer(answers(ok())) as one, RawServer(answers(ok())) as two:
        client = HttpClient(Dialer(environ={}), connections_per_origin=2)
        for server in (one, two):
            assert await send(client, origin_of(server), LOOPBACK) == 200
        assert client.connections() == {(GUARDED, "active"): 0, (GUARDED, "idle"): 2}
        client.discard_unused({(origin_of(one), LOOPBACK)})
        assert client.connections()[GUARDED, "idle"] == 1
        assert client.pool(origin_of(two), LOOPBACK) is None
        client.discard_unused(())
        assert not client.has_guarded
        await client.aclose()


@pytest.mark.parametrize(
    ("url", "allow_private", "address", "refused"),
    [
        ("http://127.0.0.1:1/mcp", ["127.0.0.1"], "127.0.0.1", ""),
        ("http://127.0.0.1:1/mcp", [], "127.0.0.1", "loopback"),
        ("https://10.0.0.7/mcp", [], "10.0.0.7", "private"),
        ("https://10.0.0.7/mcp", ["10.0.0.0/8"], "10.0.0.7", ""),
        ("https://mcp.corp/mcp", [], "10.0.0.7", "private"),
        ("https://mcp.corp/mcp", ["mcp.corp"], "10.0.0.7", ""),
        ("https://mcp.example/mcp", [], "8.8.8.8", ""),
    ],
)
def test_the_documents_of_a_server_made_at_run_time_have_no_private_address_of_their_own(
    url: str, allow_private: list[str], address: str, refused: str
) -> None:
    policy = AddressPolicy.for_upstream(url, allow_private, trusted=False)
    origin = urls.parse(url).origin
    assert policy.refusal(origin.host, origin.port, address) == refused
    # What the configuration names is trusted with its own address.
    assert AddressPolicy.for_upstream(url, []).refusal(origin.host, origin.port, address) == ""
