"""Whose file a configuration may be that was found and not named."""

import grp
import os
import pwd
from pathlib import Path

import pytest

from fakes.other_users import NOBODY, as_root
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.location import find, find_place
from mcp_auth_proxy.config.trust import reason_to_distrust
from mcp_auth_proxy.errors import ConfigurationError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of this user in a private folder."""
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    path = folder / "mcp-auth-proxy.yaml"
    path.touch(mode=0o600)
    return path


@pytest.mark.parametrize(("folder", "mode"), [(0o700, 0o600), (0o755, 0o644), (0o755, 0o444), (0o500, 0o600)])
def test_a_file_that_only_its_user_can_write_is_trusted(file: Path, folder: int, mode: int) -> None:
    file.chmod(mode)
    file.parent.chmod(folder)
    assert reason_to_distrust(file) is None


@pytest.mark.parametrize("mode", [0o757, 0o1777, 0o702])
def test_a_folder_that_everyone_can_write_is_not(file: Path, mode: int) -> None:  # T89
    file.parent.chmod(mode)
    assert reason_to_distrust(file) == f"{file.parent} can be written by everyone"


@pytest.mark.parametrize("mode", [0o606, 0o666, 0o602])
def test_a_file_that_everyone_can_write_is_not(file: Path, mode: int) -> None:  # T89
    file.chmod(mode)
    assert reason_to_distrust(file) == f"{file} can be written by everyone"


@as_root
@pytest.mark.parametrize("others", ["file", "folder"])
def test_what_belongs_to_another_user_is_not(file: Path, others: str) -> None:  # T89
    place = file if others == "file" else file.parent
    os.chown(place, NOBODY, -1)
    assert reason_to_distrust(file) == f"{place} belongs to the user {pwd.getpwuid(NOBODY).pw_name}"


@as_root
@pytest.mark.parametrize("others", ["file", "folder"])
def test_what_another_group_can_write_is_not(file: Path, others: str) -> None:  # T89
    place = file if others == "file" else file.parent
    os.chown(place, -1, NOBODY)
    assert reason_to_distrust(file) is None
    place.chmod(0o770)
    assert reason_to_distrust(file) == f"{place} can be written by the group {grp.getgrgid(NOBODY).gr_name}"


def account(name: str, uid: int, gid: int) -> pwd.struct_passwd:
    return pwd.struct_passwd((name, "x", uid, gid, "", "/", "/bin/sh"))


@pytest.mark.parametrize(
    ("name", "members", "others", "trusted"),
    [
        ("me", [], [], True),
        ("me", ["me"], [], True),
        ("users", [], [], False),
        ("me", ["me", "you"], [], False),
        ("me", [], [account("you", 1, os.getegid())], False),
    ],
)
def test_the_group_of_this_user_alone_may_write(  # T89
    file: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    members: list[str],
    others: list[pwd.struct_passwd],
    trusted: bool,
) -> None:
    me = account("me", os.geteuid(), os.getegid())
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: me)
    monkeypatch.setattr(pwd, "getpwall", lambda: [me, *others])
    monkeypatch.setattr(grp, "getgrgid", lambda gid: grp.struct_group((name, "x", gid, members)))
    os.chown(file, -1, os.getegid())
    file.chmod(0o660)
    assert (reason_to_distrust(file) is None) is trusted


def test_the_target_of_a_link_and_its_folder_count_too(file: Path, tmp_path: Path) -> None:  # T89
    here = tmp_path / "here"
    here.mkdir(mode=0o700)
    link = here / "mcp-auth-proxy.yaml"
    link.symlink_to("../folder/mcp-auth-proxy.yaml")
    assert reason_to_distrust(link) is None
    file.chmod(0o666)
    assert str(reason_to_distrust(link)).endswith("folder/mcp-auth-proxy.yaml can be written by everyone")
    file.chmod(0o600)
    file.parent.chmod(0o777)
    assert str(reason_to_distrust(link)).endswith("folder can be written by everyone")
    link.unlink()
    link.symlink_to(link)
    assert "symbolic links" in str(reason_to_distrust(link))


@as_root
def test_a_link_of_another_user_is_not_followed(file: Path) -> None:  # T89
    link = file.with_name("link.yaml")
    link.symlink_to(file)
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    assert str(reason_to_distrust(link)).startswith(f"{link} belongs to the user")


def test_a_file_that_is_not_trusted_is_refused_unless_it_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    file.parent.chmod(0o1777)
    with pytest.raises(
        ConfigurationError, match=r"current folder.*everyone.*--config or .MCP_AUTH_PROXY_CONFIG"
    ):  # T89
        find(None, {})
    assert find(file.name, {}) == file
    assert find(None, {"MCP_AUTH_PROXY_CONFIG": str(file)}) == file


def write(file: Path, keys: str = "[env:KEY]", url: str = "sqlite:///s.db") -> None:
    file.write_text(f"store: {{url: '{url}', keys: {keys}}}\nservers: {{a: {{url: 'https://a.example/mcp'}}}}\n")


COMMAND = "['exec:touch ran', env:KEY]"
ENGINE = "postgresql://db.example/?sslcert=c.pem&sslkey=%2Fproc%2Fself%2Fcwd%2Fevil.so%3A1"
KEY_LOG = "postgresql://db.example/?sslkeylogfile=.bashrc"


@pytest.mark.parametrize(("keys", "url"), [(COMMAND, "sqlite:///s.db"), ("[env:KEY]", ENGINE), ("[env:KEY]", KEY_LOG)])
def test_a_file_that_was_only_found_runs_nothing(file: Path, keys: str, url: str) -> None:  # T91
    write(file, keys, url)
    environ = {"KEY": "x" * 43}
    load(file, environ=environ)
    with pytest.raises(ConfigurationError) as caught:
        load(file, environ=environ, programs=False)
    (error,) = caught.value.errors
    assert error.path == ("store.keys[0]" if keys == COMMAND else "store.url")
    assert "only found in the current folder" in str(error)
    assert "--config or $MCP_AUTH_PROXY_CONFIG, or move it to " in str(error)


def test_which_files_are_chosen(file: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # T91
    monkeypatch.chdir(file.parent)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "none"))
    assert find_place(None, {}) == (file, False)
    assert find_place(file.name, {}) == (file, True)
    assert find_place(None, {"MCP_AUTH_PROXY_CONFIG": file.name}) == (file, True)
    folder = tmp_path / "home" / "mcp-auth-proxy"
    folder.mkdir(parents=True, mode=0o700)
    file.rename(folder / file.name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(folder.parent))
    assert find_place(None, {}) == (folder / file.name, True)
    monkeypatch.chdir(folder)
    assert find_place(None, {}) == (folder / file.name, True)
