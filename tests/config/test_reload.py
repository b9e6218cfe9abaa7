"""A configuration file that is changed while the proxy runs, on a real disk."""

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from fakes.proxy import until
from mcp_auth_proxy.config.changes import SettingsChange
from mcp_auth_proxy.config.reload import ConfigFile, Reloader
from mcp_auth_proxy.config.settings import Secret, Settings
from mcp_auth_proxy.observability import metrics

POLL = 0.02
SETTLE = 0.05


class Folder:
    """A folder with a configuration, and the reloader that watches it."""

    def __init__(self, path: Path) -> None:
        self.config = path / "mcp-auth-proxy.yaml"
        self.changes: list[SettingsChange] = []
        self.file: ConfigFile
        self.settings: Settings
        self.reloader: Reloader

    def write(self, *servers: str, more: str = "") -> None:
        """Put a file with these servers in the place of the one before, as an editor that renames."""
        lines = [f"  {name}: {{url: https://{name}.example/mcp}}" for name in servers]
        self.replace("\n".join(["servers:", *lines, more]))

    def replace(self, text: str) -> None:
        new = self.config.with_suffix(".new")
        new.write_text(text)
        new.rename(self.config)

    def start(self, listen: str | None = None, settle_time: float = SETTLE) -> None:
        self.file = ConfigFile(self.config, environ={}, listen=listen)
        self.settings = self.file.read()
        self.reloader = Reloader(
            self.file, self.settings, self.changes.append, poll_interval=POLL, settle_time=settle_time
        )

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.reloader.run())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def next_change(self, count: int = 1) -> SettingsChange:
        await until(lambda: len(self.changes) >= count, f"{count} changes")
        return self.changes[count - 1]


@pytest.fixture
def folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> Folder:
    caplog.set_level(logging.INFO)
    return Folder(tmp_path)


def reloads(outcome: str) -> float:
    return metrics.reloads.labels(outcome).value


