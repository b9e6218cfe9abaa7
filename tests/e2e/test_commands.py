"""The commands as a user runs them: exit codes, what goes to which stream, and one line for each error."""

import hashlib
import json
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from fakes.fixtures import Servers
from fakes.mcp_client import PlainClient
from fakes.other_users import NOBODY, as_root
from fakes.proxy import proxy_process, run_command, serving, until, write_config
from mcp_auth_proxy import __version__
from mcp_auth_proxy.cli.listener import bind
from mcp_auth_proxy.cli.main import cli
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.errors import McpAuthProxyError

FAULTY = """
listen: 8787
nonsense: 1
servers:
  Alpha: {url: https://a.example/mcp}
  beta: {url: ftp://b.example/mcp}
  gamma: {url: http://c.example/mcp}
  delta: {url: https://d.example/mcp, oauth: {client_id: d, client_secret: env:NOT_SET_ANYWHERE}}
"""
FAULTY_PATHS = ["listen", "nonsense", "servers.Alpha", "servers.beta.url", "servers.gamma.url"]

KEY_LINE = "A new store key was made"

DEMO_STEPS = ["401", "discovery", "registration", "consent", "token", "retry", "result", "refresh"]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir() if file.is_file()}


def one_line(err: str) -> str:
    """The only line on stderr."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


async def stored(folder: Path, url: str = "http://127.0.0.1:9/mcp") -> Path:
    """A configuration whose store has been made."""
    config = write_config(folder, {"notes": url})
    code, _, _ = await run_command("logout", "notes", "--config", str(config))
    assert code == 0
    return config


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "A command is missing"),
        (["bogus"], "No such command 'bogus'"),
        (["keys", "turn"], "No such command 'turn'"),
        (["serve", "--bogus"], "--bogus"),
        (["login"], "SERVER"),
        (["serve", "--log-level", "loud"], "'debug', 'info', 'warning'"),
        (["serve", "https://a.example/mcp", "--config", "x.yaml"], "not both"),
        (["serve", "a.example/mcp"], "is https:// missing at its beginning?"),
        (["serve", "linear"], "'linear' is not a URL. Give the URL of a server, or nothing"),
        (["login", "a.example/mcp"], "neither a configured name nor a URL; is https:// missing"),
        (["service", "install"], "or set $MCP_AUTH_PROXY_CONFIG."),
        (["serve", "ftp://a.example/mcp"], "http:// or https://"),
        (["serve", "http://a.example/mcp"], "allow_http"),
        (["serve", "https://a.example/mcp", "--listen", "nowhere"], "HOST:PORT"),
        (["serve", "--config", "gone.yaml"], "gone.yaml (from --config) does not exist"),
        (["serve"], "mcp-auth-proxy serve https://"),
        (["status"], "No configuration was found"),
        (["status", "notes"], "No configuration was found"),
        (["login", "notes"], "No configuration was found"),
        (["check"], "$MCP_AUTH_PROXY_CONFIG"),
    ],
)
async def test_wrong_usage_or_configuration_exits_with_2(tmp_path: Path, arguments: list[str], words: str) -> None:
    env = {"MCP_AUTH_PROXY_CONFIG": None, "XDG_CONFIG_HOME": str(tmp_path), "XDG_DATA_HOME": str(tmp_path)}
    code, out, err = await run_command(*arguments, env=env, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert words in err.splitlines()[-1]
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["check", "serve", "status"])
async def test_all_errors_of_the_file_are_reported_at_once(tmp_path: Path, command: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(FAULTY)
    code, out, err = await run_command(command, "--config", str(config))
    assert (code, out) == (2, "")
    reported = re.findall(rf"^error: {re.escape(str(config))}:(\d+): ([\w.]+): \S", err, re.MULTILINE)
    lines = FAULTY.splitlines()
    assert all(path.rpartition(".")[2] in lines[int(line) - 1] for line, path in reported)
    assert [path for path in FAULTY_PATHS if path not in dict(reported).values()] == []
    # Only commands that use a secret need it.
    secret_missing = command != "status"
    assert ("NOT_SET_ANYWHERE" in err) is secret_missing
    assert len(err.splitlines()) == len(FAULTY_PATHS) + secret_missing
    assert [file.name for file in tmp_path.iterdir()] == ["c.yaml"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("servers: {}", "at least one server"),
        ("servers:\n\ta: 1", "line 2, column 1"),
        ('servers:\n  a:\n    url: "https://x\n', "it begins on line 3"),
        ("- a", "mapping"),
        ("mcpServers:\n  a:\n    url: https://a.example/mcp", "1: mcpServers: unknown key; did you mean servers?"),
        ("servers:\n  a:\n    uri: https://a.example/mcp", "3: servers.a.uri: unknown key; did you mean url?"),
        ("servers:\n  a:\n    url: a.example/mcp", "URL; is https:// missing at its beginning?"),
    ],
)
async def test_an_invalid_configuration_is_reported_in_one_line(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "mcp-auth-proxy.yaml").write_text(content)
    code, _, err = await run_command("check", cwd=tmp_path)
    assert code == 2
    assert words in one_line(err)


async def test_check_validates_the_store_key_too(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}, store={"keys": ["env:KEY_OF_THE_STORE"]})
    code, out, err = await run_command("check", "--config", str(config), env={"KEY_OF_THE_STORE": "no key"})
    assert (code, out) == (2, "")
    assert "store.keys" in err
    assert "env:KEY_OF_THE_STORE is not a key" in err


async def test_an_error_in_the_store_key_has_its_line_too(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    (tmp_path / "k").write_text("no key")
    config.write_text("servers: {notes: {url: 'https://a.example/mcp'}}\nstore:\n  keys: [file:k]\n")
    _, _, err = await run_command("check", "--config", str(config))
    assert one_line(err).startswith(f"error: {config}:3: store.keys: ")


def every_command(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from every_command(command, *path, name)
        else:
            yield (*path, name)


@pytest.mark.parametrize("command", list(every_command(cli)), ids=" ".join)
async def test_help_has_an_example_and_each_default(command: tuple[str, ...]) -> None:
    code, out, err = await run_command(*command, "--help")
    assert (code, err) == (0, "")
    example = re.search(r"Examples?:\n((?: +mcp-auth-proxy .+\n)+)", out)
    assert example
    assert all(" ".join(command) in line for line in example[1].splitlines())
    options = out.partition("Options:\n")[2].partition("\n\n")[0]
    described = [" ".join(text.split()) for text in re.split(r"^  (?=-)", options, flags=re.MULTILINE)[1:]]
    own = [text for text in described if not text.startswith(("-h,", "-V,"))]
    assert [text for text in own if "Default: " not in text] == []


async def test_the_version_is_printed() -> None:
    for option in ("-V", "--version"):
        assert await run_command(option) == (0, f"mcp-auth-proxy, version {__version__}\n", "")


async def test_check_says_that_a_valid_file_is_valid(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a": "https://a.example/mcp", "b": "https://b.example/mcp"})
    assert await run_command("check", "--config", str(config)) == (0, f"{config}: valid, 2 servers\n", "")
    assert [file.name for file in tmp_path.iterdir()] == [config.name]


async def test_the_example_configuration_is_valid() -> None:
    example = Path(__file__).parents[2] / "config.example.yaml"
    code, out, err = await run_command("check", "--config", str(example))
    assert (code, err) == (0, ""), out


async def test_configuration_is_looked_for_in_the_order_that_is_documented(tmp_path: Path) -> None:
    places = {
        "flag": tmp_path / "flag.yaml",
        "variable": tmp_path / "variable.yaml",
        "here": tmp_path / "here" / "mcp-auth-proxy.yaml",
        "platform": tmp_path / "xdg" / "mcp-auth-proxy" / "mcp-auth-proxy.yaml",
    }
    for path in places.values():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump({"servers": {"a": {"url": "https://a.example/mcp"}}}))
    env: dict[str, str | None] = {"XDG_CONFIG_HOME": str(tmp_path / "xdg"), "HOME": str(tmp_path)}
    if sys.platform == "darwin":
        places.pop("platform")
    for name, path in places.items():
        arguments = ["--config", str(places["flag"])] if name == "flag" else []
        env["MCP_AUTH_PROXY_CONFIG"] = str(places["variable"]) if name in ("flag", "variable") else None
        cwd = tmp_path if name == "platform" else tmp_path / "here"
        code, out, _ = await run_command("check", *arguments, env=env, cwd=cwd)
        assert (code, out) == (0, f"{path}: valid, 1 server\n"), name


async def test_a_port_that_is_taken_is_one_line_and_exit_1(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a": "https://a.example/mcp"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code, out, err = await run_command("serve", "--config", str(config), "--listen", address)
    assert (code, out) == (1, "")
    line = one_line(err)
    assert address in line
    assert "--listen" in line
    assert [file.name for file in tmp_path.iterdir()] == [config.name]


async def test_an_address_of_another_machine_is_one_line_and_exit_1(tmp_path: Path) -> None:
    arguments = ("serve", "https://a.example/mcp", "--listen", "192.0.2.1:8787", "--allow-anonymous")
    code, _, err = await run_command(*arguments, env={"XDG_DATA_HOME": str(tmp_path)}, cwd=tmp_path)
    assert code == 1
    assert "Can't listen on 192.0.2.1:8787: this machine does not have that address; choose another with" in err
    one_line(err)


@as_root
def test_a_port_that_is_for_root_alone_says_so() -> None:
    os.seteuid(NOBODY)
    try:
        with pytest.raises(McpAuthProxyError, match=r"127\.0\.0\.1:1: ports below 1024 are for root"):
            bind(Address("127.0.0.1", 1))
    finally:
        os.seteuid(0)


async def test_a_port_alone_is_one_of_loopback(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}, listen="[::1]:0")
    async with serving("--config", str(config), "--listen", "0") as proxy:
        assert proxy.origin.startswith("http://127.0.0.1:")


@pytest.mark.parametrize("command", [["serve"], ["status"], ["login", "notes"], ["logout", "notes"]])
async def test_a_wrong_key_is_refused_and_nothing_is_written(tmp_path: Path, command: list[str]) -> None:  # T48
    config = await stored(tmp_path)
    (tmp_path / "proxy.key").write_text("A" * 43 + "=\n")
    before = digests(tmp_path)
    code, out, err = await run_command(*command, "--config", str(config))
    assert (code, out) == (2, "")
    assert "wrong key" in one_line(err).lower()
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "proxy.key").unlink(), "key file"),
        (lambda folder: (folder / "proxy.key").write_text("short\n"), "not a key"),
        (lambda folder: (folder / "proxy.db").write_bytes((folder / "proxy.db").read_bytes()[:20_000]), "damaged"),
        (lambda folder: (folder / "proxy.db").write_bytes(b"\x00" * 4096), "not a store"),
        (lambda folder: (folder / "proxy.db").write_bytes(b""), "not a store"),
    ],
)
async def test_a_damaged_store_is_refused_and_left_as_it_is(tmp_path: Path, damage: object, words: str) -> None:  # T48
    config = await stored(tmp_path)
    assert callable(damage)
    damage(tmp_path)
    before = digests(tmp_path)
    code, out, err = await run_command("serve", "--config", str(config))
    assert (code, out) == (2 if "key" in words else 1, "")
    assert words in one_line(err)
    assert digests(tmp_path) == before


@pytest.mark.parametrize(
    ("sections", "leftover", "words"),
    [
        ({"outbound": {"ca_bundle": "mcp-auth-proxy.yaml"}}, "", "no PEM certificate"),
        ({}, "proxy.db-wal", "proxy.db-wal exists"),
        ({"store": {"url": "sqlite:////proc/none/proxy.db"}}, "", "can't be created"),
    ],
    ids=["certificates", "left-over log", "no folder"],
)
async def test_a_start_that_fails_leaves_neither_store_nor_key(
    tmp_path: Path, sections: dict[str, Any], leftover: str, words: str
) -> None:
    config = write_config(tmp_path, {"notes": "http://127.0.0.1:9/mcp"}, **sections)
    if leftover:
        (tmp_path / leftover).touch()
    code, out, err = await run_command("serve", "--config", str(config))
    assert (code != 0, out) == (True, "")
    assert words in one_line(err)
    assert {file.name for file in tmp_path.iterdir()} == {config.name, leftover} - {""}


async def test_only_the_first_start_announces_the_key_that_it_created(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a": "https://a.example/mcp"})
    async with proxy_process(config) as first:
        assert await first.stop() == 0
    async with proxy_process(config) as second:
        assert await second.stop() == 0
    assert first.err.count(KEY_LINE) == 1
    assert str(tmp_path / "proxy.key") in first.err
    assert KEY_LINE not in second.err


async def test_serve_prints_what_it_serves_and_how_to_configure_a_client(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a": "https://a.example/mcp", "b": "https://b.example/mcp"})
    async with proxy_process(config) as proxy:
        assert await proxy.stop() == 0
    for name in "ab":
        assert re.search(rf"{name} +{proxy.origin}/{name}/mcp +-> +https://{name}.example/mcp", proxy.out)
    assert f"dashboard  {proxy.origin}/" in proxy.out
    assert f"store      {tmp_path / 'proxy.db'}" in proxy.out
    assert re.search(r"mcp-auth-proxy install claude-code\|\S+ a$", proxy.out, re.MULTILINE)
    assert "\x1b" not in proxy.log


async def test_serve_with_a_url_serves_one_server_at_mcp_and_under_its_name(servers: Servers, tmp_path: Path) -> None:
    upstream = await servers.mcp_server(protected=False)
    env = {"XDG_DATA_HOME": str(tmp_path / "data"), "HOME": str(tmp_path), "MCP_AUTH_PROXY_CONFIG": None}
    async with serving(upstream.url, "--listen", "127.0.0.1:0", env=env, cwd=tmp_path) as proxy:
        (name,) = re.findall(rf"{proxy.origin}/([^/]+)/mcp +->", proxy.out)
        for path in ("mcp", f"{name}/mcp"):
            async with PlainClient(f"{proxy.origin}/{path}") as client:
                assert (await client.call("echo", text=path)).text == path
        code, out, _ = await run_command("status", upstream.url, "--json", env=env, cwd=tmp_path)
        assert (code, [row["server"] for row in json.loads(out)]) == (0, [name])
        assert await proxy.stop() == 0
    assert list(tmp_path.rglob("*.db"))


async def test_a_running_proxy_does_not_import_mcp(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a": "https://a.example/mcp"})
    async with proxy_process(config, env={"PYTHONPROFILEIMPORTTIME": "1"}) as proxy:
        async with PlainClient(f"{proxy.origin}/readyz") as client:
            assert (await client.http.get(client.url)).json() == {"status": "ready"}
        assert await proxy.stop() == 0
    imported = re.findall(r"\| +([\w.]+)$", proxy.err, re.MULTILINE)
    assert "mcp_auth_proxy.app" in imported
    assert [name for name in imported if name == "mcp" or name.startswith("mcp.")] == []


async def test_the_installed_command_and_the_module_are_the_same() -> None:
    _, by_module, _ = await run_command("--version")
    script = shutil.which("mcp-auth-proxy", path=str(Path(sys.executable).parent))
    assert script, "the package is not installed in this environment"
    assert "mcp_auth_proxy.cli.main" in Path(script).read_text()
    assert re.fullmatch(r"mcp-auth-proxy, version \d+\.\d+\.\d+\S*\n", by_module)


async def test_the_demo_shows_each_step_and_exits_0() -> None:
    code, out, err = await run_command("demo", timeout=60)
    assert (code, err) == (0, "")
    place = 0
    for step in DEMO_STEPS:
        found = re.compile(rf"^  {step}\b", re.MULTILINE).search(out, place)
        assert found, f"no step {step} after\n{out[:place]}"
        place = found.end()
    assert "echo: hello" in out


async def test_an_interrupt_ends_serve_without_an_error(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"a": "https://a.example/mcp"})
    async with proxy_process(config) as proxy:
        await until(lambda: KEY_LINE in proxy.err)
        assert await proxy.stop(signal.SIGINT) == 0
    # Nothing comes after the key's line and the banner.
    assert KEY_LINE in proxy.err.rstrip().splitlines()[-1]
    assert proxy.out.rstrip().splitlines()[-1].startswith("To point an MCP client at it: ")
