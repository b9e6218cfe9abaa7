"""``/oauth-clients``: the rules of the fields, and what a client's status means for authorizations and refreshes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.mcp_server import FakeMcpServer
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.oauth_clients import OAuthClients
from web.api.api_setup import ApiSetup, api_setup, assert_problem

SECRET, NEWER = "canary-client-secret", "canary-newer-secret"
BODY = {
    "provider": "notes-provider",
    "client_id": "by-hand",
    "client_secret": SECRET,
    "authorization_url": "https://as.example/authorize",
    "token_url": "https://as.example/token",
}


async def create(api: ApiSetup, **changes: Any) -> dict[str, Any]:
    response = await api.ada.post("/oauth-clients", json={**BODY, **changes})
    assert response.status_code == 201, response.text
    made: dict[str, Any] = response.json()
    assert response.headers["location"] == f"/api/v1/oauth-clients/{made['id']}"
    return made


async def change(api: ApiSetup, made: dict[str, Any], **changes: Any) -> dict[str, Any]:
    response = await api.ada.patch(f"/oauth-clients/{made['id']}", json=changes)
    assert response.status_code == 200, response.text
    changed: dict[str, Any] = response.json()
    return changed


async def test_a_client_is_made_read_and_listed_without_its_secret(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        made = await create(api, scopes=["read"], metadata={"team": "a"}, server_ids=["notes"])
        answers = [
            await api.ada.get(f"/oauth-clients/{made['id']}"),
            await api.ben.get(f"/oauth-clients/{made['id']}"),
            await api.ben.get("/oauth-clients"),
        ]
        assert answers[0].json() == answers[1].json() == made
        assert answers[2].json() == {"items": [made], "page": {"next_page_token": None}}
        assert SECRET not in "".join(answer.text for answer in answers) + str(made)
        assert made["has_client_secret"] is True
        assert (made["customer_id"], made["project_id"], made["status"]) == ("default", "default", "active")
        assert (made["provider_name"], made["server_ids"]) == ("notes-provider", ["notes"])
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
    assert SECRET.encode() not in kept


async def test_only_admins_write_and_another_project_sees_nothing(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        made = await create(api)
        path = f"/oauth-clients/{made['id']}"
        assert_problem(await api.ben.post("/oauth-clients", json=BODY), 403, "forbidden")
        assert_problem(await api.ben.patch(path, json={}), 403, "forbidden")
        assert_problem(await api.ben.delete(path), 403, "forbidden")
        for method in ("GET", "PATCH", "DELETE"):
            assert_problem(await api.zoe.request(method, path, json={}), 404, "not-found")
        assert (await api.zoe.get("/oauth-clients")).json()["items"] == []


async def test_pages(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        made = [await create(api, provider=f"p{number}") for number in range(5)]
        found, token = [], ""
        while True:
            page = (await api.ben.get("/oauth-clients", params={"page_size": 2, "page_token": token})).json()
            found += page["items"]
            token = page["page"]["next_page_token"]
            if token is None:
                break
        assert found == made


@pytest.mark.parametrize(
    ("changes", "locs"),
    [
        ({"token_url": "http://as.example/token", "scopes": ["a b"]}, [["token_url"], ["scopes", 0]]),
        ({"provider": "", "client_id": ""}, [["provider"], ["client_id"]]),
        ({"metadata": {"issuer": 7}}, [["metadata", "issuer"]]),
        ({"metadata": {"discovery_url": "https://as.example/else"}}, [["metadata", "discovery_url"]]),
        (
            {"metadata": {"token_auth_method": "private_key_jwt", "issuer": "x", "other": 1}},
            [["metadata", "token_auth_method"], ["metadata", "issuer"]],
        ),
        ({"secret": "x", "status": "off"}, [["secret"], ["status"]]),
        ({"status": "revoked"}, [["status"]]),
        ({"redirect_uris": ["javascript:alert(1)"]}, [["redirect_uris", 0]]),
    ],
)
async def test_every_fault_of_a_body_is_named(tmp_path: Path, changes: dict[str, Any], locs: list[list[Any]]) -> None:
    async with api_setup(tmp_path) as api:
        problem = assert_problem(await api.ada.post("/oauth-clients", json={**BODY, **changes}), 422, "invalid")
        assert sorted(error["loc"] for error in problem["errors"]) == sorted(["body", *loc] for loc in locs)


async def test_what_a_change_leaves_and_what_it_replaces(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        made = await create(
            api, scopes=["read"], redirect_uris=["https://a.example/cb"], metadata={"a": 1}, server_ids=["notes"]
        )
        empty: dict[str, Any] = {
            "provider": "", "provider_name": None, "client_id": "", "client_secret": "", "authorization_url": "",
            "token_url": None, "scopes": [], "redirect_uris": [], "metadata": {}, "server_ids": None, "status": None,
        }  # fmt: skip
        unchanged = await change(api, made, **empty)
        assert {**unchanged, "updated_at": ""} == {**made, "updated_at": ""}
        unchanged = await change(api, made, status="", replace_scopes=None, replace_metadata=False)
        assert {**unchanged, "updated_at": ""} == {**made, "updated_at": ""}
        replaced = await change(api, made, scopes=["write", "write"], metadata={"b": 2})
        assert (replaced["scopes"], replaced["metadata"]) == (["write"], {"b": 2})
        bare = await change(
            api, made, replace_scopes=True, replace_redirect_uris=True, replace_metadata=True, replace_server_ids=True
        )
        assert (bare["scopes"], bare["redirect_uris"], bare["metadata"], bare["server_ids"]) == ([], [], {}, [])


async def test_a_change_can_be_bound_to_what_was_read(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        path = f"/oauth-clients/{(await create(api))['id']}"
        tag = (await api.ada.get(path)).headers["etag"]
        first = await api.ada.patch(path, json={"provider_name": "One"}, headers={"if-match": tag})
        assert first.status_code == 200
        stale = {"if-match": tag}
        assert_problem(await api.ada.patch(path, json={"provider_name": "Two"}, headers=stale), 412, "changed")
        assert_problem(await api.ada.delete(path, headers=stale), 412, "changed")
        assert (await api.ada.delete(path, headers={"if-match": first.headers["etag"]})).status_code == 204


async def test_one_client_for_a_provider_and_one_active_client_for_a_server(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        first = await create(api, server_ids=["notes"])
        again = assert_problem(await api.ada.post("/oauth-clients", json=BODY), 409, "conflict")
        assert again["existing_id"] == first["id"]
        other = {**BODY, "provider": "other", "server_ids": ["notes", "more"]}
        assert_problem(await api.ada.post("/oauth-clients", json=other), 409, "conflict")
        second = await create(api, **{**other, "status": "inactive"})
        refused = await api.ada.patch(f"/oauth-clients/{second['id']}", json={"status": "active"})
        assert_problem(refused, 409, "conflict")
        assert (await api.ada.delete(f"/oauth-clients/{first['id']}")).status_code == 204
        assert_problem(await api.ada.get(f"/oauth-clients/{first['id']}"), 404, "not-found")
        await change(api, second, status="active")
        await create(api)


async def test_a_revoked_client_stays_revoked(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        made = await create(api)
        assert (await change(api, made, status="revoked"))["has_client_secret"] is False
        for changes in ({"status": "active"}, {"client_secret": NEWER}):
            refused = await api.ada.patch(f"/oauth-clients/{made['id']}", json=changes)
            assert_problem(refused, 409, "client-revoked")
        # It is revoked already, so nothing changes.
        assert (await change(api, made, status="revoked"))["status"] == "revoked"


# With an authorization server


@asynccontextmanager
async def connected(
    servers: Servers, folder: Path, *, named: bool = True
) -> AsyncIterator[tuple[ApiSetup, dict[str, Any], FakeAuthorizationServer, FakeMcpServer]]:
    """Run the proxy with an API client for ``notes``, with which its user has authorized."""
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with api_setup(folder, {"notes": upstream.url}, inbound={}) as api:
        api.ada = api.local
        uri = f"{api.proxy.origin}/oauth/callback"
        issuer.add_client(client_id="by-hand", secret=SECRET, redirect_uris=(uri,))
        made = await create(
            api,
            authorization_url=f"{issuer.issuer}/authorize",
            token_url=f"{issuer.issuer}/token",
            server_ids=["notes"] if named else [],
            metadata={"issuer": issuer.issuer} if named else {},
        )
        await authorize(api)
        yield api, made, issuer, upstream


async def authorize(api: ApiSetup) -> None:
    """Call the server, and consent."""
    count = len(api.proxy.links)
    async with api.proxy.client("notes") as client:
        call = asyncio.ensure_future(client.initialize())
        assert (await consent(await api.proxy.next_link(count + 1))).status_code == 200
        assert (await call).status == 200


async def call(api: ApiSetup) -> Any:
    async with api.proxy.client("notes") as client:
        return await client.initialize()


@pytest.mark.parametrize("named", [True, False])
async def test_a_client_is_used_instead_of_a_registration(servers: Servers, tmp_path: Path, named: bool) -> None:
    async with connected(servers, tmp_path, named=named) as (_, _, issuer, _):
        assert issuer.registrations == 0
        assert (issuer.discoveries == 0) is named
        (asked,) = issuer.seen("authorize")
        assert asked.form["client_id"] == "by-hand"
        assert issuer.token_requests("authorization_code") == 1
    kept = b"".join(path.read_bytes() for path in tmp_path.glob("proxy.db*"))
    assert SECRET.encode() not in kept


async def test_the_next_refresh_uses_a_rotated_secret(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, made, issuer, _):
        issuer.add_client(client_id="by-hand", secret=NEWER, redirect_uris=(f"{api.proxy.origin}/oauth/callback",))
        issuer.end_access_tokens()
        await change(api, made, client_secret=NEWER)
        assert (await call(api)).status == 200
        assert (issuer.refreshes, issuer.authorizations) == (1, 1)


async def test_an_inactive_client_refreshes_and_begins_nothing(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, made, issuer, _):
        await change(api, made, status="inactive")
        issuer.end_access_tokens()
        assert (await call(api)).status == 200
        assert issuer.refreshes == 1
        issuer.end_grants()
        answer = await call(api)
        assert "notes-provider" in str(answer.message)
        assert "is inactive" in str(answer.message)
        assert (issuer.registrations, len(api.proxy.links)) == (0, 1)
        await change(api, made, status="active")
        await authorize(api)


async def test_a_revoked_client_ends_its_grants_here_and_at_the_provider(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, made, issuer, upstream):
        before = len(upstream.requests)
        await change(api, made, status="revoked")
        assert issuer.revocations == 1
        (grant,) = await Grants(api.context.database).all()
        assert grant.ended_reason.startswith("client_revoked")
        answer = await call(api)
        assert "is revoked" in str(answer.message)
        assert (issuer.registrations, len(api.proxy.links)) == (0, 1)
        assert not any(received.bearer for received in upstream.requests[before:])


async def test_a_deleted_client_leaves_the_server_to_others(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, made, issuer, _):
        assert (await api.ada.delete(f"/oauth-clients/{made['id']}")).status_code == 204
        assert issuer.revocations == 1
        await authorize(api)
        assert issuer.registrations == 1


async def test_revoking_a_client_ends_the_authorizations_that_wait(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, made, issuer, _):
        issuer.end_grants()
        async with api.proxy.client("notes") as client:
            waiting = asyncio.ensure_future(client.initialize())
            link = await api.proxy.next_link(2)
            await change(api, made, status="revoked")
            assert "client_revoked" in str((await waiting).message)
        page = await consent(link)
        assert page.status_code == 410
        assert issuer.authorizations == 1


async def test_an_address_can_not_be_changed_to_read_the_secret(servers: Servers, tmp_path: Path) -> None:  # T68
    thief = await servers.authorization_server()
    async with connected(servers, tmp_path) as (api, made, issuer, _):
        for name, value in (("token_url", f"{thief.issuer}/token"), ("client_id", "another")):
            refused = await api.ada.patch(f"/oauth-clients/{made['id']}", json={name: value})
            problem = assert_problem(refused, 422, "invalid")
            assert problem["errors"][0]["loc"] == ["body", "client_secret"]
        changed = await change(api, made, token_url=f"{thief.issuer}/token", client_secret="another-secret")
        assert changed["token_url"] == f"{thief.issuer}/token"
        (grant,) = await Grants(api.context.database).all()
        assert grant.ended_reason.startswith("client_changed")
        issuer.end_access_tokens()
        await call_and_leave(api)
        received = b"".join(request.body for request in thief.requests)
        assert SECRET.encode() not in received
        assert thief.refreshes == 0


async def test_a_new_secret_is_not_sent_to_the_old_token_endpoint(servers: Servers, tmp_path: Path) -> None:  # T68
    """As between the change of a client and the end of its grants, which are two transactions."""
    async with connected(servers, tmp_path) as (api, made, issuer, _):
        store = OAuthClients(api.context.database)
        client = await store.get(made["id"])
        assert client is not None
        moved = replace(client, token_url="https://elsewhere.example/token", client_secret=NEWER)
        await store.change(replace(moved, version=client.version + 1))
        (grant,) = (await api.ada.get("/grants")).json()["items"]
        refused = await api.ada.post(f"/grants/{grant['id']}/refresh")
        assert refused.status_code in (409, 503), refused.text
        assert issuer.refreshes == 0
        assert NEWER.encode() not in b"".join(request.body for request in issuer.requests)


async def test_a_server_that_names_the_token_endpoint_of_another_gets_neither_users_nor_the_secret(
    servers: Servers, tmp_path: Path
) -> None:
    """T68, T78: with its own pages and revocation endpoint it has the provider's token endpoint, and so its client."""
    thief = await servers.authorization_server()
    async with connected(servers, tmp_path, named=False) as (api, made, issuer, _):
        thief.metadata_changes, issuer.iss = {"token_endpoint": made["token_url"]}, None
        hostile = await servers.mcp_server(thief)
        api.change_server("notes", url=hostile.url)
        async with api.proxy.client("notes") as client:
            waiting = asyncio.ensure_future(client.initialize())
            await consent(await api.proxy.next_link(2))
            await waiting
        assert (issuer.authorizations, thief.seen("authorize")) == (2, [])
        assert (await api.ada.delete(f"/oauth-clients/{made['id']}")).status_code == 204
        received = b"".join(request.body + repr(request.headers).encode() for request in thief.requests)
        assert (thief.revocations, SECRET.encode() in received, b"Basic" in received) == (0, False, False)


async def call_and_leave(api: ApiSetup) -> None:
    """Call the server, and leave as soon as the link is there."""
    count = len(api.proxy.links)
    async with api.proxy.client("notes") as client:
        waiting = asyncio.ensure_future(client.initialize())
        await api.proxy.next_link(count + 1)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
