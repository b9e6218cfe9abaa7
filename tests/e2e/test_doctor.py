"""``doctor``: its verdict matches what the proxy does, in the proxy's own words, and it changes nothing."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import ABSENT, FakeResponse, RecordedRequest
from fakes.mcp_server import MODERN, FakeMcpServer
from fakes.proxy import Json, Sections, link_in, running_proxy, write_config
from mcp_auth_proxy.cli.doctor.examine import examine
from mcp_auth_proxy.cli.doctor.report import Outcome, Report, as_document, as_lines
from mcp_auth_proxy.config.load import load

UNHELD: Sections = {"authorization": {"wait": "0s"}}
MEMBERS = ["format", "server", "url", "verdict", "summary", "steps", "plan", "config", "config_complete", "changes"]
STEP_MEMBERS = ["step", "verdict", "says", "clause", "request", "answer"]
PLAN_MEMBERS = ["grant", "issuer", "registration", "client_id", "client_auth", "redirect_uri", "resource", "scopes"]
JSON = (("content-type", "application/json"),)


async def diagnose(folder: Path, server: str | Json, **sections: Any) -> Report:
    """What ``doctor notes`` finds with this configuration."""
    settings = load(write_config(folder, {"notes": server}, **sections), environ=os.environ)
    return await examine(settings, settings.servers["notes"])


async def refusal(folder: Path, server: str | Json, **sections: Any) -> str:
    """What a request through the running proxy is refused with."""
    async with running_proxy(folder, {"notes": server}, **UNHELD, **sections) as proxy, proxy.client("notes") as client:
        answer = await client.post("tools/list")
        assert "/connect/" not in str(answer.message)
        return str(answer.error["message"])


def refused(report: Report) -> list[str]:
    return [step.says for step in report.steps if step.verdict == "refused"]


def untouched(issuer: FakeAuthorizationServer) -> bool:
    """Whether nothing but documents was asked for."""
    return {(request.method, request.endpoint) for request in issuer.requests} <= {("GET", "metadata")}


async def test_a_valid_server_is_ready_and_its_configuration_works(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, scopes=("read",))
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, refused(report), report.config_complete) == (Outcome.READY, [], True)
    assert {step.verdict for step in report.steps} == {"ok"}
    assert report.preview is not None
    assert (report.preview.registration, report.preview.scopes) == ("dynamic", ("read",))
    assert untouched(issuer)
    assert [call.rpc_method for call in upstream.calls()] == ["initialize"]
    assert [file.name for file in tmp_path.iterdir()] == ["mcp-auth-proxy.yaml"]
    assert report.config is not None
    proposed = yaml.safe_load(report.config)["servers"]
    async with running_proxy(tmp_path, proposed, **UNHELD) as proxy, proxy.client("notes") as client:
        await consent(link_in((await client.call("echo", text="x")).message))
        assert (await client.call("echo", text="in")).text == "in"


@pytest.mark.parametrize(
    ("issuer_knobs", "server_knobs", "rule"),
    [
        pytest.param({"metadata_changes": {"issuer": "https://other.example"}}, {}, "RFC 8414 §3.3", id="issuer"),
        pytest.param({"metadata_changes": {"token_endpoint": ABSENT}}, {}, "RFC 8414 §2", id="no token endpoint"),
        pytest.param(
            {"metadata_changes": {"authorization_endpoint": "javascript:alert(1)"}}, {}, "RFC 8414 §2", id="javascript"
        ),
        pytest.param(
            {"metadata_changes": {"authorization_endpoint": ABSENT}}, {}, "RFC 8414 §2", id="no authorization endpoint"
        ),
        pytest.param(
            {"metadata_changes": {"code_challenge_methods_supported": ABSENT}}, {}, "RFC 7636 §4.2", id="no PKCE"
        ),
        pytest.param({"registration": False}, {}, "client_id", id="no registration"),
        pytest.param({"serves_metadata": False}, {}, "RFC 8414 §3", id="no metadata"),
        pytest.param(
            {"answers": {"metadata": FakeResponse.redirect("http://10.0.0.1/")}}, {}, "redirect", id="redirect"
        ),
        pytest.param({"answers": {"metadata": FakeResponse(headers=JSON, body=b"{")}}, {}, "not JSON", id="not JSON"),
        pytest.param(
            {},
            {"metadata_changes": {"resource": "https://other.example/mcp"}},
            "check the server's url (RFC 9728 §3.3)",
            id="resource",
        ),
        pytest.param({}, {"metadata_changes": {"authorization_servers": []}}, "RFC 9728 §2", id="no issuer"),
        pytest.param(
            {}, {"metadata_changes": {"authorization_servers": ["https://10.0.0.1"]}}, "allow_private", id="private"
        ),
        pytest.param(
            {}, {"metadata_answer": FakeResponse(headers=JSON, body=b"[]")}, "RFC 9728 §3.2", id="not an object"
        ),
    ],
)
async def test_what_the_proxy_refuses_is_refused_in_the_same_words(
    servers: Servers, tmp_path: Path, issuer_knobs: Json, server_knobs: Json, rule: str
) -> None:
    issuer = await servers.authorization_server(**issuer_knobs)
    upstream = await servers.mcp_server(issuer, **server_knobs)
    report = await diagnose(tmp_path, upstream.url)
    assert untouched(issuer)
    assert report.outcome is Outcome.REFUSED
    said = await refusal(tmp_path, upstream.url)
    first = refused(report)[0]
    assert rule in first
    assert first.split(" with the redirect URI ")[0] in said


async def test_an_unavailable_metadata_server_is_reported_as_by_the_proxy(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(outage=FakeResponse.html(status=503))
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, report.config) == (Outcome.REFUSED, None)
    assert refused(report)[0] in await refusal(tmp_path, upstream.url)


async def test_an_unreachable_server_is_reported_as_by_the_proxy(tmp_path: Path) -> None:
    report = await diagnose(tmp_path, "http://127.0.0.1:9/mcp")
    assert (report.outcome, report.config, report.preview) == (Outcome.REFUSED, None, None)
    assert refused(report) == [await refusal(tmp_path, "http://127.0.0.1:9/mcp")]


@pytest.mark.parametrize("options", [{}, {"modern": False}, {"sessions_on": True}, {"answer_as": "sse"}])
async def test_a_server_without_protection_needs_no_authorization(
    servers: Servers, tmp_path: Path, options: Json
) -> None:
    upstream = await servers.mcp_server(protected=False, metadata_at=set(), **options)
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, report.preview, report.config_complete) == (Outcome.OPEN, None, True)
    assert [call.rpc_method for call in upstream.calls("POST")] == ["initialize", "tools/list"]
    assert upstream.sessions == {}


async def test_a_server_of_2026_only_is_probed_with_that_revision(servers: Servers, tmp_path: Path) -> None:
    def modern_only(received: RecordedRequest) -> FakeResponse | None:
        old = received.method == "POST" and received.header("mcp-protocol-version") != MODERN
        return (
            FakeResponse.json({"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no"}}, 400)
            if old
            else None
        )

    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, intercept=modern_only)
    report = await diagnose(tmp_path, upstream.url)
    assert report.outcome is Outcome.READY
    assert [call.rpc_method for call in upstream.calls()] == ["initialize", "server/discover"]


@pytest.mark.parametrize("method", ["tools/list", "tools/call"])
async def test_a_server_that_protects_only_some_methods_is_noticed(
    servers: Servers, tmp_path: Path, method: str
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    opened = FakeMcpServer(upstream.origin, [], protected=False)

    def let_through(received: RecordedRequest) -> FakeResponse | None:
        is_open = received.path == upstream.path and received.rpc_method in {"initialize", "tools/list"} - {method}
        return opened._speak(received) if is_open else None

    upstream.intercept = let_through
    report = await diagnose(tmp_path, upstream.url)
    assert report.outcome is Outcome.READY
    assert report.preview is not None
    assert report.preview.issuer == issuer.issuer
    assert untouched(issuer)


async def test_a_plain_403_is_not_a_demand_for_authorization(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(intercept=lambda received: FakeResponse(status=403))
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, report.config) == (Outcome.REFUSED, None)
    assert any(step.clause == "RFC 6750 §3.1" for step in report.steps)


@pytest.mark.parametrize("documented", [True, False])
async def test_a_server_of_2025_03_26_is_its_own_authorization_server(
    servers: Servers, tmp_path: Path, documented: bool
) -> None:
    def of_old(received: RecordedRequest) -> FakeResponse | None:
        if received.path == "/.well-known/oauth-authorization-server" and documented:
            ends = {name: f"{upstream.origin}/{name[:5]}" for name in ("authorization_endpoint", "token_endpoint")}
            pkce = {"code_challenge_methods_supported": ["S256"], "registration_endpoint": f"{upstream.origin}/join"}
            return FakeResponse.json({"issuer": upstream.origin, **ends, **pkce})
        return FakeResponse(status=405) if received.path == "/register" else None

    upstream = await servers.mcp_server(metadata_at=set(), challenges={401: []}, intercept=of_old)
    report = await diagnose(tmp_path, upstream.url)
    assert report.outcome is Outcome.READY
    assert report.preview is not None
    assert report.preview.issuer == upstream.origin
    assert any(step.clause == "MCP 2025-03-26" for step in report.steps)
    assert {request.method for request in upstream.requests if request.path != "/mcp"} <= {"GET", "OPTIONS"}


async def test_a_401_without_any_oauth_behind_it_is_not_taken_for_an_old_server(
    servers: Servers, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(metadata_at=set(), challenges={401: ["Basic realm=x"]})
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, report.config) == (Outcome.REFUSED, None)
    assert "API key" in refused(report)[0]


@pytest.mark.parametrize("status", [401, 404])
@pytest.mark.parametrize("challenges", [['Basic realm="x"'], ["Digest nonce=x", "Basic"], []])
async def test_a_server_without_any_oauth_is_refused_in_the_words_of_the_proxy(
    servers: Servers, tmp_path: Path, status: int, challenges: list[str]
) -> None:
    upstream = await servers.mcp_server(metadata_at=set(), challenges={401: challenges})
    elsewhere = FakeResponse(status=status, headers=tuple(("www-authenticate", value) for value in challenges))
    upstream.intercept = lambda received: elsewhere if received.path != upstream.path else None
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, report.preview, report.config) == (Outcome.REFUSED, None, None)
    assert "POST" not in {request.method for request in upstream.requests if request.path != upstream.path}
    asked = ", ".join(value.partition(" ")[0] for value in challenges)
    assert (f"asks for {asked}, which the proxy does not support" in report.steps[0].says) == bool(challenges)
    said = await refusal(tmp_path, upstream.url)
    assert refused(report)[0].startswith(said.removeprefix("Server notes can't be authorized: "))
    assert (f"The server asks for {asked}, which" in said) == bool(challenges)


@pytest.mark.parametrize(
    ("oauth", "challenges", "answer"),
    [
        ({}, ["Bearer"], FakeResponse(status=401)),
        ({"client_id": "by-hand"}, ["Basic"], FakeResponse(status=401)),
        ({}, ["Basic"], FakeResponse.json({"error": "invalid_client"}, 401)),
    ],
    ids=["asks for a token", "registered by hand", "an error of OAuth"],
)
async def test_a_401_that_may_be_from_oauth_is_not_a_refusal(
    servers: Servers, tmp_path: Path, oauth: Json, challenges: list[str], answer: FakeResponse
) -> None:
    upstream = await servers.mcp_server(metadata_at=set(), challenges={401: challenges})
    upstream.intercept = lambda received: answer if received.path in ("/register", "/token") else None
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": oauth})
    assert (report.outcome, refused(report)) == (Outcome.READY, [])


async def test_the_json_has_the_members_that_programs_rely_on(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    document = json.loads(json.dumps(as_document(await diagnose(tmp_path, upstream.url))))
    assert list(document) == MEMBERS
    assert (document["format"], document["verdict"]) == (1, "ready")
    assert all(list(step) == STEP_MEMBERS for step in document["steps"])
    assert document["steps"][0]["request"] == {"method": "POST", "url": upstream.url, "rpc": "initialize"}
    assert list(document["steps"][0]["answer"]) == ["status", "text"]
    assert list(document["plan"])[: len(PLAN_MEMBERS)] == PLAN_MEMBERS
    names = [step["step"] for step in document["steps"]]
    assert names == list(dict.fromkeys(names)), "each once, for a server without a detour"


async def test_text_from_a_server_can_not_control_the_terminal(servers: Servers, tmp_path: Path) -> None:
    nasty = "\x1b]0;owned\x07\x1b[2J"
    issuer = await servers.authorization_server(answers={"metadata": FakeResponse.html(nasty, 404)})
    upstream = await servers.mcp_server(issuer, challenges={401: [f'Bearer realm="a", nasty="{chr(0x9B)}2J"']})
    report = await diagnose(tmp_path, upstream.url)
    assert not [
        c for c in str(as_document(report)) + "".join(as_lines(report)).replace("\x1b[", "") if c in "\x1b\x07\x9b"
    ]
    assert "owned" in str(as_document(report))


async def test_a_relative_resource_metadata_is_noted_and_ignored(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(await servers.authorization_server())
    upstream.challenges = {401: ['Bearer resource_metadata="/elsewhere"']}
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, refused(report)) == (Outcome.READY, [])
    (noted,) = [step for step in report.steps if step.verdict == "note"]
    assert (noted.step, noted.clause) == ("protected resource metadata", "RFC 9728 §5.1")
    assert noted.request is None
    assert "not an absolute URL" in noted.says
    assert "/elsewhere" in noted.says