async def test_a_changed_file_is_read_and_the_differences_applied(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    applied = reloads("applied")
    folder.write("a", "b")
    folder.start()
    async with folder.watched():
        folder.write("b", "c", more="limits: {body: 1MiB}")
        change = await folder.next_change()
        await until(lambda: caplog.messages)
    assert (change.servers.added, change.servers.removed, change.servers.changed) == (("c",), ("a",), ())
    assert change.applied == ("limits.body",)
    assert caplog.messages == ["configuration reloaded: added c; removed a; applied limits.body"]
    assert reloads("applied") == applied + 1


async def test_each_change_is_compared_with_the_one_before(folder: Folder) -> None:
    folder.write("a")
    folder.start()
    async with folder.watched():
        folder.write("a", "b")
        await folder.next_change()
        folder.write("a")
        assert (await folder.next_change(2)).servers.removed == ("b",)


async def test_a_file_with_errors_changes_nothing_and_each_error_is_logged_on_its_own_line(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("a")
    folder.start()
    async with folder.watched():
        folder.replace("nonsense: 1\nservers:\n  a: {url: ftp://a.example}\n  b: {}\n")
        await until(lambda: len(caplog.messages) == 3)
        assert metrics.last_reload_successful.labels().value == 0
        folder.replace("servers: [")
        await until(lambda: len(caplog.messages) == 4)
        assert folder.changes == []
        folder.write("a", "b")
        await folder.next_change()
    start = f"configuration not reloaded: {folder.config}:"
    assert all(message.startswith(start) for message in caplog.messages[:4])
    logged = [message.removeprefix(start) for message in caplog.messages[:4]]
    places = ["1: nonsense: ", "3: servers.a.url: ", "4: servers.b.url: ", " line 2, column 1: "]
    assert all(line.startswith(place) for line, place in zip(logged, places, strict=True))
    assert {record.levelname for record in caplog.records[:4]} == {"ERROR"}
    assert metrics.last_reload_successful.labels().value == 1


async def test_keys_that_need_a_restart_are_named_and_the_rest_applied(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("a")
    folder.start()
    async with folder.watched():
        folder.write("a", "b", more="listen: 127.0.0.1:1\nstore: {url: sqlite:///other.db}")
        change = await folder.next_change()
        await until(lambda: len(caplog.messages) == 2)
    assert change.settings.listen == folder.settings.listen
    assert caplog.messages == [
        "configuration reloaded: added b",
        "configuration: restart the proxy to apply the new listen, store.url",
    ]
    assert caplog.records[1].levelname == "WARNING"


async def test_the_flag_of_the_command_line_still_overrides_the_file(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("a")
    folder.start(listen="127.0.0.1:7")
    async with folder.watched():
        folder.write("a", "b", more="listen: 127.0.0.1:1")
        await folder.next_change()
        await until(lambda: caplog.messages)
    assert caplog.messages == ["configuration reloaded: added b"]


# What counts as a change, and when it is read


def write_secret(folder: Folder, text: str) -> Path:
    secret = folder.config.with_name("secret")
    secret.write_text(text)
    return secret


WITH_SECRET = "servers: {a: {url: https://a.example/mcp, oauth: {client_id: x, client_secret: file:secret}}}"


def secret_of(settings: Settings) -> Secret | None:
    return settings.servers["a"].oauth.client_secret


async def test_a_secret_file_that_changed_alone_is_read_again(folder: Folder) -> None:
    write_secret(folder, "old")
    folder.replace(WITH_SECRET)
    folder.start()
    assert secret_of(folder.settings) == Secret("old")
    async with folder.watched():
        write_secret(folder, "new")
        change = await folder.next_change()
    assert change.servers.changed == ("a",)
    assert secret_of(change.settings) == Secret("new")


async def test_a_missing_secret_file_is_noticed_when_it_appears(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("a")
    folder.start()
    async with folder.watched():
        folder.replace(WITH_SECRET)
        await until(lambda: "servers.a.oauth.client_secret: the file" in caplog.text)
        write_secret(folder, "here")
        assert secret_of((await folder.next_change()).settings) == Secret("here")


async def test_secret_files_are_still_watched_while_the_configuration_is_broken(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    write_secret(folder, "old")
    folder.replace(WITH_SECRET)
    folder.start()
    async with folder.watched():
        folder.replace("servers: [")
        await until(lambda: len(caplog.messages) == 1)
        write_secret(folder, "new")
        await until(lambda: len(caplog.messages) == 2)  # logged again, because something changed
        folder.replace(WITH_SECRET)
        assert secret_of((await folder.next_change()).settings) == Secret("new")


async def test_a_swapped_symbolic_link_is_a_change(folder: Folder) -> None:
    """Kubernetes mounts a ConfigMap as links through ``..data``, and swaps that one."""
    root = folder.config.parent
    for version, servers in (("v1", "{a: {url: https://a.example/mcp}}"), ("v2", "{b: {url: https://b.example/mcp}}")):
        (root / version).mkdir()
        (root / version / folder.config.name).write_text(f"servers: {servers}")
    (root / "..data").symlink_to("v1")
    folder.config.symlink_to(f"..data/{folder.config.name}")
    folder.start()
    async with folder.watched():
        (root / "..new").symlink_to("v2")
        (root / "..new").rename(root / "..data")
        change = await folder.next_change()
    assert (change.servers.added, change.servers.removed) == (("b",), ("a",))


async def test_a_file_is_not_read_while_it_is_being_saved(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    """Each intermediate state is valid, but only the last one is intended."""
    folder.write("a")
    folder.start(settle_time=0.5)
    text = "servers:\n" + "".join(f"  s{n}: {{url: https://s{n}.example/mcp}}\n" for n in range(8))
    async with folder.watched():
        with folder.config.open("w") as file:
            for line in text.splitlines(keepends=True):
                file.write(line)
                file.flush()
                await asyncio.sleep(2 * POLL)  # a slow editor, but faster than what is waited out
        change = await folder.next_change()
    assert len(change.settings.servers) == 8
    assert len(folder.changes) == 1
    assert len(caplog.messages) == 1


async def test_a_requested_reload_happens_even_if_nothing_has_changed(
    folder: Folder, caplog: pytest.LogCaptureFixture
) -> None:
    folder.write("a")
    folder.start()
    async with folder.watched():
        folder.reloader.request()
        await until(lambda: caplog.messages)
    assert caplog.messages == ["configuration reloaded: nothing has changed"]
    assert folder.changes == []


async def test_a_replaced_file_of_the_same_size_and_time_is_noticed_by_its_inode(folder: Folder) -> None:
    folder.write("a")
    folder.start()
    before = folder.config.stat()
    new = folder.config.with_suffix(".new")
    new.write_text(folder.config.read_text().replace("a:", "b:"))
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert new.stat().st_size == before.st_size
    async with folder.watched():
        new.rename(folder.config)
        assert (await folder.next_change()).servers.added == ("b",)


def test_a_file_that_changes_while_it_is_read_is_read_again(folder: Folder) -> None:
    folder.write("a")
    folder.start()
    assert not folder.file.has_changed()
    folder.write("a", "b")
    assert folder.file.has_changed()
    folder.file.read()
    assert not folder.file.has_changed()


async def test_a_missing_file_changes_nothing(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.write("a")
    folder.start()
    text = folder.config.read_text()
    async with folder.watched():
        folder.config.unlink()
        await until(lambda: caplog.messages)
        assert "can't be read (No such file or directory)" in caplog.messages[0]
        folder.replace(text)
        await until(lambda: len(caplog.messages) == 2)
    assert folder.changes == []


async def test_an_unexpected_exception_does_not_end_the_watch(folder: Folder, caplog: pytest.LogCaptureFixture) -> None:
    folder.write("a")
    folder.start()
    calls: list[SettingsChange] = []

    def apply(change: SettingsChange) -> None:
        calls.append(change)
        raise RuntimeError("a defect")

    folder.reloader = Reloader(folder.file, folder.settings, apply, poll_interval=POLL, settle_time=SETTLE)
    async with folder.watched():
        folder.write("b")
        await until(lambda: len(calls) == 1)
        folder.write("c")
        await until(lambda: len(calls) == 2)
    assert "could not be reloaded" in caplog.text
