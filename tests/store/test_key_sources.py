"""Keys from commands and from the keyring: one line says what is wrong, and nothing that a command has said."""

import base64
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from keyring import core

from mcp_auth_proxy.config.settings import KeySource, StoreSettings
from mcp_auth_proxy.errors import KeyRejected, KeyUnavailable, StoreError
from mcp_auth_proxy.store import key_sources
from mcp_auth_proxy.store.cipher import Key, key_errors, load_key

pytestmark = pytest.mark.sqlite  # no store is opened

KEY = base64.b64encode(b"k" * 32).decode()
CANARY = "canary-secret"
BACKENDS = """
import time
from keyring.backend import KeyringBackend
from keyring.errors import KeyringLocked

class Full(KeyringBackend):
    priority = 1

    def get_password(self, service, name):
        return {("org/proxy", "store-key"): "KEY"}.get((service, name))

    def set_password(self, service, name, password):
        raise NotImplementedError

class Locked(Full):
    def get_password(self, service, name):
        raise KeyringLocked("canary-secret")

class Broken(Full):
    def get_password(self, service, name):
        raise ZeroDivisionError("canary-secret")

class Silent(Full):
    def get_password(self, service, name):
        time.sleep(60)
"""


def command(*words: str) -> KeySource:
    return KeySource(kind="exec", name=shlex.join(words))


def python(code: str) -> KeySource:
    return command(sys.executable, "-c", code)


def problem(source: KeySource, kind: type[StoreError] = KeyUnavailable) -> str:
    """Load a key, which fails; return the error, which is one line and has nothing of what was printed."""
    with pytest.raises(kind) as caught:
        load_key(source)
    text = str(caught.value)
    assert CANARY not in text
    assert "\n" not in text
    assert "exec:" in text or "keyring:" in text
    return text


def test_a_command_prints_the_key() -> None:
    assert load_key(command("echo", KEY)) == Key.of(b"k" * 32)


def test_its_words_are_told_apart_as_in_a_shell_but_none_runs() -> None:
    assert load_key(KeySource(kind="exec", name=f"printf '%s' \"{KEY}\"")).id
    # What a shell would expand, run or redirect is an argument.
    assert "not a key" in problem(KeySource(kind="exec", name="echo $HOME;echo|cat>x"), KeyRejected)


