"""What one replica does is effective at the others within a second, and what began at one goes on at another."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.mcp_client import PlainClient
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import link_in, until
from fakes.replicas import Replica, replicas
from fakes.shared_stores import Section
from fakes.team import post
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, Principal, Role
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.api_keys import ApiKeys
from mcp_auth_proxy.store.principals import Principals

PROMISED = 1.0
"""Seconds until a change is effective everywhere."""

LOOPBACK = ["127.0.0.0/8", "::1"]
URLS: dict[str, Any] = {"elicitation": {"url": {}}}


async def soon(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Wait until a change that was just made is effective; fail if that takes longer than is promised."""
    begun = time.monotonic()
    while not await condition():
        assert time.monotonic() - begun < PROMISED + 9, f"{what}: never"
        await asyncio.sleep(0.02)
    seconds = time.monotonic() - begun
    assert seconds <= PROMISED, f"{what}: {seconds:.2f} s"


class Shared:
    """Two replicas that identify callers by their keys; ``ada`` is an admin."""

    def __init__(self, made: list[Replica], issuer: FakeAuthorizationServer, upstream: FakeMcpServer) -> None:
        self.here, self.there = made
        self.issuer = issuer
        self.upstream = upstream
        self.keys: dict[str, str] = {}

    async def add(self, name: str, role: Role = Role.MEMBER) -> None:
        """Add a principal ``prn_NAME`` with a key."""
        store = await open_store(load(self.here.config, environ={}).store)
        try:
            await Principals(store).add(Principal(id=f"prn_{name}", name=name, role=role, created_at=time.time()))
            key, text = make_key(principal=f"prn_{name}", name=name, scopes=ALL_SCOPES, now=time.time())
            await ApiKeys(store).add(key)
        finally:
            await store.close()
        self.keys[name] = text

    async def api(self, method: str, path: str, *, name: str = "ada", at: Replica | None = None, **options: Any) -> Any:
        """Call the API as somebody; return the JSON of the answer, None if there is none."""
        response = await (at or self.here).request(method, f"/api/v1{path}", key=self.keys[name], **options)
        assert response.is_success, response.text
        return response.json() if response.content else None

    async def works(self, replica: Replica, name: str = "ada", server: str = "notes") -> bool:
        return await replica.is_connected(server, headers=self.auth(name))

    async def status(self, replica: Replica, path: str, name: str = "ada") -> int:
        """Return the status of an answer of the API."""
        return (await replica.request("GET", f"/api/v1{path}", key=self.keys[name])).status_code

    async def mcp_status(self, replica: Replica, server: str = "notes", name: str = "ada") -> int:
        return (await replica.call(server, headers=self.auth(name))).status

    def auth(self, name: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[name]}"}

    async def connect(self, browser: Browser, name: str = "ada") -> None:
        """Sign in here, open the link there, and come back here; the session is one for all."""
        assert (await post(browser, f"{self.here.origin}/sign-in", key=self.keys[name], next="/")).status_code == 303
        reply = await self.there.call("notes", headers=self.auth(name))
        back = await browser.stop_before(self.there.here(link_in(reply.message)))
        page = await browser.open(self.here.here(back))
        assert page.status_code in (200, 303), page.text


@asynccontextmanager
async def shared(servers: Servers, folder: Path, **sections: Any) -> AsyncIterator[Shared]:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    sections = {
        "inbound": {"mode": "api_key"},
        "admin": {"allow_private": LOOPBACK},
        "authorization": {"wait": "0s"},
        **sections,
    }
    async with replicas(folder, 2, {"notes": upstream.url}, **sections) as made:
        found = Shared(made, issuer, upstream)
        await found.add("ada", Role.ADMIN)
        await soon(lambda: _is(found.status(found.here, "/me"), 200), "a principal")
        await soon(lambda: _is(found.status(found.there, "/me"), 200), "a principal")
        yield found


async def _is(status: Awaitable[int], expected: int) -> bool:
    return await status == expected


