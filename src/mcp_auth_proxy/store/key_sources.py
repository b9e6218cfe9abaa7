"""Store keys that a command prints (``exec:``), or that the keyring of the desktop holds (``keyring:``).

What a command writes, to stdout or stderr, appears nowhere: no log, no error. Few proxies use these sources, so
``cipher`` imports this module when it meets the first one.
"""

import contextlib
import importlib
import os
import select
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any

from mcp_auth_proxy.config.settings import KeySource
from mcp_auth_proxy.errors import KeyRejected, KeyUnavailable

TIMEOUT = 10.0
"""Seconds that a command, or the keyring, is given."""

MAX_OUTPUT = 4096
"""Bytes that a command may print: a key has 44."""

_POLL = 0.05
_NOT_STARTED = "could not be started ({})"


def from_command(source: KeySource, environ: Mapping[str, str]) -> str:
    """Return what a command prints. Raises KeyUnavailable if it fails, hangs or can't be started.

    It runs without a shell and without a terminal, in a process group of its own, which is killed if it hangs.
    """
    try:
        process = subprocess.Popen(
            shlex.split(source.name),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=dict(environ),
            start_new_session=True,
        )
    except FileNotFoundError:
        raise _failed(source, "was not found") from None
    except OSError as error:
        raise _failed(source, _NOT_STARTED.format(error.strerror)) from None
    with process:
        try:
            output = _output(source, process, time.monotonic() + TIMEOUT)
        except BaseException:  # also on Ctrl-C: the command must not outlive us
            _kill(process)
            raise
        status = process.returncode
    if status < 0:
        raise _failed(source, f"was ended by signal {-status}")
    if status:
        raise _failed(source, f"failed with exit status {status}")
    return output.decode("ascii", "replace")


def _output(source: KeySource, process: "subprocess.Popen[bytes]", deadline: float) -> bytes:
    """Return what a process has printed when it ends. What it leaves running may keep stdout open."""
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    os.set_blocking(descriptor, False)
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    output, open_still = b"", True
    while True:
        if time.monotonic() > deadline:
            raise _failed(source, f"timed out after {TIMEOUT:g} s")
        if open_still:
            poll.poll(_POLL * 1000)
        else:
            time.sleep(_POLL / 10)
        # In this order: what was printed before the end is there to be read after it.
        ended = process.poll() is not None
        while open_still and (part := _read(descriptor)) is not None:
            output += part
            open_still = part != b""
            if len(output) > MAX_OUTPUT:
                raise _failed(source, f"printed more than {MAX_OUTPUT} bytes")
        if ended:
            return output


def _read(descriptor: int) -> bytes | None:
    """Return what can be read now: None if there is nothing yet, an empty text at the end."""
    try:
        return os.read(descriptor, MAX_OUTPUT)
    except BlockingIOError:
        return None


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """End a process and its children. One that was waited for is left alone: its number may be somebody else's."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)


def from_keyring(source: KeySource) -> str:
    """Return a password of the keyring. Raises KeyRejected if it is missing, KeyUnavailable if it can't be asked."""
    try:
        keyring = importlib.import_module("keyring")
    except ImportError:
        raise KeyRejected(
            f"The store key {source} needs a package that is not installed: pip install 'mcp-auth-proxy[keyring]'"
        ) from None
    service, _, name = source.name.rpartition("/")
    answer: list[Any] = []

    def ask() -> None:
        try:
            answer.append(keyring.get_password(service, name))
        except Exception as error:  # backends are plug-ins, and raise whatever they like
            answer.append(error)

    # A backend may ask its user to unlock it, and can't be interrupted.
    thread = threading.Thread(target=ask, name="keyring", daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    match answer:
        case [str() as text]:
            return text
        case [None]:
            raise KeyRejected(
                f"The store key {source} is not in the keyring; make one with: "
                f"openssl rand -base64 32 | keyring set {shlex.quote(service)} {shlex.quote(name)}"
            )
        case []:
            raise KeyUnavailable(f"The store key {source}: the keyring did not answer within {TIMEOUT:g} s. Unlock it.")
        case _:
            # Only the type: the text may be anything.
            raise KeyUnavailable(
                f"The store key {source}: the keyring can't be read ({type(answer[0]).__name__}). Unlock it, or choose "
                "a backend with PYTHON_KEYRING_BACKEND."
            )


def _failed(source: KeySource, what: str) -> KeyUnavailable:
    return KeyUnavailable(
        f"The store key {source}: the command {what}. Run it by hand; it must print the key, and nothing else."
    )
