"""With a public https name the proxy uses its Client ID Metadata Document, if the server supports them."""

import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.mcp_client import PlainClient
from fakes.proxy_setup import proxy_setup
from mcp_auth_proxy.config.settings import Address

PUBLIC = "https://proxy.example"
DOCUMENT = f"{PUBLIC}/oauth/client-metadata.json"


class PublicBrowser(Browser):
    """A browser that reaches the proxy under its public name, as through a TLS terminator."""

    def __init__(self, address: Address) -> None:
        super().__init__()
        self.address = address
        self.client._transport = Terminator(self.client._transport, address)


class Terminator(httpx2.AsyncBaseTransport):
    def __init__(self, inner: httpx2.AsyncBaseTransport, address: Address) -> None:
        self.inner = inner
        self.address = address

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if url.host == urlsplit(PUBLIC).hostname:
            # A new request: the browser keeps its cookies by the URL of the old one.
            url = url.copy_with(scheme="http", host=self.address.host, port=self.address.port)
            request = httpx2.Request(request.method, url, headers=request.headers, stream=request.stream)
        return await self.inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self.inner.aclose()


def free_address() -> Address:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return Address("127.0.0.1", free.getsockname()[1])


@pytest.mark.parametrize("supported", [True, False])
async def test_behind_https_our_metadata_document_is_the_client_if_supported(
    servers: Servers, tmp_path: Path, supported: bool
) -> None:
    address = free_address()
    async with proxy_setup(
        servers, tmp_path, issuer={"client_documents": supported}, public_url=PUBLIC, listen=address
    ) as setup:
        setup.client.url = f"http://{address}/notes/mcp"
        async with PublicBrowser(address) as browser:
            link = await https_link(setup.client)
            assert link.startswith(f"{PUBLIC}/connect/notes?")
            page = await browser.follow(link)
            assert page.status_code == 200
            document = (await browser.open(DOCUMENT)).json()
        assert (await setup.ask("in")).text == "in"
        asked = setup.issuer.seen("authorize")[0].form
        assert setup.issuer.registrations == (0 if supported else 1)
        assert (asked["client_id"] == DOCUMENT) == supported
        assert asked["redirect_uri"] == f"{PUBLIC}/oauth/callback"
        assert document["client_id"] == DOCUMENT
        assert document["redirect_uris"] == [f"{PUBLIC}/oauth/callback"]
        assert document["application_type"] == "web"
        assert document["token_endpoint_auth_method"] == "none"
        if not supported:
            assert setup.issuer.seen("register")[0].message["application_type"] == "web"


async def https_link(client: PlainClient) -> str:
    answer = (await client.call("echo")).message
    return str(answer["result"]["_meta"]["io.mcp-auth-proxy/authorization_url"])


async def test_a_document_hosted_elsewhere_is_the_client(servers: Servers, tmp_path: Path) -> None:
    url = "https://elsewhere.example/client.json"
    async with proxy_setup(
        servers, tmp_path, oauth={"client_metadata_url": url}, issuer={"client_documents": True}
    ) as setup:
        await setup.connect()
        assert {request.form["client_id"] for request in setup.issuer.seen("token")} == {url}
        assert setup.issuer.registrations == 0
