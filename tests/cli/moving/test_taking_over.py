"""Logins of mcp-remote and mcp-use are found by the URLs of the servers; their folders as recorded from real runs."""

import asyncio
import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from fakes.authorization_server import FakeAuthorizationServer
from fakes.fixtures import Servers
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import proxy_process, run_command, running_proxy, write_config
from mcp_auth_proxy.cli.demo_servers.ledger import Client
from mcp_auth_proxy.cli.moving import mcp_remote, mcp_use
from mcp_auth_proxy.config.settings import OAuthSettings, ServerSettings
from mcp_auth_proxy.store import plain_files

REDIRECT = "http://localhost:16850/oauth/callback"


def written(path: Path, values: dict[str, Any], *, at: float | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2))
    if at is not None:
        os.utime(path, (at, at))


class Elsewhere:
    """Another program that has signed in: its client and its tokens are known to the authorization server."""

    def __init__(self, issuer: FakeAuthorizationServer, resource: str) -> None:
        self.issuer = issuer
        self.client = Client(id="their-client", redirect_uris=(REDIRECT,))
        issuer.ledger.clients[self.client.id] = self.client
        verifier = "v" * 43
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).decode().rstrip("=")
        code = issuer.ledger.authorize(
            self.client, redirect_uri=REDIRECT, challenge=challenge, resource=resource, scopes=("notes:read",)
        )
        issued = issuer.ledger.redeem(
            self.client, code=code, redirect_uri=REDIRECT, verifier=verifier, resource=resource
        )
        self.tokens: dict[str, Any] = {
            "access_token": issued.access_token,
            "token_type": "Bearer",
            "expires_in": issued.expires_in,
            "scope": " ".join(issued.scopes),
            "refresh_token": issued.refresh_token,
        }
        self.registration: dict[str, Any] = {
            "redirect_uris": [REDIRECT],
            "token_endpoint_auth_method": "none",
            "client_id": self.client.id,
            "client_id_issued_at": 1795327361,
        }

    def keep(self, folder: Path, url: str, *, issuer: str | None = None, at: float | None = None) -> None:
        """Write the files of mcp-remote; the issuer as its later versions note it."""
        noted = {} if issuer is None else {"issuer": issuer, "expires_at": 4_000_000_000_000}
        name = hashlib.md5(url.encode()).hexdigest()
        written(folder / f"{name}_client_info.json", {**self.registration, **noted})
        written(folder / f"{name}_tokens.json", {**self.tokens, **noted}, at=at)
        (folder / f"{name}_code_verifier.txt").write_text("verifier")


@pytest.fixture
async def elsewhere(mcp_server: FakeMcpServer, authorization_server: FakeAuthorizationServer) -> Elsewhere:
    return Elsewhere(authorization_server, mcp_server.url)


async def import_from(program: str, folder: Path, config: Path, *words: str, **env: str) -> tuple[int, str, str]:
    return await run_command("import", "--from", program, str(folder), "--config", str(config), *words, env=env)


