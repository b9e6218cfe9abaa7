"""``/grants`` over sockets: whose are listed, how each state looks, what is refused, and what deletes and renews."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse
from fakes.proxy import link_in
from mcp_auth_proxy.broker.backoff import LONGEST
from mcp_auth_proxy.store.grants import Grants
from web.api.api_setup import ApiSetup, api_setup, assert_problem

moment = datetime.fromisoformat


async def listed(client: httpx2.AsyncClient, **query: str) -> list[tuple[str, str]]:
    """Return owner and server of what a caller sees."""
    response = await client.get("/grants", params=query)
    assert response.status_code == 200, response.text
    return [(item["owner_name"], item["server"]) for item in response.json()["items"]]


async def test_members_see_their_own_grants_and_admins_those_of_their_project(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for owner, server in (("prn_ada", "notes"), ("prn_ben", "notes"), ("prn_ben", "linear"), ("prn_zoe", "notes")):
            await api.add_grant(owner, server)
        assert await listed(api.ben) == [("ben", "notes"), ("ben", "linear")]
        assert await listed(api.eve) == []
        assert await listed(api.ada) == [("ada", "notes"), ("ben", "notes"), ("ben", "linear")]
        assert await listed(api.zoe) == [("zoe", "notes")]
        assert await listed(api.ada, principal="ben", server="linear") == [("ben", "linear")]
        assert await listed(api.ada, principal="prn_ben") == [("ben", "notes"), ("ben", "linear")]
        assert await listed(api.ada, principal="prn_zoe") == await listed(api.ada, principal="nobody") == []
        assert await listed(api.ben, principal="ben") == [("ben", "notes"), ("ben", "linear")]
        assert_problem(await api.ben.get("/grants?principal=prn_ada"), 403, "forbidden")
        assert_problem(await api.ben.get("/grants?principal=nobody"), 403, "forbidden")


async def test_a_grant_has_every_field_and_no_token(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        stored = await api.add_grant("prn_ben", account="work")
        response = await api.ben.get(f"/grants/{stored.id}")
        assert response.status_code == 200
        grant = response.json()
        assert "canary" not in response.text
        since, until = grant.pop("granted_at"), grant.pop("expires_at")
        assert since < until
        assert since.endswith("Z")
        assert grant == {
            "id": str(stored.id),
            "server": "notes",
            "server_name": "notes",
            "account": "work",
            "owner": "prn_ben",
            "owner_name": "ben",
            "issuer": "https://as.example",
            "scopes": ["read", "write"],
            "label": "",
            "state": "active",
            "reason": "",
            "health": {"state": "fresh", "since": since, "next_try": None, "reason": None},
        }


@pytest.mark.parametrize("name", ["ben", "zoe"])
async def test_somebody_elses_grant_is_404_as_if_absent(tmp_path: Path, name: str) -> None:  # T65
    async with api_setup(tmp_path) as api:
        stored = await api.add_grant("prn_ada")
        client: httpx2.AsyncClient = getattr(api, name)
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/refresh")):
            foreign = assert_problem(await client.request(method, f"/grants/{stored.id}{path}"), 404, "not-found")
            absent = assert_problem(await client.request(method, f"/grants/{stored.id + 1}{path}"), 404, "not-found")
            assert {**foreign, "request_id": ""} == {**absent, "request_id": ""}
        assert await Grants(api.engine).get(stored.id) is not None


@pytest.mark.parametrize("grant_id", ["0", "01", "-1", "x", "1.0", "%F0%9F%92%A9", "9" * 30, str(2**63), "²"])
async def test_what_is_no_id_of_a_grant_is_404(tmp_path: Path, grant_id: str) -> None:
    async with api_setup(tmp_path) as api:
        await api.add_grant("prn_ada")
        assert_problem(await api.ada.get(f"/grants/{grant_id}"), 404, "not-found")


async def test_a_member_sees_the_shared_grant_and_can_not_change_it(tmp_path: Path) -> None:  # T66
    async with api_setup(tmp_path) as api:
        api.change_server("notes", grant_owner="shared")
        stored = await api.add_grant("project:default")
        assert (await api.ben.get(f"/grants/{stored.id}")).json()["owner"] == "project:default"
        assert_problem(await api.ben.delete(f"/grants/{stored.id}"), 403, "forbidden")
        assert_problem(await api.ben.post(f"/grants/{stored.id}/refresh"), 403, "forbidden")
        assert await listed(api.ben) == []
        assert await listed(api.ada) == [("", "notes")]
        assert_problem(await api.zoe.get(f"/grants/{stored.id}"), 404)


async def test_a_shared_grant_of_a_server_that_one_may_not_use_is_404(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        api.change_server("notes", grant_owner="shared", allow=("eve",))
        stored = await api.add_grant("project:default")
        assert (await api.eve.get(f"/grants/{stored.id}")).status_code == 200
        assert_problem(await api.ben.get(f"/grants/{stored.id}"), 404)


async def test_grants_are_listed_by_state(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        now = api.clock()
        await api.add_grant("prn_ada")
        await api.add_grant("prn_ben", refresh_token=None)
        await api.add_grant("prn_eve", expires_at=now - 1)
        await api.add_grant("prn_ben", "linear", refresh_token=None, expires_at=now - 1)
        ended = await api.add_grant("prn_eve", "linear")
        await Grants(api.engine).end(ended.id, version=1, reason="invalid_grant", now=now)
        assert await listed(api.ada, state="active") == [("ada", "notes")]
        assert await listed(api.ada, state="degraded") == [("ben", "notes")]
        assert await listed(api.ada, state="expired") == [("eve", "notes")]
        assert await listed(api.ada, state="ended") == [("ben", "linear"), ("eve", "linear")]
        items = (await api.ada.get("/grants")).json()["items"]
        assert [item["health"]["state"] for item in items] == ["fresh", "degraded", "expired", "ended", "ended"]
        assert [item["reason"] for item in items][3:] == [
            "The token has expired, and can't be renewed.",
            "invalid_grant",
        ]
        problem = assert_problem(await api.ada.get("/grants?state=good&page_size=0"), 422, "invalid")
        assert sorted(error["loc"] for error in problem["errors"]) == [["query", "page_size"], ["query", "state"]]


async def test_an_etag_guards_the_deletion(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        stored = await api.add_grant("prn_ben")
        url = f"/grants/{stored.id}"
        tag = (await api.ben.get(url)).headers["etag"]
        assert (await api.ben.get(url, headers={"if-none-match": tag})).status_code == 304
        assert_problem(await api.ben.delete(url, headers={"if-match": '"other"'}), 412, "changed")
        assert_problem(await api.ben.delete(url, headers={"if-match": f"W/{tag}"}), 412, "changed")
        assert (await api.ben.delete(url, headers={"if-match": f'"other", {tag}'})).status_code == 200
        assert_problem(await api.ben.delete(url, headers={"if-match": "*"}), 404)


# With an authorization server


async def connect(api: ApiSetup) -> str:
    """Connect ``local`` with the server ``notes`` as a user would, and return the path of the grant."""
    async with api.proxy.client("notes") as client:
        page = await consent(link_in((await client.call("echo", text="x")).message))
        assert page.status_code == 200, page.text
    (item,) = (await api.local.get("/grants")).json()["items"]
    return f"/grants/{item['id']}"


@asynccontextmanager
async def connected(
    servers: Servers, folder: Path, **options: Any
) -> AsyncIterator[tuple[ApiSetup, FakeAuthorizationServer, str]]:
    """Run a proxy in mode ``none``; yield it, the authorization server, and the path of the grant of ``local``."""
    issuer = await servers.authorization_server(auto_consent=True, **options)
    upstream = await servers.mcp_server(issuer)
    sections = {"inbound": {}, "authorization": {"wait": "0s"}}
    async with api_setup(folder, {"notes": upstream.url}, **sections) as api:
        yield api, issuer, await connect(api)


async def test_a_refresh_renews_at_once(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, issuer, grant):
        before = (await api.local.get(grant)).json()
        api.clock.ahead += 10
        renewed = await api.local.post(f"{grant}/refresh")
        assert renewed.status_code == 200, renewed.text
        assert renewed.json()["expires_at"] > before["expires_at"]
        assert renewed.json() == (await api.local.get(grant)).json()
        assert issuer.refreshes == 1


async def test_a_failed_refresh_is_503_and_the_grant_is_retried(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, issuer, grant):
        issuer.answers["token"] = FakeResponse.json({"error": "temporarily_unavailable"}, 503)
        for _ in range(2):
            failed = await api.local.post(f"{grant}/refresh")
            assert_problem(failed, 503, "refresh-failed")
            assert int(failed.headers["retry-after"]) >= 1
        assert issuer.refreshes == 1, "the second one waits for the pause"
        shown = (await api.local.get(grant)).json()
        assert (shown["state"], shown["health"]["state"]) == ("active", "retrying")
        assert "503" in shown["health"]["reason"]
        assert len((await api.local.get("/grants?state=active")).json()["items"]) == 1
        del issuer.answers["token"]
        api.clock.ahead += LONGEST
        renewed = (await api.local.post(f"{grant}/refresh")).json()["health"]
        assert (renewed["state"], renewed["next_try"], renewed["reason"]) == ("fresh", None, None)
        assert moment(renewed["since"]) > moment(shown["health"]["next_try"]) > moment(shown["health"]["since"])


async def test_a_refused_refresh_is_409_and_the_token_goes_on(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, issuer, grant):
        issuer.answers["token"] = FakeResponse.json({"error": "invalid_grant"}, 400)
        problem = assert_problem(await api.local.post(f"{grant}/refresh"), 409, "not-renewable")
        assert "the token still works" in problem["detail"]
        shown = (await api.local.get(grant)).json()
        assert (shown["state"], shown["health"]["state"]) == ("degraded", "degraded")
        assert "invalid_grant" in shown["health"]["reason"]
        assert shown["health"]["next_try"] == shown["expires_at"], "it is tried once more then"
        assert len((await api.local.get("/grants?state=degraded")).json()["items"]) == 1


async def test_a_refresh_that_ends_the_grant_is_409_from_then_on(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, issuer, grant):
        issuer.end_grants()
        api.clock.ahead += 10 * 86_400
        for _ in range(2):
            problem = assert_problem(await api.local.post(f"{grant}/refresh"), 409, "ended")
            assert "invalid_grant" in problem["detail"]
        shown = (await api.local.get(grant)).json()
        assert (shown["state"], shown["health"]["state"]) == ("ended", "ended")
        assert "invalid_grant" in shown["reason"]
        assert issuer.refreshes == 1


async def test_a_grant_without_a_refresh_token_is_409(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        stored = await api.add_grant("prn_ben", refresh_token=None)
        assert_problem(await api.ben.post(f"/grants/{stored.id}/refresh"), 409, "not-renewable")


async def test_a_grant_that_the_configuration_no_longer_fits_is_409(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for server in ("notes", "removed"):
            stored = await api.add_grant("prn_ben", server, resource="https://elsewhere.example")
            assert_problem(await api.ben.post(f"/grants/{stored.id}/refresh"), 409, "not-renewable")


async def test_a_deleted_grant_is_revoked_upstream_and_used_no_more(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, issuer, grant):
        deleted = await api.local.delete(grant)
        assert deleted.status_code == 200
        assert deleted.json() == {"revoked_upstream": True, "detail": f"Revoked at {issuer.issuer}."}
        assert issuer.revocations >= 1
        assert_problem(await api.local.get(grant), 404)
        async with api.proxy.client("notes") as client:
            assert "/connect/notes" in link_in((await client.call("echo", text="x")).message)


async def test_a_grant_that_can_not_be_revoked_is_deleted_all_the_same(servers: Servers, tmp_path: Path) -> None:
    async with connected(servers, tmp_path) as (api, issuer, grant):
        issuer.answers["revoke"] = FakeResponse.json({}, 503)
        deleted = (await api.local.delete(grant)).json()
        assert deleted["revoked_upstream"] is False
        assert "could not be revoked" in deleted["detail"]
        assert_problem(await api.local.delete(grant), 404)


async def test_the_deletion_of_an_ended_grant_leaves_the_one_in_use(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        old = await api.add_grant("prn_ben", issuer="https://old.example")
        new = await api.add_grant("prn_ben")
        deleted = await api.ben.delete(f"/grants/{old.id}")
        assert deleted.json() == {
            "revoked_upstream": False,
            "detail": "The grant had ended before, so nothing was revoked.",
        }
        assert (await api.ben.get(f"/grants/{new.id}")).json()["state"] == "active"
