"""Where each client has its file, and what an entry in it looks like."""

from pathlib import Path

import pytest

from mcp_auth_proxy.cli.install import CLIENT_NAMES
from mcp_auth_proxy.cli.install.clients import CLIENTS, Machine, Target, is_current, is_ours

HOME = Path("/home/me")
SUPPORT = "Library/Application Support"
PLACES = {
    "claude-code": (".claude.json", ".claude.json"),
    "claude-desktop": (
        ".config/Claude/claude_desktop_config.json",
        f"{SUPPORT}/Claude/claude_desktop_config.json",
    ),
    "cursor": (".cursor/mcp.json", ".cursor/mcp.json"),
    "vscode": (".config/Code/User/mcp.json", f"{SUPPORT}/Code/User/mcp.json"),
    "codex": (".codex/config.toml", ".codex/config.toml"),
    "gemini": (".gemini/settings.json", ".gemini/settings.json"),
}
URL = "http://127.0.0.1:8787/linear/mcp"
COMMAND = ("/bin/mcp-auth-proxy", "stdio", "linear")
ENTRIES = {
    "claude-code": (
        {"type": "http", "url": URL},
        {"type": "http", "url": URL, "headers": {"Authorization": "Bearer ${KEY}"}},
    ),
    "claude-desktop": ({"command": COMMAND[0], "args": ["stdio", "linear"]},) * 2,
    "cursor": ({"url": URL}, {"url": URL, "headers": {"Authorization": "Bearer ${env:KEY}"}}),
    "vscode": (
        {"type": "http", "url": URL},
        {"type": "http", "url": URL, "headers": {"Authorization": "Bearer ${env:KEY}"}},
    ),
    "codex": ({"url": URL}, {"url": URL, "bearer_token_env_var": "KEY"}),
    "gemini": ({"httpUrl": URL}, {"httpUrl": URL, "headers": {"Authorization": "Bearer ${KEY}"}}),
}


def test_every_client_is_known_by_its_name() -> None:
    assert tuple(CLIENTS) == CLIENT_NAMES == tuple(PLACES)


@pytest.mark.parametrize("name", CLIENT_NAMES)
def test_each_client_has_its_file_on_linux_and_macos(name: str) -> None:
    linux, macos = PLACES[name]
    assert CLIENTS[name].path(Machine(HOME, "linux", {})) == HOME / linux
    assert CLIENTS[name].path(Machine(HOME, "darwin", {})) == HOME / macos


@pytest.mark.parametrize(
    ("name", "variable", "file"),
    [
        ("claude-desktop", "XDG_CONFIG_HOME", "Claude/claude_desktop_config.json"),
        ("vscode", "XDG_CONFIG_HOME", "Code/User/mcp.json"),
        ("codex", "CODEX_HOME", "config.toml"),
        ("claude-code", "CLAUDE_CONFIG_DIR", ".claude.json"),
    ],
)
def test_a_folder_that_was_moved_is_used_if_the_client_uses_it(
    tmp_path: Path, name: str, variable: str, file: str
) -> None:
    machine = Machine(HOME, "linux", {variable: str(tmp_path / "moved")})
    assert CLIENTS[name].path(machine) == HOME / PLACES[name][0]
    (tmp_path / "moved" / file).parent.mkdir(parents=True)
    (tmp_path / "moved" / file).touch()
    assert CLIENTS[name].path(machine) == tmp_path / "moved" / file
    assert CLIENTS[name].path(Machine(HOME, "linux", {variable: "moved"})) == HOME / PLACES[name][0]


@pytest.mark.parametrize("name", CLIENT_NAMES)
def test_an_entry_refers_to_the_key_and_never_has_it(name: str) -> None:
    plain, with_key = ENTRIES[name]
    target = Target(server="linear", url=URL, command=COMMAND)
    assert CLIENTS[name].entry(target) == plain
    keyed = Target(server="linear", url=URL, command=COMMAND, variable="KEY")
    assert CLIENTS[name].entry(keyed) == with_key


def test_codex_gets_names_that_it_accepts() -> None:
    assert [client.key("notes@work") for client in CLIENTS.values()].count("notes@work") == 5
    assert CLIENTS["codex"].key("notes@work") == "notes_work"


def test_an_entry_is_current_whatever_its_user_has_added() -> None:
    entry = {"url": URL}
    assert is_current({"url": URL, "disabled": True}, entry)
    assert not is_current({"url": URL, "headers": {"Authorization": "Bearer x"}}, entry)
    assert not is_current({"url": "https://mcp.linear.app/mcp"}, entry)
    assert not is_current("url", entry)


@pytest.mark.parametrize(
    ("entry", "ours"),
    [
        ({"url": "http://127.0.0.1:9/linear@work/mcp"}, True),
        ({"httpUrl": "https://proxy.example.com/linear%40work/mcp"}, True),
        ({"command": "/opt/mcp-auth-proxy", "args": ["stdio", "linear@work"]}, True),
        ({"url": "https://mcp.linear.app/mcp"}, False),
        ({"url": "http://127.0.0.1:9/linear/mcp"}, False),
        ({"command": "npx", "args": ["linear@work"]}, False),
        ([], False),
    ],
)
def test_an_entry_is_ours_if_it_leads_to_the_proxy(entry: object, ours: bool) -> None:
    assert is_ours(entry, "linear@work") is ours
