"""The router if callers are identified: who is refused and how, which servers a caller has, and what is forwarded."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from fakes.callers import HeaderCallers, admin, principal
from fakes.proxy import RunningProxy, running_proxy, until
from fakes.raw_client import RawClient, RawResponse
from fakes.raw_server import Peer, RawServer, ok
from fakes.tasks import tasks_made
from mcp_auth_proxy.config.settings import InboundSettings, JwtSettings, ServerSettings
from mcp_auth_proxy.errors import CallerRefused, StoreUnavailable
from mcp_auth_proxy.models import Scope
from mcp_auth_proxy.proxy.routes import ROUTES_OF_A_CALLER
from mcp_auth_proxy.router import UNKNOWN_SERVER
from mcp_auth_proxy.rpc import answers
from mcp_auth_proxy.web.protected_resource import ProtectedResource

CALL = json.dumps({"jsonrpc": "2.0", "id": 9, "method": "tools/call", "params": {"name": "pay"}}).encode()
ADA, BOB = "X-Test-Caller: ada", "X-Test-Caller: bob"
IDP = "https://idp.example.com"
EVENTS = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def inbound(*modes: Any, audience: str = "the-proxy", **jwt: Any) -> InboundSettings:
    return InboundSettings(modes=modes, jwt=(JwtSettings(issuer=IDP, audience=audience, **jwt),))


@dataclass
class Shared:
    """A proxy that identifies callers, and its upstream."""

    proxy: RunningProxy
    upstream: RawServer
    callers: HeaderCallers
    client: RawClient

    async def post(self, *fields: str, path: str = "/notes/mcp") -> RawResponse:
        self.client.post(CALL, *fields, path=path)
        return await self.client.answer()

    async def get(self, path: str, *fields: str, method: str = "GET") -> RawResponse:
        self.client.send("\n".join([f"{method} {path} HTTP/1.1", "Host: HOST", *fields, "", ""]))
        return await self.client.answer()

    def identify(self, settings: InboundSettings) -> None:
        """Use other settings for what the answers say."""
        self.proxy.application.router.resource = ProtectedResource(self.proxy.origin, settings)

    def configure(self, **changes: Any) -> None:
        """Change settings of the server ``notes``."""
        servers = self.proxy.application.servers
        servers.replace({**servers, "notes": replace(servers["notes"], **changes)})


async def always(peer: Peer) -> None:
    """Answer each request on the connection, with a session id."""
    while True:
        await peer.request()
        await peer.send(ok(b"{}").replace(b"\r\n\r\n", b"\r\nMcp-Session-Id: s.1\r\n\r\n", 1))


@asynccontextmanager
async def shared(folder: Path, script: Any = always, **sections: Any) -> AsyncIterator[Shared]:
    callers = HeaderCallers(principal("ada"), principal("bob"), admin("root"))
    async with (
        RawServer(script) as upstream,
        running_proxy(
            folder, {"notes": upstream.url, "docs": upstream.url}, authenticator=callers, **sections
        ) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        yield Shared(proxy, upstream, callers, client)


def error_of(answer: RawResponse) -> dict[str, Any]:
    document = json.loads(answer.body)
    assert (document["jsonrpc"], document["id"]) == ("2.0", None)
    found: dict[str, Any] = document["error"]
    return found


# Who is refused


@pytest.mark.parametrize("fields", [(), ("X-Test-Caller: eve",), (ADA, ADA), ("Authorization: Bearer upstream-token",)])
@pytest.mark.parametrize("path", ["/notes/mcp", "/notes@work/mcp", "/nowhere/mcp", "/mcp"])
async def test_who_is_not_known_is_refused_whatever_the_server_and_nothing_is_forwarded(  # T59 T60
    tmp_path: Path, fields: tuple[str, ...], path: str
) -> None:
    async with shared(tmp_path) as there:
        answer = await there.post(*fields, path=path)
        assert (answer.status, error_of(answer)["code"]) == (401, answers.CALLER_REFUSED)
        assert there.upstream.requests == []
        assert (await there.post(ADA)).status == 200


@pytest.mark.parametrize(
    ("modes", "expected"),
    [
        (("api_key",), 'Bearer error="invalid_token"'),
        (("trusted_header",), None),
        (
            ("jwt",),
            'Bearer error="invalid_token", resource_metadata="{}/.well-known/oauth-protected-resource/notes/mcp"',
        ),
        (
            ("api_key", "jwt"),
            'Bearer error="invalid_token", resource_metadata="{}/.well-known/oauth-protected-resource/notes/mcp"',
        ),
    ],
)
async def test_a_challenge_names_metadata_only_if_callers_log_in_somewhere(
    tmp_path: Path, modes: tuple[str, ...], expected: str | None
) -> None:
    async with shared(tmp_path) as there:
        there.identify(inbound(*modes))
        answer = await there.post("X-Test-Caller: eve")
        assert answer.all("www-authenticate") == ([expected.format(there.proxy.origin)] if expected else [])
        without = (await there.post()).all("www-authenticate")
        assert without == (
            [expected.format(there.proxy.origin).replace('error="invalid_token"', "").replace(" , ", " ").strip()]
            if expected
            else []
        )


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (CallerRefused("two credentials", 400), 400, []),
        (CallerRefused("not listed", 403), 403, []),
        (CallerRefused("the identity provider is down", 503, retry_after=2.5), 503, ["3"]),
        (StoreUnavailable("locked"), 503, ["5"]),
    ],
)
async def test_each_refusal_has_its_status(
    tmp_path: Path, error: CallerRefused | StoreUnavailable, status: int, retry_after: list[str]
) -> None:
    async with shared(tmp_path) as there:
        there.callers.cached, there.callers.error = False, error
        answer = await there.post(ADA)
        assert (answer.status, answer.all("retry-after"), answer.all("www-authenticate")) == (status, retry_after, [])
        assert there.upstream.requests == []


async def test_a_credential_that_is_not_for_mcp_is_refused(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        there.callers.change("ada", scopes=frozenset({Scope.SELF, Scope.ADMIN}))
        assert ((await there.post(ADA)).status, (await there.post(ADA)).status) == (401, 401)
        assert there.upstream.requests == []


async def test_a_caller_that_is_known_takes_the_fast_path(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        assert (await there.post(ADA)).status == 200
        with tasks_made() as tasks:
            assert (await there.post(ADA)).status == 200
        assert tasks == []
        assert there.callers.peers == {"127.0.0.1"}


# Metadata, preflights


async def test_metadata_names_the_identity_provider_without_a_credential(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        there.identify(inbound("jwt"))
        for name in ("notes", "notes@work", "nowhere"):
            answer = await there.get(f"/.well-known/oauth-protected-resource/{name}/mcp")
            assert (answer.status, answer.all("content-type")) == (200, ["application/json"])
            document = json.loads(answer.body)
            assert document["authorization_servers"] == [IDP]
            assert document["resource"] == f"{there.proxy.origin}/{name}/mcp"
            assert "scopes_supported" not in document
        there.identify(inbound("jwt", scopes=("mcp", "openid")))
        document = json.loads((await there.get("/.well-known/oauth-protected-resource/notes/mcp")).body)
        assert document["scopes_supported"] == ["mcp", "openid"]


@pytest.mark.parametrize("slash", ["", "/"])
async def test_an_audience_that_is_the_proxys_origin_is_what_tokens_are_requested_for(
    tmp_path: Path, slash: str
) -> None:
    async with shared(tmp_path) as there:
        there.identify(inbound("jwt", audience=there.proxy.origin + slash))
        answer = await there.get("/.well-known/oauth-protected-resource/notes/mcp")
        assert json.loads(answer.body)["resource"] == there.proxy.origin + slash


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        (inbound("api_key"), "/.well-known/oauth-protected-resource/notes/mcp"),
        (inbound("trusted_header"), "/.well-known/oauth-protected-resource/notes/mcp"),
        (inbound("jwt", kubernetes=True), "/.well-known/oauth-protected-resource/notes/mcp"),
        (inbound("jwt"), "/.well-known/oauth-protected-resource"),
        (inbound("jwt"), "/.well-known/oauth-protected-resource/api/mcp"),
        (inbound("jwt"), "/.well-known/oauth-authorization-server/notes/mcp"),
        (inbound("api_key"), "/.well-known/openid-configuration"),
    ],
)
async def test_where_nobody_logs_in_metadata_is_a_json_404(
    tmp_path: Path, settings: InboundSettings, path: str
) -> None:
    async with shared(tmp_path) as there:
        there.identify(settings)
        answer = await there.get(path)
        assert (answer.status, answer.all("content-type")) == (404, ["application/json"])
        assert json.loads(answer.body)


@pytest.mark.parametrize("path", ["/notes/mcp", "/.well-known/oauth-protected-resource/notes/mcp"])
async def test_pages_of_allowed_origins_see_challenge_and_metadata_without_a_credential(
    tmp_path: Path, path: str
) -> None:
    page = "Origin: http://app.example"
    async with shared(tmp_path, inbound={"allowed_origins": ["http://app.example"]}) as there:
        there.identify(inbound("jwt"))
        asked = "Access-Control-Request-Headers: authorization, x-api-key"
        preflight = await there.get(path, page, "Access-Control-Request-Method: POST", asked, method="OPTIONS")
        assert preflight.status == 204
        assert "x-api-key" in preflight.all("access-control-allow-headers")[0]
        answer = await there.get(path, page)
        assert answer.all("access-control-allow-origin") == ["http://app.example"]
        assert "WWW-Authenticate" in answer.all("access-control-expose-headers")[0]
        assert (await there.get(path, "Origin: http://evil.example")).status == 403
        assert there.upstream.requests == []


# Which servers there are


@pytest.mark.parametrize(
    ("changes", "allowed"),
    [
        ({"allow": ("ada",)}, {"ada"}),
        ({"allow": ("a*", "ro?t")}, {"ada", "root"}),
        ({"allow": ("role:admin",)}, {"root"}),
        ({"allow": ("role:member",)}, {"ada", "bob"}),
        ({"allow": ()}, set()),
        ({"project": "elsewhere"}, set()),
        ({"origin": "adhoc", "owner": "id-of-bob"}, {"bob"}),
    ],
)
async def test_a_server_does_not_exist_for_those_it_is_not_for(  # T44 T59 T65
    tmp_path: Path, changes: dict[str, Any], allowed: set[str]
) -> None:
    async with shared(tmp_path) as there:
        there.configure(**changes)
        for name in ("ada", "bob", "root"):
            for path in ("/notes/mcp", "/notes@work/mcp"):
                answer = await there.post(f"X-Test-Caller: {name}", path=path)
                assert answer.status == (200 if name in allowed else 404)
                if name not in allowed:
                    error = error_of(answer)
                    nowhere = error_of(await there.post(f"X-Test-Caller: {name}", path=path.replace("notes", "xxxxx")))
                    assert error["code"] == UNKNOWN_SERVER
                    assert json.dumps(error).replace("notes", "xxxxx") == json.dumps(nowhere)
                    assert error["data"] == {"servers": ["docs"]}


async def test_a_changed_principal_has_other_servers_at_once(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        there.configure(allow=("role:admin",))
        assert (await there.post(ADA)).status == 404
        there.callers.change("ada", principal=admin("ada"))
        assert (await there.post(ADA)).status == 200
        assert (await there.post(ADA)).status == 200
        there.callers.change("ada", principal=principal("ada"))
        assert (await there.post(ADA)).status == 404


@pytest.mark.parametrize(
    ("path", "account"),
    [
        ("/notes/mcp", "default"),
        ("/notes@default/mcp", "default"),
        ("/notes@work/mcp", "work"),
        ("/notes%40work/mcp", "work"),
        ("/notes@4-2/mcp", "4-2"),
        ("/notes@Work/mcp", None),
        ("/notes@/mcp", None),
        ("/notes@-work/mcp", None),
        (f"/notes@{'a' * 32}/mcp", "a" * 32),
        (f"/notes@{'a' * 33}/mcp", None),
        ("/notes@work@home/mcp", None),
        ("/notes%2540work/mcp", None),
    ],
)
async def test_the_path_names_the_account(tmp_path: Path, path: str, account: str | None) -> None:
    async with shared(tmp_path) as there:
        answer = await there.post(ADA, path=path)
        assert answer.status == (200 if account else 404)
        route = there.proxy.application.router._routes.find(principal("ada"), path.encode())
        assert (route and route.account) == ((principal("ada").id, "notes", account) if account else None)


async def test_any_number_of_accounts_can_be_named(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        for number in range(ROUTES_OF_A_CALLER + 2):
            assert (await there.post(ADA, path=f"/notes@a{number}/mcp")).status == 200
        table = there.proxy.application.router._routes._tables[principal("ada").id]
        assert 0 < len(table.routes) <= ROUTES_OF_A_CALLER


# What is forwarded


async def test_no_credential_of_a_caller_is_forwarded_in_any_spelling(tmp_path: Path) -> None:  # T60 T63
    async with shared(tmp_path) as there:
        answer = await there.post(
            ADA,
            "X_Test_Caller: root",
            "Authorization: Bearer inbound",
            "X-API-Key: mapk_1",
            "X_Api_Key: mapk_2",
            "X-Forwarded-User: root",
            "X-Proxy-Secret: shh",
            "x_proxy_secret: shh",
            "X-Other: kept",
        )
        assert answer.status == 200
        (sent,) = there.upstream.requests
        assert b"kept" in sent
        for secret in (b"ada", b"root", b"inbound", b"mapk", b"shh"):
            assert secret not in sent


async def test_a_session_id_is_signed_on_the_way_down_and_stripped_on_the_way_up(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        for _ in range(2):  # by a handler, and on the fast path
            (signed,) = (await there.post(ADA)).all("mcp-session-id")
            assert signed.startswith("s.1.")
            assert (await there.post(ADA, f"Mcp-Session-Id: {signed}")).status == 200
            assert b"mcp-session-id: s.1\r\n" in there.upstream.requests[-1].lower()
        with tasks_made() as tasks:
            for _ in range(2):
                answer = await there.post(ADA, f"Mcp-Session-Id: {signed}")
                assert answer.all("mcp-session-id") == [signed]
        assert tasks == []


@pytest.mark.parametrize("changes", [{}, {"grant_owner": "shared"}], ids=["own grants", "a shared grant"])
async def test_the_session_of_another_caller_server_or_account_is_not_found(  # T44 T64
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    async with shared(tmp_path) as there:
        there.configure(**changes)
        for caller in (ADA, BOB):
            await there.post(caller)
        (signed,) = (await there.post(ADA)).all("mcp-session-id")
        before = len(there.upstream.requests)
        for fields, path in [
            ((BOB, f"Mcp-Session-Id: {signed}"), "/notes/mcp"),
            ((ADA, f"Mcp-Session-Id: {signed}"), "/docs/mcp"),
            ((ADA, f"Mcp-Session-Id: {signed}"), "/notes@work/mcp"),
            ((ADA, "Mcp-Session-Id: s.1"), "/notes/mcp"),
            ((ADA, f"Mcp-Session-Id: {signed}x"), "/notes/mcp"),
            ((ADA, "Mcp-Session-Id:"), "/notes/mcp"),
            ((ADA, f"Mcp-Session-Id: {signed}", "Mcp-Session-Id: s.1"), "/notes/mcp"),
        ]:
            answer = await there.post(*fields, path=path)
            assert (answer.status, json.loads(answer.body)["error"]["code"]) == (404, answers.NOT_FOUND)
            assert json.loads(answer.body)["id"] == 9
        assert len(there.upstream.requests) == before
        # The same bytes on the same connection, for another server: what was found for one is not used for the other.
        assert (await there.post(ADA, f"Mcp-Session-Id: {signed}")).status == 200
        assert (await there.post(ADA, f"Mcp-Session-Id: {signed}", path="/docs/mcp")).status == 404
        assert (await there.post(ADA, f"Mcp-Session-Id: {signed}")).status == 200


async def test_another_spelling_of_the_session_field_is_not_forwarded(tmp_path: Path) -> None:  # T64
    async with shared(tmp_path) as there:
        assert (await there.post(ADA, "Mcp_Session_Id: s.1")).status == 200
        assert b"s.1" not in there.upstream.requests[0]


@pytest.mark.parametrize(("owner", "passes"), [("caller", True), ("shared", False)])
async def test_events_are_not_repeated_from_a_token_that_others_use_too(
    tmp_path: Path, owner: str, passes: bool
) -> None:
    async with shared(tmp_path) as there:
        there.configure(grant_owner=owner)
        for field in ("Last-Event-ID: e7", "Last_Event_Id: e7"):
            await there.post(ADA, field)
            assert (b"e7" in there.upstream.requests[-1]) is passes
        (signed,) = (await there.post(ADA)).all("mcp-session-id")
        await there.post(ADA, "Last-Event-ID: e8", f"Mcp-Session-Id: {signed}")
        assert b"e8" in there.upstream.requests[-1]


# Those who may no longer call


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_the_streams_of_a_disabled_principal_end_within_a_second(tmp_path: Path, method: str) -> None:  # T74
    async def streams(peer: Peer) -> None:
        while True:
            request = await peer.request()
            if b"stream" in request:
                await peer.send(EVENTS + b"9\r\ndata: {}\n\r\n")
                await peer.until_gone()
                return
            await peer.send(ok(b"{}"))

    async with shared(tmp_path, streams) as there, RawClient.to(there.proxy.origin) as other:
        for client, caller in ((there.client, ADA), (other, BOB)):
            client.post(CALL, caller)
            await client.answer()
            if method == "GET":
                client.get("/notes/mcp", caller, "X-Kind: stream")
            else:
                client.post(CALL, caller, "X-Kind: stream")
            assert (await client.head())[0] == 200
        await until(lambda: there.proxy.application.forwarder.active_requests == 2, "two streams")
        there.callers.disable("ada")
        assert (await there.client.rest(1.0) if method == "GET" else await _end(there.client)).endswith(b"0\r\n\r\n")
        assert there.proxy.application.forwarder.active_requests == 1
        async with RawClient.to(there.proxy.origin) as again:
            again.post(CALL, ADA)
            assert (await again.answer()).status == 401


async def test_a_stream_ends_when_its_server_is_no_longer_for_the_caller(tmp_path: Path) -> None:  # T59
    async def streams(peer: Peer) -> None:
        await peer.request()
        await peer.send(EVENTS + b"9\r\ndata: {}\n\r\n")
        await peer.until_gone()

    async with shared(tmp_path, streams) as there, RawClient.to(there.proxy.origin) as other:
        for client, caller in ((there.client, ADA), (other, BOB)):
            client.get("/notes/mcp", caller)
            assert (await client.head())[0] == 200
        there.configure(upstream_timeout=9.0)
        assert there.proxy.application.forwarder.active_requests == 2
        there.configure(allow=("bob",))
        assert (await _end(there.client)).endswith(b"0\r\n\r\n")
        assert there.proxy.application.forwarder.active_requests == 1


async def _end(client: RawClient) -> bytes:
    async with asyncio.timeout(1.0):
        return await client.reader.readuntil(b"0\r\n\r\n")


async def test_a_request_that_waits_for_its_answer_gets_a_401_if_its_caller_is_disabled(tmp_path: Path) -> None:  # T74
    async def silent(peer: Peer) -> None:
        await peer.request()
        await peer.until_gone()

    async with shared(tmp_path, silent) as there:
        there.client.post(CALL, ADA)
        await until(lambda: there.upstream.requests, "a request")
        there.callers.disable("ada")
        answer = await there.client.answer()
        document = json.loads(answer.body)
        assert (answer.status, document["id"], document["error"]["code"]) == (401, 9, answers.CALLER_REFUSED)


# Metrics


@pytest.mark.parametrize(("fields", "status"), [((), 401), ((ADA,), 403), (("X-Test-Caller: root",), 200)])
async def test_metrics_are_for_admins(tmp_path: Path, fields: tuple[str, ...], status: int) -> None:
    async with shared(tmp_path) as there:
        answer = await there.get("/metrics", *fields)
        assert answer.status == status
        assert (b"mcp_auth_proxy_build_info" in answer.body) is (status == 200)
        for probe in ("/healthz", "/readyz"):
            assert (await there.get(probe)).status == 200


@pytest.mark.parametrize("path", ["/%6detrics", "/metric%73", "/%6Detrics?a=b"])
async def test_no_other_spelling_of_the_path_shows_the_metrics(tmp_path: Path, path: str) -> None:
    async with shared(tmp_path) as there, RawClient.to(there.proxy.origin) as client:
        client.send(f"GET {path} HTTP/1.1\nHost: HOST\n\n")
        answer = await client.answer()
        assert (answer.status, b"mcp_auth_proxy" in answer.body) == (400, False)


async def test_the_credential_of_an_admin_without_that_scope_shows_no_metrics(tmp_path: Path) -> None:
    async with shared(tmp_path) as there:
        there.callers.change("root", scopes=frozenset({Scope.MCP}))
        assert (await there.get("/metrics", "X-Test-Caller: root")).status == 403


# Mode none


async def test_without_callers_nothing_is_signed_dropped_or_asked(tmp_path: Path) -> None:
    async with (
        RawServer(always) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        for path in ("/notes/mcp", "/mcp", "/notes@work/mcp", "/notes%40work/mcp"):
            client.post(CALL, "Mcp-Session-Id: s.1", "X-API-Key: for-the-server", path=path)
            answer = await client.answer()
            assert (answer.status, answer.all("mcp-session-id")) == (200, ["s.1"])
            assert b"for-the-server" in upstream.requests[-1]
        client.get("/metrics")
        assert (await client.answer()).status == 200


async def test_a_server_made_at_run_time_leaves_the_only_one_of_the_file_at_its_short_address(tmp_path: Path) -> None:
    async with (
        RawServer(always) as upstream,
        running_proxy(tmp_path, {"notes": upstream.url}) as proxy,
        RawClient.to(proxy.origin) as client,
    ):
        servers = proxy.application.servers
        servers.replace({**servers, "made": ServerSettings(name="made", url=upstream.url, origin="api")})
        for path, status in (("/mcp", 200), ("/made/mcp", 200), ("/gone/mcp", 404)):
            client.post(CALL, path=path)
            assert (await client.answer()).status == status
