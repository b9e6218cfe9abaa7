"""Mix-up (T77): a hostile authorization server names an honest one's sign-in page, to get the honest one's codes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.extension_server import ExtensionServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.hostile import assert_refused
from fakes.http_exchange import ABSENT, FakeResponse
from fakes.proxy import link_in, running_proxy
from fakes.proxy_setup import ProxySetup, proxy_setup
from mcp_auth_proxy.errors import DocumentRefused
from mcp_auth_proxy.oauth import discovery

PROMISE = "authorization_response_iss_parameter_supported"
KNOWN = "known-to-the-honest-server"


@dataclass(kw_only=True)
class Attack:
    """The proxy before a server that names the hostile authorization server ``proxy.issuer``."""

    proxy: ProxySetup
    honest: FakeAuthorizationServer

    @property
    def hostile(self) -> FakeAuthorizationServer:
        return self.proxy.issuer

    def stolen(self) -> list[str]:
        """Return the codes and verifiers that the hostile server was sent."""
        names = ("code", "code_verifier")
        return [request.form[name] for request in self.hostile.requests for name in names if name in request.form]


@asynccontextmanager
async def attack(
    servers: Servers,
    folder: Path,
    *,
    site: str = "localhost",
    honest: Mapping[str, Any] | None = None,
    promise: object = ABSENT,
) -> AsyncIterator[Attack]:
    """Run the attack. ``site``: the honest server's host; the hostile server is at 127.0.0.1.

    ``honest`` are options of that server; ``promise`` is what the hostile metadata says of ``iss``.
    """
    victim = await servers.authorization_server(auto_consent=True, **(honest or {}))
    victim.issuer = victim.issuer.replace("127.0.0.1", site)
    async with proxy_setup(servers, folder) as setup:
        callback = f"{setup.proxy.origin}/oauth/callback"
        victim.add_client(client_id=KNOWN, auth="none", redirect_uris=(callback,))
        answer = {"client_id": KNOWN, "token_endpoint_auth_method": "none", "redirect_uris": [callback]}
        setup.issuer.answers["register"] = FakeResponse.json(answer, 201)
        endpoint = {"authorization_endpoint": f"{victim.issuer}/authorize"}
        setup.issuer.metadata_changes = {**endpoint, PROMISE: promise}
        yield Attack(proxy=setup, honest=victim)


@pytest.mark.parametrize("promise", [ABSENT, False, None, "true", 1, [True]], ids=str)
async def test_a_sign_in_page_on_another_site_is_refused_and_nothing_is_sent_there(  # T77
    servers: Servers, tmp_path: Path, promise: object
) -> None:
    async with attack(servers, tmp_path, honest={"iss": None}, promise=promise) as found:
        async with asyncio.timeout(5):
            assert_refused(await found.proxy.ask(), "authorization server metadata", found.hostile.issuer)
        assert found.proxy.proxy.links == []
        assert found.honest.requests == []
        assert (found.hostile.registrations, found.stolen()) == (0, [])


async def test_the_error_names_the_key_and_its_value(servers: Servers, tmp_path: Path) -> None:  # T77
    async with attack(servers, tmp_path) as found:
        pin = f"servers.notes.oauth.issuer: {found.hostile.issuer}"
        assert_refused(await found.proxy.ask(), found.honest.issuer, "another site", pin, "RFC 9700 §4.4")


@pytest.mark.parametrize("iss", [None, "auto", ""], ids=str)
async def test_a_promised_iss_that_is_absent_or_of_the_other_server_is_refused(  # T77
    servers: Servers, tmp_path: Path, iss: str | None
) -> None:
    async with attack(servers, tmp_path, honest={"iss": iss}, promise=True) as found:
        page = await consent(link_in((await found.proxy.ask()).message))
        assert page.status_code == 400
        assert "iss" in page.text
        assert found.honest.authorizations == 1
        assert found.stolen() == []


async def test_an_iss_that_was_not_promised_is_compared_too(servers: Servers, tmp_path: Path) -> None:  # T77
    async with attack(servers, tmp_path, site="127.0.0.1") as found:
        page = await consent(link_in((await found.proxy.ask()).message))
        assert page.status_code == 400
        assert "another issuer" in page.text
        assert found.honest.authorizations == 1
        assert found.stolen() == []


@pytest.mark.parametrize("way", ["promise", "issuer", "metadata"])
async def test_a_sign_in_page_on_another_site_works_if_iss_is_promised_or_the_issuer_is_pinned(  # T77
    servers: Servers, tmp_path: Path, way: str
) -> None:
    issuer = await servers.authorization_server(auto_consent=True, iss="auto" if way == "promise" else None)
    sign_in = f"{issuer.issuer}/authorize".replace("127.0.0.1", "localhost")
    issuer.metadata_changes = {"authorization_endpoint": sign_in, PROMISE: way == "promise"}
    pins: dict[str, dict[str, object]] = {
        "promise": {},
        "issuer": {"issuer": issuer.issuer},
        "metadata": {"metadata": issuer.metadata()},
    }
    async with proxy_setup(servers, tmp_path, oauth=pins[way]) as setup:
        setup.upstream.authorization_servers[:] = [issuer]
        await setup.connect()
        assert (issuer.authorizations, setup.issuer.requests) == (1, [])


async def test_grants_without_a_sign_in_page_are_not_affected(servers: Servers, tmp_path: Path) -> None:
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "s"}
    async with proxy_setup(servers, tmp_path, oauth=oauth) as setup:
        setup.issuer.add_client(client_id="agent", secret="s")
        setup.issuer.metadata_changes = {"authorization_endpoint": "https://other.example/a", PROMISE: ABSENT}
        assert (await setup.ask("in")).text == "in"


@pytest.mark.parametrize("pinned", [False, True], ids=["found", "pinned"])
async def test_the_device_codes_of_another_server_are_not_asked_for(  # T77
    servers: Servers, tmp_path: Path, pinned: bool
) -> None:
    async with ExtensionServer.running() as honest, ExtensionServer.running() as hostile:
        honest.issuer = honest.issuer.replace("127.0.0.1", "localhost")
        upstream = await servers.mcp_server(hostile)
        endpoint = honest.metadata()["device_authorization_endpoint"]
        hostile.metadata_changes = {"device_authorization_endpoint": endpoint, PROMISE: True}
        pin = {"issuer": hostile.issuer} if pinned else {}
        config = {"notes": {"url": upstream.url, "oauth": {"grant": "device_code", **pin}}}
        async with (
            running_proxy(tmp_path, config, authorization={"wait": "0s"}) as proxy,
            proxy.client("notes") as client,
        ):
            answer = await client.call("echo")
        assert bool(honest.seen("device_authorization")) is pinned
        if not pinned:
            assert_refused(answer, "device_authorization_endpoint", "servers.notes.oauth.issuer")
            assert (hostile.registrations, hostile.polls) == (0, 0)


@pytest.mark.parametrize(
    ("device", "token", "refused"),
    [
        ("https://oauth2.googleapis.com/device/code", "https://oauth2.googleapis.com/token", False),
        ("https://device.as.example/code", "https://elsewhere.example/token", False),
        ("https://oauth2.googleapis.com/device/code", "https://as.example/token", True),
    ],
)
def test_a_device_endpoint_belongs_to_the_issuer_or_to_the_token_endpoint(  # T77
    device: str, token: str, refused: bool
) -> None:
    metadata = discovery.ServerMetadata(
        issuer="https://as.example", token_endpoint=token, device_authorization_endpoint=device
    )
    with pytest.raises(DocumentRefused, match="another site") if refused else nullcontext():
        discovery.require_own_device_endpoint(metadata, server="notes")


def test_an_issuer_that_is_not_quite_a_url_is_no_fault_of_the_check() -> None:
    """The issuer of a server of MCP 2025-03-26 is below the server's origin, and otherwise any text."""
    body = '{"issuer": "https://h/\\u00e9", "token_endpoint": "https://h/t", "authorization_endpoint": "https://o/a"}'
    metadata = discovery.read_server_metadata(
        body.encode(), url="https://h/m", issuer="https://h", policy_http_loopback=False, legacy=True
    )
    with pytest.raises(DocumentRefused, match="another site"):
        discovery.require_own_authorization_endpoint(metadata, server="notes")
