"""``api-keys`` and ``principals`` as a user runs them, beside a process that identifies callers."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from fakes.proxy import run_command, write_config
from identity.setup import Clock, bearer
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity import make_authenticator
from mcp_auth_proxy.models import Identity, Role
from mcp_auth_proxy.oauth.fetch import Fetcher
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.principals import Principals

PEER = "127.0.0.1"
KEY = re.compile(r"mapk_([0-9a-f]{12})_[0-9A-Za-z]{43}\n")
ISSUER = "https://idp.example.com/realm"


def config_in(folder: Path) -> Path:
    return write_config(folder, {"notes": "http://127.0.0.1:9/mcp"}, inbound={"mode": "api_key"})


async def command(folder: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Run a command; return what it prints on stdout and, without the line of the configuration, on stderr."""
    found, out, err = await run_command(*arguments, "--config", str(folder / "mcp-auth-proxy.yaml"))
    assert found == code, err
    assert "Traceback" not in err
    return out, "".join(line for line in err.splitlines(keepends=True) if not line.startswith("configuration: "))


async def listed(folder: Path, group: str) -> list[dict[str, Any]]:
    out, _ = await command(folder, group, "list", "--json")
    rows: list[dict[str, Any]] = json.loads(out)
    return rows


async def test_a_key_is_the_only_thing_on_stdout_and_is_shown_once(tmp_path: Path) -> None:
    config_in(tmp_path)
    out, err = await command(tmp_path, "api-keys", "create", "alice", "--expires", "90d")
    found = KEY.fullmatch(out)
    assert found
    assert out.strip() not in err
    shown, _ = await command(tmp_path, "api-keys", "list")
    assert found[1] in shown
    assert "alice" in shown
    assert out.strip() not in shown
    (row,) = await listed(tmp_path, "api-keys")
    assert list(row) == [
        "id", "name", "principal", "principal_id", "scopes", "created_at", "expires_at", "last_used_at"
    ]  # fmt: skip
    assert (row["id"], row["principal"], row["scopes"]) == (found[1], "alice", ["mcp", "self"])
    assert row["expires_at"] > row["created_at"]
    (principal,) = await listed(tmp_path, "principals")
    assert list(principal) == ["id", "project_id", "name", "role", "status", "identities", "created_at"]
    assert principal["id"] == row["principal_id"]
    assert principal["identities"] == [{"source": "key", "subject": found[1]}]
    assert (principal["role"], principal["status"], principal["project_id"]) == ("member", "active", "default")
    assert all(out.strip().encode() not in file.read_bytes() for file in tmp_path.iterdir())


async def test_a_running_process_heeds_keys_and_principals(tmp_path: Path) -> None:
    # T74
    settings = load(config_in(tmp_path))
    engine = await open_store(settings.store)
    callers = make_authenticator(settings, database=engine, fetcher=Fetcher(), clock=Clock())
    await callers.start()
    try:
        key, _ = await command(tmp_path, "api-keys", "create", "alice", "--role", "admin")
        caller = await callers.identify(bearer(key.strip()), PEER)
        assert (caller.principal.name, caller.principal.role) == ("alice", "admin")
        assert caller.scopes == {"mcp", "self", "admin"}
        await command(tmp_path, "api-keys", "create", "root", "--role", "admin")
        await command(tmp_path, "principals", "disable", "alice")
        with pytest.raises(CallerRefused):
            await _after_a_second(callers, key)
        await command(tmp_path, "principals", "enable", caller.principal.id)
        await callers.identify(bearer(key.strip()), PEER)
        await command(tmp_path, "api-keys", "revoke", key.split("_")[1])
        with pytest.raises(CallerRefused):
            await _after_a_second(callers, key)
    finally:
        await callers.aclose()
        await engine.close()


async def _after_a_second(callers: Any, key: str) -> None:
    await callers.directory.heed_changes()
    await callers.identify(bearer(key.strip()), PEER)


async def test_a_second_key_belongs_to_the_same_principal(tmp_path: Path) -> None:
    config_in(tmp_path)
    await command(tmp_path, "api-keys", "create", "alice")
    _, err = await command(tmp_path, "api-keys", "create", "alice", "--role", "admin", "--scopes", "mcp,admin")
    assert "alice was member, and is admin now" in err
    (principal,) = await listed(tmp_path, "principals")
    assert principal["role"] == "admin"
    assert [row["scopes"] for row in await listed(tmp_path, "api-keys")] == [["mcp", "self"], ["admin", "mcp"]]


