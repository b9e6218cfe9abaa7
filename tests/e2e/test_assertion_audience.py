"""The audience of client assertions (RFC 7523 §3): the issuer, or the endpoint if the operator says so."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fakes.extension_server import ExtensionServer, audience_of, new_key, pem
from fakes.fixtures import Servers
from fakes.proxy import running_proxy
from mcp_auth_proxy.cli.demo_servers.ledger import Client, OAuthError


class OlderServer(ExtensionServer):
    """It wants the URL of the endpoint as audience."""

    wanted = "token"

    def _by_assertion(self, form: Mapping[str, str]) -> Client:
        if audience_of(form["client_assertion"]) != f"{self.issuer}/{self.wanted}":
            raise OAuthError("invalid_client", "the assertion is not for this endpoint", 401)
        return self.ledger.clients["agent"]


@pytest.mark.parametrize("audience", [None, "issuer", "endpoint"])
async def test_the_audience_is_the_issuer_unless_the_operator_says_otherwise(
    servers: Servers, tmp_path: Path, audience: str | None
) -> None:
    (tmp_path / "client.pem").write_text(pem(new_key()))
    oauth: dict[str, Any] = {"grant": "client_credentials", "client_id": "agent", "private_key": "file:client.pem"}
    if audience is not None:
        oauth["client_assertion_audience"] = audience
    async with OlderServer.running() as issuer:
        issuer.add_client(client_id="agent", auth="private_key_jwt")
        upstream = await servers.mcp_server(issuer)
        config = {"notes": {"url": upstream.url, "oauth": oauth}}
        async with (
            running_proxy(tmp_path, config, authorization={"wait": "0s"}) as proxy,
            proxy.client("notes") as client,
        ):
            reply = await client.call("echo", text="in")
            if audience == "endpoint":
                assert reply.text == "in"
            else:
                assert "invalid_client" in reply.error["message"]
                (request,) = issuer.seen("token")
                assert audience_of(request.form["client_assertion"]) == issuer.issuer
