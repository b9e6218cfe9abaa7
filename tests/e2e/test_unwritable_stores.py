"""Stores that can't be written: a read-only mount, a missing permission and a full disk are told apart."""

import os
import subprocess
from pathlib import Path

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.other_users import NOBODY, as_root
from fakes.proxy import PROGRAM, link_in, serving, start_command, write_config
from store import samples

READ_ONLY = 'mount --bind "$STORE" "$STORE" && mount -o remount,bind,ro "$STORE" && exec "$@"'
AS_ANOTHER = ("unshare", "--user", "--map-user=1000", "--map-group=1000", *PROGRAM)
MOUNTED = ("unshare", "--mount", "sh", "-euc", READ_ONLY, "sh", *PROGRAM)


def configured(folder: Path, url: str = "http://127.0.0.1:9/mcp") -> tuple[Path, Path]:
    """Return the folder of a store, which is there, and a configuration that names it."""
    store = folder / "store"
    store.mkdir()
    return store, write_config(
        folder, {"linear": url}, store={"url": f"sqlite:///{store}/store.db"}, authorization={"wait": "0s"}
    )


async def run_mounted(store: Path, *arguments: str) -> tuple[int, str, str]:
    """Run a command to which the folder of the store is mounted read-only; return exit code, stdout and stderr."""
    process = await start_command(*arguments, env={"STORE": str(store)}, program=MOUNTED)
    out, err = await process.communicate()
    lines = [line for line in err.decode().splitlines() if not line.startswith("configuration: ")]
    return process.returncode or 0, out.decode(), "\n".join(lines)


@as_root
@pytest.mark.parametrize("schema", [4, samples.NEWEST])
async def test_serve_names_a_read_only_mount_and_status_works_there(tmp_path: Path, schema: int) -> None:
    store, config = configured(tmp_path)
    samples.copy(schema, store)
    (store / "store.db").chmod(0o600)
    before = sorted(os.listdir(store))
    code, out, err = await run_mounted(store, "serve", "--config", str(config), "--listen", "127.0.0.1:0")
    assert (code, out, len(err.splitlines())) == (1, "", 1), err
    assert f"error: The file system of {store / 'store.db'} is mounted read-only" in err
    assert "Mount it writable, or set store.url" in err
    code, out, err = await run_mounted(store, "status", "--config", str(config))
    assert (code, err) == (0, "")
    assert out.startswith("linear")
    code, _, err = await run_mounted(store, "api-keys", "create", "anna", "--config", str(config))
    assert (code, "is mounted read-only" in err) == (1, True)
    assert sorted(os.listdir(store)) == before


@as_root
async def test_a_first_start_on_a_read_only_mount_names_it(tmp_path: Path) -> None:
    store, config = configured(tmp_path)
    code, _, err = await run_mounted(store, "serve", "--config", str(config), "--listen", "127.0.0.1:0")
    assert (code, len(err.splitlines())) == (1, 1), err
    assert f"The file system of {store} is mounted read-only" in err
    code, _, err = await run_mounted(store, "status", "--config", str(config))
    assert (code, err) == (0, "")


@as_root
async def test_a_mount_that_becomes_read_only_is_named_by_readyz_and_valid_tokens_go_on(  # F8
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server(auto_consent=True)
    upstream = await servers.mcp_server(issuer)
    store, config = configured(tmp_path, upstream.url)
    program = ("unshare", "--mount", *PROGRAM)
    options = ("--config", str(config), "--listen", "127.0.0.1:0")
    async with serving(*options, program=program) as proxy, proxy.client("linear") as client:
        assert (await consent(link_in((await client.call("echo")).message))).status_code == 200
        assert (await client.call("echo", text="in")).text == "in"
        in_its_place = ("nsenter", f"--target={proxy.process.pid}", "--mount", "sh", "-euc", READ_ONLY, "sh", "true")
        subprocess.run(in_its_place, env={**os.environ, "STORE": str(store)}, check=True, timeout=10)
        async with httpx2.AsyncClient(trust_env=False, timeout=20) as http:
            ready = await http.get(f"{proxy.origin}/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "store")
        assert f"The file system of {store / 'store.db'} is mounted read-only" in ready.json()["reason"]
        assert (await client.call("echo", text="good")).text == "good"
        assert await proxy.stop() == 0, proxy.log


@as_root
@pytest.mark.parametrize("closed", ["store.db", "."])
async def test_a_missing_permission_is_named_with_its_place_and_user(tmp_path: Path, closed: str) -> None:
    store, config = configured(tmp_path)
    samples.copy(samples.NEWEST, store)
    (store / "store.db").chmod(0o644)
    store.chmod(0o755)
    os.chown(store / closed, NOBODY, NOBODY)
    before = sorted(os.listdir(store))
    process = await start_command("serve", "--config", str(config), "--listen", "127.0.0.1:0", program=AS_ANOTHER)
    _, err = await process.communicate()
    (_, line) = err.decode().splitlines()
    assert process.returncode == 1
    assert f"this user (uid 1000) may not write {store / closed}." in line
    assert "writable for this user" in line
    assert "mounted" not in line
    process = await start_command("status", "--config", str(config), program=AS_ANOTHER)
    out, _ = await process.communicate()
    assert (process.returncode, out.decode().startswith("linear")) == (0, True)
    assert sorted(os.listdir(store)) == before