async def test_a_principal_that_its_own_request_has_made_is_not_promoted_unasked(tmp_path: Path) -> None:
    settings = load(config_in(tmp_path))
    await command(tmp_path, "api-keys", "create", "bob")
    engine = await open_store(settings.store)
    await Principals(engine).provision(Identity(f"jwt:{ISSUER}", "1"), ["alice"], role=Role.MEMBER, now=time.time())
    await engine.close()
    promote = ("api-keys", "create", "alice", "--role", "admin")
    _, err = await command(tmp_path, *promote, code=1)
    assert "first request" in err
    assert "--change-role" in err
    assert [row["role"] for row in await listed(tmp_path, "principals")] == ["member", "member"]
    _, err = await command(tmp_path, *promote, "--change-role")
    assert "alice was member, and is admin now" in err


async def test_identities_are_added_before_the_first_request(tmp_path: Path) -> None:
    config_in(tmp_path)
    identity = f"jwt:{ISSUER}=sub=with=signs"
    out, _ = await command(tmp_path, "principals", "add", "alice", "--identity", identity)
    assert re.fullmatch(r"alice is a principal \(member\): prn_[0-9a-f]{24}\n", out)
    await command(tmp_path, "principals", "add", "alice", "--identity", "header:x-user=al")
    (principal,) = await listed(tmp_path, "principals")
    assert principal["identities"] == [
        {"source": "header:x-user", "subject": "al"},
        {"source": f"jwt:{ISSUER}", "subject": "sub=with=signs"},
    ]
    _, err = await command(tmp_path, "principals", "add", "bob", "--identity", identity, code=1)
    assert "'alice' already" in err
    assert len(await listed(tmp_path, "principals")) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["api-keys", "create", "local"], 2, "another meaning"),
        (["api-keys", "create", "role:admin"], 2, "another meaning"),
        (["api-keys", "create", " "], 2, "printable"),
        (["api-keys", "create", "a", "--scopes", "mcp,root"], 2, "mcp, self, admin"),
        (["api-keys", "create", "a", "--scopes", "admin"], 1, "--role admin"),
        (["api-keys", "create", "a", "--expires", "soon"], 2, "90d"),
        (["api-keys", "create", "a", "--expires", "99y"], 2, "90d"),
        (["api-keys", "create", "a", "--role", "root"], 2, "admin"),
        (["api-keys", "revoke", "nonsense"], 1, "api-keys list"),
        (["principals", "disable", "nobody"], 1, "principals list"),
        (["principals", "add", "a", "--identity", "mail:a@b"], 2, "jwt:ISSUER=SUBJECT"),
    ],
)
async def test_what_can_not_be_done_is_said_in_one_line(
    tmp_path: Path, arguments: list[str], code: int, words: str
) -> None:
    config_in(tmp_path)
    out, err = await command(tmp_path, *arguments, code=code)
    assert out == ""
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")


async def test_nothing_is_listed_and_no_store_is_made_before_the_first_key(tmp_path: Path) -> None:
    config_in(tmp_path)
    for group in ("api-keys", "principals"):
        assert await listed(tmp_path, group) == []
        assert "api-keys create NAME" in (await command(tmp_path, group, "list"))[0]
    assert [file.name for file in tmp_path.iterdir()] == ["mcp-auth-proxy.yaml"]


async def test_a_disabled_principal_gets_no_further_key(tmp_path: Path) -> None:
    config_in(tmp_path)
    await command(tmp_path, "api-keys", "create", "alice")
    await command(tmp_path, "principals", "disable", "alice")
    _, err = await command(tmp_path, "api-keys", "create", "alice", code=1)
    assert "principals enable alice" in err


async def test_a_command_warns_if_no_admin_is_left(tmp_path: Path) -> None:
    config_in(tmp_path)
    for name, project in (("alice", "default"), ("bob", "default"), ("zoe", "other")):
        await command(tmp_path, "api-keys", "create", name, "--role", "admin", "--project", project)
    _, err = await command(tmp_path, "api-keys", "create", "bob", "--role", "member")
    assert "warning" not in err
    for arguments in (("principals", "disable", "zoe"), ("principals", "disable", "alice")):
        _, err = await command(tmp_path, *arguments)
        assert "no active admin now" in err
    found = {row["name"]: (row["role"], row["status"]) for row in await listed(tmp_path, "principals")}
    assert found == {"alice": ("admin", "disabled"), "bob": ("member", "active"), "zoe": ("admin", "disabled")}
