"""``/keys`` over sockets: made once, for no more than one's own, and gone when deleted."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.headless import Browser
from fakes.team import post
from mcp_auth_proxy.models import Scope
from web.api.api_setup import ApiSetup, api_setup, assert_problem


async def made(client: httpx2.AsyncClient, **body: object) -> dict[str, Any]:
    response = await client.post("/keys", json=body)
    assert response.status_code == 201, response.text
    key: dict[str, Any] = response.json()
    return key


async def me_with(api: ApiSetup, key: str) -> httpx2.Response:
    return await api.nobody.get("/me", headers={"x-api-key": key})


async def test_a_key_is_shown_once_works_and_can_be_deleted(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        created = await made(api.ben, name="laptop")
        assert created["key"].startswith(f"mapk_{created['id']}_")
        assert created["scopes"] == ["mcp", "self"]
        assert (await me_with(api, created["key"])).json()["credential"] == f"key:{created['id']}"
        listed = await api.ben.get("/keys")
        assert created["key"] not in listed.text
        assert [key["name"] for key in listed.json()["items"]] == ["test", "laptop"]
        assert (await api.ben.delete(f"/keys/{created['id']}")).status_code == 204
        assert_problem(await me_with(api, created["key"]), 401)
        assert_problem(await api.ben.delete(f"/keys/{created['id']}"), 404, "not-found")


async def test_an_empty_body_makes_a_usual_key(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        response = await api.ben.post("/keys")
        assert response.status_code == 201
        assert response.json()["expires_at"] is None


@pytest.mark.parametrize("how", ["Bearer", "Basic", "X-API-Key"])
async def test_a_key_is_accepted_in_each_place_and_not_in_two(tmp_path: Path, how: str) -> None:
    async with api_setup(tmp_path) as api:
        key = api.keys["ben"]
        field = {"Bearer": {"authorization": f"Bearer {key}"}, "X-API-Key": {"x-api-key": key}}.get(how, {})
        basic = ("any", key) if how == "Basic" else None
        url = f"{api.proxy.origin}/api/v1/me"
        async with httpx2.AsyncClient(trust_env=False) as client:
            answer = await client.get(url, headers=field, auth=basic)
            assert answer.json()["principal"]["name"] == "ben"
            second = {"authorization": f"Bearer {key}"} if how == "X-API-Key" else {"x-api-key": key}
            both = await client.get(url, headers={**field, **second}, auth=basic)
            assert_problem(both, 400, "several-credentials")


async def test_a_key_ends_when_it_says(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        end = datetime.fromtimestamp(api.clock() + 60, UTC)
        created = await made(api.ben, expires_at=end.isoformat())
        assert (await me_with(api, created["key"])).status_code == 200
        api.clock.ahead += 61
        assert_problem(await me_with(api, created["key"]), 401)


async def test_a_key_that_has_ended_when_it_is_made_is_never_accepted(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        created = await made(api.ben, expires_at="2001-01-01T00:00:00Z")
        assert_problem(await me_with(api, created["key"]), 401)


@pytest.mark.parametrize("signs_in", [False, True])
async def test_a_members_key_makes_none_that_lasts_longer(tmp_path: Path, signs_in: bool) -> None:
    async with api_setup(tmp_path) as api, Browser() as browser:
        end = api.clock() + 60
        key = (await made(api.ben, expires_at=datetime.fromtimestamp(end, UTC).isoformat()))["key"]
        client, headers, url = browser.client, {"x-api-key": key}, f"{api.proxy.origin}/api/v1/keys"
        if signs_in:
            await post(browser, f"{api.proxy.origin}/sign-in", key=key)
            headers = {"origin": api.proxy.origin}
        usual = await client.post(url, headers=headers)
        assert datetime.fromisoformat(usual.json()["expires_at"]).timestamp() == pytest.approx(end, abs=0.01)
        for seconds, status in ((59, 201), (61, 403)):
            wanted = datetime.fromtimestamp(api.clock() + seconds, UTC).isoformat()
            answer = await client.post(url, headers=headers, json={"expires_at": wanted})
            assert answer.status_code == status, answer.text


async def test_an_admins_key_may(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        key = (await made(api.ada, scopes=["admin"], expires_at="2999-01-01T00:00:00Z"))["key"]
        answer = await api.nobody.post("/keys", headers={"x-api-key": key}, json={"principal": "ben"})
        assert answer.json()["expires_at"] is None


@pytest.mark.parametrize("end", ["0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:00"])
async def test_an_end_that_no_answer_could_show_is_422(tmp_path: Path, end: str) -> None:
    async with api_setup(tmp_path) as api:
        problem = assert_problem(await api.ben.post("/keys", json={"expires_at": end}), 422)
        assert [error["loc"] for error in problem["errors"]] == [["body", "expires_at"]]
        assert (await api.ada.get("/keys")).status_code == 200


async def test_an_end_without_a_zone_is_422(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for text in ("2999-01-01T00:00:00", "tomorrow", 5):
            problem = assert_problem(await api.ben.post("/keys", json={"expires_at": text}), 422)
            assert [error["loc"] for error in problem["errors"]] == [["body", "expires_at"]]


async def test_no_key_is_for_more_than_the_credential_that_makes_it(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        assert_problem(await api.ben.post("/keys", json={"scopes": ["admin"]}), 403, "forbidden")
        assert (await made(api.ada, scopes=["admin", "mcp"]))["scopes"] == ["admin", "mcp"]
        only_self = {"x-api-key": await api.key_of("prn_ada", [Scope.SELF])}
        refused = await api.nobody.post("/keys", json={"scopes": ["self", "mcp"]}, headers=only_self)
        assert_problem(refused, 403)
        usual = await api.nobody.post("/keys", headers=only_self)
        assert usual.json()["scopes"] == ["self"]


async def test_a_key_without_self_or_admin_can_not_use_the_api(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        only_mcp = await api.key_of("prn_ada", [Scope.MCP])
        assert_problem(await me_with(api, only_mcp), 403, "forbidden")
        only_admin = await api.key_of("prn_ada", [Scope.ADMIN])
        assert (await me_with(api, only_admin)).status_code == 200
        # The scope alone makes no admin.
        assert_problem(await me_with(api, await api.key_of("prn_ben", [Scope.ADMIN])), 403)
        without_admin = {"x-api-key": await api.key_of("prn_ada", [Scope.SELF])}
        assert_problem(await api.nobody.get("/events", headers=without_admin), 403)


async def test_keys_of_others_are_for_admins_of_the_project(tmp_path: Path) -> None:  # T65
    async with api_setup(tmp_path) as api:
        created = await made(api.ada, principal="ben", name="for ben")
        assert created["principal"] == "prn_ben"
        assert_problem(await api.ben.post("/keys", json={"principal": "ada"}), 403, "forbidden")
        assert_problem(await api.zoe.post("/keys", json={"principal": "ben"}), 404, "not-found")
        for client in (api.eve, api.zoe):
            assert_problem(await client.delete(f"/keys/{created['id']}"), 404, "not-found")
            assert created["id"] not in (await client.get("/keys")).text
        assert_problem(await api.eve.get("/keys?principal=ben"), 403)
        assert len((await api.ada.get("/keys")).json()["items"]) == 4
        assert [key["name"] for key in (await api.ada.get("/keys?principal=ben")).json()["items"]] == [
            "test",
            "for ben",
        ]
        assert (await api.ada.delete(f"/keys/{created['id']}")).status_code == 204


async def test_keys_are_listed_in_pages_while_some_are_deleted(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for number in range(5):
            await made(api.ben, name=str(number))
        first = (await api.ben.get("/keys?page_size=2")).json()
        assert [key["name"] for key in first["items"]] == ["test", "0"]
        assert (await api.ben.delete(f"/keys/{first['items'][1]['id']}")).status_code == 204
        token = first["page"]["next_page_token"]
        rest = (await api.ben.get("/keys", params={"page_token": token})).json()
        assert [key["name"] for key in rest["items"]] == ["1", "2", "3", "4"]
        assert rest["page"]["next_page_token"] is None
