"""Which processes hold leases, and which are certainly dead."""

import fcntl
import math
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.lease import ABANDONED, BELIEVED_SECONDS, KEPT_SECONDS, LONGEST, Owners, remove_files
from store.builders import NOW

APPEAR = """
import pathlib, sys
from mcp_auth_proxy.store.lease import Owners
owners = Owners(pathlib.Path(sys.argv[1]))
owners.appear()
print(owners.new(), flush=True)
sys.stdin.read()
"""
OLDER_VERSION = f"{os.uname().nodename}:{os.getppid()}:1.x"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "proxy.db"


@pytest.fixture
def ours(store: Path) -> Iterator[Owners]:
    with closing(Owners(store)) as owners:
        yield owners


@pytest.fixture
def theirs(store: Path) -> Iterator[Owners]:
    with closing(Owners(store)) as owners:
        owners.appear()
        yield owners


def dead(store: Path) -> str:
    """Return an owner whose process was killed."""
    program = (sys.executable, "-c", APPEAR, str(store))
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "src")}
    with subprocess.Popen(program, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        owner = process.stdout.readline().strip()
        process.kill()
    return owner


def the_file(store: Path) -> Path:
    (path,) = store.parent.glob(".proxy.db.*.alive")
    return path


def test_a_living_process_holds(ours: Owners, theirs: Owners) -> None:
    assert ours.is_held(theirs.new(), NOW, NOW + LONGEST - 1)
    assert ours.is_held(ours.new(), NOW, NOW)
    assert not ours.is_held(theirs.new(), NOW, NOW + LONGEST + 1)


def test_owner_names_differ(ours: Owners, theirs: Owners) -> None:
    assert len({ours.new(), ours.new(), theirs.new()}) == 3


def test_a_killed_process_holds_nothing(store: Path, ours: Owners) -> None:  # F13
    owner = dead(store)
    assert not ours.is_held(owner, NOW, NOW)
    assert ours.may_refresh(owner, NOW, owner=ours.new(), now=NOW, needed=False)


@pytest.mark.parametrize(
    "owner",
    ["elsewhere:1:x", OLDER_VERSION, "", "x", "::", f"{'0' * 8}.{'1' * 32}.{'2' * 16}"],
    ids=["other", "older", "empty", "x", "colons", "gone"],
)
def test_if_nothing_is_known_of_a_process_its_lease_ends_in_time(ours: Owners, owner: str) -> None:
    """So it is with an older version too, which wrote pids: those of another pid namespace mean nothing here."""
    assert ours.is_held(owner, NOW, NOW + LONGEST)
    assert not ours.is_held(owner, NOW, NOW + LONGEST + 1)
    assert not ours.is_held(owner, NOW, NOW + 25.1), "a lease lasts 25 seconds at most"
    assert not ours.is_held(owner, NOW + LONGEST + 1, NOW)


@pytest.mark.parametrize("time", [math.nan, math.inf, -math.inf, 1e300])
def test_a_time_that_nobody_of_us_wrote_ends_a_lease(ours: Owners, time: float) -> None:  # T91
    owner = f"{'0' * 8}.{'1' * 32}.{'2' * 16}"
    assert not ours.is_held(owner, time, NOW)
    assert ours.may_refresh(owner, time, owner=ours.new(), now=NOW, needed=False)


def test_of_a_file_that_is_gone_nothing_is_known(store: Path, ours: Owners) -> None:
    owner = dead(store)
    the_file(store).unlink()
    assert ours.is_held(owner, NOW, NOW)


def test_a_link_is_not_followed(store: Path, ours: Owners) -> None:
    owner = dead(store)
    path = the_file(store)
    path.rename(store)
    path.symlink_to(store)
    assert ours.is_held(owner, NOW, NOW)


def test_what_is_not_a_file_tells_nothing(store: Path, ours: Owners) -> None:
    owner = dead(store)
    path = the_file(store)
    path.unlink()
    os.mkfifo(path)
    assert ours.is_held(owner, NOW, NOW)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_the_file_of_another_user_tells_nothing(store: Path, ours: Owners) -> None:
    owner = dead(store)
    os.chown(the_file(store), 12345, -1)
    assert ours.is_held(owner, NOW, NOW)
    remove_files(store)
    assert the_file(store).exists()


def test_a_file_system_without_locks_tells_nothing(store: Path, ours: Owners, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = dead(store)

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert ours.is_held(owner, NOW, NOW)
    ours.appear()
    assert len(list(store.parent.iterdir())) == 1


def test_a_process_of_another_machine_is_believed_dead_after_its_lease_only(
    store: Path, ours: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = dead(store)
    monkeypatch.setattr(lease, "_machine", lambda: "f" * 8)
    assert ours.is_held(owner, NOW, NOW)
    assert not ours.may_refresh(owner, NOW, owner=ours.new(), now=NOW, needed=True)
    assert ours.may_refresh(owner, NOW, owner=ours.new(), now=NOW + LONGEST + 1, needed=False)


def test_without_proc_machines_are_told_apart_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "Path", lambda path: Path(f"/nonexistent{path}"))
    assert lease._machine() == lease._machine()


# When a refresh may be taken over


def test_a_refresh_of_a_living_process_is_taken_over_after_its_lease_if_that_is_needed(
    ours: Owners, theirs: Owners
) -> None:
    """A stopped process may come back with new tokens, and the old refresh token must not be sent twice."""
    for holder in (theirs.new(), "elsewhere:1:x"):
        for now, needed, expected in (
            (NOW + LONGEST, True, False),
            (NOW + LONGEST + 1, True, True),
            (NOW + LONGEST + 1, False, False),
            (NOW - LONGEST - 1, True, True),
        ):
            assert ours.may_refresh(holder, NOW, owner=ours.new(), now=now, needed=needed) is expected
    later = NOW + BELIEVED_SECONDS + 1
    assert ours.may_refresh("elsewhere:1:x", NOW, owner=ours.new(), now=later, needed=False)
    assert not ours.may_refresh(theirs.new(), NOW, owner=ours.new(), now=later, needed=False)


def test_right_after_an_outage_only_who_has_nothing_to_store_is_taken_over(
    store: Path, ours: Owners, theirs: Owners
) -> None:
    long_ago = NOW - BELIEVED_SECONDS - 1
    for holder, expected in (
        (theirs.new(), False),
        ("elsewhere:1:x", False),
        (theirs.new() + ABANDONED, True),
        ("elsewhere:1:x" + ABANDONED, True),
        (dead(store), True),
    ):
        owner = ours.new()
        assert ours.may_refresh(holder, long_ago, owner=owner, now=NOW, needed=True, settled=False) is expected
        assert ours.may_refresh(holder, long_ago, owner=owner, now=NOW, needed=True)


def test_a_refresh_that_was_given_up_is_free_if_it_is_needed(ours: Owners, theirs: Owners) -> None:
    holder, owner = theirs.new() + ABANDONED, ours.new()
    assert ours.may_refresh(holder, NOW, owner=owner, now=NOW, needed=True)
    assert not ours.may_refresh(holder, NOW, owner=owner, now=NOW, needed=False)
    assert ours.may_refresh(holder, NOW, owner=owner, now=NOW + LONGEST + 1, needed=False)


def test_a_refresh_that_nobody_or_the_same_owner_has_begun_is_free(ours: Owners, theirs: Owners) -> None:
    owner = ours.new()
    assert ours.may_refresh("", None, owner=owner, now=NOW, needed=False)
    assert ours.may_refresh(owner, NOW, owner=owner, now=NOW, needed=False)
    assert ours.may_refresh(owner + ABANDONED, NOW, owner=owner, now=NOW, needed=False)
    assert not ours.may_refresh(theirs.new(), NOW, owner=owner, now=NOW, needed=True)


# The files


def test_the_file_is_private_and_gone_after_a_clean_exit(store: Path) -> None:  # T46
    with closing(Owners(store)) as owners:
        assert list(store.parent.iterdir()) == []
        before = os.umask(0)
        owners.appear()
        os.umask(before)
        owners.appear()
        assert stat.S_IMODE(the_file(store).stat().st_mode) == 0o600
        owners.took("a")
        owners.gave_back("a")
    assert list(store.parent.iterdir()) == []


@pytest.mark.parametrize("count", [1, 3000])
def test_the_file_stays_if_a_lease_is_left_behind(store: Path, ours: Owners, count: int) -> None:
    with closing(Owners(store)) as owners:
        owners.appear()
        for number in range(count):
            owners.took(str(number))
        left = owners.new()
        assert ours.is_held(left, NOW, NOW)
    assert not ours.is_held(left, NOW, NOW)


def test_a_file_that_somebody_has_removed_is_made_again(store: Path, ours: Owners, theirs: Owners) -> None:
    the_file(store).unlink()
    theirs.appear()
    assert the_file(store).exists()
    assert ours.is_held(theirs.new(), NOW, NOW)


def test_a_folder_that_can_not_be_written_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with closing(Owners(tmp_path / "missing" / "proxy.db")) as owners, caplog.at_level("INFO"):
        owners.appear()
        owners.appear()
        owners.clean_up()
    assert len(caplog.records) == 1
    assert "others notice it late" in caplog.text


def test_files_of_the_dead_are_removed_an_hour_after_their_last_claim(
    store: Path, ours: Owners, theirs: Owners
) -> None:
    dead(store)
    fresh, old = the_file_of(theirs), next(path for path in files(store) if path != the_file_of(theirs))
    ours.clean_up()
    assert set(files(store)) == {fresh, old}
    long_ago = os.stat(old).st_mtime - KEPT_SECONDS - 1
    for path in (fresh, old):
        os.utime(path, (long_ago, long_ago))
    ours.clean_up()
    assert files(store) == [fresh]
    theirs.appear()
    assert os.stat(fresh).st_mtime > long_ago


def files(store: Path) -> list[Path]:
    return sorted(store.parent.glob(".proxy.db.*.alive"))


def the_file_of(owners: Owners) -> Path:
    return owners._path
