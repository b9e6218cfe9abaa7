"""Logins of the real mcp-remote are taken over, as its version 0.1 and its latest one keep them."""

from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.mcp_remote import sign_in
from fakes.proxy import link_in, proxy_process, run_command, write_config

pytestmark = pytest.mark.clients


@pytest.mark.timeout(180)  # a node program and three of ours start, and answer this process in turn
@pytest.mark.parametrize("version", ["0.1", "0.15"])
async def test_a_login_of_mcp_remote_goes_on_here(servers: Servers, tmp_path: Path, version: str) -> None:
    issuer = await servers.authorization_server(auto_consent=True, token_seconds=600)
    upstream = await servers.real_mcp_server(issuer, scopes=("notes:read",))
    folder = tmp_path / "mcp-auth"
    await sign_in(version, upstream.url, folder)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = write_config(tmp_path, {"notes": upstream.url}, authorization={"wait": "0s"})
    authorizations, registrations, renewed = issuer.authorizations, issuer.registrations, issuer.refreshes
    words = ("import", "--from", "mcp-remote", "--config", str(config))
    code, out, err = await run_command(*words, env={"MCP_REMOTE_CONFIG_DIR": str(folder)})
    assert code == 0, err
    assert "notes, since" in out and "imported" in out
    assert "their refresh tokens are the proxy's from now on" in err
    assert ("do not name its authorization server" in err) == (version == "0.1")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert not [secret for secret in issuer.secrets() if secret in out + err]
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        await client.initialize()
        assert (await client.call("echo", text="with its token")).text == "with its token"
        assert issuer.refreshes == renewed
        issuer.end_access_tokens()
        assert (await client.call("echo", text="renewed")).text == "renewed"
        assert issuer.refreshes == renewed + 1
        assert (issuer.authorizations, issuer.registrations) == (authorizations, registrations)
        # Its redirect URI is not ours: a consent needs a client of our own.
        issuer.end_grants()
        assert (await consent(link_in((await client.call("echo", text="x")).message))).status_code == 200
        assert (await client.call("echo", text="again")).text == "again"
        assert issuer.registrations == registrations + 1
        assert await proxy.stop() == 0
    assert not [secret for secret in issuer.secrets() if secret in proxy.log]
