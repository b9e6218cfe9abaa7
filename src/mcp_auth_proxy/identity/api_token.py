"""The file ``api-token`` of mode ``none``: a key of ``local``, for programs of this user on this machine."""

import contextlib
import os
from pathlib import Path

from mcp_auth_proxy.config.settings import Settings
from mcp_auth_proxy.identity.keys import has_key_form, make_key
from mcp_auth_proxy.models import ALL_SCOPES, LOCAL
from mcp_auth_proxy.store import files

_MAX_TEXT = 4096


def token_path(settings: Settings) -> Path | None:
    """Return where the file is: beside the store, unless ``admin.token_file`` says otherwise.

    None if neither is there: with PostgreSQL ``admin.token_file`` must say it.
    """
    if settings.admin.token_file is not None or settings.store.postgresql is not None:
        return settings.admin.token_file
    return settings.store.path.with_name("api-token")


def read_token(path: Path) -> str | None:
    """Return the key in the file; None if there is none, or if others than this user could read or write it.

    Raises OSError.
    """
    try:
        # Not blocking: somebody may have put a FIFO there, if the place was chosen badly.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            problem = files.exposure(os.fstat(file.fileno()))
            text = file.read(_MAX_TEXT).strip()
    except FileNotFoundError:
        return None
    return text.decode() if problem is None and has_key_form(text) else None


def obtain_token(path: Path, *, now: float) -> str:
    """Return the key in the file; make the file, 0600, if it is missing or can't be trusted. Raises OSError."""
    token = read_token(path) or _made(path, now)
    if token is None:
        # Only a file that was there, and is no good: another process may have made one since we looked.
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        token = _made(path, now)
    if token is None:
        raise PermissionError(f"{path} is not this user's alone")
    return token


def _made(path: Path, now: float) -> str | None:
    """Make the file; return its key, or that of another process, which was faster. None if neither can be trusted."""
    files.make_folder(path.parent)
    _, token = make_key(principal=LOCAL, name="api-token", scopes=ALL_SCOPES, now=now)
    draft = files.temporary_path(path)
    files.create(draft, f"{token}\n".encode())
    return token if files.link_into_place(draft, path) else read_token(path)
