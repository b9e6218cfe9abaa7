"""``/servers``: what the configuration has is shown, and others are made, changed and deleted while the proxy runs."""

from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import httpx2

from fakes.fixtures import Servers
from fakes.proxy import RunningProxy, running_proxy, until
from mcp_auth_proxy.store.grants import Grants
from mcp_auth_proxy.store.servers import NEVER_CONNECTED
from web.api.api_setup import SERVERS, api_setup, assert_problem
from web.api.made_setup import LOOPBACK, administer, made_setup, principal_of

SECRET = "canary-client-secret"


def another(folder: Path) -> AbstractAsyncContextManager[RunningProxy]:
    """Another proxy on the same store."""
    sections: dict[str, Any] = {"inbound": {"mode": "api_key"}, "admin": {"allow_private": list(LOOPBACK)}}
    return running_proxy(folder, SERVERS, **sections)


async def test_a_server_of_the_configuration_has_its_name_for_an_id_and_cannot_be_changed(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        listed = (await api.ben.get("/servers")).json()["items"]
        assert [(it["id"], it["name"], it["origin"]) for it in listed] == [
            ("linear", "linear", "config"),
            ("notes", "notes", "config"),
        ]
        assert [(it["account"], it["word"], it["state"]) for it in listed[0]["accounts"]] == [
            ("default", "needs consent", None)
        ]
        assert (await api.ben.get("/servers/notes")).json()["url"] == "http://127.0.0.1:9/mcp"
        for response in (
            await api.ada.patch("/servers/notes", json={"url": "https://x.example/mcp"}),
            await api.ada.delete("/servers/notes"),
            await api.ada.post("/servers", json={"name": "notes", "url": "https://x.example/mcp"}),
        ):
            assert_problem(response, 409, "config-owned")
        # Another project's admin does not see it.
        assert_problem(await api.zoe.get("/servers/notes"), 404, "not-found")


async def test_a_server_is_served_as_soon_as_it_is_made_and_until_it_is_deleted(
    servers: Servers, tmp_path: Path
) -> None:
    async with made_setup(servers, tmp_path, protected=False) as setup:
        made = await setup.make()
        assert (made["origin"], made["name"], made["owner"]) == ("api", "tickets", None)
        event = (await setup.api.ada.get("/events")).json()["items"][0]
        assert (event["action"], event["server"], event["server_name"]) == ("servers.create", made["id"], "tickets")
        async with setup.mcp("tickets", "ben") as client:
            assert (await client.call("echo", text="hello")).text == "hello"
        assert (await setup.api.ada.delete(f"/servers/{made['id']}")).status_code == 204
        assert_problem(await setup.api.ada.get(f"/servers/{made['id']}"), 404)
        async with httpx2.AsyncClient(trust_env=False, headers=setup.key("ben")) as client:
            gone = await client.post(f"{setup.api.proxy.origin}/tickets/mcp", json={})
        assert gone.status_code == 404


async def test_only_admins_make_change_and_delete(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made = await setup.make()
        path = f"/servers/{made['id']}"
        body = {"name": "x", "url": "https://x.example/mcp"}
        for response in (
            await setup.api.ben.post("/servers", json=body),
            await setup.api.ben.patch(path, json={"url": "https://x.example/mcp"}),
            await setup.api.ben.delete(path),
        ):
            assert_problem(response, 403, "forbidden")
        for method in ("GET", "DELETE", "PATCH"):
            body = {} if method != "PATCH" else {"name": "y"}
            assert_problem(await setup.api.zoe.request(method, path, json=body), 404)


async def test_every_fault_of_a_new_server_is_named(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        body = {
            "name": "tickets",
            "url": "http://far.example/mcp",
            "oauth": {"grant": "magic", "client_secret": "file:/etc/passwd", "scopes": ["a b"], "color": "red"},
        }
        problem = assert_problem(await api.ada.post("/servers", json=body), 422)
        assert {".".join(map(str, it["loc"])) for it in problem["errors"]} == {
            "body.url",
            "body.oauth.grant",
            "body.oauth.client_secret",
            "body.oauth.scopes.0",
            "body.oauth.color",
        }
        problem = assert_problem(await api.ada.post("/servers", json={"name": "BAD", "extra": 1}), 422)
        assert {tuple(it["loc"]) for it in problem["errors"]} == {("body", "name"), ("body", "url"), ("body", "extra")}
        # Also those that only the rules of the configuration find.
        faulty = {"url": "ftp://x", "oauth": {"grant": "magic"}, "upstream_timeout": "soon", "extra": 1}
        made = (await api.ada.post("/servers", json={"name": "made", "url": "https://x.example/mcp"})).json()
        for response in (
            await api.ada.post("/servers", json={"name": "BAD", **faulty}),
            await api.ada.patch(f"/servers/{made['id']}", json={"name": "BAD", **faulty}),
        ):
            assert {".".join(map(str, it["loc"])) for it in assert_problem(response, 422)["errors"]} == {
                "body.name",
                "body.url",
                "body.oauth.grant",
                "body.upstream_timeout",
                "body.extra",
            }
        for name in ("adhoc-x", "static"):
            body = {"name": name, "url": "https://x.example/mcp"}
            assert (await api.ada.post("/servers", json=body)).status_code in (409, 422)


async def test_files_variables_and_receivers_of_callers_tokens_cannot_be_named_by_the_api(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for oauth in (
            {"client_id": "c", "client_secret": "env:PATH"},
            {"grant": "token_exchange", "client_id": "c", "client_secret": "s", "issuer": "https://as.example"},
            {"client_id": "c", "private_key": "file:/etc/hostname", "client_auth": "private_key_jwt"},
            {"grant": "jwt_bearer", "client_id": "c", "assertion": "file:/etc/hostname"},
        ):
            body = {"name": "tickets", "url": "https://x.example/mcp", "oauth": oauth}
            assert_problem(await api.ada.post("/servers", json=body), 422)


async def test_a_private_address_needs_the_key_that_the_refusal_names(tmp_path: Path) -> None:  # T69
    async with api_setup(tmp_path) as api:
        for url in (
            "http://169.254.169.254/mcp",
            "http://127.0.0.1:1/mcp",
            "https://10.0.0.7/mcp",
            "http://localhost/",
        ):
            problem = assert_problem(await api.ada.post("/servers", json={"name": "x", "url": url}), 422)
            assert problem["errors"][0]["loc"] == ["body", "url"], url
        administer(api, allow_private=LOOPBACK)
        own = {"name": "x", "url": f"{api.proxy.origin}/notes/mcp"}
        assert "loop" in assert_problem(await api.ada.post("/servers", json=own), 422)["detail"]
        allowed = await api.ada.post("/servers", json={"name": "x", "url": "http://127.0.0.1:1/mcp"})
        assert allowed.status_code == 201


async def test_a_secret_is_never_shown_and_goes_elsewhere_only_with_who_knows_it(tmp_path: Path) -> None:  # T68
    async with api_setup(tmp_path) as api:
        oauth = {"client_id": "c", "client_secret": SECRET, "issuer": "https://as.example", "scopes": ["read"]}
        body = {"name": "tickets", "url": "https://x.example/mcp", "oauth": oauth}
        made = await api.ada.post("/servers", json=body)
        assert SECRET not in made.text
        path = f"/servers/{made.json()['id']}"
        shown = await api.ada.get(path)
        assert SECRET not in shown.text
        assert shown.json()["oauth"]["has_client_secret"] is True
        for patch in (
            {"url": "https://evil.example/mcp"},
            {"oauth": {"issuer": "https://evil.example"}},
            {"oauth": {"client_id": "d"}},
            {"oauth": {"metadata": {"issuer": "https://as.example", "token_endpoint": "https://evil.example/token"}}},
        ):
            problem = assert_problem(await api.ada.patch(path, json=patch), 422)
            assert ["body", "oauth", "client_secret"] in [it["loc"] for it in problem["errors"]], patch
        # What does not move the secret needs none, and leaves it.
        changed = await api.ada.patch(path, json={"oauth": {"scopes": None, "resource": "omit"}})
        assert changed.status_code == 200, changed.text
        assert (changed.json()["oauth"]["scopes"], changed.json()["oauth"]["has_client_secret"]) == (None, True)
        moved = {"url": "https://y.example/mcp", "oauth": {"client_secret": "another"}}
        assert (await api.ada.patch(path, json=moved)).json()["url"] == "https://y.example/mcp"
        without = await api.ada.patch(path, json={"oauth": {"client_secret": None, "issuer": None}})
        assert without.json()["oauth"]["has_client_secret"] is False


async def test_a_change_that_was_made_for_an_older_state_is_refused(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        made = await api.ada.post("/servers", json={"name": "tickets", "url": "https://x.example/mcp"})
        path, tag = f"/servers/{made.json()['id']}", made.headers["etag"]
        assert (await api.ada.get(path)).headers["etag"] == tag
        first = await api.ada.patch(path, json={"url": "https://y.example/mcp"}, headers={"if-match": tag})
        assert first.status_code == 200
        late = await api.ada.patch(path, json={"url": "https://z.example/mcp"}, headers={"if-match": tag})
        assert_problem(late, 412)
        assert_problem(await api.ada.delete(path, headers={"if-match": tag}), 412)
        again = await api.ada.post("/servers", json={"name": "tickets", "url": "https://x.example/mcp"})
        assert_problem(again, 409, "name-taken")


async def test_deleting_a_server_revokes_its_grants_and_forgets_its_name(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made = await setup.make()
        for client in (setup.api.ben, setup.api.eve):
            assert (await setup.connect(made["id"], client))["status"] == "connected"
        assert len(await Grants(setup.api.context.database).all()) == 2
        assert (await setup.api.ada.delete(f"/servers/{made['id']}")).status_code == 204
        assert setup.issuer.revocations == 2
        assert await Grants(setup.api.context.database).all() == []
        registrations = setup.issuer.registrations
        again = await setup.make()
        assert again["id"] != made["id"]
        assert (await setup.connect(again["id"], setup.api.ben))["status"] == "connected"
        assert setup.issuer.registrations == registrations + 1


async def test_another_process_serves_a_new_server_within_a_second(servers: Servers, tmp_path: Path) -> None:
    async with (
        made_setup(servers, tmp_path, protected=False) as setup,
        another(tmp_path) as other,
        other.client("tickets", headers=setup.key("ben")) as client,
    ):
        made = await setup.make()
        await until(lambda: "tickets" in other.application.servers, "the server is known", timeout=3)
        assert (await client.call("echo", text="hello")).text == "hello"
        await setup.api.ada.delete(f"/servers/{made['id']}")
        await until(lambda: "tickets" not in other.application.servers, "the server is gone", timeout=3)


async def test_servers_are_there_after_a_restart(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made = await setup.make(oauth={"client_id": "c", "client_secret": SECRET})
    async with another(tmp_path) as proxy, httpx2.AsyncClient(trust_env=False, headers=setup.key("ada")) as client:
        shown = (await client.get(f"{proxy.origin}/api/v1/servers/{made['id']}")).json()
        assert (shown["name"], shown["oauth"]["has_client_secret"]) == ("tickets", True)


async def test_an_adhoc_server_belongs_to_one_principal_and_goes_if_it_is_never_connected(
    servers: Servers, tmp_path: Path
) -> None:
    async with made_setup(servers, tmp_path) as setup:
        api, made = setup.api, setup.api.proxy.application.made
        server = await made.adhoc(principal_of(api, "ben"), setup.upstream.url)
        assert await made.adhoc(principal_of(api, "ben"), setup.upstream.url) == server
        shown = (await api.ben.get(f"/servers/{server.id}")).json()
        assert (shown["origin"], shown["owner"]) == ("adhoc", "prn_ben")
        assert server.id not in [it["id"] for it in (await api.eve.get("/servers")).json()["items"]]
        assert_problem(await api.eve.get(f"/servers/{server.id}"), 404)  # T65
        assert_problem(await api.eve.post(f"/servers/{server.id}/flows", json={}), 404)
        assert_problem(await api.eve.delete(f"/servers/{server.id}"), 404)
        assert (await setup.connect(server.id, api.ben))["status"] == "connected"
        unused = await made.adhoc(principal_of(api, "eve"), setup.upstream.url)
        api.clock.ahead += NEVER_CONNECTED + 10
        await made.purge()
        assert unused.name not in api.proxy.application.servers
        assert server.name in api.proxy.application.servers
        assert (await api.ben.delete(f"/servers/{server.id}")).status_code == 204


async def test_adhoc_servers_share_one_label_in_the_metrics(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path, protected=False) as setup:
        server = await setup.api.proxy.application.made.adhoc(principal_of(setup.api, "ben"), setup.upstream.url)
        async with setup.mcp(server.name, "ben") as client:
            assert (await client.call("echo", text="hello")).text == "hello"
        async with httpx2.AsyncClient(trust_env=False, headers=setup.key("ada")) as client:
            metrics = (await client.get(f"{setup.api.proxy.origin}/metrics")).text
        assert 'server="adhoc"' in metrics
        assert server.name not in metrics
        assert 'mcp_auth_proxy_upstream_connections{origin="adhoc"' in metrics


async def test_servers_are_listed_in_pages(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for number in range(5):
            await api.ada.post("/servers", json={"name": f"s{number}", "url": f"https://{number}.example/mcp"})
        names: list[str] = []
        token: str | None = ""
        for _ in range(4):
            page = (await api.ben.get("/servers", params={"page_size": 2, "page_token": token})).json()
            names += [it["name"] for it in page["items"]]
            token = page["page"]["next_page_token"]
        assert (names, token) == (["linear", "notes", *(f"s{number}" for number in range(5))], None)
