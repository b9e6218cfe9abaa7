"""The wires: each call as the system that it comes from documents it, with its answers and errors."""

import base64
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.http_exchange import FakeResponse
from fakes.mcp_client import PlainClient
from web.api.api_setup import ApiSetup, api_setup, assert_problem
from web.api.made_setup import LOOPBACK, NO_ISS, administer, consented, made_setup

CLIENTS = "/v1/customers/default/projects/default/mcp-oauth-clients"
BODY = {
    "provider": "github",
    "provider_name": "GitHub",
    "client_id": "by-hand",
    "client_secret": "canary-secret",
    "authorization_url": "https://as.example/authorize",
    "token_url": "https://as.example/token",
}
DISCOVERED = {
    "scopes_supported", "authorization_endpoint", "token_endpoint", "registration_endpoint",
    "supports_dynamic_registration",
}  # fmt: skip


@asynccontextmanager
async def wire(api: ApiSetup, name: str = "", **headers: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Yield a client of another system, with the key of a principal as its token."""
    given = {"authorization": f"Bearer {api.keys[name]}"} if name else {}
    async with httpx2.AsyncClient(
        base_url=api.proxy.origin, headers=given | headers, trust_env=False, timeout=30
    ) as client:
        yield client


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def basic(key: str) -> dict[str, str]:
    return {"authorization": "Basic " + base64.b64encode(f"admin:{key}".encode()).decode()}


def x_api_key(key: str) -> dict[str, str]:
    return {"x-api-key": key}


def client_error(response: httpx2.Response, status: int, kind: str) -> str:
    """Check an error of Bifrost's shape; return its message."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()
    assert set(error) == {"event_id", "type", "is_bifrost_error", "status_code", "error"}
    assert (error["is_bifrost_error"], error["status_code"], error["type"]) == (True, status, kind)
    assert error["event_id"]
    assert set(error["error"]) == {"type", "code", "message", "param"}
    message: str = error["error"]["message"]
    assert message
    return message


def tool_error(response: httpx2.Response, status: int, kind: str) -> None:
    """Check an error of SELISE's shape."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()
    assert set(error) == {"is_success", "item_id", "detail", "error"}
    assert (error["is_success"], error["error"]) == (False, kind)
    assert error["detail"]


def faults(response: httpx2.Response) -> list[tuple[list[str], str]]:
    """Return the faults of a body that the wire with a code has refused."""
    assert response.status_code == 422, response.text
    document = response.json()
    assert set(document) == {"detail"}
    assert all(fault["msg"] for fault in document["detail"])
    return [(fault["loc"], fault["type"]) for fault in document["detail"]]


# Who calls


@pytest.mark.parametrize("credential", [bearer, basic, x_api_key])
async def test_each_wire_takes_each_credential(tmp_path: Path, credential: Callable[[str], dict[str, str]]) -> None:
    async with api_setup(tmp_path) as api, wire(api, **credential(api.keys["ada"])) as client:
        listed = await client.get(CLIENTS)
        assert listed.json() == {"clients": [], "page": {"next_page_token": None}}
        assert_problem(await client.post("/api/mcp/oauth/discover", json={"mcp_server_url": "no URL"}), 422)
        client_error(await client.post("/api/mcp/client/none/complete-oauth"), 404, "not-found")
        body = {"code": "c", "state": "s", "project_key": "default"}
        tool_error(await client.post("/tools/none/complete-oauth", json=body), 404, "not-found")
        started = await client.get("/api/mcp/oauth/start", params={"mcp_server_url": "no URL"})
        # A page is for browsers, which have a session.
        assert_problem(started, 422)


async def test_without_a_credential_each_wire_answers_401_in_its_own_shape(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for headers in ({}, {"authorization": "Bearer mapk_made_up"}):
            async with wire(api, **headers) as client:
                answers = [
                    await client.post("/api/mcp/oauth/discover", json={"mcp_server_url": "https://a.example/mcp"}),
                    await client.get(CLIENTS),
                    await client.post("/api/mcp/client/notes/complete-oauth"),
                    await client.post("/tools/notes/complete-oauth", json={}),
                ]
            assert_problem(answers[0], 401, "unauthenticated")
            assert_problem(answers[1], 401, "unauthenticated")
            client_error(answers[2], 401, "unauthenticated")
            tool_error(answers[3], 401, "unauthenticated")
            assert all(answer.headers["www-authenticate"].startswith("Bearer") for answer in answers)
        async with wire(api, **bearer(api.keys["ada"]), **x_api_key(api.keys["ada"])) as client:
            client_error(await client.post("/api/mcp/client/notes/complete-oauth"), 400, "several-credentials")


async def test_the_wires_are_those_of_the_api_in_mode_none_and_gone_without_it(tmp_path: Path) -> None:
    async with api_setup(tmp_path, inbound={"mode": "none"}) as api:
        token = (tmp_path / "api-token").read_text().strip()
        async with wire(api, **bearer(token)) as client:
            assert (await client.post(CLIENTS, json=BODY)).status_code == 201
        async with wire(api) as client:
            assert_problem(await client.get(CLIENTS), 401)


async def test_what_the_guard_refuses_has_the_shape_of_the_wire_too(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api, wire(api, "ada", origin="https://evil.example") as client:
        assert_problem(await client.get(CLIENTS), 403, "refused")
        assert_problem(await client.post("/api/mcp/oauth/discover", json={}), 403, "refused")
        client_error(await client.post("/api/mcp/client/notes/complete-oauth"), 403, "refused")
        tool_error(await client.post("/tools/notes/complete-oauth", json={}), 403, "refused")
        assert (await client.get("/sign-in")).headers["content-type"].startswith("text/plain")


async def test_other_methods_are_405_and_limits_are_shared_with_the_api(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api, wire(api, "ada") as client:
        refused = await client.get("/api/mcp/client/notes/complete-oauth")
        client_error(refused, 405, "method-not-allowed")
        assert refused.headers["allow"] == "POST"
        tool_error(await client.put("/tools/notes/complete-oauth"), 405, "method-not-allowed")
        assert_problem(await client.put(CLIENTS), 405)
        while (response := await api.ada.get("/me")).status_code == 200:
            pass
        assert_problem(response, 429)
        refused = await client.post("/api/mcp/client/notes/complete-oauth")
        client_error(refused, 429, "too-many-requests")
        assert int(refused.headers["retry-after"]) >= 1
        assert (await client.get("/v1/customers/default")).headers["content-type"].startswith("text/html")


async def test_servers_of_these_names_keep_their_addresses(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(await servers.authorization_server(), protected=False)
    names = {"v1": upstream.url, "tools": upstream.url, "customers": upstream.url}
    async with api_setup(tmp_path, names) as api:
        for name in names:
            async with PlainClient(f"{api.proxy.origin}/{name}/mcp", headers=bearer(api.keys["ben"])) as mcp:
                assert (await mcp.call("echo", text="hello")).text == "hello"
        async with wire(api, "ben") as client:
            done = await client.post("/api/mcp/client/tools/complete-oauth")
            assert done.json()["status"] == "success", done.text


# Windmill: discover, start, callback


async def test_discover_as_windmill_documents_it(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup, wire(setup.api, "ben") as client:
        answer = await client.post("/api/mcp/oauth/discover", json={"mcp_server_url": setup.upstream.url})
        found = answer.json()
        assert answer.status_code == 200, answer.text
        assert set(found) >= DISCOVERED
        assert found["supports_dynamic_registration"] is True
        assert found["token_endpoint"].startswith(setup.issuer.issuer)
        assert_problem(await client.post("/api/mcp/oauth/discover", content="x"), 415)
        assert_problem(await client.post("/api/mcp/oauth/discover", json={}), 422)


async def test_start_and_callback_as_windmill_documents_them(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup, setup.signed_in("ben") as browser:
        administer(setup.api, allow_private=LOOPBACK, adhoc="member", popup_origins=("https://app.example",))
        query = f"mcp_server_url={quote(setup.upstream.url, safe='')}&scopes=read,write"
        start = f"{setup.api.proxy.origin}/api/mcp/oauth/start?{query}"
        shown = await browser.open(start)
        assert shown.status_code == 200
        assert "<code>read</code> <code>write</code>" in shown.text
        assert setup.issuer.requests == []
        back = await browser.stop_before(start)
        wired = back.replace("/oauth/callback?", "/api/mcp/oauth/callback?")
        last = await browser.follow(wired, until="/nowhere")
        assert last.headers["content-type"].startswith("text/html")
        assert "mcp-auth-proxy.oauth" in last.text
        assert "https://app.example" in last.text
        assert "connected" in last.text
        # Nothing on the way cuts the tie to the opener.
        hop = await browser.open(wired)
        assert hop.headers["cross-origin-opener-policy"] == "unsafe-none"


async def test_start_leads_a_browser_without_a_session_to_the_sign_in(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup, Browser() as browser:
        url = f"{setup.api.proxy.origin}/api/mcp/oauth/start?mcp_server_url={quote(setup.upstream.url)}"
        answer = await browser.open(url)
        assert answer.status_code == 303
        assert answer.headers["location"].startswith("/sign-in?next=")
        assert answer.headers["cross-origin-opener-policy"] == "unsafe-none"
        signed_in = await browser.client.post(
            f"{setup.api.proxy.origin}{answer.headers['location']}",
            data={"key": setup.api.keys["ada"], "next": urlsplit(url)._replace(scheme="", netloc="").geturl()},
            headers={"origin": setup.api.proxy.origin},
        )
        assert signed_in.headers["location"].endswith("&confirm=1"), signed_in.text


# Tetrate: OAuth clients


async def test_oauth_clients_as_tetrate_documents_them(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api, wire(api, "ada") as client:
        place = {"customer_id": "default", "project_id": "default"}
        made = await client.post(CLIENTS, json={**BODY, **place, "status": "", "scopes": ["repo"], "metadata": {}})
        assert made.status_code == 201, made.text
        view = made.json()
        assert made.headers["location"] == f"{CLIENTS}/{view['id']}"
        assert {name: view[name] for name in place} == place
        assert (view["status"], view["scopes"]) == ("active", ["repo"])
        assert "canary-secret" not in made.text
        one = f"{CLIENTS}/{view['id']}"
        got = await client.get(one)
        assert got.json() == view
        assert got.headers["etag"] == (await api.ada.get(f"/oauth-clients/{view['id']}")).headers["etag"]
        listed = await client.get(CLIENTS, params={"page_size": 1})
        assert listed.json() == {"clients": [view], "page": {"next_page_token": None}}
        nothing: dict[str, Any] = {
            "provider": "",
            "scopes": [],
            "status": "",
            "redirect_uris": None,
            "client_secret": "",
        }
        same = await client.patch(one, json={**place, "id": view["id"], **nothing})
        assert same.status_code == 200, same.text
        assert {**same.json(), "updated_at": ""} == {**view, "updated_at": ""}
        changed = await client.patch(one, json={"status": "inactive", "replace_scopes": True})
        assert (changed.json()["status"], changed.json()["scopes"]) == ("inactive", [])
        assert_problem(await client.patch(one, json={}, headers={"if-match": '"old"'}), 412)
        assert_problem(await client.patch(one, json={"token_url": "https://evil.example/token"}), 422)
        twice = assert_problem(await client.post(CLIENTS, json=BODY), 409)
        assert twice["existing_id"] == view["id"]
        assert (await client.delete(one)).status_code == 204
        assert_problem(await client.get(one), 404)
        events = (await api.ada.get("/events")).json()["items"]
        done = {(event["action"], event["target"]) for event in events if event["outcome"] == "ok"}
        assert {(f"oauth-clients.{verb}", view["id"]) for verb in ("create", "change", "delete")} <= done


@pytest.mark.parametrize(
    "place", ["customers/other/projects/default", "customers/default/projects/other", "customers/x/projects/y"]
)
async def test_another_customer_or_project_is_404(tmp_path: Path, place: str) -> None:
    async with api_setup(tmp_path) as api, wire(api, "ada") as client:
        view = (await client.post(CLIENTS, json=BODY)).json()
        foreign = f"/v1/{place}/mcp-oauth-clients"
        for method, path, body in (
            ("GET", foreign, None),
            ("POST", foreign, {**BODY, "provider": "another"}),
            ("GET", f"{foreign}/{view['id']}", None),
            ("PATCH", f"{foreign}/{view['id']}", {}),
            ("DELETE", f"{foreign}/{view['id']}", None),
        ):
            assert_problem(await client.request(method, path, json=body), 404, "not-found")
        for name in ("customer_id", "project_id"):
            body = {**BODY, "provider": "another", name: "other"}
            assert_problem(await client.post(CLIENTS, json=body), 404, "not-found")
        assert_problem(await client.patch(f"{CLIENTS}/{view['id']}", json={"id": "another"}), 404)
        assert len((await client.get(CLIENTS)).json()["clients"]) == 1
        async with wire(api, "zoe") as another:
            assert_problem(await another.get(CLIENTS), 404)
            assert (await another.get(CLIENTS.replace("projects/default", "projects/other"))).status_code == 200


async def test_the_customer_is_the_configured_one_and_pages_are_bound_to_their_list(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api, wire(api, "ada") as client:
        administer(api, customer_id="acme")
        own = CLIENTS.replace("customers/default", "customers/acme")
        assert_problem(await client.get(CLIENTS), 404)
        for number in range(3):
            await client.post(own, json={**BODY, "provider": f"p{number}"})
        first = (await client.get(own, params={"page_size": 2})).json()
        token = first["page"]["next_page_token"]
        second = (await client.get(own, params={"page_size": 2, "page_token": token})).json()
        assert [len(page["clients"]) for page in (first, second)] == [2, 1]
        assert first["clients"][0]["customer_id"] == "acme"
        assert_problem(await client.get(own, params={"page_token": "made-up"}), 400, "page-token")
        assert_problem(await client.get(own, params={"page_size": 201}), 422)


async def test_members_read_clients_and_only_admins_write_them(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api, wire(api, "ben") as client:
        assert_problem(await client.post(CLIENTS, json=BODY), 403, "forbidden")
        assert (await client.get(CLIENTS)).status_code == 200
        assert_problem(await client.post(CLIENTS, json={}), 403)
        async with wire(api, "ada") as admin:
            problem = assert_problem(await admin.post(CLIENTS, json={"surprise": 1}), 422, "invalid")
            assert ["body", "surprise"] in [fault["loc"] for fault in problem["errors"]]
            assert len(problem["errors"]) == 5


# Bifrost: complete


async def test_complete_as_bifrost_documents_it(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup, wire(setup.api, "ben") as client:
        made = await setup.make()
        path = f"/api/mcp/client/{made['id']}/complete-oauth"
        client_error(await client.post(path), 400, "not-authorized")
        client_error(await client.post("/api/mcp/client/made-up/complete-oauth"), 404, "not-found")
        await setup.connect(made["id"], setup.api.ben)
        as_json = {"content-type": "application/json"}
        for headers, content in (({}, ""), (as_json, ""), (as_json, "{}")):
            done = await client.post(path, headers=headers, content=content)
            assert done.status_code == 200, done.text
            assert set(done.json()) == {"status", "message"}
            assert done.json()["status"] == "success"
            assert "tickets is connected" in done.json()["message"]
        setup.upstream.answers["initialize"] = FakeResponse(status=500)
        setup.upstream.answers["tools/list"] = FakeResponse(status=500)
        client_error(await client.post(path), 502, "upstream-failed")
        events = (await setup.api.ada.get("/events")).json()["items"]
        found = {(event["action"], event["target"], event["outcome"]) for event in events}
        assert ("servers.complete", made["id"], "ok") in found
        assert ("servers.complete", made["id"], "upstream-failed") in found


# SELISE Blocks: complete with a code


async def test_complete_with_a_code_as_selise_documents_it(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path, issuer=NO_ISS) as setup, wire(setup.api, "ben") as client:
        made = await setup.make()
        path = f"/tools/{made['id']}/complete-oauth"
        flow = await setup.headless(made["id"], setup.api.ben)
        given = {**await consented(flow["authorization_url"]), "project_key": "default"}
        assert set(given) == {"code", "state", "project_key"}
        csrf = [(["body", "state"], "value_error.csrf")]
        assert faults(await client.post(path, json={**given, "state": "made-up"})) == csrf
        async with wire(setup.api, "eve") as eve:
            assert faults(await eve.post(path, json=given)) == csrf
        tool_error(await client.post(path, json={**given, "project_key": "other"}), 404, "not-found")
        tool_error(await client.post("/tools/made-up/complete-oauth", json=given), 404, "not-found")
        assert setup.issuer.token_requests() == 0
        done = await client.post(path, json=given)
        assert done.status_code == 200, done.text
        assert done.json() == {
            "is_success": True, "item_id": made["id"], "detail": "tickets is connected.", "error": None,
        }  # fmt: skip
        tool_error(await client.post(path, json=given), 400, "code-refused")
        missing = [(["body", name], "missing") for name in ("code", "state", "project_key")]
        assert faults(await client.post(path, json={})) == missing
        assert faults(await client.post(path, content="{", headers={"content-type": "application/json"}))
        assert faults(await client.post(path, json={**given, "code": 1}))[0][0] == ["body", "code"]
        tool_error(await client.post(path, content="x=1"), 415, "unsupported-media-type")
        tool_error(await client.post(path, json={**given, "code": "x" * 300_000}), 413, "too-large")


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        ("invalid_grant", 400, "code-refused"),
        ("invalid_client", 401, "authorization-refused"),
        ("access_denied", 401, "authorization-refused"),
    ],
)
async def test_a_refused_code_is_400_and_what_else_the_provider_refuses_is_401(
    servers: Servers, tmp_path: Path, error: str, status: int, kind: str
) -> None:
    async with made_setup(servers, tmp_path, issuer=NO_ISS) as setup, wire(setup.api, "ben") as client:
        made = await setup.make()
        flow = await setup.headless(made["id"], setup.api.ben)
        given = {**await consented(flow["authorization_url"]), "project_key": "default"}
        setup.issuer.answers["token"] = FakeResponse.json({"error": error}, status=400)
        tool_error(await client.post(f"/tools/{made['id']}/complete-oauth", json=given), status, kind)


@pytest.mark.parametrize("form", ["{}", "?{}"])
async def test_where_iss_is_promised_the_code_is_the_whole_callback_query(
    servers: Servers, tmp_path: Path, form: str
) -> None:
    async with made_setup(servers, tmp_path) as setup, wire(setup.api, "ben") as client:
        made = await setup.make()
        path = f"/tools/{made['id']}/complete-oauth"
        flow = await setup.headless(made["id"], setup.api.ben)
        query = await consented(flow["authorization_url"])
        given = {"code": query["code"], "state": query["state"], "project_key": "default"}
        assert faults(await client.post(path, json=given)) == [(["body", "iss"], "missing")]
        done = await client.post(path, json={**given, "code": form.format(urlencode(query))})
        assert (done.status_code, done.json()["is_success"]) == (200, True), done.text


async def test_an_iss_of_another_issuer_in_the_query_is_refused(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup, wire(setup.api, "ben") as client:
        made = await setup.make()
        flow = await setup.headless(made["id"], setup.api.ben)
        query: dict[str, Any] = await consented(flow["authorization_url"])
        wrong = urlencode({**query, "iss": "https://evil.example"})
        given = {"code": wrong, "state": query["state"], "project_key": "default"}
        answer = await client.post(f"/tools/{made['id']}/complete-oauth", json=given)
        tool_error(answer, 400, "code-refused")
        assert "another issuer" in json.loads(answer.text)["detail"]
