"""Starting as a service or in a container: what the manager is told, and what is said if it can't work."""

import asyncio
import hashlib
import os
import socket
from pathlib import Path

import pytest

from bench.processes import free_port
from fakes.other_users import NOBODY, as_root
from fakes.proxy import PROGRAM, proxy_process, run_command, serving, start_command, unnamed, until, write_config

ROOT = Path(__file__).resolve().parents[2]
SERVERS: dict[str, str] = {"notes": "https://mcp.example.com/mcp"}
AS_ANOTHER = ("unshare", "--user", "--map-user=1000", "--map-group=1000", *PROGRAM)
"""Root without its power over the files of others."""


async def refused(config: Path, *, program: tuple[str, ...] = PROGRAM) -> tuple[int, str]:
    """Run ``serve`` until it gives up; return the exit code and its one line."""
    process = await start_command("serve", "--config", str(config), program=program)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    said = unnamed(err.decode())
    assert (out, said.count("\n")) == (b"", 1), said
    assert said.startswith("error: ")
    return process.returncode or 0, said


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


async def test_the_service_manager_is_told_when_the_proxy_listens_and_when_it_stops(tmp_path: Path) -> None:
    config = write_config(tmp_path, SERVERS, health_listen=f"127.0.0.1:{(health := free_port())}")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        address = f"127.0.0.1:{(port := free_port())}"
        process = await start_command(
            "serve", "--config", str(config), "--listen", address, env={"NOTIFY_SOCKET": str(tmp_path / "notify")}
        )
        try:
            assert await asyncio.to_thread(manager.recv, 100) == b"READY=1"
            for listening in (port, health):
                socket.create_connection(("127.0.0.1", listening), 5).close()
            process.terminate()
            assert await asyncio.to_thread(manager.recv, 100) == b"STOPPING=1"
            await asyncio.wait_for(process.communicate(), 10)
            assert process.returncode == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.communicate()


@pytest.mark.parametrize("command", ["serve", "check"])
async def test_an_address_beyond_loopback_is_refused_unless_it_is_meant(tmp_path: Path, command: str) -> None:
    config = write_config(tmp_path, SERVERS, listen="0.0.0.0:0")
    code, out, err = await run_command(command, "--config", str(config))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "inbound.allow_anonymous" in err
    assert content(tmp_path).keys() == {config.name}


async def test_a_url_beyond_loopback_is_refused_unless_it_is_meant(tmp_path: Path) -> None:
    code, out, err = await run_command("serve", SERVERS["notes"], "--listen", "0.0.0.0:0", cwd=tmp_path)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--allow-anonymous" in err


async def test_a_reload_does_not_take_back_the_leave_of_the_flag(tmp_path: Path) -> None:
    config = write_config(tmp_path, SERVERS)
    async with proxy_process(config, "--allow-anonymous", listen="0.0.0.0:0") as proxy:
        write_config(tmp_path, {**SERVERS, "more": "https://more.example.com/mcp"})
        await until(lambda: "added more" in proxy.log)


async def test_a_second_start_changes_nothing(tmp_path: Path) -> None:
    config = write_config(tmp_path, SERVERS, listen=(address := f"127.0.0.1:{free_port()}"))
    async with proxy_process(config, listen=address) as proxy:
        before = content(tmp_path)
        code, said = await refused(config)
        assert code == 1
        assert f"{address} is taken by another program, maybe another mcp-auth-proxy" in said
        assert content(tmp_path) == before
        assert await proxy.stop() == 0


async def test_a_port_of_the_health_endpoints_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        config = write_config(tmp_path, SERVERS, health_listen=address)
        code, said = await refused(config)
    assert code == 1
    assert f"{address} is taken by another program" in said
    assert "another address with the key 'health_listen'" in said
    assert content(tmp_path).keys() == {config.name}


def compose_config(folder: Path) -> Path:
    """The configuration of compose.yaml, with the paths of the container in ``folder``, and another port."""
    (folder / "data").mkdir()
    (folder / "secrets").mkdir()
    text = (ROOT / "deploy/compose/config.yaml").read_text()
    text = text.replace("/run/secrets", str(folder / "secrets")).replace("//data/", f"/{folder}/data/")
    config = folder / "config.yaml"
    config.write_text(text.replace(":8787", f":{free_port()}"))
    return config


