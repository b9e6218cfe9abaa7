"""Which processes serve a store: those that hold a lock beside it."""

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.other_users import NOBODY, as_root
from mcp_auth_proxy.config.settings import Address
from mcp_auth_proxy.store.sqlite.serving import ServingLock, served, served_addresses

HERE = Address("127.0.0.1", 8787)
OTHER = Address("::1", 9)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    path = tmp_path / "proxy.db"
    path.touch(mode=0o600)
    return path


def lock_files(store: Path) -> list[Path]:
    return [path for path in store.parent.iterdir() if path != store]


def test_each_process_has_a_file_of_its_own_while_it_serves(store: Path) -> None:
    assert served_addresses(store) == []
    first, second = ServingLock(store, HERE), ServingLock(store, OTHER)
    assert set(served_addresses(store)) == {HERE, OTHER}
    assert [path.stat().st_mode & 0o777 for path in lock_files(store)] == [0o600, 0o600]
    first.release()
    first.release()
    assert served_addresses(store) == [OTHER]
    second.release()
    assert (served_addresses(store), lock_files(store)) == ([], [])


def test_a_process_says_what_it_serves_and_for_whom(store: Path) -> None:
    lock = ServingLock(store, HERE, only="mark", for_bridges=True)
    other = ServingLock(store, OTHER)
    assert {each.address: (each.only, each.for_bridges) for each in served(store)} == {
        HERE: ("mark", True),
        OTHER: ("", False),
    }
    lock.release()
    other.release()


def test_a_killed_process_no_longer_counts_and_its_file_is_removed(store: Path) -> None:  # T89
    code = (
        "import sys; from pathlib import Path; from mcp_auth_proxy.config.settings import Address;"
        "from mcp_auth_proxy.store.sqlite.serving import ServingLock;"
        "lock = ServingLock(Path(sys.argv[1]), Address('127.0.0.1', 1)); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        assert served_addresses(store) == [Address("127.0.0.1", 1)]
        process.send_signal(signal.SIGKILL)
        process.wait(10)
    (left,) = lock_files(store)
    assert served_addresses(store) == []
    ServingLock(store, HERE).release()
    assert not left.exists()


def test_asking_at_the_same_time_makes_no_dead_process_alive(store: Path) -> None:
    lock = ServingLock(store, HERE)
    (file,) = lock_files(store)
    copy = file.read_bytes()
    lock.release()
    file.write_bytes(copy)
    file.chmod(0o600)
    with file.open("rb") as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)
        assert served_addresses(store) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{}", b'{"store": 1}', b"\xff", b'{"host": "127.0.0.1", "port": 1}', b"[" * 5000],
)
def test_a_file_that_was_not_written_by_a_proxy_is_ignored(store: Path, content: bytes) -> None:
    path = store.with_name(".proxy.db.0123.serving")
    with path.open("wb") as file:
        path.chmod(0o600)
        file.write(content)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert served_addresses(store) == []


def planted(store: Path, folder: Path) -> Path:
    """The name of a lock file of a store, in a folder."""
    return folder / f".{store.name}.planted.serving"


def test_the_file_of_another_store_is_not_believed(store: Path, tmp_path: Path) -> None:  # T89
    folder = tmp_path / "other"
    folder.mkdir()
    other = folder / "proxy.db"
    other.touch(mode=0o600)
    lock = ServingLock(other, HERE)
    (file,) = lock_files(other)
    os.link(file, planted(store, store.parent))
    assert served_addresses(store) == []
    planted(store, store.parent).unlink()
    planted(store, store.parent).symlink_to(file)
    assert served_addresses(store) == []
    os.mkfifo(store.parent / f".{store.name}.pipe.serving")
    assert served_addresses(store) == []
    assert served_addresses(other) == [HERE]
    lock.release()


@as_root
def test_the_file_of_another_user_is_not_believed(store: Path) -> None:  # T89
    found = store.stat()
    content = {"store": [found.st_dev, found.st_ino], "host": HERE.host, "port": HERE.port}
    path = planted(store, store.parent)
    with path.open("w") as file:
        path.chmod(0o600)
        json.dump(content, file)
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        assert served_addresses(store) == [HERE], "of this user"
        path.chmod(0o666)
        assert served_addresses(store) == [], "others can write it"
        path.chmod(0o600)
        os.chown(path, NOBODY, -1)
        assert served_addresses(store) == []


def test_a_lock_that_can_not_be_had_is_logged_and_stops_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock = ServingLock(tmp_path / "nowhere" / "proxy.db", HERE)
    assert "can't tell that this proxy is running" in caplog.text
    assert served_addresses(tmp_path / "nowhere" / "proxy.db") == []
    lock.release()