def test_a_program_is_found_by_the_path_of_the_environment(tmp_path: Path) -> None:
    program = tmp_path / "print-key"
    program.write_text(f"#!/bin/sh\necho {KEY}\n")
    program.chmod(0o700)
    assert load_key(command("print-key"), {"PATH": f"{tmp_path}:/usr/bin:/bin"}).id
    with pytest.raises(KeyUnavailable, match="not found"):
        load_key(command("print-key"), {"PATH": "/usr/bin:/bin"})


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (f"import sys; print({CANARY!r}); print({CANARY!r}, file=sys.stderr); sys.exit(3)", "exit status 3"),
        ("import os; os.kill(os.getpid(), 15)", "signal 15"),
        ("print('x' * 5000, flush=True); import time; time.sleep(60)", "more than 4096 bytes"),
    ],
)
def test_a_command_that_fails_is_named_with_its_status(code: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert said in problem(python(code))
    assert capfd.readouterr() == ("", "")


def test_what_is_not_a_key_is_not_shown() -> None:  # T91
    assert "not a key" in problem(python(f"print({CANARY!r})"), KeyRejected)
    assert "not a key" in problem(python("import sys; sys.stdout.buffer.write(b'\\xff' * 44)"), KeyRejected)


def test_a_program_that_is_missing_or_not_executable_is_named(tmp_path: Path) -> None:
    assert "not found" in problem(command(str(tmp_path / "nowhere")))
    (tmp_path / "text").write_text("no program")
    assert "Permission denied" in problem(command(str(tmp_path / "text")))


def test_other_words_than_the_program_are_not_shown() -> None:
    source = command("false", CANARY)
    assert "exec:false …" in problem(source)


def _state(pid: str) -> str:
    """Return the state of a process in one letter, as Linux has it; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def test_a_command_that_hangs_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_sources, "TIMEOUT", 0.5)
    pids = tmp_path / "pids"
    begun_at = time.monotonic()
    shell = f"sleep 60 & echo $! $$ > {pids}; trap '' TERM; wait"
    assert "timed out after 0.5 s" in problem(command("sh", "-c", shell))
    assert time.monotonic() - begun_at < 10
    for pid in pids.read_text().split():
        # The child may wait for the init process to collect it, and a busy machine may end it late.
        while (state := _state(pid)) != "Z" and state and time.monotonic() - begun_at < 20:
            time.sleep(0.02)
        assert state in ("Z", "")


def test_the_time_is_ten_seconds() -> None:
    assert key_sources.TIMEOUT == 10


def test_a_command_that_closes_its_output_and_hangs_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:  # T91
    monkeypatch.setattr(key_sources, "TIMEOUT", 0.5)
    assert "timed out" in problem(
        python(f"import os, time; os.write(1, {KEY.encode()!r}); os.close(1); time.sleep(60)")
    )


def test_what_a_command_leaves_running_does_not_hold_it_up() -> None:
    begun_at = time.monotonic()
    assert load_key(command("sh", "-c", f"sleep 5 & echo {KEY}")).id
    assert time.monotonic() - begun_at < 4


def test_a_command_has_no_input_and_no_terminal() -> None:
    code = f"import os, sys; assert sys.stdin.read() == ''; assert os.getsid(0) == os.getpid(); print({KEY!r})"
    assert load_key(python(code)).id


def test_check_runs_no_command_and_asks_no_keyring(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    sources = (command("touch", str(mark)), KeySource(kind="keyring", name="a/b"))
    assert key_errors(StoreSettings(path=tmp_path / "s.db", keys=sources, keys_named=True)) == []
    assert not mark.exists()


@pytest.fixture
def use_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that chooses one of ``BACKENDS`` as users choose theirs."""
    (tmp_path / "backends_of_a_test.py").write_text(BACKENDS.replace("KEY", KEY, 1))
    monkeypatch.syspath_prepend(str(tmp_path))

    def use(name: str) -> None:
        monkeypatch.setenv("PYTHON_KEYRING_BACKEND", name if "." in name else f"backends_of_a_test.{name}")
        # It remembers its backend for the life of the process.
        monkeypatch.setattr(core, "_keyring_backend", None)

    return use


KEYRING = KeySource(kind="keyring", name="org/proxy/store-key")


def test_the_keyring_has_the_key(use_backend: Callable[[str], None]) -> None:
    use_backend("Full")
    assert load_key(KEYRING) == Key.of(b"k" * 32)


def test_a_key_that_the_keyring_does_not_have_is_made_with_a_command(use_backend: Callable[[str], None]) -> None:
    use_backend("Full")
    found = problem(KeySource(kind="keyring", name="my proxy/key"), KeyRejected)
    assert "openssl rand -base64 32 | keyring set 'my proxy' key" in found


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("Locked", "KeyringLocked"),
        ("Broken", "ZeroDivisionError"),
        ("keyring.backends.fail.Keyring", "NoKeyringError"),
        ("Silent", "did not answer within 0.2 s"),
    ],
)
def test_a_keyring_that_cannot_be_asked_is_named(
    backend: str, said: str, use_backend: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_sources, "TIMEOUT", 0.2)
    use_backend(backend)
    assert said in problem(KEYRING)


def test_a_missing_extra_is_named_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # What an import finds there counts as not installed.
    monkeypatch.setitem(sys.modules, "keyring", None)
    assert "pip install 'mcp-auth-proxy[keyring]'" in problem(KEYRING, KeyRejected)
