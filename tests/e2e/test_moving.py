"""``export`` and ``import``: logins of one proxy go on at another, and only there."""

import asyncio
import base64
import json
import stat
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import yaml

from fakes.authorization_server import FakeAuthorizationServer
from fakes.headless import consent
from fakes.mcp_server import FakeMcpServer
from fakes.proxy import ProxyProcess, link_in, proxy_process, run_command, running_proxy, until, write_config

PASSPHRASE = {"PASSPHRASE": "correct horse battery"}
SEALED = ("--passphrase", "env:PASSPHRASE")
AT_ONCE = {"wait": "0s"}


class Places:
    """Two folders with a configuration each, for the same server ``notes``."""

    def __init__(self, folder: Path, url: str) -> None:
        self.url = url
        self.file = folder / "logins.export"
        self.here, self.there = folder / "here", folder / "there"
        for place in (self.here, self.there):
            place.mkdir()
            write_config(place, {"notes": url}, authorization=AT_ONCE)

    async def command(self, place: Path, *words: str, **env: str) -> tuple[int, str, str]:
        config = str(place / "mcp-auth-proxy.yaml")
        return await run_command(*words, "--config", config, env={**PASSPHRASE, **env})

    async def export(self, *words: str) -> tuple[int, str, str]:
        return await self.command(self.here, "export", *words, str(self.file), *SEALED)

    async def import_(self, *words: str) -> tuple[int, str, str]:
        return await self.command(self.there, "import", str(self.file), *SEALED, *words)

    async def grants(self, place: Path) -> list[dict[str, object]]:
        code, out, err = await self.command(place, "status", "--json")
        assert code == 0, err
        return list(json.loads(out))


@pytest.fixture
def places(tmp_path: Path, mcp_server: FakeMcpServer) -> Places:
    return Places(tmp_path, mcp_server.url)


@asynccontextmanager
async def proxy_at(place: Path) -> AsyncIterator[ProxyProcess]:
    async with proxy_process(place / "mcp-auth-proxy.yaml") as proxy:
        yield proxy


async def log_in(place: Path, url: str) -> None:
    """Log in at a proxy in this process: to start another one takes a second."""
    async with (
        running_proxy(place, {"notes": url}, authorization=AT_ONCE) as proxy,
        proxy.client("notes") as client,
    ):
        await client.initialize()
        assert (await consent(link_in((await client.call("echo", text="x")).message))).status_code == 200
        assert (await client.call("echo", text="x")).text == "x"


async def answer(proxy: ProxyProcess) -> str:
    async with proxy.client("notes") as client:
        await client.initialize()
        return json.dumps((await client.call("echo", text="hello")).message)


async def test_a_login_that_was_moved_goes_on_elsewhere_and_has_ended_here(
    places: Places, authorization_server: FakeAuthorizationServer
) -> None:
    await log_in(places.here, places.url)
    code, out, err = await places.export("--move")
    assert (code, err) == (0, "")
    assert "notes, since" in out and "it has ended here" in out
    assert stat.S_IMODE(places.file.stat().st_mode) == 0o600
    content = places.file.read_bytes()
    assert not [secret for secret in authorization_server.secrets() if secret.encode() in content]
    assert authorization_server.revocations == 0
    assert [row["reason"] for row in await places.grants(places.here)] == ["moved"]
    code, out, err = await places.import_()
    assert code == 0, err
    assert "imported" in out
    authorization_server.end_access_tokens()
    async with proxy_at(places.there) as proxy:
        assert "hello" in await answer(proxy)
    assert (authorization_server.authorizations, authorization_server.registrations) == (1, 1)
    assert authorization_server.refreshes == 1
    async with proxy_at(places.here) as proxy:
        assert "/connect/" in await answer(proxy)


async def test_a_running_proxy_notices_moves_at_once(places: Places) -> None:
    await log_in(places.here, places.url)
    async with proxy_at(places.here) as here, proxy_at(places.there) as there:
        assert "hello" in await answer(here)
        assert "/connect/" in await answer(there)
        assert (await places.export("--move"))[0] == 0
        assert (await places.import_())[0] == 0
        imported_at = time.monotonic()
        while "/connect/" not in await answer(here) or "hello" not in await answer(there):
            assert time.monotonic() - imported_at < 2, "a second is promised, and calls take some time"