async def test_compose_without_its_key(tmp_path: Path) -> None:
    code, said = await refused(compose_config(tmp_path))
    assert code == 2
    assert f"store.keys[0]: the file {tmp_path}/secrets/store-key can't be read (No such file or directory)" in said
    assert list((tmp_path / "data").iterdir()) == list((tmp_path / "secrets").iterdir()) == []


async def test_compose_with_a_key_that_is_a_folder(tmp_path: Path) -> None:
    """Docker makes a folder where a file to mount does not exist."""
    config = compose_config(tmp_path)
    (tmp_path / "secrets/store-key").mkdir()
    code, said = await refused(config)
    assert (code, "store.keys[0]" in said, "Is a directory" in said) == (2, True, True)
    assert list((tmp_path / "data").iterdir()) == []


async def test_a_secret_that_is_missing(tmp_path: Path) -> None:
    oauth = {"grant": "client_credentials", "client_id": "a", "client_secret": "file:gone", "issuer": "https://as.x"}
    config = write_config(tmp_path, {"notes": {"url": SERVERS["notes"], "oauth": oauth}})
    code, said = await refused(config)
    assert code == 2
    assert f"servers.notes.oauth.client_secret: the file {tmp_path}/gone can't be read" in said
    assert content(tmp_path).keys() == {config.name}


@as_root
async def test_a_configuration_in_a_folder_of_another_user(tmp_path: Path) -> None:
    (folder := tmp_path / "mounted").mkdir(mode=0o700)
    config = write_config(folder, SERVERS)
    os.chown(folder, NOBODY, NOBODY)
    code, said = await refused(config, program=AS_ANOTHER)
    assert (code, said) == (2, f"error: {config} (from --config) can't be read (Permission denied)\n")
    # The user's folder, as after `sudo -u` with the HOME of root.
    env = {"HOME": None, "XDG_CONFIG_HOME": str(folder)}
    process = await start_command("serve", program=AS_ANOTHER, env=env, cwd=tmp_path)
    _, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, err.decode()) == (
        2,
        f"error: {folder}/mcp-auth-proxy/mcp-auth-proxy.yaml can't be read (Permission denied)\n",
    )


@as_root
@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("check",), 2, "No configuration was found."),
        (("serve", SERVERS["notes"]), 2, "This user has no home folder, where the store would be"),
        (("status",), 2, "This user has no home folder"),
        (("service", "status"), 1, "This user has no home folder"),
        (
            ("check", "--config", "~nobody-of-that-name/proxy.yaml"),
            2,
            "(from --config) names a home folder that does not",
        ),
        (("healthcheck", "--config", "~nobody-of-that-name/proxy.yaml"), 1, "names a home folder that does not exist"),
    ],
)
async def test_a_user_without_a_home_folder(tmp_path: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    program = ("unshare", "--user", "--map-user=4242", "--map-group=4242", *PROGRAM)
    home = {"HOME": None, "XDG_CONFIG_HOME": None, "XDG_DATA_HOME": None}
    process = await start_command(*arguments, program=program, env=home, cwd=tmp_path)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert (process.returncode, out, err.count(b"\n")) == (code, b"", 1), err.decode()
    assert words in err.decode()
    assert list(tmp_path.iterdir()) == []


@as_root
async def test_a_volume_of_another_user(tmp_path: Path) -> None:
    (tmp_path / "store-key").write_text("A" * 43 + "=")
    (data := tmp_path / "data").mkdir(mode=0o700)
    os.chown(data, NOBODY, NOBODY)
    store = {"url": f"sqlite:///{data}/proxy.db", "keys": ["file:store-key"]}
    code, said = await refused(write_config(tmp_path, SERVERS, store=store), program=AS_ANOTHER)
    assert code == 1
    assert str(data) in said
    assert "ermission denied" in said
    assert list(data.iterdir()) == []


async def test_the_configuration_of_compose_serves_with_its_key(tmp_path: Path) -> None:
    config = compose_config(tmp_path)
    (tmp_path / "secrets/store-key").write_text("A" * 43 + "=\n")
    (tmp_path / "secrets/store-key").chmod(0o444)
    async with serving("--config", str(config)) as proxy:
        assert await proxy.stop() == 0
    assert {file.name for file in (tmp_path / "data").iterdir()} >= {"mcp-auth-proxy.db"}
    assert os.listdir(tmp_path / "secrets") == ["store-key"]
