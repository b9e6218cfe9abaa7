"""The authorization server of the MCP SDK, on which FastMCP and many others are built: from consent to logout."""

from pathlib import Path

import pytest

from fakes.headless import consent
from fakes.proxy import RunningProxy, Sections, link_in, run_command, running_proxy
from fakes.sdk_server import SdkServer

UNHELD: Sections = {"authorization": {"wait": "0s"}}


async def connect_and_renew(proxy: RunningProxy, server: SdkServer) -> None:
    """Consent, a call, and another one after every access token has died."""
    async with proxy.client("notes") as client:
        page = await consent(link_in((await client.call("echo", text="x")).message))
        assert page.status_code == 200, page.text
        assert (await client.call("echo", text="connected")).text == "connected"
        server.provider.access.clear()
        assert (await client.call("echo", text="renewed")).text == "renewed"


async def test_a_client_that_registers_itself_connects_renews_and_revokes(tmp_path: Path) -> None:
    async with SdkServer.running() as server:
        async with running_proxy(tmp_path, {"notes": server.url}, **UNHELD) as proxy:
            await connect_and_renew(proxy, server)
        assert len(server.seen("register")) == 1
        assert [request.form["grant_type"] for request in server.seen("token")] == [
            "authorization_code",
            "refresh_token",
        ]
        code, out, err = await run_command("logout", "notes", "--config", str(tmp_path / "mcp-auth-proxy.yaml"))
        assert (code, err) == (0, "")
        assert "revoked at" in out
        assert server.provider.refresh == {}


@pytest.mark.parametrize("configured", [True, False], ids=["configured", "chosen"])
async def test_a_client_registered_by_hand_for_basic_connects_and_renews(tmp_path: Path, configured: bool) -> None:
    oauth = {"client_id": "by-hand", "client_secret": "file:secret"}
    if configured:
        oauth["client_auth"] = "client_secret_basic"
    (tmp_path / "secret").write_text("s3cret:/+")
    async with (
        SdkServer.running() as server,
        running_proxy(tmp_path, {"notes": {"url": server.url, "oauth": oauth}}, **UNHELD) as proxy,
    ):
        server.add_client(
            "by-hand",
            secret="s3cret:/+",
            auth="client_secret_basic",
            redirect_uri=f"{proxy.origin}/oauth/callback",
        )
        await connect_and_renew(proxy, server)
        first, *others = server.seen("token")
        # Some refuse the id together with Basic, so it is sent only after a server has required it once.
        assert "client_id" not in first.form
        assert [(request.form["grant_type"], request.form["client_id"]) for request in others] == [
            ("authorization_code", "by-hand"),
            ("refresh_token", "by-hand"),
        ]
        assert all("client_secret" not in request.form for request in server.seen("token"))


async def test_a_method_of_the_configuration_is_registered_and_used(tmp_path: Path) -> None:
    oauth = {"client_auth": "client_secret_basic"}
    async with (
        SdkServer.running() as server,
        running_proxy(tmp_path, {"notes": {"url": server.url, "oauth": oauth}}, **UNHELD) as proxy,
    ):
        await connect_and_renew(proxy, server)
        (registered,) = server.seen("register")
        assert registered.message["token_endpoint_auth_method"] == "client_secret_basic"
        assert all((request.header("authorization") or "").startswith("Basic ") for request in server.seen("token"))