async def test_requests_that_wait_for_consent_go_on_with_an_import(places: Places, mcp_server: FakeMcpServer) -> None:
    write_config(places.there, {"notes": mcp_server.url}, authorization={"wait": "20s"})
    await log_in(places.here, places.url)
    assert (await places.export("--move"))[0] == 0
    async with proxy_at(places.there) as proxy:
        held = asyncio.create_task(answer(proxy))
        await proxy.next_link()
        assert (await places.import_())[0] == 0
        assert "hello" in await asyncio.wait_for(held, 10)


async def test_a_move_waits_for_a_renewal_that_is_under_way(
    places: Places, authorization_server: FakeAuthorizationServer
) -> None:
    await log_in(places.here, places.url)
    gate = asyncio.Event()
    authorization_server.gates["token"] = gate
    async with proxy_at(places.here) as proxy:
        authorization_server.end_access_tokens()
        call = asyncio.create_task(answer(proxy))
        await until(lambda: authorization_server.refreshes == 1)
        moving = asyncio.create_task(places.export("--move"))
        # The command runs until it sees the renewal: it must not end, nor write.
        done, _ = await asyncio.wait([moving], timeout=2)
        assert not done and not places.file.exists()
        gate.set()
        await call
        assert (await moving)[0] == 0
    assert (await places.import_())[0] == 0
    authorization_server.gates.clear()
    authorization_server.end_access_tokens()
    async with proxy_at(places.there) as proxy:
        assert "hello" in await answer(proxy)
    assert authorization_server.refreshes == 2


# Log in once on a laptop, run in a cluster


def mount(folder: Path, files: dict[str, bytes]) -> None:
    """Put files into a folder as the kubelet does: links to a folder of their own, which ``..data`` names."""
    folder.mkdir(exist_ok=True)
    data = folder / f"..{len(list(folder.iterdir()))}"
    data.mkdir()
    for name, content in files.items():
        (data / name).write_bytes(content)
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("..data") / name)
    link = folder / "..new"
    link.symlink_to(data.name)
    link.replace(folder / "..data")


async def secret(places: Places, folder: Path, *words: str) -> None:
    code, out, err = await places.command(
        places.here, "export", "notes", "--format", "kubernetes-secret", *SEALED, *words
    )
    assert code == 0, err
    assert "kubectl create secret generic" in err and "horse" not in out + err
    document = yaml.safe_load(out)
    assert (document["apiVersion"], document["kind"], document["type"]) == ("v1", "Secret", "Opaque")
    (content,) = document["data"].values()
    # As the API server decodes it.
    decoded = base64.b64decode(content)
    mount(folder, {"logins": decoded, "passphrase": PASSPHRASE["PASSPHRASE"].encode()})


async def test_a_login_of_a_laptop_runs_in_the_cluster(
    places: Places, authorization_server: FakeAuthorizationServer, mcp_server: FakeMcpServer, tmp_path: Path
) -> None:
    mounted = tmp_path / "secrets"
    await log_in(places.here, places.url)
    await secret(places, mounted)
    assert [row["reason"] for row in await places.grants(places.here)] == ["moved"]
    store = {"import": [f"file:{mounted}/logins"], "import_passphrase": f"file:{mounted}/passphrase"}
    write_config(places.there, {"notes": mcp_server.url}, authorization=AT_ONCE, store=store)
    authorization_server.end_access_tokens()
    async with proxy_at(places.there) as pod:
        assert "imported the login of server notes" in pod.log
        assert "hello" in await answer(pod)
    async with proxy_at(places.there) as pod:
        assert "imported" not in pod.log
        assert "hello" in await answer(pod)
    assert (authorization_server.authorizations, authorization_server.refreshes) == (1, 1)
    await log_in(places.here, places.url)
    await secret(places, mounted)
    async with proxy_at(places.there) as pod:
        assert "imported the login of server notes in place of an older one" in pod.log
        assert "hello" in await answer(pod)


async def test_an_import_that_cant_be_opened_ends_the_start(places: Places, mcp_server: FakeMcpServer) -> None:
    (places.there / "broken").write_text("no export")
    store = {"import": ["file:broken"], "import_passphrase": "env:PASSPHRASE"}
    write_config(places.there, {"notes": mcp_server.url}, store=store)
    code, _, err = await places.command(places.there, "serve", "--listen", "127.0.0.1:0")
    assert code == 2
    assert "store.import[0]: " in err and "is not an export" in err and err.count("\n") == 1
    assert not (places.there / "proxy.db").exists()
