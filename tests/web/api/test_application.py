"""What holds for every call: who may make it, how it is refused, how often it may be made, and what is recorded."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx2
import pytest

from fakes.proxy import running_proxy
from mcp_auth_proxy.models import LOCAL_CALLER, Caller
from web.api.api_setup import SERVERS, ApiSetup, api_setup, assert_problem

BODY = 256 * 1024


async def test_no_credential_is_401_everywhere_but_for_the_document(tmp_path: Path) -> None:  # T43
    async with api_setup(tmp_path) as api:
        for method, path in [("GET", "/me"), ("GET", "/nothing"), ("DELETE", "/me")]:
            response = await api.nobody.request(method, path)
            assert_problem(response, 401, "unauthenticated")
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert (await api.nobody.get("/openapi.json")).status_code == 200


async def test_unknown_paths_and_methods_are_problems_too(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for path in ("/nothing", "/events/1/2", "/grants/", "/grants//refresh"):
            response = await api.ada.get(path)
            assert response.status_code in (400, 404)
        refused = await api.ada.put("/events")
        assert_problem(refused, 405, "method-not-allowed")
        assert refused.headers["allow"] == "GET, HEAD"
        assert_problem(await api.ada.request("OPTIONS", "/keys"), 405)
        head = await api.ada.head("/events")
        assert (head.status_code, head.content) == (200, b"")


async def test_without_admin_enabled_there_is_no_api(tmp_path: Path) -> None:
    off: Any = {"admin": {"enabled": False}}
    async with running_proxy(tmp_path, SERVERS, **off) as proxy, httpx2.AsyncClient(trust_env=False) as client:
        for path in ("/me", "/openapi.json"):
            assert (await client.get(f"{proxy.origin}/api/v1{path}")).status_code == 404
        assert not (tmp_path / "api-token").exists()


async def test_a_page_of_another_origin_is_refused_and_no_cors_field_is_sent(tmp_path: Path) -> None:
    async with api_setup(tmp_path, inbound={"mode": "api_key", "allowed_origins": ["https://app.example"]}) as api:
        foreign = {"origin": "https://app.example"}
        for method in ("GET", "POST", "OPTIONS"):
            response = await api.ada.request(method, "/keys", headers=foreign)
            assert response.status_code == 403
            assert not [name for name in response.headers if name.startswith("access-control")]
        own = {"origin": api.proxy.origin}
        assert (await api.ada.get("/keys", headers=own)).status_code == 200


# Bodies


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonp", ""])
async def test_a_body_that_is_not_declared_as_json_is_415(tmp_path: Path, kind: str) -> None:
    async with api_setup(tmp_path) as api:
        response = await api.ben.post("/keys", content=b"{}", headers={"content-type": kind})
        assert_problem(response, 415, "unsupported-media-type")


async def test_a_body_over_the_limit_is_413_with_and_without_its_length(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        headers = {"content-type": "application/json; charset=utf-8"}
        fits = json.dumps({"name": "n"}).encode().ljust(BODY)
        assert (await api.ben.post("/keys", content=fits, headers=headers)).status_code == 201

        async def parts() -> Any:
            yield fits
            yield b" "

        for content in (fits + b" ", parts()):
            assert_problem(await api.ben.post("/keys", content=content, headers=headers), 413, "too-large")


@pytest.mark.parametrize(
    "body",
    [b"{", b"nope", b'{"name": "\\ud800"}', b'{"name": "\xff"}', b"[" * 200_000, b'{"name":1}{}', b"\xef\xbb\xbf{}"],
)
async def test_a_body_that_is_no_json_is_422(tmp_path: Path, body: bytes) -> None:
    async with api_setup(tmp_path) as api:
        response = await api.ben.post("/keys", content=body, headers={"content-type": "application/json"})
        problem = assert_problem(response, 422, "invalid")
        assert [(error["loc"], error["type"]) for error in problem["errors"]] == [(["body"], "json_invalid")]


@pytest.mark.parametrize("levels", [70, 700, 70_000])
async def test_a_body_that_is_nested_too_deeply_is_422(tmp_path: Path, levels: int) -> None:
    async with api_setup(tmp_path) as api:
        deep = "[" * levels + "]" * levels
        for path, body in (
            ("/servers", '{"name": "x", "url": "https://x.example/mcp", "oauth": {"scopes": %s}}'),
            ("/oauth-clients", '{"metadata": {"a": %s}}'),
        ):
            response = await api.ada.post(path, content=body % deep, headers={"content-type": "application/json"})
            assert assert_problem(response, 422)["errors"][0]["type"] == "json_invalid"


@pytest.mark.parametrize("body", ["[]", "7", "null", '"x"'])
async def test_a_body_that_is_no_object_is_422(tmp_path: Path, body: str) -> None:
    async with api_setup(tmp_path) as api:
        response = await api.ben.post("/keys", content=body, headers={"content-type": "application/json"})
        problem = assert_problem(response, 422, "invalid")
        assert [(error["loc"], error["type"]) for error in problem["errors"]] == [(["body"], "type_error")]


# Pages


async def test_a_page_token_of_another_caller_query_or_list_is_400(tmp_path: Path) -> None:  # T67
    async with api_setup(tmp_path) as api:
        for _ in range(3):
            await api.key_of("prn_ada")
            await api.key_of("prn_ben")
        token = (await api.ada.get("/keys?page_size=1")).json()["page"]["next_page_token"]
        good = await api.ada.get("/keys", params={"page_token": token, "page_size": "200"})
        assert len(good.json()["items"]) == 8
        assert_problem(await api.ben.get("/keys", params={"page_token": token}), 400, "page-token")
        assert_problem(await api.ada.get("/keys", params={"page_token": token, "principal": "ben"}), 400, "page-token")
        assert_problem(await api.ada.get("/grants", params={"page_token": token}), 400, "page-token")
        for place in range(0, len(token), 7):
            edited = token[:place] + ("A" if token[place] != "A" else "B") + token[place + 1 :]
            assert_problem(await api.ada.get("/keys", params={"page_token": edited}), 400, "page-token")


@pytest.mark.parametrize("query", ["page_size=0", "page_size=201", "page_size=x", "page_size=1.5", "page_size="])
async def test_a_bad_page_size_is_422(tmp_path: Path, query: str) -> None:
    async with api_setup(tmp_path) as api:
        for path in ("/keys", "/grants", "/events", "/principals"):
            problem = assert_problem(await api.ada.get(f"{path}?{query}"), 422, "invalid")
            assert [error["loc"] for error in problem["errors"]] == [["query", "page_size"]]


# Limits


async def test_a_principal_may_call_200_times_at_once_and_then_ten_times_a_second(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        api.clock.stop()
        statuses = [response.status_code for response in await many(api.ben, 210)]
        assert sorted(statuses) == [200] * 200 + [429] * 10
        refused = await api.ben.get("/me")
        assert_problem(refused, 429, "too-many-requests")
        assert refused.headers["retry-after"] == "1"
        assert (await api.eve.get("/me")).status_code == 200
        api.clock.ahead += 1
        assert [response.status_code for response in await many(api.ben, 11)].count(200) == 10


async def test_an_address_may_present_five_bad_credentials_a_second(tmp_path: Path) -> None:  # T43
    async with api_setup(tmp_path) as api:
        api.clock.stop()
        bad = {"x-api-key": "mapk_000000000000_" + "x" * 43}
        statuses = [(await api.nobody.get("/me", headers=bad)).status_code for _ in range(6)]
        assert statuses == [401] * 5 + [429]
        refused = await api.nobody.get("/me", headers=bad)
        assert_problem(refused, 429, "too-many-requests")
        assert refused.headers["retry-after"] == "1"
        assert_problem(await api.nobody.get("/me"), 401)
        # Others may call from the same address.
        assert (await api.ben.get("/me")).status_code == 200
        api.clock.ahead += 0.2
        assert_problem(await api.nobody.get("/me", headers=bad), 401)


async def many(client: httpx2.AsyncClient, count: int) -> list[httpx2.Response]:
    return await asyncio.gather(*(client.get("/me") for _ in range(count)))


# Audit


async def test_every_change_leaves_an_event_also_if_it_is_refused(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        key = (await api.ben.post("/keys", json={}, headers={"x-request-id": "r-1"})).json()
        await api.ben.delete("/grants/7")
        await api.ben.patch("/principals/prn_eve", json={"role": "admin"})
        await api.ben.post("/keys", json={"scopes": []})
        await api.ben.get("/me")
        page = (await api.ada.get("/events")).json()
        assert [(item["action"], item["target"], item["outcome"]) for item in page["items"]] == [
            ("principals.change", "prn_eve", "forbidden"),
            ("grants.delete", "7", "not-found"),
            ("keys.create", key["id"], "ok"),
        ]
        first = page["items"][-1]
        assert (first["server"], first["server_name"]) == (None, None)
        assert first["request_id"] == "r-1"
        assert (first["principal"], first["address"]) == ("prn_ben", "127.0.0.1")
        assert first["credential"].startswith("key:")
        assert key["key"] not in json.dumps(page)
        assert (await api.zoe.get("/events")).json()["items"] == []
        assert_problem(await api.ben.get("/events"), 403)


@pytest.mark.parametrize("given", ["a b", "x" * 65, "", "a,b", "é".encode().decode("latin-1")])
async def test_a_request_id_that_is_no_token_is_replaced(tmp_path: Path, given: str) -> None:
    async with api_setup(tmp_path) as api:
        answer = await api.ben.get("/me", headers={b"x-request-id": given.encode("latin-1")})
        assert answer.headers["x-request-id"] != given
        assert len(answer.headers["x-request-id"]) == 32


# Sessions


async def session(api: ApiSetup) -> None:
    """Let whoever sends the cookie ``s=1`` have a session."""

    async def caller(request: Any) -> Caller | None:
        return LOCAL_CALLER if request.cookies.get("s") == "1" else None

    api.context.session_caller = caller


async def test_a_session_needs_a_page_of_our_own(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        await session(api)
        cookie = {"cookie": "s=1"}
        own = {**cookie, "origin": api.proxy.origin}
        assert (await api.nobody.get("/me", headers=own)).json()["principal"]["id"] == "local"
        from_script = {**cookie, "sec-fetch-site": "same-origin"}
        assert (await api.nobody.get("/me", headers=from_script)).status_code == 200
        assert_problem(await api.nobody.get("/me", headers=cookie), 403, "forbidden")
        assert_problem(await api.nobody.post("/keys", headers=cookie), 403, "forbidden")
        foreign = {**cookie, "origin": "https://evil.example"}
        assert (await api.nobody.post("/keys", headers=foreign)).status_code == 403
        assert_problem(await api.ben.get("/me", headers=own), 400, "several-credentials")
