"""The configuration that ``doctor`` proposes, configured servers, and the command itself."""

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import ABSENT, FakeResponse
from fakes.proxy import Json, Sections, link_in, proxy_process, run_command, running_proxy, write_config
from mcp_auth_proxy.cli.doctor.examine import examine
from mcp_auth_proxy.cli.doctor.report import Outcome, Report
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Address

UNHELD: Sections = {"authorization": {"wait": "0s"}}


async def diagnose(folder: Path, server: str | Json, **sections: Any) -> Report:
    """What ``doctor notes`` finds with this configuration."""
    settings = load(write_config(folder, {"notes": server}, **sections), environ=os.environ)
    return await examine(settings, settings.servers["notes"])


def proposed(report: Report, folder: Path) -> Json:
    """The proposed servers, after the file was seen to load as it is printed."""
    assert report.config is not None
    printed = folder / "printed.yaml"
    printed.write_text(report.config)
    load(printed, environ=os.environ)
    printed.unlink()
    servers: Json = yaml.safe_load(report.config)["servers"]
    return servers


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


async def connects(folder: Path, servers: Json, *, port: int = 0) -> bool:
    """Whether the proxy, so configured, gets a user through consent and a call through the server."""
    listen = Address("127.0.0.1", port)
    async with running_proxy(folder, servers, listen=listen, **UNHELD) as proxy, proxy.client("notes") as client:
        page = await consent(link_in((await client.call("echo", text="x")).message))
        return page.status_code == 200 and (await client.call("echo", text="in")).text == "in"


