"""``/discover``: what a server asks for, without registering or storing anything."""

from pathlib import Path

import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.names import names
from fakes.raw_server import RawServer, answers, ok
from web.api.api_setup import api_setup, assert_problem
from web.api.made_setup import made_setup


async def test_a_protected_server_is_described_and_nothing_is_registered(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path, scopes=("read",)) as setup:
        response = await setup.api.ben.post("/discover", json={"mcp_server_url": setup.upstream.url})
        assert response.status_code == 200, response.text
        found, issuer = response.json(), setup.issuer.issuer
        assert found["requires_authorization"] is True
        assert found["issuer"] == issuer
        assert found["authorization_endpoint"].startswith(issuer)
        assert found["token_endpoint"].startswith(issuer)
        assert found["registration_endpoint"].startswith(issuer)
        assert found["supports_dynamic_registration"] is True
        assert "dynamic" in found["registration_methods"]
        assert {finding["verdict"] for finding in found["findings"]} <= {"ok", "note"}
        assert found["findings"][0]["says"] == "It asks for a token, and for the scopes read."
        assert setup.issuer.registrations == 0
        servers_left = (await setup.api.ada.get("/servers")).json()["items"]
        assert [server["name"] for server in servers_left] == ["linear", "notes"]


async def test_what_a_server_does_not_have_is_null(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        setup.issuer.registration = False
        found = (await setup.api.ben.post("/discover", json={"mcp_server_url": setup.upstream.url})).json()
        assert (found["registration_endpoint"], found["supports_dynamic_registration"]) == (None, False)
        assert found["registration_methods"] == ["configured"]
        (refused,) = (finding for finding in found["findings"] if finding["verdict"] == "refused")
        assert "servers.NAME.oauth.client_id" in refused["says"]


async def test_an_open_server_needs_nothing(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path, protected=False, metadata_at=set()) as setup:
        found = (await setup.api.ben.post("/discover", json={"mcp_server_url": setup.upstream.url})).json()
        assert found["requires_authorization"] is False


async def test_a_refused_document_is_named(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        setup.issuer.answers["metadata"] = FakeResponse.json({"issuer": "https://evil.example"})
        problem = assert_problem(
            await setup.api.ben.post("/discover", json={"mcp_server_url": setup.upstream.url}), 502, "document-refused"
        )
        assert "issuer" in problem["detail"]


@pytest.mark.parametrize(
    "url",
    ["http://169.254.169.254/latest", "https://[fd00:ec2::254]/", "ftp://x.example", "http://far.example/mcp", ""],
)
async def test_a_url_that_breaks_a_rule_is_refused_before_anything_is_sent(tmp_path: Path, url: str) -> None:  # T69
    async with api_setup(tmp_path) as api:
        problem = assert_problem(await api.ben.post("/discover", json={"mcp_server_url": url}), 422)
        assert problem["errors"][0]["loc"] == ["body", "mcp_server_url"]


async def test_a_name_that_rebinds_is_refused_when_it_is_dialed_and_nothing_is_sent(  # T69
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with names(monkeypatch) as resolver:
        # Public when the server is made, and this machine when it is used.
        resolver.addresses = {"127.0.0.1": "127.0.0.1", "rebind.example": "203.0.113.7"}
        async with api_setup(tmp_path) as api, RawServer(answers(ok())) as there:
            url = f"https://rebind.example:{there.port}/mcp"
            made = await api.ada.post("/servers", json={"name": "rebind", "url": url})
            assert made.status_code == 201
            for address in ("127.0.0.1", "169.254.169.254", "10.0.0.7"):
                resolver.addresses["rebind.example"] = address
                api.proxy.application.resolver.expire("rebind.example", owner=f"rebind.example:{there.port}")
                for path, body in (
                    (f"/servers/{made.json()['id']}/verify", {}),
                    (f"/servers/{made.json()['id']}/flows", {}),
                    ("/discover", {"mcp_server_url": url}),
                ):
                    problem = assert_problem(await api.ben.post(path, json=body), 502, "upstream-failed")
                    assert "admin.allow_private" in problem["detail"]
                key = {"authorization": f"Bearer {api.keys['ben']}"}
                async with api.proxy.client("rebind", headers=key) as client:
                    refused = await client.post("tools/list", {})
                assert "admin.allow_private" in refused.message["error"]["message"]
            assert there.peers == []


async def test_documents_at_a_private_address_are_refused(servers: Servers, tmp_path: Path) -> None:  # T69
    async with made_setup(servers, tmp_path) as setup:
        # The server may be on loopback, its authorization server nowhere else.
        setup.upstream.metadata_changes = {"authorization_servers": ["https://10.0.0.7"]}
        problem = assert_problem(
            await setup.api.ben.post("/discover", json={"mcp_server_url": setup.upstream.url}), 502, "document-refused"
        )
        assert "10.0.0.7" in problem["detail"]


async def test_a_server_that_does_not_answer_in_time_is_504(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made = await setup.make(upstream_timeout="300ms")
        setup.upstream.intercept = lambda request: FakeResponse(head=False)
        for action, status in (("flows", 504), ("verify", 502)):
            assert_problem(await setup.api.ben.post(f"/servers/{made['id']}/{action}"), status)
