"""Which leases are still held."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mcp_auth_proxy.store import lease
from mcp_auth_proxy.store.lease import is_held, new_owner
from store.builders import NOW

HOST = socket.gethostname()


def test_a_living_process_holds() -> None:
    assert is_held(new_owner(), NOW, NOW + 59)
    assert is_held(f"{HOST}:{os.getpid()}:random", NOW, NOW)


def test_owner_names_differ() -> None:
    assert new_owner() != new_owner()


def test_a_dead_process_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not is_held(f"{HOST}:{process.pid}:1.x", NOW, NOW)


@pytest.mark.skipif(sys.platform != "linux", reason="start times come from /proc")
def test_a_lease_of_a_reused_pid_holds_nothing() -> None:
    assert not is_held(f"{HOST}:{os.getpid()}:1.x", NOW, NOW)


@pytest.mark.skipif(sys.platform != "linux", reason="process states come from /proc")
def test_a_zombie_holds_nothing() -> None:
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        assert not is_held(f"{HOST}:{process.pid}:", NOW, NOW)


@pytest.mark.parametrize("owner", ["elsewhere:1:x", "", "x", "::", f"{HOST}:nonsense:x"])
def test_for_other_machines_only_the_age_counts(owner: str) -> None:
    assert is_held(owner, NOW, NOW + 60)
    assert not is_held(owner, NOW, NOW + 61)
    assert not is_held(owner, NOW + 61, NOW)


# Systems without /proc


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "Path", lambda path: Path(f"/nonexistent{path}"))


@pytest.mark.usefixtures("without_proc")
def test_without_proc_a_process_is_known_by_its_pid_alone() -> None:
    owner = new_owner()
    assert owner.startswith(f"{HOST}:{os.getpid()}:.")
    assert is_held(owner, NOW, NOW)
    # Whatever its start time was: there is nothing to compare it with.
    assert is_held(f"{HOST}:{os.getpid()}:1.x", NOW, NOW)
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    assert not is_held(f"{HOST}:{process.pid}:1.x", NOW, NOW)


@pytest.mark.usefixtures("without_proc")
def test_a_process_of_another_user_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int, sign: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert is_held(f"{HOST}:1:x", NOW, NOW)


@pytest.mark.usefixtures("without_proc")
def test_on_windows_no_process_is_probed_since_that_would_end_it(monkeypatch: pytest.MonkeyPatch) -> None:
    killed: list[int] = []
    windows = SimpleNamespace(name="nt", kill=lambda pid, sign: killed.append(pid))
    monkeypatch.setattr(lease, "os", windows)
    owner = f"{HOST}:{os.getpid()}:x"
    assert (is_held(owner, NOW, NOW), is_held(owner, NOW, NOW + 61)) == (True, False)
    assert killed == []