async def test_the_newest_of_all_versions_is_taken(
    elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    issuer, folder = elsewhere.issuer, tmp_path / "auth"
    elsewhere.keep(folder / "mcp-remote-v1", mcp_server.url, issuer=issuer.issuer, at=2000.0)
    elsewhere.tokens |= {"access_token": "older", "refresh_token": "older"}
    elsewhere.keep(folder / "mcp-remote-0.1.37", mcp_server.url, at=1000.0)
    config = write_config(tmp_path, {"notes": mcp_server.url}, authorization={"wait": "0s"})
    code, out, err = await import_from("mcp-remote", folder, config, "--json")
    assert code == 0, err
    (row,) = json.loads(out)["grants"]
    assert (row["server"], row["issuer"], row["outcome"]) == ("notes", issuer.issuer, "imported")
    async with running_proxy(tmp_path, {"notes": mcp_server.url}) as proxy, proxy.client("notes") as client:
        await client.initialize()
        issuer.end_access_tokens()
        assert (await client.call("echo", text="x")).text == "x"
    assert (issuer.refreshes, issuer.registrations, issuer.authorizations) == (1, 0, 0)
    assert issuer.seen("token")[0].form["client_id"] == elsewhere.client.id


async def test_a_login_of_another_authorization_server_is_not_taken(
    elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    elsewhere.keep(tmp_path / "mcp-remote-v1", mcp_server.url, issuer="https://as.example")
    config = write_config(tmp_path, {"notes": mcp_server.url})
    code, out, err = await import_from("mcp-remote", tmp_path, config)
    assert (code, out) == (1, "")
    assert "The login is from https://as.example" in err and "1 of 1 logins could not be imported" in err
    assert elsewhere.issuer.token_requests() == 0
    assert not (tmp_path / "proxy.db").exists()


async def test_a_running_proxy_uses_what_was_taken_over(
    elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    elsewhere.keep(tmp_path / "mcp-remote-0.1.9", mcp_server.url)
    config = write_config(tmp_path, {"notes": mcp_server.url}, authorization={"wait": "20s"})
    async with proxy_process(config) as proxy, proxy.client("notes") as client:
        held = asyncio.create_task(client.initialize())
        await proxy.next_link()
        code, _, err = await import_from("mcp-remote", tmp_path, config)
        assert code == 0, err
        await held
        assert (await client.call("echo", text="x")).text == "x"
    assert elsewhere.issuer.authorizations == 0


async def test_a_server_that_is_out_of_reach_and_a_client_that_is_missing_are_said(
    elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    folder = tmp_path / "mcp-remote-v1"
    elsewhere.keep(folder, mcp_server.url)
    (folder / f"{hashlib.md5(mcp_server.url.encode()).hexdigest()}_client_info.json").unlink()
    elsewhere.keep(folder, "http://127.0.0.1:9/mcp")
    elsewhere.keep(folder, "https://unknown.example/mcp")
    (folder / f"{'0' * 32}_tokens.json").write_text("{ no json")
    servers = {"notes": mcp_server.url, "gone": "http://127.0.0.1:9/mcp"}
    code, out, err = await import_from("mcp-remote", tmp_path, write_config(tmp_path, servers))
    assert (code, out) == (1, "")
    assert "Put it in servers.notes.oauth.client_id" in err
    assert "gone: not imported: " in err
    assert "2 logins of mcp-remote" in err and "belong to no configured server" in err


async def test_logins_of_mcp_use_are_taken(elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path) -> None:
    netloc = mcp_server.url.removeprefix("http://").removesuffix("/mcp")
    folder = tmp_path / "tokens"
    written(folder / f"{netloc}__mcp.json", {**elsewhere.tokens, "expires_at": 4_000_000_000.0})
    written(folder / "registrations" / f"{netloc}__mcp_registration.json", elsewhere.registration)
    config = write_config(tmp_path, {"notes": mcp_server.url})
    code, out, err = await import_from("mcp-use", folder, config)
    assert code == 0, err
    assert "imported" in out and "The files of mcp-use stay" in err
    async with running_proxy(tmp_path, {"notes": mcp_server.url}) as proxy, proxy.client("notes") as client:
        await client.initialize()
        elsewhere.issuer.end_access_tokens()
        assert (await client.call("echo", text="x")).text == "x"
    assert (elsewhere.issuer.refreshes, elsewhere.issuer.registrations) == (1, 0)


HUGE = 10**400


@pytest.mark.parametrize(
    "values",
    [
        {"access_token": "a", "expires_in": HUGE, "expires_at": HUGE},
        {"access_token": "a", "expires_in": float("nan"), "expires_at": float("-inf")},
        {"access_token": "a", "expires_in": True, "expires_at": []},
        {"access_token": "a\r\nX-Other: b"},
        {"access_token": "a", "refresh_token": "\ud800", "scope": "\x00"},
        {"access_token": {"a": 1}},
    ],
)
def test_values_that_no_token_response_has_do_no_harm(tmp_path: Path, values: dict[str, Any]) -> None:  # T91
    server = ServerSettings(name="a", url="https://a.example/mcp")
    name = hashlib.md5(server.url.encode()).hexdigest()
    folder = tmp_path / "mcp-remote-v1"
    written(folder / f"{name}_tokens.json", values)
    written(folder / f"{name}_client_info.json", {"client_id": "c", "client_secret_expires_at": HUGE})
    written(tmp_path / "a.example__mcp.json", values)
    for found in (mcp_remote.find(tmp_path, server, None), mcp_use.find(tmp_path, server)):
        if values["access_token"] != "a":
            assert found is None
            continue
        assert found is not None
        assert found.tokens.expires_at is None or found.tokens.expires_at < time.time() + 2
        assert found.tokens.refresh_token is None


@pytest.mark.parametrize("kind", ["pipe", "device", "large", "folder"])
def test_what_is_no_file_of_tokens_is_not_read(tmp_path: Path, kind: str) -> None:  # T91
    server = ServerSettings(name="a", url="https://a.example/mcp")
    path = tmp_path / "mcp-remote-v1" / f"{hashlib.md5(server.url.encode()).hexdigest()}_tokens.json"
    path.parent.mkdir()
    match kind:
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "large":
            path.write_text(json.dumps({"access_token": "a", "pad": "x" * 2**20}))
        case _:
            path.mkdir()
    assert mcp_remote.find(tmp_path, server, None) is None


@pytest.mark.parametrize("program", ["mcp-remote", "mcp-use"])
async def test_one_login_is_not_taken_for_two_servers(  # T91
    elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path, program: str
) -> None:
    """Both would renew it, and a server with reuse detection would end it."""
    folder = tmp_path / "logins"
    elsewhere.keep(folder / "mcp-remote-v1", mcp_server.url, issuer=elsewhere.issuer.issuer)
    written(plain_files.mcp_use_tokens(folder, mcp_server.url), elsewhere.tokens)
    written(plain_files.mcp_use_registration(folder, mcp_server.url), elsewhere.registration)
    config = write_config(tmp_path, {"notes": mcp_server.url, "other": mcp_server.url})
    code, out, err = await import_from(program, folder, config)
    assert code == 1
    assert "notes, since" in out
    assert "other" not in out
    assert "other: not imported: notes has taken the same login." in err
    assert "1 of 2 logins could not be imported" in err


@pytest.mark.parametrize(
    ("program", "files"), [("mcp-remote", ".mcp-auth/mcp-remote-v1"), ("mcp-use", ".mcp_use/tokens")]
)
async def test_without_a_folder_that_of_the_program_is_meant(
    elsewhere: Elsewhere, mcp_server: FakeMcpServer, tmp_path: Path, program: str, files: str
) -> None:
    folder = tmp_path / files
    elsewhere.keep(folder, mcp_server.url)
    written(plain_files.mcp_use_tokens(folder, mcp_server.url), elsewhere.tokens)
    written(plain_files.mcp_use_registration(folder, mcp_server.url), elsewhere.registration)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    config = write_config(tmp_path, {"notes": mcp_server.url})
    words = ("import", "--from", program, "--config", str(config))
    code, out, err = await run_command(*words, env={"HOME": str(tmp_path), "MCP_REMOTE_CONFIG_DIR": None})
    assert code == 0, err
    assert "notes, since" in out
    assert f"The files of {program} stay, but their refresh tokens are the proxy's from now on" in err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_when_a_token_ends_is_read_as_each_version_of_mcp_remote_notes_it(tmp_path: Path) -> None:
    server = ServerSettings(name="notes", url=URL)
    name = f"{hashlib.md5(URL.encode()).hexdigest()}_tokens.json"
    noted = {"access_token": "a", "expires_in": 60}
    # 0.15 in milliseconds; 0.1 not at all, so the lifetime counts from when the file was written.
    written(tmp_path / "mcp-remote-v1" / name, {**noted, "expires_at": 1_800_000_000_500}, at=2000.0)
    written(tmp_path / "mcp-remote-0.1.37" / name, noted, at=1000.0)
    ends = []
    for version in ("v1", "0.1.37"):
        found = mcp_remote.find(tmp_path / f"mcp-remote-{version}", server, None)
        assert found is not None
        ends.append(found.tokens.expires_at)
    assert ends == [1_800_000_000.5, 1060.0]


async def test_a_folder_without_a_login_is_said(servers: Servers, tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": "https://notes.example/mcp"})
    code, _, err = await import_from("mcp-remote", tmp_path / "nowhere", config)
    assert code == 1 and "There is no folder" in err
    words = ("import", "--from", "mcp-remote", "--config", str(config))
    code, _, err = await run_command(*words, env={"MCP_REMOTE_CONFIG_DIR": str(tmp_path)})
    assert code == 1 and f"{tmp_path} has no login of mcp-remote for a configured server" in err


URL = "https://notes.example/mcp"


@pytest.mark.parametrize(
    ("oauth", "headers", "text"),
    [
        (OAuthSettings(), None, URL),
        (OAuthSettings(), None, f"{URL}/"),
        (OAuthSettings(), None, f"{URL}|{URL}"),
        (OAuthSettings(resource="https://notes.example"), None, f"{URL}|https://notes.example"),
        (OAuthSettings(), {"X-B": "2", "X-A": "1"}, URL + '|{"X-A":"1","X-B":"2"}'),
        (OAuthSettings(authorization_params={"prompt": "é"}), {"X-A": "1"}, URL + '|{"prompt":"é"}|{"X-A":"1"}'),
        (
            OAuthSettings(client_metadata_url="https://c.example/c"), {"X-A": "1"},
            URL + '|{"X-A":"1"}|https://c.example/c',
        ),
    ],
)  # fmt: skip
def test_the_names_are_those_of_mcp_remote(oauth: OAuthSettings, headers: dict[str, str] | None, text: str) -> None:
    server = ServerSettings(name="notes", url=URL, oauth=oauth)
    assert hashlib.md5(text.encode()).hexdigest() in set(mcp_remote.hashes(server, headers))
