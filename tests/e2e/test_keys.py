"""The keys of the store as users change them: commands, SIGHUP, start."""

import base64
import json
import os
import shlex
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fakes.fixtures import Servers
from fakes.proxy import ProxyProcess, proxy_process, run_command, until, write_config
from mcp_auth_proxy.cli import key_rotation
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.store.cipher import Key


def key(folder: Path, name: str) -> str:
    """Write a key file, and return its id."""
    secret = os.urandom(32)
    (folder / name).write_text(base64.b64encode(secret).decode())
    return Key.of(secret).id


def set_keys(config: Path, *keys: str) -> None:
    """Change ``store.keys``, in one step."""
    document = yaml.safe_load(config.read_text())
    document["store"]["keys"] = list(keys)
    new = config.with_suffix(".new")
    new.write_text(yaml.safe_dump(document))
    new.rename(config)


def config_with(folder: Path, *keys: str, servers: dict[str, Any] | None = None) -> Path:
    entries = servers or {"a": {"url": "http://127.0.0.1:9/mcp"}}
    return write_config(folder, entries, store={"url": "sqlite:///proxy.db", "keys": list(keys)})


async def fill(config: Path) -> None:
    code, _, err = await run_command("api-keys", "create", "anna", "--config", str(config))
    assert code == 0, err


async def keys(config: Path, command: str, *options: str, code: int = 0) -> tuple[Any, str]:
    found, out, err = await run_command("keys", command, "--json", "--config", str(config), *options)
    assert found == code, err
    return json.loads(out) if out else None, err


async def hangup(proxy: ProxyProcess) -> str:
    """Send SIGHUP; return what the log says until the reload is done."""
    seen = len(proxy.err)
    proxy.process.send_signal(signal.SIGHUP)
    await until(lambda: "configuration reloaded" in proxy.err[seen:], "a reload")
    return proxy.err[seen:]


async def test_the_whole_change_of_a_key(tmp_path: Path) -> None:
    old, new = key(tmp_path, "old.key"), key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:old.key")
    await fill(config)
    listed, _ = await keys(config, "list")
    (row,) = listed
    assert row["rows"] > 0
    assert row == {"id": old, "source": "file:old.key", "rows": row["rows"], "droppable": False}
    assert list(row) == ["id", "source", "rows", "droppable"]
    set_keys(config, "file:new.key", "file:old.key")
    rotated, err = await keys(config, "rotate")
    assert rotated == {
        "key": new,
        "resealed": row["rows"],
        "skipped": 0,
        "failed": 0,
        "left": 0,
        "failures": [],
        "droppable": [old],
    }
    assert f"of {row['rows']} rows" in err
    listed, _ = await keys(config, "list")
    assert listed == [
        {"id": new, "source": "file:new.key", "rows": row["rows"], "droppable": False},
        {"id": old, "source": "file:old.key", "rows": 0, "droppable": True},
    ]
    set_keys(config, "file:new.key")
    code, out, _ = await run_command("principals", "list", "--config", str(config))
    assert (code, "anna" in out) == (0, True)
    set_keys(config, "file:old.key")
    code, out, err = await run_command("serve", "--config", str(config))
    assert (code, out) == (2, "")
    assert err.startswith("error: Wrong key")


async def test_texts_for_people_say_what_to_do_next(tmp_path: Path) -> None:
    old, new = key(tmp_path, "old.key"), key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:old.key")
    await fill(config)
    set_keys(config, "file:new.key", "file:old.key")
    _, out, _ = await run_command("keys", "list", "--config", str(config))
    assert f"{old}  file:old.key" in out
    assert "keys rotate" in out
    code, out, _ = await run_command("keys", "rotate", "--config", str(config))
    assert code == 0
    assert f"key {new} seals the store" in out
    assert f"key {old} is not needed any more: remove file:old.key from store.keys" in out


