"""Other users of this machine, and what reaches a terminal: attacks on the commands."""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.fixtures import RealMcpServer, Servers
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.other_users import NOBODY, as_root
from fakes.proxy import Environment, proxy_process, run_command, serving, start_command, until, write_config
from fakes.raw_server import Peer, RawServer, answers, ok

CONTROLS = "\x07\x1b[2J\x7f\x9b31m\u202e\u2066\u061c\u200f\u2028"
"""A bell, sequences of C0 and C1 for the terminal, DEL, and what turns the direction of text or starts a line."""


async def output(*arguments: str, cwd: Path | None = None, env: Environment | None = None) -> tuple[int, str, str]:
    """Run a command to its end; return exit code, stdout, and all of stderr."""
    process = await start_command(*arguments, cwd=cwd, env=env)
    out, err = await asyncio.wait_for(process.communicate(), 30)
    return process.returncode or 0, out.decode(), err.decode()


# The configuration file

NO_VARIABLE: Environment = {"MCP_AUTH_PROXY_CONFIG": None}

COMMANDS = [["serve"], ["check"], ["status"], ["status", "--json"], ["login", "a"], ["logout", "a"], ["doctor", "a"]]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
async def test_no_command_uses_a_file_that_others_may_have_put_into_its_folder(  # T89
    tmp_path: Path, command: list[str]
) -> None:
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    tmp_path.chmod(0o1777)
    code, out, err = await output(*command, cwd=tmp_path, env=NO_VARIABLE)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    for part in (str(config), "current folder", "can be written by everyone", "--config", "$MCP_AUTH_PROXY_CONFIG"):
        assert part in err
    assert sorted(path.name for path in tmp_path.iterdir()) == [config.name], "nothing was made there"


@pytest.mark.parametrize(
    "command",
    [["serve"], ["check"], ["status"], ["export", "x", "--passphrase", "file:passphrase"]],
    ids=lambda command: command[0],
)
async def test_a_file_that_was_only_found_runs_no_program(tmp_path: Path, command: list[str]) -> None:  # T91
    keys = [f"exec:touch {tmp_path}/ran"]
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"}, store={"url": "sqlite:///s.db", "keys": keys})
    (tmp_path / "passphrase").write_text("long enough for this")
    code, out, err = await output(*command, cwd=tmp_path, env=NO_VARIABLE)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    for part in (str(config), "store.keys[0]", "only found in the current folder", "--config"):
        assert part in err
    assert not (tmp_path / "ran").exists()
    assert (await output("check", "--config", config.name, cwd=tmp_path, env=NO_VARIABLE))[0] == 0, "it was named"


@as_root
@pytest.mark.parametrize("others", ["folder", "file"])
async def test_a_file_or_folder_of_another_user_is_refused(tmp_path: Path, others: str) -> None:  # T89
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    os.chown(tmp_path if others == "folder" else config, NOBODY, NOBODY)
    code, out, err = await output("check", cwd=tmp_path, env=NO_VARIABLE)
    assert (code, out) == (2, "")
    assert "belongs to the user" in err
    for arguments, env in ((["--config", config.name], NO_VARIABLE), ([], {"MCP_AUTH_PROXY_CONFIG": str(config)})):
        assert (await output("check", *arguments, cwd=tmp_path, env=env))[0] == 0, "it was named openly"


@pytest.mark.parametrize("command", [["status"], ["status", "--json"], ["logout", "a"], ["check"]], ids=" ".join)
@pytest.mark.parametrize("named", [True, False])
async def test_every_command_says_which_file_it_uses(tmp_path: Path, command: list[str], named: bool) -> None:  # T89
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    arguments = ["--config", str(config)] if named else []
    code, out, err = await output(*command, *arguments, cwd=tmp_path, env=NO_VARIABLE)
    assert code == 0
    assert str(config) in (out if command == ["check"] else err.splitlines()[0])
    if "--json" in command:
        assert json.loads(out)[0]["server"] == "a"


@pytest.mark.parametrize("form", ["text", "json"])
async def test_serve_says_which_file_it_uses(tmp_path: Path, form: str) -> None:  # T89
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    async with serving("--log-format", form, cwd=tmp_path, env=NO_VARIABLE) as proxy:
        assert await proxy.stop() == 0
    line = proxy.err.splitlines()[0]
    assert (json.loads(line)["message"] if form == "json" else line) == f"configuration: {config}"


# The key file


