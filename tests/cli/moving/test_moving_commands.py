"""The options of ``export`` and ``import``, what they refuse, and what they say; on stores without a proxy."""

import asyncio
import json
import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from fakes.proxy import write_config
from mcp_auth_proxy.cli.main import cli
from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import ConfigurationError, McpAuthProxyError
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.exports import MOVED
from mcp_auth_proxy.store.grants import Grants
from store.builders import NOW, grant

SECRETS = {"PASSPHRASE": "correct horse battery", "OTHER": "wrong horse battery", "SHORT": "short", "EMPTY": ""}
SEALED = ("--passphrase", "env:PASSPHRASE")


class Place:
    """A folder with a configuration for ``linear`` and ``notes``, and its store."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        servers = {name: f"https://{name}.example/mcp" for name in ("linear", "notes")}
        self.config = write_config(folder, servers)
        self.database = folder / "proxy.db"

    @property
    def store(self) -> StoreSettings:
        key = KeySource(kind="file", name=str(self.folder / "proxy.key"))
        return StoreSettings(path=self.database, keys=(key,), default_key=True)

    def run(self, *words: str) -> Result:
        """Run a command in this process; ``exception`` is what ``main`` would make one line of."""
        return CliRunner(env=SECRETS).invoke(cli, [*words, "--config", str(self.config)])

    def add(self, *names: str, at: float = NOW) -> None:
        async def work() -> None:
            engine = await open_store(self.store)
            for name in names:
                await Grants(engine).add(grant(name, at=at))
            await engine.close()

        asyncio.run(work())

    def reasons(self) -> dict[str, str]:
        async def work() -> dict[str, str]:
            engine = await open_store(self.store)
            found = {each.key.account.server: each.ended_reason for each in await Grants(engine).all()}
            await engine.close()
            return found

        return asyncio.run(work())


@pytest.fixture
def here(tmp_path: Path) -> Place:
    place = Place(tmp_path / "here")
    place.add("linear", "notes")
    return place


@pytest.fixture
def there(tmp_path: Path) -> Place:
    return Place(tmp_path / "there")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "logins.export"


def refused(result: Result, kind: type[Exception] = McpAuthProxyError) -> str:
    assert isinstance(result.exception, kind), result.output
    return str(result.exception)


def test_only_the_named_servers_are_exported(here: Place, there: Place, file: Path) -> None:
    result = here.run("export", "linear", str(file), *SEALED, "--move", "--json")
    document = json.loads(result.stdout)
    assert [each["server"] for each in document["grants"]] == ["linear"]
    assert document["moved"] is True
    assert here.reasons() == {"linear": MOVED, "notes": ""}
    assert there.run("import", str(file), *SEALED).exit_code == 0
    assert there.reasons() == {"linear": ""}


def test_a_copy_writes_nothing_and_says_that_only_one_of_the_two_may_go_on(here: Place, file: Path) -> None:
    before = here.database.read_bytes()
    result = here.run("export", str(file), *SEALED)
    assert "only one of the two may go on" in result.stderr
    assert "copied" in result.stdout
    assert here.database.read_bytes() == before
    assert not [text for text in (b"canary", b"horse") if text in file.read_bytes()]


def test_a_login_that_was_moved_away_can_come_back(here: Place, file: Path) -> None:
    assert here.run("export", str(file), *SEALED, "--move").exit_code == 0
    assert here.run("import", str(file), *SEALED).stdout.count("imported") == 2
    assert here.reasons() == {"linear": "", "notes": ""}


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("env:SHORT", "is too short: it needs at least 12 characters"),
        ("env:EMPTY", "is empty"),
        ("env:UNSET", "'UNSET' is not set"),
        ("file:/nowhere/passphrase", "can't be read"),
        ("correct horse battery", "must be env:NAME or file:PATH"),
        ("env:", "must be env:NAME or file:PATH"),
    ],
)
def test_a_passphrase_that_cant_be_used_is_an_error_of_usage(here: Place, file: Path, source: str, said: str) -> None:
    for words in (("export", str(file)), ("import", str(file))):
        text = refused(here.run(*words, "--passphrase", source), ConfigurationError)
        assert said in text and "horse" not in text
    assert not file.exists()


def test_a_passphrase_in_a_file_may_end_with_a_newline(here: Place, there: Place, file: Path, tmp_path: Path) -> None:
    (tmp_path / "passphrase").write_text(f"{SECRETS['PASSPHRASE']}\n")
    assert here.run("export", str(file), "--passphrase", f"file:{tmp_path}/passphrase").exit_code == 0
    assert there.run("import", str(file), *SEALED).exit_code == 0


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "tail": (lambda sealed: sealed[:-1], "cut off"),
    "head": (lambda sealed: sealed[:30], "cut off"),
    "magic": (lambda sealed: sealed[:5], "cut off"),
    "empty": (lambda sealed: b"", "cut off"),
    "foreign": (lambda sealed: b"PK\x03\x04" + sealed, "is not an export"),
    "newer": (lambda sealed: sealed[:22] + b"\x02" + sealed[23:], "version 2 of the format"),
    "costly": (lambda sealed: sealed[:23] + b"\x28" + sealed[24:], "within bounds"),
    "content": (lambda sealed: sealed[:-20] + bytes([sealed[-20] ^ 1]) + sealed[-19:], "was changed"),
    "salt": (lambda sealed: sealed[:30] + bytes([sealed[30] ^ 1]) + sealed[31:], "was changed"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_file_that_is_not_as_it_was_written_changes_nothing(
    here: Place, there: Place, file: Path, damage: str
) -> None:
    assert here.run("export", str(file), *SEALED).exit_code == 0
    change, said = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    assert said in refused(there.run("import", str(file), *SEALED))
    assert not there.database.exists()


def test_a_wrong_passphrase_changes_nothing(here: Place, there: Place, file: Path) -> None:
    assert here.run("export", str(file), *SEALED).exit_code == 0
    text = refused(there.run("import", str(file), "--passphrase", "env:OTHER"))
    assert "the passphrase is wrong" in text and "horse" not in text
    assert not there.database.exists()


def test_no_file_is_replaced_unless_that_is_asked_for(here: Place, file: Path) -> None:  # T91
    file.write_text("mine")
    assert "--force" in refused(here.run("export", "--move", str(file), *SEALED))
    assert file.read_text() == "mine"
    assert here.reasons() == {"linear": "", "notes": ""}
    assert here.run("export", "--move", str(file), *SEALED, "--force").exit_code == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert [path.name for path in file.parent.iterdir() if path.is_file()] == [file.name]


def test_a_link_is_not_followed_and_the_umask_does_not_count(here: Place, tmp_path: Path) -> None:  # T91
    link, elsewhere = tmp_path / "link", tmp_path / "elsewhere"
    link.symlink_to(elsewhere)
    assert "exists already" in refused(here.run("export", str(link), *SEALED))
    before = os.umask(0)
    try:
        assert here.run("export", str(link), *SEALED, "--force").exit_code == 0
    finally:
        os.umask(before)
    assert not elsewhere.exists()
    assert (link.is_symlink(), stat.S_IMODE(link.stat().st_mode)) == (False, 0o600)


def test_a_move_that_cant_write_its_file_ends_nothing(here: Place, tmp_path: Path) -> None:
    for name, said in (
        ("missing/logins", "does not exist"),
        ("here", "is a folder"),
        (f"{'x' * 240}", "can't be written"),
    ):
        assert said in refused(here.run("export", "--move", f"{tmp_path}/{name}", *SEALED))
    assert here.reasons() == {"linear": "", "notes": ""}


def test_names_and_files_are_told_apart(here: Place, there: Place, file: Path) -> None:
    assert "There is no store" in refused(there.run("export", str(file), *SEALED))
    assert "There is no server 'other'" in refused(here.run("export", "other", str(file), *SEALED), ConfigurationError)
    assert "no login of notes@work" in refused(here.run("export", "notes@work", str(file), *SEALED))
    result = here.run("export", "notes", *SEALED)
    assert result.exit_code == 2 and "notes is a server" in result.stderr
    assert here.run("export", *SEALED).exit_code == 2
    assert not file.exists()


@pytest.mark.parametrize(
    "words",
    [
        ("import",),
        ("import", "logins"),
        ("import", "logins", *SEALED, "--as", "anna"),
        ("import", "--from", "mcp-remote", *SEALED),
        ("import", "--from", "mcp-use", "--headers", "env:HEADERS"),
        ("export", "linear", "--format", "kubernetes-secret", "--json", *SEALED),
        ("export", "linear", "logins", "--name", "acme", *SEALED),
        ("export", "--format", "kubernetes-secret", *SEALED),
    ],
)
def test_options_that_do_not_belong_together_are_refused(here: Place, words: tuple[str, ...]) -> None:
    assert here.run(*words).exit_code == 2


def test_a_login_that_is_not_used_there_is_named(here: Place, tmp_path: Path, file: Path) -> None:
    assert here.run("export", str(file), *SEALED).exit_code == 0
    there = Place(tmp_path / "there")
    write_config(there.folder, {"linear": "https://elsewhere.example/mcp"})
    result = there.run("import", str(file), *SEALED)
    assert result.exit_code == 0
    assert "notes is not configured here" in result.stderr
    assert "linear has another url" in result.stderr


def test_what_became_of_each_login_is_said(here: Place, there: Place, file: Path) -> None:
    assert here.run("export", str(file), *SEALED).exit_code == 0
    there.add("linear", at=NOW + 1)
    there.add("notes", at=NOW - 1)
    rows = json.loads(there.run("import", str(file), *SEALED, "--json").stdout)["grants"]
    assert {row["server"]: (row["outcome"], row["reason"]) for row in rows} == {
        "linear": ("kept", "the one that is here is newer"),
        "notes": ("imported", "in place of an older one"),
    }
    again = there.run("import", str(file), *SEALED).stdout
    assert "notes, since" in again and "not imported: it is here already, and stays" in again


def test_a_secret_of_kubernetes_moves_unless_it_keeps(here: Place, there: Place, tmp_path: Path) -> None:
    file = tmp_path / "secret.yaml"
    words = ("--format", "kubernetes-secret", *SEALED)
    result = here.run("export", "linear", str(file), *words, "--keep", "--name", "acme-logins")
    assert result.exit_code == 0
    assert "only one of the two" in result.stderr
    assert yaml.safe_load(file.read_text())["metadata"]["name"] == "acme-logins"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    result = here.run("export", "linear", *words)
    assert yaml.safe_load(result.stdout)["metadata"]["name"] == "mcp-auth-proxy-logins"
    assert '"$PASSPHRASE"' in result.stderr and "horse" not in result.output
    assert here.reasons() == {"linear": MOVED, "notes": ""}
    assert "--name" in refused(here.run("export", "notes", *words, "--name", "a b"), ConfigurationError)


def test_output_that_is_closed_ends_nothing(here: Place) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = ("export", "linear", "--format", "kubernetes-secret", *SEALED, "--config", str(here.config))

    async def work() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "mcp_auth_proxy", *command, env={**os.environ, **SECRETS}, stdout=writing,
            stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        return await process.wait()

    assert asyncio.run(work()) == 1
    os.close(writing)
    assert here.reasons() == {"linear": "", "notes": ""}