async def test_list_reads_only_and_names_keys_that_are_missing(tmp_path: Path) -> None:
    old, new = key(tmp_path, "old.key"), key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:old.key")
    await fill(config)
    set_keys(config, "file:new.key", "file:old.key")
    code, _, err = await run_command("api-keys", "create", "bert", "--config", str(config))
    assert code == 0, err
    set_keys(config, "file:new.key")
    before = (tmp_path / "proxy.db").read_bytes()
    listed, _ = await keys(config, "list")
    assert [(row["id"], row["source"], row["droppable"]) for row in listed] == [
        (new, "file:new.key", False),
        (old, None, False),
    ]
    assert all(row["rows"] > 0 for row in listed)
    assert (tmp_path / "proxy.db").read_bytes() == before
    # Rotation leaves those rows as they are, and says which.
    rotated, err = await keys(config, "rotate", code=1)
    assert rotated["failed"] == len(rotated["failures"]) == listed[1]["rows"]
    for row in rotated["failures"]:
        assert f"the row {row['row']} of {row['table']} stays as it is" in err
        assert old in row["problem"]


async def test_before_the_first_start_there_is_nothing_to_rotate(tmp_path: Path) -> None:
    new = key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:new.key")
    listed, _ = await keys(config, "list")
    assert listed == [{"id": new, "source": "file:new.key", "rows": 0, "droppable": False}]
    _, err = await keys(config, "rotate", code=1)
    assert "There is no store" in err
    assert not (tmp_path / "proxy.db").exists()
    default = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    assert (await keys(default, "list"))[0] == []


