"""``/principals`` and ``/me`` over sockets: who may call, and who one is."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from fakes.fixtures import Servers
from mcp_auth_proxy.store.grants import Grants
from web.api.api_setup import ApiSetup, api_setup, assert_problem

MEMBERS = [("GET", "/principals"), ("POST", "/principals"), ("PATCH", "/principals/prn_ben")]
DELETION = ("DELETE", "/principals/prn_ben/grants")


@pytest.mark.parametrize(("method", "path"), [*MEMBERS, DELETION])
async def test_members_can_not_manage_principals(tmp_path: Path, method: str, path: str) -> None:
    async with api_setup(tmp_path) as api:
        assert_problem(await api.ben.request(method, path, json={}), 403, "forbidden")


async def test_principals_are_added_listed_and_changed(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        identity = {"source": "jwt:https://idp.example", "subject": "42"}
        added = await api.ada.post("/principals", json={"name": "kim", "role": "admin", "identities": [identity]})
        assert added.status_code == 200, added.text
        kim = added.json()
        assert kim.pop("created_at").endswith("Z")
        expected = {
            "project_id": "default",
            "name": "kim",
            "role": "admin",
            "status": "active",
            "identities": [identity],
        }
        assert kim == {"id": kim["id"], **expected}
        names = [item["name"] for item in (await api.ada.get("/principals")).json()["items"]]
        assert names == ["ada", "ben", "eve", "kim"]
        assert [item["name"] for item in (await api.zoe.get("/principals")).json()["items"]] == ["zoe"]
        changed = await api.ada.patch(f"/principals/{kim['id']}", json={"role": "member", "status": "disabled"})
        assert changed.status_code == 200
        assert (changed.json()["role"], changed.json()["status"]) == ("member", "disabled")


async def test_a_name_or_identity_of_another_is_409_with_its_id(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        problem = assert_problem(await api.ada.post("/principals", json={"name": "ben"}), 409, "name-taken")
        assert problem["existing_id"] == "prn_ben"
        identity = {"source": "header:x-user", "subject": "kim"}
        assert (await api.ada.post("/principals", json={"name": "k", "identities": [identity]})).status_code == 200
        taken = await api.ada.post("/principals", json={"name": "l", "identities": [identity]})
        assert_problem(taken, 409, "name-taken")


@pytest.mark.parametrize("name", ["local", "role:admin", "project:default", "prn_ben", " ben", "ben ", "ben\u200f"])
async def test_a_name_that_means_something_else_is_422(tmp_path: Path, name: str) -> None:
    async with api_setup(tmp_path) as api:
        problem = assert_problem(await api.ada.post("/principals", json={"name": name}), 422, "invalid")
        assert [error["loc"] for error in problem["errors"]] == [["body", "name"]]


async def test_the_id_of_a_principal_of_another_project_is_not_told(tmp_path: Path) -> None:  # T65
    async with api_setup(tmp_path) as api:
        problem = assert_problem(await api.zoe.post("/principals", json={"name": "ben"}), 409, "name-taken")
        assert "prn_ben" not in str(problem)


async def test_every_fault_of_a_body_is_named(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        body = {
            "name": "",
            "role": "king",
            "identities": [{"source": "key:1"}, {"source": "jwt:https://idp", "subject": "a\u202eb"}, 7],
            "project_id": "other",
        }
        problem = assert_problem(await api.ada.post("/principals", json=body), 422, "invalid")
        assert {(".".join(map(str, each["loc"])), each["type"]) for each in problem["errors"]} == {
            ("body.name", "value_error"),
            ("body.role", "value_error"),
            ("body.identities.0.source", "value_error"),
            ("body.identities.0.subject", "missing"),
            ("body.identities.1.subject", "value_error"),
            ("body.identities.2", "type_error"),
            ("body.project_id", "extra_forbidden"),
        }


@pytest.mark.parametrize(("change", "status"), [({"status": "disabled"}, 401), ({"role": "member"}, 403)])
async def test_a_call_that_was_begun_before_does_not_undo_it(  # T74
    tmp_path: Path, change: dict[str, str], status: int
) -> None:
    async with api_setup(tmp_path) as api:
        kim = await add_admin(api)
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow_body() -> AsyncIterator[bytes]:
            yield b'{"status": "active", '
            begun.set()
            await go_on.wait()
            yield b'"role": "admin"}'

        headers = {"x-api-key": await api.key_of(kim), "content-type": "application/json"}
        undo = asyncio.ensure_future(api.nobody.patch(f"/principals/{kim}", headers=headers, content=slow_body()))
        await begun.wait()
        assert (await api.ada.patch(f"/principals/{kim}", json=change)).status_code == 200
        go_on.set()
        assert_problem(await undo, status)
        now = api.directory.principal(kim)
        assert now is not None
        assert change.items() <= {"status": str(now.status), "role": str(now.role)}.items()


async def add_admin(api: ApiSetup) -> str:
    added = await api.ada.post("/principals", json={"name": "kim", "role": "admin"})
    return str(added.json()["id"])


async def test_a_disabled_principal_is_401_at_once(tmp_path: Path) -> None:  # T74
    async with api_setup(tmp_path) as api:
        assert (await api.ben.get("/me")).status_code == 200
        assert (await api.ada.patch("/principals/prn_ben", json={"status": "disabled"})).status_code == 200
        assert_problem(await api.ben.get("/me"), 401, "unauthenticated")
        assert (await api.ada.patch("/principals/prn_ben", json={"status": "active"})).status_code == 200
        assert (await api.ben.get("/me")).status_code == 200


async def test_a_change_heeds_if_match(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        first = await api.ada.patch("/principals/prn_ben", json={})
        tag = {"if-match": first.headers["etag"]}
        assert (await api.ada.patch("/principals/prn_ben", json={"role": "admin"}, headers=tag)).status_code == 200
        assert_problem(await api.ada.patch("/principals/prn_ben", json={}, headers=tag), 412, "changed")


async def test_a_principal_of_another_project_is_404(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        stored = await api.add_grant("prn_ben")
        for principal in ("prn_ben", "prn_nobody"):
            assert_problem(await api.zoe.patch(f"/principals/{principal}", json={"status": "disabled"}), 404)
            assert_problem(await api.zoe.delete(f"/principals/{principal}/grants"), 404)
        assert await Grants(api.engine).get(stored.id) is not None


async def test_all_grants_of_a_principal_are_deleted(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        one, two = await api.add_grant("prn_ben"), await api.add_grant("prn_ben", "linear", "work")
        other = await api.add_grant("prn_eve")
        answer = await api.ada.delete("/principals/prn_ben/grants")
        assert answer.status_code == 200
        items = answer.json()["items"]
        found = [(item["id"], item["server_name"], item["account"], item["revoked_upstream"]) for item in items]
        assert found == [(str(one.id), "notes", "default", False), (str(two.id), "linear", "work", False)]
        assert [grant.id for grant in await Grants(api.engine).all()] == [other.id]


# /me


async def test_me_shows_each_server_with_its_state(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        api.change_server("linear", allow=("ada",))
        stored = await api.add_grant("prn_ben", account="work")
        me = (await api.ben.get("/me")).json()
        principal = {name: me["principal"][name] for name in ("id", "name", "role", "project_id", "status")}
        assert principal == {
            "id": "prn_ben",
            "name": "ben",
            "role": "member",
            "project_id": "default",
            "status": "active",
        }
        assert [identity["source"] for identity in me["principal"]["identities"]] == ["key"]
        assert me["mode"] == "api_key"
        assert me["credential"].startswith("key:")
        assert me["scopes"] == ["admin", "mcp", "self"]
        (notes,) = me["servers"]
        states: list[tuple[str, Any, str]] = [
            (account["account"], account["state"], account["address"].removeprefix(api.proxy.origin))
            for account in notes["accounts"]
        ]
        assert states == [("default", "needs consent", "/notes/mcp"), ("work", "connected", "/notes@work/mcp")]
        assert notes["accounts"][1]["grant"] == (await api.ben.get(f"/grants/{stored.id}")).json()
        assert (notes["id"], notes["name"], notes["state"]) == ("notes", "notes", "needs consent")
        servers = (await api.ada.get("/me")).json()["servers"]
        assert sorted(server["name"] for server in servers) == ["linear", "notes"]


async def test_me_in_mode_none_is_local(tmp_path: Path) -> None:
    async with api_setup(tmp_path, inbound={}) as api:
        me = (await api.local.get("/me")).json()
        assert (me["mode"], me["principal"]["id"], me["principal"]["role"]) == ("none", "local", "admin")
        assert me["credential"] == "token"
        await api.add_grant("local")
        servers = (await api.local.get("/me")).json()["servers"]
        assert {server["name"]: server["state"] for server in servers} == {
            "notes": "connected",
            "linear": "needs consent",
        }
        assert_problem(await api.local.patch("/principals/local", json={"status": "disabled"}), 409, "local")
        assert_problem(await api.nobody.get("/me"), 401)


async def test_a_server_that_no_request_reaches_is_unreachable_until_one_does(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    async with api_setup(tmp_path, {"notes": upstream.url}, inbound={}, authorization={"wait": "0s"}) as api:

        async def state() -> str:
            (server,) = (await api.local.get("/me")).json()["servers"]
            return str(server["state"])

        async with api.proxy.client("notes") as client:
            api.change_server("notes", url="http://127.0.0.1:9/mcp")
            assert (await client.call("echo", text="x")).status == 502
            assert await state() == "unreachable"
            api.change_server("notes", url=upstream.url)
            await client.call("echo", text="x")
            assert await state() == "authorizing"
            # A trial by the API is a request too.
            api.change_server("notes", url="http://127.0.0.1:9/mcp")
            assert (await api.local.post("/servers/notes/flows", json={})).status_code == 502
            assert await state() == "unreachable"
            api.change_server("notes", url=upstream.url)
            assert (await api.local.post("/servers/notes/flows", json={})).status_code == 201
            assert await state() == "authorizing"


@pytest.mark.parametrize("change", [{"status": "disabled"}, {"role": "member"}])
async def test_the_last_admin_stays(tmp_path: Path, change: dict[str, str]) -> None:
    async with api_setup(tmp_path) as api:
        for client, principal in ((api.ada, "prn_ada"), (api.zoe, "prn_zoe")):
            assert_problem(await client.patch(f"/principals/{principal}", json=change), 409, "last-admin")
            assert (await client.get("/principals")).status_code == 200
        assert (await api.ada.patch("/principals/prn_ben", json={"role": "admin"})).status_code == 200
        # Each takes the other for the one who stays.
        changes = await asyncio.gather(
            api.ada.patch("/principals/prn_ben", json=change), api.ben.patch("/principals/prn_ada", json=change)
        )
        assert sorted(each.status_code for each in changes)[0] == 200
        admins = [each for each in api.directory.principals() if each.role == "admin" and each.is_active]
        assert {each.project_id for each in admins} == {"default", "other"}
