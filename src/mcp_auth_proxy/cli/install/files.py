"""Read and replace the configuration files of clients: mode, encoding and links stay, nothing is half written."""

import contextlib
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mcp_auth_proxy.cli.install.undo import InvalidDocument
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.store.files import create, make_folder, temporary_path

BACKUP = ".mcp-auth-proxy.bak"
"""The end of the name of a backup."""

MAX_SIZE = 64 * 2**20
_BOM = b"\xef\xbb\xbf"
_TRIES = 5
"""How often an edit is made again because the client has just written the file itself."""


class FileProblem(McpAuthProxyError):
    """A file of a client can't be used. It was not changed."""


@dataclass(frozen=True, slots=True)
class ClientFile:
    """The configuration file of a client. ``path`` may be a link, which stays one."""

    path: Path

    @property
    def backup(self) -> Path:
        """Where the file is kept as it was before entries were added."""
        return self.path.with_name(self.path.name + BACKUP)

    def read(self) -> str | None:
        """Return the text; None if there is no file. Raises FileProblem."""
        return self._text(self.path)

    def before(self) -> str | None:
        """Return the text of the backup; None if there is none. Raises FileProblem."""
        return self._text(self.backup)

    def edit(self, change: Callable[[str | None], str | None], *, keep: Callable[[str], bool]) -> bool:
        """Replace the text by what ``change`` makes of it, None for no file; return whether that is another one.

        ``keep`` says of a text that is about to be replaced whether it becomes the backup. Raises FileProblem.
        """
        for _ in range(_TRIES):
            text = self.read()
            changed = self._checked(change, text)
            if changed == text:
                return False
            try:
                if text is not None and keep(text):
                    self._write(self.backup, self.path.read_bytes(), self._stat())
                if self._replace(text, changed):
                    return True
            except OSError as error:
                raise self._problem(f"can't be written: {error.strerror or error}") from None
        raise self._problem("is written by another program all the time. End the client, and try again")

    def forget_backup(self) -> None:
        """Delete the backup."""
        with contextlib.suppress(OSError):
            self.backup.unlink()

    def _checked(self, change: Callable[[str | None], str | None], text: str | None) -> str | None:
        try:
            return change(text)
        except InvalidDocument as problem:
            raise self._problem(f"can't be edited, and was left as it is: {problem}") from None

    def _replace(self, before: str | None, after: str | None) -> bool:
        """Write a text in place of another; return False if the file has changed meanwhile. Raises OSError."""
        real, found = self.path.resolve(), self._stat()
        bom = _BOM if found is not None and self.path.read_bytes().startswith(_BOM) else b""
        if self.read() != before:
            return False
        if after is None:
            real.unlink()
            return True
        make_folder(real.parent)
        self._write(real, bom + after.encode(), found)
        return True

    def _stat(self) -> os.stat_result | None:
        try:
            return self.path.stat()
        except FileNotFoundError:
            return None

    def _write(self, path: Path, content: bytes, like: os.stat_result | None) -> None:
        """Write a whole file with the mode and owner of another, or one for this user only. Raises OSError."""
        draft = temporary_path(path)
        try:
            create(draft, content)
            if like is not None:
                with contextlib.suppress(PermissionError):
                    os.chown(draft, like.st_uid, like.st_gid)
                draft.chmod(stat.S_IMODE(like.st_mode))
            draft.replace(path)
        except BaseException:  # also on Ctrl-C: the draft has what the file has
            draft.unlink(missing_ok=True)
            raise

    def _text(self, path: Path) -> str | None:
        try:
            content = path.read_bytes() if path.stat().st_size <= MAX_SIZE else None
        except FileNotFoundError:
            return None
        except (OSError, RuntimeError) as error:
            raise self._problem(f"can't be read: {getattr(error, 'strerror', None) or error}") from None
        if content is None:
            raise self._problem(f"is larger than {MAX_SIZE // 2**20} MiB")
        try:
            return content.removeprefix(_BOM).decode()
        except UnicodeDecodeError:
            raise self._problem("is not text in UTF-8, and was left as it is") from None

    def _problem(self, problem: str) -> FileProblem:
        return FileProblem(f"{self.path} {problem}.")
