"""The routes that are not for MCP: front page, health, metrics, client metadata, and pages that say what is wrong."""

import pytest

from mcp_auth_proxy import __version__
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.errors import StoreRejected, StoreUnavailable
from mcp_auth_proxy.models import GrantType
from mcp_auth_proxy.observability.instruments import CONTENT_TYPE
from mcp_auth_proxy.web.pages import SECURITY_HEADERS
from web.site_setup import site_setup

PUBLIC = "https://mcp.example.com"


def server(name: str, grant: GrantType = GrantType.AUTHORIZATION_CODE) -> ServerSettings:
    return ServerSettings(name=name, url=f"https://{name}.example/mcp", oauth=OAuthSettings(grant=grant))


async def test_the_front_page_lists_the_servers_of_now_with_the_address_for_clients() -> None:
    async with site_setup(PUBLIC, {"notes": server("notes")}) as setup:
        for names in (["notes"], ["docs", "mail"]):
            setup.servers.clear()
            setup.servers.update({name: server(name) for name in names})
            page = await setup.client.get("/")
            assert page.status_code == 200
            assert [name for name in ("notes", "docs", "mail") if f"{PUBLIC}/{name}/mcp" in page.text] == names
            assert __version__ in page.text


@pytest.mark.parametrize("path", ["/", "/nowhere", "/connect/notes", "/oauth/callback", "/oauth/client-metadata.json"])
async def test_no_page_can_be_framed_or_run_a_script(path: str) -> None:
    async with site_setup() as setup:
        page = await setup.client.get(path, params={"state": "S"})
        assert {"x-frame-options": "DENY", "x-content-type-options": "nosniff"}.items() <= dict(page.headers).items()
        policy = page.headers["content-security-policy"]
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        if path == "/":
            # The one page with a script, which is a file of its own.
            assert "script-src 'self';" in policy
            assert "style-src 'self';" in policy
            assert "<style" not in page.text
        else:
            assert SECURITY_HEADERS.items() <= dict(page.headers).items()


async def test_health_is_told_without_a_look_at_the_store() -> None:
    async with site_setup() as setup:
        setup.store.problem = StoreUnavailable("It is locked.")
        health = await setup.client.get("/healthz")
        assert (health.status_code, health.json()) == (
            200,
            {"status": "ok", "service": "mcp-auth-proxy", "version": __version__},
        )


async def test_it_is_ready_while_the_store_can_be_written_and_it_does_not_drain() -> None:
    async with site_setup() as setup:
        ready = await setup.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
        setup.store.problem = StoreUnavailable("The disk is full.")
        ready = await setup.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "store", "reason": "The disk is full."})
        setup.draining = True
        ready = await setup.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "draining"})


async def test_metrics_are_in_the_form_that_prometheus_reads_and_kept_nowhere() -> None:
    async with site_setup() as setup:
        scrape = await setup.client.get("/metrics")
        assert (scrape.status_code, scrape.headers["content-type"]) == (200, CONTENT_TYPE)
        assert scrape.headers["cache-control"] == "no-store"
        assert "# TYPE " in scrape.text


async def test_a_page_that_there_is_not_says_so() -> None:
    async with site_setup() as setup:
        page = await setup.client.get("/nowhere")
        assert (page.status_code, "There is no page at this address." in page.text) == (404, True)


@pytest.mark.parametrize("path", ["/", "/readyz", "/oauth/callback"])
async def test_pages_can_not_be_written_to(path: str) -> None:
    async with site_setup() as setup:
        assert (await setup.client.post(path)).status_code == 405
        assert setup.broker.opened == []


async def test_a_store_that_fails_is_told_by_a_page(caplog: pytest.LogCaptureFixture) -> None:
    async with site_setup() as setup:
        setup.broker.visit = StoreRejected("The key is wrong.")
        page = await setup.client.get("/connect/notes?flow=F1")
        assert page.status_code == 503
        assert "The key is wrong." in page.text
    assert "The key is wrong." in caplog.text


async def test_a_client_metadata_document_needs_an_address_that_others_can_fetch() -> None:
    async with site_setup("http://127.0.0.1:8787") as setup:
        page = await setup.client.get("/oauth/client-metadata.json")
        assert page.status_code == 404
        assert "https" in page.text


@pytest.mark.parametrize("grant", [GrantType.AUTHORIZATION_CODE, GrantType.DEVICE_CODE])
async def test_the_client_metadata_document_has_its_own_address_as_id(grant: GrantType) -> None:
    async with site_setup(PUBLIC, {"a": server("a"), "b": server("b", grant)}) as setup:
        response = await setup.client.get("/oauth/client-metadata.json")
        document = response.json()
        assert document["client_id"] == f"{PUBLIC}/oauth/client-metadata.json"
        assert document["redirect_uris"] == [f"{PUBLIC}/oauth/callback"]
        device = "urn:ietf:params:oauth:grant-type:device_code" in document["grant_types"]
        assert device is (grant is GrantType.DEVICE_CODE)
        assert response.headers["cache-control"] == "public, max-age=3600"