async def test_a_proxy_takes_up_keys_and_keeps_them_if_others_fail(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server()
    upstream.protected = False
    old, new = key(tmp_path, "old.key"), key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:old.key", servers={"a": {"url": upstream.url}})
    async with proxy_process(config) as proxy:
        set_keys(config, "file:new.key", "file:old.key")
        assert "applied store.keys" in await hangup(proxy)
        assert (await keys(config, "rotate"))[0]["droppable"] == [old]
        for broken in ("exec:false", "exec:/nowhere/at/all", "keyring:proxy/no-such-key"):
            set_keys(config, broken, "file:new.key")
            said = await hangup(proxy)
            (line,) = [line for line in said.splitlines() if "store.keys" in line]
            assert "the keys stay as they were" in line
            assert broken.partition(" ")[0] in line
        (tmp_path / "bad.key").write_text("canary")
        set_keys(config, "file:bad.key", "file:new.key")
        said = await hangup(proxy)
        assert "is not a key" in said
        assert "canary" not in said
        key(tmp_path, "third.key")
        set_keys(config, "file:third.key")
        assert "the keys stay as they were: Wrong key" in await hangup(proxy)
        set_keys(config, "file:new.key")
        assert "applied store.keys" in await hangup(proxy)
        async with proxy.client("a") as client:
            assert (await client.call("echo", text="still")).text == "still"
    assert [row["id"] for row in (await keys(config, "list"))[0]] == [new]


async def test_a_command_that_hangs_holds_up_no_request(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server()
    upstream.protected = False
    key(tmp_path, "old.key")
    config = config_with(tmp_path, "file:old.key", servers={"a": {"url": upstream.url}})
    pid = tmp_path / "pid"
    async with proxy_process(config) as proxy, proxy.client("a") as client:
        set_keys(config, f"exec:sh -c 'echo $$ > {pid}; exec sleep 60'", "file:old.key")
        proxy.process.send_signal(signal.SIGHUP)
        await until(lambda: pid.exists() and pid.read_text(), "the command")
        begun_at = time.monotonic()
        for number in range(5):
            assert (await client.call("echo", text=str(number))).text == str(number)
        assert time.monotonic() - begun_at < 5
        os.kill(int(pid.read_text()), signal.SIGKILL)
        await until(lambda: "the keys stay as they were" in proxy.err, "the end of the command")
        (line,) = [line for line in proxy.err.splitlines() if "the keys stay as they were" in line]
        assert "exec:sh …" in line
        assert (await client.call("echo", text="on")).text == "on"


async def test_sighup_reads_the_sources_again(servers: Servers, tmp_path: Path) -> None:
    """Neither the configuration nor a key file that it names has changed, but what a command prints."""
    old, new = key(tmp_path, "old.key"), key(tmp_path, "new.key")
    print_key = shlex.join([sys.executable, "-c", f"print(open({str(tmp_path / 'printed.key')!r}).read())"])
    (tmp_path / "printed.key").write_bytes((tmp_path / "old.key").read_bytes())
    config = config_with(tmp_path, f"exec:{print_key}", "file:old.key")
    async with proxy_process(config) as proxy:
        (tmp_path / "printed.key").write_bytes((tmp_path / "new.key").read_bytes())
        assert "applied store.keys" in await hangup(proxy)
        rotated, _ = await keys(config, "rotate")
        assert (rotated["key"], rotated["droppable"]) == (new, [old])
        assert "nothing has changed" in await hangup(proxy)


async def test_a_key_file_that_changes_is_taken_up_without_a_signal(tmp_path: Path) -> None:
    """As Kubernetes renews a mounted Secret."""
    key(tmp_path, "old.key")
    (tmp_path / "first.key").write_bytes((tmp_path / "old.key").read_bytes())
    config = config_with(tmp_path, "file:first.key", "file:old.key")
    async with proxy_process(config) as proxy:
        key(tmp_path, "next.key")
        (tmp_path / "next.key").rename(tmp_path / "first.key")
        await until(lambda: "applied store.keys" in proxy.err, "the new key")


async def test_rotation_waits_for_proxies_that_lack_the_key_and_then_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """To such a proxy, what was sealed with the key would count as missing."""
    old, new = key(tmp_path, "old.key"), key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:old.key")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    other = write_config(
        elsewhere,
        {"a": "http://127.0.0.1:9/mcp"},
        store={"url": f"sqlite:///{tmp_path}/proxy.db", "keys": [f"file:{tmp_path}/{it}.key" for it in ("new", "old")]},
    )
    monkeypatch.setattr(key_rotation, "_TAKE_UP_SECONDS", 0.5)
    async with proxy_process(config) as proxy:
        await fill(config)
        with pytest.raises(McpAuthProxyError) as caught:
            await key_rotation.rotate(load(other, environ={}), as_json=True)
        address = proxy.origin.removeprefix("http://")
        assert f"The proxy at {address} does not have the key {new}" in str(caught.value)
        assert "SIGHUP" in str(caught.value)
        assert f"waiting until the proxy at {address}" in capsys.readouterr().err
        connection = sqlite3.connect(tmp_path / "proxy.db")
        found = {seal.hex() for (seal,) in connection.execute("SELECT substr(seal, 2, 4) FROM principals")}
        assert found == {old}


async def test_a_proxy_that_still_seals_with_another_key_is_named(tmp_path: Path) -> None:
    key(tmp_path, "old.key"), key(tmp_path, "new.key")
    config = config_with(tmp_path, "file:old.key", "file:new.key")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    files = [f"file:{tmp_path}/{it}.key" for it in ("new", "old")]
    store = {"url": f"sqlite:///{tmp_path}/proxy.db", "keys": files}
    other = write_config(elsewhere, {"a": "http://127.0.0.1:9/mcp"}, store=store)
    async with proxy_process(config) as proxy:
        rotated, err = await keys(other, "rotate")
        assert rotated["left"] == 0
        assert f"the proxy at {proxy.origin.removeprefix('http://')} still seals with another key" in err


async def test_a_start_whose_command_fails_says_so_in_one_line(tmp_path: Path) -> None:
    script = "echo canary; echo canary >&2; exit 7"
    config = config_with(tmp_path, f"exec:sh -c '{script}'")
    code, out, err = await run_command("serve", "--config", str(config))
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert "exec:sh" in line
    assert "exit status 7" in line
    assert "canary" not in line
    assert not (tmp_path / "proxy.db").exists()
    code, out, _ = await run_command("check", "--config", str(config))
    assert (code, "valid" in out) == (0, True)


async def test_a_store_is_made_with_a_key_from_a_command(tmp_path: Path) -> None:
    made = key(tmp_path, "my.key")
    config = config_with(tmp_path, f"exec:cat {tmp_path}/my.key")
    await fill(config)
    (row,) = (await keys(config, "list"))[0]
    assert (row["id"], row["source"]) == (made, f"exec:cat {tmp_path}/my.key")