async def test_a_consent_and_a_logout_are_effective_everywhere(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    async with shared(servers, tmp_path, store=shared_store) as setup, Browser() as browser:
        here, there = setup.here, setup.there
        assert not await setup.works(there)
        await setup.connect(browser)
        assert await setup.works(here)
        await soon(lambda: setup.works(there), "a consent")
        assert (setup.issuer.registrations, setup.issuer.authorizations) == (1, 1)
        (grant,) = (await setup.api("GET", "/grants", at=there))["items"]
        await setup.api("DELETE", f"/grants/{grant['id']}")
        seen = len(setup.upstream.calls("tools/call"))

        async def logged_out() -> bool:
            return not await setup.works(there)

        await soon(logged_out, "a logout")
        # The token was revoked: what is sent with it until then is answered with a challenge.
        assert len(setup.upstream.calls("tools/call")) - seen <= 60
        # The session is one for all, and ends everywhere at once.
        assert (await browser.open(f"{there.origin}/")).status_code == 200
        await post(browser, f"{here.origin}/sign-in/out")
        assert (await browser.open(f"{there.origin}/")).status_code == 303


async def test_what_an_admin_changes_is_effective_everywhere(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    async with shared(servers, tmp_path, store=shared_store) as setup:
        there = setup.there
        made = await setup.api("POST", "/keys", json={"name": "more", "principal": "prn_ada"})
        setup.keys["more"] = made["key"]
        await soon(lambda: _is(setup.status(there, "/me", "more"), 200), "a key")
        await setup.api("DELETE", f"/keys/{made['id']}")
        await soon(lambda: _is(setup.status(there, "/me", "more"), 401), "the end of a key")
        await soon(lambda: _is(setup.mcp_status(there, name="more"), 401), "the end of a key")
        await setup.add("ben")
        for replica in (setup.here, there):
            await soon(lambda it=replica: _is(setup.mcp_status(it, name="ben"), 200), "a principal")  # type: ignore[misc]
        await setup.api("PATCH", "/principals/prn_ben", json={"status": "disabled"})
        await soon(lambda: _is(setup.mcp_status(there, name="ben"), 401), "a disabled principal")
        await setup.api("PATCH", "/principals/prn_ben", json={"status": "active"})
        await soon(lambda: _is(setup.mcp_status(there, name="ben"), 200), "an active principal")

        open_one = await servers.mcp_server(protected=False)
        other = await servers.mcp_server(protected=False)
        server = await setup.api("POST", "/servers", json={"name": "tickets", "url": open_one.url})
        await soon(lambda: setup.works(there, server="tickets"), "a new server")
        assert len(open_one.calls("tools/call")) == 1
        await setup.api("PATCH", f"/servers/{server['id']}", json={"url": other.url})

        async def changed() -> bool:
            return await setup.works(there, server="tickets") and bool(other.calls("tools/call"))

        await soon(changed, "a changed server")
        await setup.api("DELETE", f"/servers/{server['id']}")
        await soon(lambda: _is(setup.mcp_status(there, server="tickets"), 404), "a deleted server")


async def test_the_streams_of_a_disabled_principal_end_at_every_replica(  # T74
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    plain = await servers.mcp_server(protected=False)
    plain.sessions_on = True
    entry = {"open": plain.url}
    sections: dict[str, Any] = {"inbound": {"mode": "api_key"}, "store": shared_store}
    async with replicas(tmp_path, 2, entry, **sections) as made:
        setup = Shared(made, await servers.authorization_server(), plain)
        for name, role in (("ada", Role.ADMIN), ("ben", Role.MEMBER)):
            await setup.add(name, role)
        for replica in made:
            await soon(lambda it=replica: _is(setup.status(it, "/me", "ben"), 200), "a principal")  # type: ignore[misc]
        async with setup.there.client("open", headers=setup.auth("ben")) as ben:
            await ben.initialize()
            async with ben.stream() as (response, events):
                assert response.status_code == 200
                await until(lambda: any(session.streams for session in plain.sessions.values()), "a stream")
                await setup.api("PATCH", "/principals/prn_ben", json={"status": "disabled"})
                async with asyncio.timeout(PROMISED):
                    assert [event async for event in events] == []
        # Its connection may be closed with it.
        assert await setup.mcp_status(setup.there, "open", "ben") == 401


async def test_a_client_of_the_api_that_is_revoked_is_revoked_everywhere(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    async with shared(servers, tmp_path, store=shared_store) as setup, Browser() as browser:
        issuer = setup.issuer
        issuer.add_client(client_id="by-hand", auth="none", redirect_uris=(f"{setup.here.origin}/oauth/callback",))
        body = {
            "provider": "notes-provider",
            "client_id": "by-hand",
            "authorization_url": f"{issuer.issuer}/authorize",
            "token_url": f"{issuer.issuer}/token",
            "server_ids": ["notes"],
        }
        made = await setup.api("POST", "/oauth-clients", json=body)
        await setup.connect(browser)
        await soon(lambda: setup.works(setup.there), "a consent")
        assert issuer.registrations == 0
        assert issuer.seen("authorize", client_id="by-hand")
        await setup.api("PATCH", f"/oauth-clients/{made['id']}", json={"status": "revoked"})

        async def over() -> bool:
            return not await setup.works(setup.there)

        await soon(over, "a revoked client")


async def test_a_held_request_goes_on_when_the_callback_lands_on_another_replica(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    sections: dict[str, Any] = {"authorization": {"wait": "30s"}, "store": shared_store}
    async with replicas(tmp_path, 3, {"notes": upstream.url}, **sections) as (one, two, three):
        held = [asyncio.create_task(replica.call("notes")) for replica in (one, two, three)]
        found = [each.process.links for each in (one, two, three) if each.process is not None]
        await until(lambda: all(found), "the link at every replica")
        links = {link for each in found for link in each}
        assert len(links) == 1
        page = await two.consent(links.pop(), callback=three)
        assert page.status_code in (200, 303), page.text
        async with asyncio.timeout(PROMISED):
            assert [(await call).text for call in held] == ["in"] * 3
        assert (issuer.registrations, issuer.authorizations, issuer.token_requests()) == (1, 1, 1)


async def test_a_session_that_began_before_consent_goes_on_at_another_replica(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer, sessions_on=True)
    sections: dict[str, Any] = {"authorization": {"wait": "0s", "cold_start": True}, "store": shared_store}
    async with (
        replicas(tmp_path, 2, {"notes": upstream.url}, **sections) as (one, two),
        one.client("notes", capabilities=URLS) as client,
        two.client("notes", capabilities=URLS) as other,
    ):
        assert "result" in (await client.initialize()).message
        other.session = client.session
        reply = await client.call("echo", text="in")
        (elicitation,) = reply.error["data"]["elicitations"]
        listed = (await other.post("tools/list")).result["tools"]
        assert "authorize_notes" in {tool["name"] for tool in listed}
        # The stream is at the other replica, and the callback too: the one that asked hears of neither.
        async with other.stream() as (response, events):
            assert response.status_code == 200
            page = await one.consent(elicitation["url"], callback=two)
            assert page.status_code in (200, 303), page.text
            async with asyncio.timeout(10):
                message = await anext(events)
                while message["method"] != "notifications/elicitation/complete":
                    message = await anext(events)
            assert message["params"] == {"elicitationId": elicitation["elicitationId"]}
        for each in (other, client):
            await soon(lambda it=each: _answered(it), "a consent")  # type: ignore[misc]
        assert len({received.header("mcp-session-id") for received in upstream.calls("tools/call")}) == 1


async def test_without_callers_one_key_and_one_confirmation_hold_everywhere(
    servers: Servers, tmp_path: Path, shared_store: Section
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    # The sign-in page is on another site, so the user is asked before the first redirect.
    issuer.issuer = issuer.issuer.replace("127.0.0.1", "localhost")
    sections: dict[str, Any] = {"authorization": {"wait": "0s"}, "admin": {"token_file": "token"}}
    async with replicas(tmp_path, 2, {"notes": upstream.url}, store=shared_store, **sections) as made:
        # Both have started in the same instant; one of them has made the file.
        key = (tmp_path / "token").read_text().strip()
        for here, there in (made, made[::-1]):
            link = link_in((await here.call("notes")).message)
            async with Browser() as browser:
                page = await browser.open(there.here(link))
                if here is made[0]:
                    assert (page.status_code, issuer.authorizations) == (200, 0), "it asks, the first time"
                    assert (await browser.follow(there.here(link))).status_code == 200
                else:
                    assert page.status_code == 303, page.text
                    assert (await browser.follow(there.here(link))).status_code == 200
            await soon(lambda it=here: it.is_connected("notes"), "a consent")  # type: ignore[misc]
            (grant,) = (await there.request("GET", "/api/v1/grants", key=key)).json()["items"]
            assert (await here.request("DELETE", f"/api/v1/grants/{grant['id']}", key=key)).is_success

            async def logged_out(it: Replica = there) -> bool:
                return not await it.is_connected("notes")

            await soon(logged_out, "a logout")


async def _answered(client: PlainClient) -> bool:
    message = (await client.call("echo", text="in")).message
    return "result" in message and not message["result"].get("isError")