async def test_without_registration_the_configuration_names_the_client_id(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(
        registration=False, metadata_changes={"code_challenge_methods_supported": ABSENT}
    )
    upstream = await servers.mcp_server(issuer)
    port = free_port()
    report = await diagnose(tmp_path, upstream.url, listen=f"127.0.0.1:{port}")
    assert (report.outcome, report.config_complete) == (Outcome.REFUSED, False)
    assert [change.key for change in report.changes] == [
        "servers.notes.oauth.allow_missing_pkce",
        "servers.notes.oauth.client_id",
    ]
    config = proposed(report, tmp_path)
    redirect = f"http://127.0.0.1:{port}/oauth/callback"
    assert report.config is not None
    assert redirect in report.config
    assert "client_secret: env:NOTES_CLIENT_SECRET" in report.config
    issuer.add_client(client_id="by-hand", auth="none", redirect_uris=(redirect,))
    config["notes"]["oauth"]["client_id"] = "by-hand"
    assert await connects(tmp_path, config, port=port)
    assert (await diagnose(tmp_path, config["notes"], listen=f"127.0.0.1:{port}")).outcome is Outcome.READY


async def test_a_missing_pkce_alone_leaves_nothing_to_fill_in(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(metadata_changes={"code_challenge_methods_supported": ["plain"]})
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, upstream.url)
    assert (report.outcome, report.config_complete) == (Outcome.REFUSED, True)
    assert await connects(tmp_path, proposed(report, tmp_path))


@pytest.mark.parametrize("listed", [["none"], ["private_key_jwt", "client_secret_post"]])
async def test_a_client_auth_that_is_not_listed_is_replaced_by_a_listed_one(
    servers: Servers, tmp_path: Path, listed: list[str]
) -> None:
    issuer = await servers.authorization_server(metadata_changes={"token_endpoint_auth_methods_supported": listed})
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": {"client_auth": "client_secret_basic"}})
    assert (report.outcome, report.config_complete) == (Outcome.REFUSED, True)
    (stopped,) = [step for step in report.steps if step.verdict == "refused"]
    assert (stopped.step, stopped.clause) == ("client authentication", "RFC 8414 §2")
    (change,) = report.changes
    assert (change.key, change.value) == ("servers.notes.oauth.client_auth", listed[-1])
    assert "without this key the proxy chooses" in change.why
    config = proposed(report, tmp_path)
    assert await connects(tmp_path, config)
    assert (await diagnose(tmp_path, config["notes"])).outcome is Outcome.READY


@pytest.mark.parametrize(
    "changes",
    [
        {"token_endpoint_auth_methods_supported": ["private_key_jwt"]},
        {"token_endpoint_auth_methods_supported": ["none"], "authorization_endpoint": ABSENT},
    ],
    ids=["none to register for", "another reason"],
)
async def test_another_client_auth_is_not_proposed_if_it_would_not_help(
    servers: Servers, tmp_path: Path, changes: Json
) -> None:
    issuer = await servers.authorization_server(metadata_changes=changes)
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": {"client_auth": "client_secret_basic"}})
    assert (report.outcome, report.config, report.changes) == (Outcome.REFUSED, None, ())
    assert len([step for step in report.steps if step.verdict == "refused"]) == 1


async def test_a_client_auth_waits_for_the_secret_of_a_client_that_is_yet_to_be_registered(
    servers: Servers, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(await servers.authorization_server(registration=False))
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": {"client_auth": "client_secret_post"}})
    assert (report.outcome, report.config_complete) == (Outcome.REFUSED, False)
    assert proposed(report, tmp_path)["notes"]["oauth"] == {"client_id": "YOUR_CLIENT_ID"}
    assert report.config is not None
    assert "the secret of that client: servers.notes.oauth.client_auth: client_secret_post" in report.config


async def test_a_sign_in_page_on_another_site_leads_to_the_pin_which_is_left_to_the_operator(  # T77
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server()
    sign_in = f"{issuer.issuer}/authorize".replace("127.0.0.1", "localhost")
    promise = {"authorization_response_iss_parameter_supported": ABSENT}
    issuer.metadata_changes = {"authorization_endpoint": sign_in, **promise}
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, upstream.url)
    assert report.outcome is Outcome.REFUSED
    (stopped,) = [step for step in report.steps if step.verdict == "refused"]
    assert (stopped.step, stopped.clause) == ("issuer", "RFC 9700 §4.4")
    (change,) = report.changes
    assert (change.key, change.value, change.applied) == ("servers.notes.oauth.issuer", issuer.issuer, False)
    assert report.config is not None
    assert f"servers.notes.oauth.issuer: {issuer.issuer}" in report.config
    config = proposed(report, tmp_path)
    assert config == {"notes": {"url": upstream.url}}
    config["notes"]["oauth"] = {"issuer": issuer.issuer}
    assert (await diagnose(tmp_path, config["notes"])).outcome is Outcome.READY
    assert await connects(tmp_path, config)


async def test_a_private_address_is_named_but_neither_allowed_nor_asked(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer, metadata_changes={"authorization_servers": ["https://169.254.169.254"]})
    report = await diagnose(tmp_path, upstream.url)  # T1
    assert (report.outcome, report.preview, report.config_complete) == (Outcome.REFUSED, None, False)
    assert proposed(report, tmp_path) == {"notes": {"url": upstream.url}}
    assert report.config is not None
    assert "authorization.allow_private: [169.254.169.254]" in report.config
    assert "allow_private" not in yaml.safe_load(report.config).get("authorization", {})


async def test_the_keys_of_a_configured_server_apply_and_its_secrets_stay(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "canary-secret", "scopes": ["read"]}
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": oauth})
    assert report.outcome is Outcome.READY
    assert report.preview is not None
    assert (report.preview.grant, report.preview.scopes) == ("client_credentials", ("read",))
    assert (report.preview.client_id, report.preview.client_auth) == ("agent", "client_secret_basic")
    assert "canary-secret" not in repr(report)
    assert report.config is not None
    assert yaml.safe_load(report.config)["servers"]["notes"]["oauth"] == {
        **oauth,
        "client_secret": "env:NOTES_CLIENT_SECRET",
    }
    assert issuer.token_requests() == 0


@pytest.mark.parametrize(
    ("oauth", "words"),
    [
        ({"issuer": "https://other.example"}, "pins https://other.example"),
        ({"grant": "device_code"}, "device_authorization_endpoint"),
        (
            {
                "grant": "jwt_bearer",
                "assertion": "file:gone.jwt",
                "metadata": {"token_endpoint": "https://as.example/t"},
            },
            "gone.jwt can't be read",
        ),
    ],
)
async def test_what_a_configured_grant_lacks_is_refused(
    servers: Servers, tmp_path: Path, oauth: Json, words: str
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": oauth})
    assert report.outcome is Outcome.REFUSED
    assert words in report.summary
    assert not report.config_complete
    assert (issuer.token_requests(), issuer.registrations) == (0, 0)


async def test_static_metadata_replaces_discovery(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server()
    metadata = {
        "authorization_endpoint": "https://as.example/authorize",
        "token_endpoint": "https://as.example/token",
        "code_challenge_methods_supported": ["S256"],
    }
    report = await diagnose(tmp_path, {"url": upstream.url, "oauth": {"client_id": "x", "metadata": metadata}})
    assert (report.outcome, report.config_complete) == (Outcome.READY, True)
    assert proposed(report, tmp_path)["notes"]["oauth"]["metadata"] == metadata
    assert upstream.metadata_requests == []


async def test_a_client_metadata_document_needs_no_registration(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server(client_documents=True, registration=False)
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, upstream.url, public_url="https://proxy.example.com")
    assert report.outcome is Outcome.READY
    assert report.preview is not None
    assert report.preview.client_id == "https://proxy.example.com/oauth/client-metadata.json"
    assert report.config is not None
    assert yaml.safe_load(report.config)["public_url"] == "https://proxy.example.com"


async def test_a_registration_in_the_store_counts_and_the_store_stays_as_it_is(
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    port = free_port()
    assert await connects(tmp_path, {"notes": upstream.url}, port=port)
    issuer.registration = False
    before = digests(tmp_path)
    report = await diagnose(tmp_path, upstream.url, listen=f"127.0.0.1:{port}")
    assert (report.outcome, report.config_complete) == (Outcome.READY, True)
    assert report.preview is not None
    assert report.preview.client_id in issuer.ledger.clients
    after = digests(tmp_path)
    assert {name: after[name] for name in after if name != "mcp-auth-proxy.yaml"} == {
        name: before[name] for name in before if name != "mcp-auth-proxy.yaml"
    }


async def test_a_url_with_a_query_is_to_be_completed(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, f"{upstream.url}?api_key=canary-4711")
    assert (report.outcome, report.config_complete) == (Outcome.READY, False)
    assert proposed(report, tmp_path)["notes"]["url"] == f"{upstream.url}?api_key=****"
    assert report.config is not None
    assert "# the values of its query are not shown here" in report.config


async def test_a_client_that_belongs_to_another_issuer_is_refused_as_by_the_proxy(
    servers: Servers, tmp_path: Path
) -> None:
    first, second = await servers.authorization_server(), await servers.authorization_server()
    upstream = await servers.mcp_server(first)
    server = {"url": upstream.url, "oauth": {"client_id": "by-hand"}}
    async with running_proxy(tmp_path, {"notes": server}, **UNHELD) as proxy, proxy.client("notes") as client:
        link_in((await client.call("echo", text="x")).message)
    upstream.authorization_servers = [second]  # T11
    report = await diagnose(tmp_path, server)
    assert report.outcome is Outcome.REFUSED
    assert report.config is not None
    assert f"servers.notes.oauth.issuer: {second.issuer}" in report.config
    assert "issuer" not in proposed(report, tmp_path)["notes"]["oauth"]


async def test_a_store_that_can_not_be_opened_is_reported(servers: Servers, tmp_path: Path) -> None:
    (tmp_path / "proxy.db").write_bytes(b"not a database")
    (tmp_path / "proxy.key").write_text("A" * 43 + "=")
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    report = await diagnose(tmp_path, upstream.url)
    assert (report.steps[0].step, report.steps[0].verdict) == ("store", "refused")
    assert report.outcome is Outcome.REFUSED
    assert (tmp_path / "proxy.db").read_bytes() == b"not a database"


async def test_the_command_works_by_name_while_serve_runs(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    config = write_config(tmp_path, {"notes": upstream.url, "other": "https://other.example/mcp"})
    async with proxy_process(config):
        code, out, err = await run_command("doctor", "notes", "--config", str(config))
    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "The proxy can authorize notes" in out
    assert f"url: {upstream.url}" in out
    assert "other.example" not in out


async def test_the_command_by_url_prints_json_and_exits_with_1_if_it_would_fail(
    servers: Servers, tmp_path: Path
) -> None:
    env = {"XDG_DATA_HOME": str(tmp_path), "MCP_AUTH_PROXY_CONFIG": None}
    upstream = await servers.mcp_server(metadata_at=set(), challenges={401: []})
    code, out, err = await run_command("doctor", upstream.url, "--json", env=env, cwd=tmp_path)
    assert (code, err, json.loads(out)["verdict"]) == (1, "", "refused")
    upstream.protected = False
    code, out, err = await run_command("doctor", upstream.url, "--json", env=env, cwd=tmp_path)
    assert (code, err, json.loads(out)["verdict"]) == (0, "", "open")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "SERVER"),
        (["nobody"], "There is no server 'nobody'"),
        (["https://a.example/mcp", "--config", "mcp-auth-proxy.yaml"], "not both"),
        (["http://a.example/mcp"], "allow_http"),
        (["notes", "--config", "gone.yaml"], "gone.yaml"),
    ],
)
async def test_wrong_usage_exits_with_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    write_config(tmp_path, {"notes": "https://a.example/mcp"})
    code, out, err = await run_command("doctor", *arguments, env={"MCP_AUTH_PROXY_CONFIG": None}, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert words in err


async def test_a_redirect_on_the_same_origin_is_followed_as_the_proxy_does(servers: Servers, tmp_path: Path) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    moved = f"{upstream.origin}/old"
    upstream.intercept = lambda r: FakeResponse.redirect("/mcp", 307) if r.path == "/old" else None
    upstream.metadata_changes = {"resource": upstream.origin}
    assert (await diagnose(tmp_path, moved)).outcome is Outcome.READY
    upstream.intercept = lambda r: FakeResponse.redirect("https://b.example/mcp", 307) if r.path == "/old" else None
    report = await diagnose(tmp_path, moved)
    assert (report.outcome, report.config) == (Outcome.REFUSED, None)
    assert "servers.notes.url" in report.summary