@pytest.mark.parametrize("command", [["serve"], ["status"], ["logout", "a"], ["check"]], ids=" ".join)
async def test_a_default_key_file_that_others_can_read_stops_every_command(  # T89
    tmp_path: Path, command: list[str]
) -> None:
    config = str(write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"}))
    assert (await run_command("logout", "a", "--config", config))[0] == 0
    (tmp_path / "proxy.key").chmod(0o640)
    code, out, err = await run_command(*command, "--config", config)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert f"chmod 600 {tmp_path}/proxy.key" in err
    assert (tmp_path / "proxy.key").read_text().strip() not in err
    (tmp_path / "proxy.key").chmod(0o600)
    assert (await run_command("status", "--config", config))[0] == 0


@pytest.mark.parametrize(("mode", "warned"), [(0o644, False), (0o666, True)])
async def test_a_key_file_that_is_named_may_have_any_mode(tmp_path: Path, mode: int, warned: bool) -> None:  # T89
    key = tmp_path / "mounted.key"
    key.write_text("A" * 43 + "=\n")
    key.chmod(mode)
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"}, store={"keys": [f"file:{key}"]})
    async with proxy_process(config) as proxy:
        assert await proxy.stop() == 0
    _, _, err = await run_command("check", "--config", str(config))
    for text in (proxy.err, err):
        assert (f"chmod 600 {key}" in text) is warned


# Who listens at the port


def lying() -> RawServer:
    """A program that answers as a running proxy does."""
    return RawServer(answers(*[ok(b'{"status": "alive", "service": "mcp-auth-proxy"}')] * 3))


async def test_login_believes_no_program_that_answers_like_the_proxy(tmp_path: Path) -> None:  # T89
    async with lying() as attacker:
        listen = f"127.0.0.1:{attacker.port}"
        config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"}, listen=listen)
        code, out, err = await run_command("login", "a", "--config", str(config))
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert f"{listen} is taken by another program" in err
    assert "/connect/" not in err
    assert attacker.requests == [], "it is not even asked"


async def test_login_believes_no_program_that_took_the_port_of_a_proxy_that_was_killed(  # T89
    tmp_path: Path, real_mcp_server: RealMcpServer
) -> None:
    config = write_config(tmp_path, {"notes": real_mcp_server.url})
    async with proxy_process(config) as proxy:
        listen = proxy.origin.removeprefix("http://")
        await proxy.stop(signal.SIGKILL)
    assert [path for path in tmp_path.iterdir() if path.suffix == ".serving"], "what the killed process left"
    host, _, port = listen.partition(":")
    config = write_config(tmp_path, {"notes": real_mcp_server.url}, listen=listen)
    with socket.create_server((host, int(port))):
        code, out, err = await run_command("login", "notes", "--config", str(config))
    assert (code, out) == (1, "")
    assert "is taken by another program" in err
    async with proxy_process(config, listen=listen) as proxy:
        assert len([path for path in tmp_path.iterdir() if path.suffix == ".serving"]) == 1
        assert await proxy.stop() == 0
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".serving"]


async def test_login_believes_no_proxy_at_another_port(tmp_path: Path, real_mcp_server: RealMcpServer) -> None:  # T89
    async with lying() as attacker:
        listen = f"127.0.0.1:{attacker.port}"
        config = write_config(tmp_path, {"notes": real_mcp_server.url}, listen=listen)
        async with proxy_process(config) as proxy:
            code, out, err = await run_command("login", "notes", "--config", str(config))
            assert (code, out) == (1, "")
            assert "is taken by another program" in err
            assert await proxy.stop() == 0


async def test_login_believes_one_of_several_replicas_that_serves_its_store_at_this_address(
    servers: Servers, tmp_path: Path
) -> None:
    upstream = await servers.mcp_server(protected=False)
    config = write_config(tmp_path, {"open": upstream.url})
    anonymous = proxy_process(config, "--allow-anonymous", listen="0.0.0.0:0")
    async with anonymous as first, proxy_process(config) as second:
        for host, proxy in (("127.0.0.1", first), ("0.0.0.0", first), ("localhost", second)):
            port = proxy.origin.rpartition(":")[2]
            config = write_config(tmp_path, {"open": upstream.url}, listen=f"{host}:{port}")
            code, out, err = await run_command("login", "open", "--config", str(config))
            assert (code, out.splitlines()[0]) == (0, "open asks for no authorization."), err
        assert (await first.stop(), await second.stop()) == (0, 0)


# What reaches a terminal


def assert_clean(text: str) -> None:
    assert not [character for character in CONTROLS if character in text and not character.isprintable()], repr(text)


async def test_the_names_of_tools_do_not_control_the_terminal(servers: Servers, tmp_path: Path) -> None:  # T89
    def tools(received: RecordedRequest) -> FakeResponse:
        names = [f"tool{CONTROLS}\r\nnotes is connected.", "plain"]
        listed = {"tools": [{"name": name, "inputSchema": {"type": "object"}} for name in names]}
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "result": listed})

    upstream = await servers.mcp_server(protected=False, modern=False, answers={"tools/list": tools})
    config = write_config(tmp_path, {"notes": upstream.url})
    code, out, err = await run_command("login", "notes", "--config", str(config))
    assert code == 0, err
    assert_clean(out + err)
    assert len(out.splitlines()) == 2
    assert r"plain, tool\x07\x1b[2J" in out


