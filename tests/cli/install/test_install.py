"""``install``: entries in the files of MCP clients, and the files as they were before."""

import json
import os
import stat
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from fakes.mcp_client import PlainClient
from fakes.proxy import Environment, Json, proxy_process, run_command, serving, write_config
from mcp_auth_proxy.cli import main
from mcp_auth_proxy.cli.install import CLIENT_NAMES
from mcp_auth_proxy.cli.install.files import BACKUP

FILES = {
    "claude-code": ".claude.json",
    "claude-desktop": ".config/Claude/claude_desktop_config.json",
    "cursor": ".cursor/mcp.json",
    "vscode": ".config/Code/User/mcp.json",
    "codex": ".codex/config.toml",
    "gemini": ".gemini/settings.json",
}
ODD_JSON = (
    '\ufeff// settings\r\n{\r\n\t"theme": "dark", // é\r\n\t"%s": {\r\n\t\t"other": {"url": "https://x.example"}, '
    '/* , */\r\n\t},\r\n\t"list": [1, 2,],\r\n}\r\n\r\n'
)
ODD_TOML = (
    "\ufeff# settings\r\nmodel = 'x' # é\r\n\r\n[mcp_servers.other]\r\nurl = 'https://x.example'\r\n[tui]\r\na = 1"
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="files of Linux and macOS")