async def test_the_errors_of_servers_do_not_control_the_terminal(servers: Servers, tmp_path: Path) -> None:  # T89
    def refuse(received: RecordedRequest) -> FakeResponse:
        error = {"code": -32000, "message": f"no{CONTROLS}\nerror: all is well"}
        return FakeResponse.json({"jsonrpc": "2.0", "id": received.message["id"], "error": error})

    upstream = await servers.mcp_server(protected=False, answers={"tools/list": refuse})
    config = write_config(tmp_path, {"notes": upstream.url})
    code, out, err = await run_command("login", "notes", "--config", str(config))
    assert code == 1
    assert_clean(out + err)
    assert not [line for line in err.splitlines() if line.startswith("error: all")]


@pytest.mark.parametrize("form", [[], ["--json"]], ids=["text", "json"])
async def test_scopes_and_issuers_do_not_control_the_terminal(  # T89
    servers: Servers, tmp_path: Path, form: list[str]
) -> None:
    issuer = await servers.authorization_server(token_changes={"scope": f"read \x7f{CONTROLS}"})
    issuer.add_client(client_id="agent", secret="s3cret")
    upstream = await servers.mcp_server(issuer, challenges={401: [f'Bearer scope="a{chr(0x9B)}2J"']})
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "s3cret"}
    config = write_config(tmp_path, {"notes": {"url": upstream.url, "oauth": oauth}})
    for command in (["login", "notes"], ["status", *form], ["doctor", "notes", *form]):
        _, out, err = await run_command(*command, "--config", str(config))
        assert_clean(out + err)
        if form and "--json" in command:
            json.loads(out)


async def test_what_the_user_wrote_does_not_control_the_terminal(tmp_path: Path) -> None:  # T89
    for arguments in ([f"--no{CONTROLS}"], [f"no{CONTROLS}"], ["status", "--config", f"{tmp_path}/no{CONTROLS}"]):
        code, out, err = await run_command(*arguments)
        assert code == 2
        assert_clean(out + err)


# Files that a process leaves


async def test_the_keys_of_tls_connections_are_written_nowhere(tmp_path: Path) -> None:  # T89
    log = tmp_path / "keys.log"
    make_context = [sys.executable, "-c", "import ssl; ssl.create_default_context()"]
    subprocess.run(make_context, check=True, env={**os.environ, "SSLKEYLOGFILE": str(log)})
    log.unlink()  # Python makes the file with the first context, unless the variable is ignored

    async def not_tls(peer: Peer) -> None:
        await peer.send(ok())

    async with RawServer(not_tls) as server:
        env = {"SSLKEYLOGFILE": str(log), "MCP_AUTH_PROXY_CONFIG": None, "XDG_DATA_HOME": str(tmp_path)}
        code, out, _ = await run_command("doctor", f"https://127.0.0.1:{server.port}/mcp", env=env, cwd=tmp_path)
        assert code == 1
        assert len(server.peers) >= 1, out
    assert not log.exists()


async def test_a_serving_process_leaves_no_core_dump(tmp_path: Path) -> None:  # T89
    config = write_config(tmp_path, {"a": "http://127.0.0.1:9/mcp"})
    async with proxy_process(config) as proxy:
        limits = Path(f"/proc/{proxy.process.pid}/limits")
        if limits.exists():
            assert re.search(r"Max core file size +0 +0 ", limits.read_text())
        proxy.process.send_signal(signal.SIGSEGV)
        await until(lambda: proxy.process.returncode is not None)
    assert not list(tmp_path.glob("*core*"))


_MEASURE = """
import ctypes, os, sys
from mcp_auth_proxy.cli.hardening import protect_process
from mcp_auth_proxy.observability import process
if len(sys.argv) > 1:
    os.setgroups([]), os.setgid(int(sys.argv[1])), os.setuid(int(sys.argv[1]))
protect_process()
assert ctypes.CDLL(None).prctl(3) == 0, "PR_GET_DUMPABLE"
for sample in (process.start_time, process.cpu_seconds, process.resident_memory, process.open_files, process.max_files):
    assert sample(), sample.__name__
assert process.start_time() != {(): process._IMPORTED_AT}
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux only")
@pytest.mark.parametrize("user", [[], pytest.param([str(NOBODY)], marks=as_root)], ids=["this user", "nobody"])
def test_a_process_that_can_not_be_dumped_still_measures_itself(user: list[str]) -> None:  # T89
    subprocess.run([sys.executable, "-c", _MEASURE, *user], check=True, timeout=20)