class Machine:
    """A home folder with a configuration of the proxy beside it, and the command line in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch, self._capsys = monkeypatch, capsys
        self.home = folder / "home"
        self.home.mkdir()
        monkeypatch.setenv("HOME", str(self.home))
        monkeypatch.chdir(self.home)
        # It is for the whole process.
        monkeypatch.setattr(main, "protect_process", lambda: None)
        for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "CODEX_HOME", "CLAUDE_CONFIG_DIR", "MCP_AUTH_PROXY_CONFIG"):
            monkeypatch.delenv(name, raising=False)
        servers: dict[str, str | Json] = {"linear": "https://mcp.linear.app/mcp", "notes": "https://notes.example/mcp"}
        self.config = write_config(folder, servers, listen="127.0.0.1:8787")

    def file(self, client: str) -> Path:
        return self.home / FILES[client]

    def write(self, client: str, text: str, mode: int = 0o640) -> bytes:
        path = self.file(client)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        path.chmod(mode)
        return path.read_bytes()

    def install(self, *arguments: str, config: bool = True) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        options = ("--config", str(self.config)) if config else ()
        self._monkeypatch.setattr(sys, "argv", ["mcp-auth-proxy", "install", *arguments, *options])
        with pytest.raises(SystemExit) as end:
            main.main()
        out, err = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, out, err

    def everything(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.home.rglob("*") if path.is_file()}


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Machine:
    return Machine(tmp_path, monkeypatch, capsys)


def odd_text(client: str) -> str:
    return ODD_TOML if client == "codex" else ODD_JSON % ("servers" if client == "vscode" else "mcpServers")


def entries_of(client: str, content: bytes) -> dict[str, Any]:
    text = content.decode()
    if client == "codex":
        return dict(tomllib.loads(text.lstrip("\ufeff"))["mcp_servers"])
    return dict(json.loads(text)["servers" if client == "vscode" else "mcpServers"])


@pytest.mark.parametrize("client", CLIENT_NAMES)
def test_a_file_that_is_edited_keeps_all_else_and_is_restored(machine: Machine, client: str) -> None:
    before = machine.write(client, odd_text(client))
    path = machine.file(client)
    code, out, err = machine.install(client, "linear", "notes@work")
    assert code == 0, err
    backup = path.with_name(path.name + BACKUP)
    assert f"linear is in {path}: " in out
    assert str(backup) in err
    assert backup.read_bytes() == before
    installed = path.read_bytes()
    assert b"\n" not in installed.replace(b"\r\n", b"")
    assert {stat.S_IMODE(file.stat().st_mode) for file in (path, backup)} == {0o640}
    assert sorted(file.name for file in path.parent.iterdir() if file.is_file()) == sorted([path.name, backup.name])
    # What was there is there, byte for byte and in its order, with nothing but insertions between.
    rest = iter(installed)
    assert all(byte in rest for byte in before)

    code, out, err = machine.install(client, "notes@work", "linear")
    assert (code, path.read_bytes(), "Restart" in err) == (0, installed, False)
    assert f"linear is in {path} already: " in out

    code, out, err = machine.install(client, "linear", "notes@work", "--remove")
    assert (code, path.read_bytes()) == (0, before), err
    assert f"linear was removed from {path}" in out
    assert [file.name for file in path.parent.iterdir() if file.is_file()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("client", CLIENT_NAMES)
def test_a_file_that_was_not_there_is_made_for_its_user_and_goes_again(machine: Machine, client: str) -> None:
    code, _, err = machine.install(client, "linear", "notes@work")
    assert code == 0, err
    path = machine.file(client)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = entries_of(client, path.read_bytes())
    key = "notes_work" if client == "codex" else "notes@work"
    assert list(found) == ["linear", key]
    if client == "claude-desktop":
        assert found[key]["args"] == ["stdio", "notes@work", "--config", str(machine.config)]
        assert Path(found[key]["command"]).is_absolute()
    else:
        assert [value for value in found[key].values() if value != "http"] == ["http://127.0.0.1:8787/notes@work/mcp"]
    assert (machine.install(client, "linear", "--remove"))[0] == 0
    assert list(entries_of(client, path.read_bytes())) == [key]
    assert (machine.install(client, "notes@work", "--remove"))[0] == 0
    assert machine.everything() == {}


def test_what_was_edited_meanwhile_stays(machine: Machine) -> None:
    machine.write("cursor", '{\n  "a": 1 // one\n}')
    machine.install("cursor", "linear")
    path = machine.file("cursor")
    path.write_text(path.read_text().replace('"a": 1', '"a": [2]'))
    code, _, err = machine.install("cursor", "linear", "--remove")
    assert (code, path.read_text()) == (0, '{\n  "a": [2] // one\n}'), err


def test_a_link_stays_a_link(machine: Machine) -> None:
    real = machine.home / "dotfiles/mcp.json"
    real.parent.mkdir()
    real.write_text("{}")
    path = machine.file("cursor")
    path.parent.mkdir()
    path.symlink_to(real)
    assert (machine.install("cursor", "linear"))[0] == 0
    assert path.is_symlink()
    assert "linear" in entries_of("cursor", real.read_bytes())
    assert path.with_name(path.name + BACKUP).read_text() == "{}"
    assert (machine.install("cursor", "linear", "--remove"))[0] == 0
    assert (path.is_symlink(), real.read_text()) == (True, "{}")


def test_an_entry_that_leads_elsewhere_is_replaced_and_comes_back(machine: Machine) -> None:
    before = machine.write("gemini", '{"mcpServers": {"linear": {"httpUrl": "https://mcp.linear.app/mcp"}}}')
    code, _, err = machine.install("gemini", "linear")
    assert code == 0
    assert "did not lead to this proxy; that entry was replaced" in err
    expected = {"linear": {"httpUrl": "http://127.0.0.1:8787/linear/mcp"}}
    assert entries_of("gemini", machine.file("gemini").read_bytes()) == expected
    assert (machine.install("gemini", "linear", "--remove"))[0] == 0
    assert machine.file("gemini").read_bytes() == before
    code, _, err = machine.install("gemini", "linear", "--remove")
    assert (code, machine.file("gemini").read_bytes()) == (1, before)
    assert err.splitlines()[-1].endswith("does not lead to this proxy, so nothing was removed.")


@pytest.mark.parametrize("client", CLIENT_NAMES)
@pytest.mark.parametrize("content", [b"{]", b"\xff\xfe{}"], ids=["syntax", "encoding"])
def test_an_invalid_file_is_untouched_and_named(machine: Machine, client: str, content: bytes) -> None:
    path = machine.file(client)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    before = machine.everything()
    for options in ((), ("--remove",)):
        code, out, err = machine.install(client, "linear", *options)
        assert (code, out, machine.everything()) == (1, "", before)
        assert err.splitlines()[-1].startswith(f"error: {path} ")


@pytest.mark.parametrize("client", CLIENT_NAMES)
def test_print_writes_nothing(machine: Machine, client: str) -> None:
    code, out, err = machine.install(client, "linear", "--print")
    assert (code, machine.everything()) == (0, {})
    assert list(entries_of(client, out.encode())) == ["linear"]
    assert str(machine.file(client)) in err


def test_unknown_clients_and_servers_are_answered_with_the_known_ones(machine: Machine) -> None:
    code, out, err = machine.install("emacs", "linear")
    assert (code, out) == (2, "")
    assert [name for name in CLIENT_NAMES if f"'{name}'" not in err.splitlines()[-1]] == []
    for options in ((), ("--remove",), ("--print",)):
        code, out, err = machine.install("cursor", "lineal", *options)
        assert (code, out) == (2, "")
        assert err.splitlines()[-1].startswith("error: There is no server 'lineal'. ")
        assert "linear, notes" in err.splitlines()[-1]
    code, _, err = machine.install("cursor", "https://mcp.example.com/mcp?key=secret")
    assert (code, "secret" in err) == (2, False)
    assert machine.everything() == {}


@pytest.mark.parametrize("client", CLIENT_NAMES)
def test_a_shared_service_is_entered_with_a_reference_to_its_key(machine: Machine, client: str) -> None:
    options = ("--url", "https://proxy.example.com/", "--api-key", "env:PROXY_KEY")
    code, _, err = machine.install(client, "anything", *options, config=False)
    assert code == 0, err
    entry = entries_of(client, machine.file(client).read_bytes())["anything"]
    if client == "claude-desktop":
        shared = ["stdio", "anything", "--url", "https://proxy.example.com", "--api-key", "env:PROXY_KEY"]
        assert entry["args"] == shared
    else:
        assert "https://proxy.example.com/anything/mcp" in entry.values()
        assert "PROXY_KEY" in json.dumps(entry)
    code, _, err = machine.install(client, "anything", "--url", "https://proxy.example.com", config=False)
    if client == "claude-desktop":
        assert (code, "--url needs --api-key env:NAME or file:PATH" in err) == (2, True)
    else:
        assert (code, "PROXY_KEY" in machine.file(client).read_text()) == (0, False), err
    code, _, _ = machine.install(client, "anything", "--remove", "--url", "https://proxy.example.com", config=False)
    assert (code, machine.everything()) == (0, {})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--api-key", "mapk_1_secret"), "--api-key must be env:NAME for cursor"),
        (("--api-key", "file:/key"), "--api-key must be env:NAME for cursor"),
        (("--api-key", "env:A B"), "--api-key must be env:NAME for cursor"),
        (("--url", "http://proxy.example.com"), "must begin with https://"),
        (("--url", "https://proxy.example.com", "--config", "x"), "Give --url or --config, not both."),
    ],
)
def test_wrong_options_are_refused(machine: Machine, options: tuple[str, ...], words: str) -> None:
    code, _, err = machine.install("cursor", "linear", *options, config=False)
    assert (code, machine.everything()) == (2, {})
    assert words in err.splitlines()[-1]
    assert "secret" not in err


def test_a_file_that_looks_like_ours_has_a_backup_if_it_has_entries_of_its_user(machine: Machine) -> None:
    document = {"mcpServers": {"other": {"url": "https://x.example/mcp"}}}
    before = machine.write("cursor", json.dumps(document, indent=2) + "\n")
    assert machine.install("cursor", "linear")[0] == 0
    backup = machine.file("cursor").with_name(f"mcp.json{BACKUP}")
    assert backup.read_bytes() == before
    # Another change is kept too, and an entry of ours in the backup does not come back.
    text = machine.file("cursor").read_text().replace("x.example", "y.example")
    machine.file("cursor").write_text(text)
    assert machine.install("cursor", "notes")[0] == 0
    assert backup.read_text() == text
    assert machine.install("cursor", "notes", "linear", "--remove")[0] == 0
    assert machine.file("cursor").read_bytes() == before.replace(b"x.example", b"y.example")


def test_a_changed_address_is_written_over_the_old_one(machine: Machine) -> None:
    before = machine.write("codex", 'model = "x"\n')
    assert machine.install("codex", "linear")[0] == 0
    machine.config.write_text(machine.config.read_text().replace("8787", "9797"))
    assert machine.install("codex", "linear")[0] == 0
    text = machine.file("codex").read_text()
    assert text == 'model = "x"\n\n[mcp_servers.linear]\nurl = "http://127.0.0.1:9797/linear/mcp"\n'
    assert machine.install("codex", "linear", "--remove")[0] == 0
    assert machine.file("codex").read_bytes() == before


def test_what_is_not_there_need_not_be_removed(machine: Machine) -> None:
    code, out, _ = machine.install("vscode", "linear", "--remove")
    assert (code, out) == (0, f"linear is not in {machine.file('vscode')}\n")
    assert machine.everything() == {}


async def test_the_entry_leads_to_the_running_proxy(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    config = write_config(tmp_path, {"away": "http://127.0.0.1:9/mcp"})
    env: Environment = {"HOME": str(home), "XDG_DATA_HOME": str(home / "data"), "XDG_CONFIG_HOME": None}
    code, _, err = await run_command("install", "cursor", "away", "--config", str(config), env=env)
    assert (code, "No proxy is running with the store" in err) == (1, True)
    async with proxy_process(config) as proxy:
        code, _, err = await run_command("install", "cursor", "away", "--config", str(config), env=env)
        assert code == 0, err
        url = entries_of("cursor", (home / ".cursor/mcp.json").read_bytes())["away"]["url"]
        assert url == f"{proxy.origin}/away/mcp"
        async with PlainClient(url) as client:
            assert "away" in (await client.initialize()).message["error"]["message"]
        assert await proxy.stop() == 0


async def test_a_program_finds_a_proxy_that_has_no_configuration(tmp_path: Path) -> None:
    env: Environment = {"HOME": str(tmp_path), "XDG_DATA_HOME": None, "XDG_CONFIG_HOME": None}
    async with serving("http://127.0.0.1:9/mcp", "--listen", "127.0.0.1:0", env=env, cwd=tmp_path) as proxy:
        code, _, err = await run_command("install", "claude-desktop", "server", env=env, cwd=tmp_path)
        assert code == 0, err
        file = tmp_path / ".config/Claude/claude_desktop_config.json"
        entry = entries_of("claude-desktop", file.read_bytes())["server"]
        assert entry["args"] == ["stdio", "server", "--url", proxy.origin]
        code, _, err = await run_command("install", "claude-desktop", "server", "--remove", env=env, cwd=tmp_path)
        assert (code, file.exists()) == (0, False), err


def test_new_folders_are_for_the_user_alone_whatever_the_umask_is(machine: Machine) -> None:  # T46
    before = os.umask(0)
    try:
        code, _, err = machine.install("vscode", "linear")
    finally:
        os.umask(before)
    assert code == 0, err
    path = machine.file("vscode")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for folder in (path.parent, path.parent.parent, path.parent.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
