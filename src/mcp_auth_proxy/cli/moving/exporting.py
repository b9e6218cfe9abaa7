"""``export``: seal logins into a file, and with ``--move`` end them here once the file is on the disk."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from mcp_auth_proxy.cli import audit
from mcp_auth_proxy.cli.moving import secret_manifest
from mcp_auth_proxy.cli.moving.rows import grant_row, grant_text, owner_names
from mcp_auth_proxy.cli.owners import split
from mcp_auth_proxy.cli.terminal import complain, say, say_json
from mcp_auth_proxy.config.settings import Secret, StoreSettings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError, StoreError
from mcp_auth_proxy.store import Engine, exports, files, open_store, open_store_read_only, store_exists
from mcp_auth_proxy.store.exports import Export, RefreshUnderWay, Selection
from mcp_auth_proxy.store.sealed_file import FileKey

LONGEST_REFRESH = 40.0
"""Seconds that a renewal which is under way is waited for: longer than any process may hold it."""

_RETRY = 0.25

ONE_OF_TWO = (
    "warning: this is a copy, and only one of the two may go on: servers replace refresh tokens, and end a login whose "
    "old one comes again. Stop using these logins here before the copy is used, or export with --move."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """What to export. ``known``: the configured servers, None without a configuration. ``file``: None for stdout.

    ``secret_name``: that of a Secret of Kubernetes; None for a plain file.
    """

    store: StoreSettings
    known: frozenset[str] | None
    servers: tuple[str, ...]
    file: Path | None
    passphrase: Secret = field(repr=False)
    move: bool
    secret_name: str | None
    force: bool
    as_json: bool
    passphrase_source: str

    @property
    def selection(self) -> Selection:
        """The accounts that are named; everything if none is."""
        return Selection(frozenset(split(name) for name in self.servers))


async def export(job: ExportJob) -> int:
    """Write the export, and print what is in it. Return 0; raise McpAuthProxyError."""
    if job.secret_name is not None:
        secret_manifest.check_name(job.secret_name)
    _check_file(job)
    if not store_exists(job.store):
        raise McpAuthProxyError(f"There is no store at {job.store.shown} yet, and so there are no logins.")
    # Nothing is written to the store before all of this is sure.
    engine = await open_store_read_only(job.store)
    try:
        _check_servers(job, found := await exports.copy(engine, job.selection))
    finally:
        await engine.close()
    key = await asyncio.to_thread(FileKey.new, job.passphrase.value)
    if job.move:
        found = await _move(job, key)
    else:
        _write(job, key, found)
    _report(job, found)
    return 0


async def _move(job: ExportJob, key: FileKey) -> Export:
    written: list[Export] = []

    def place(found: Export) -> None:
        _write(job, key, found)
        written.append(found)

    engine = await open_store(job.store, announce=complain)
    try:
        moved = await _once_settled(engine, job, place)
        for grant in moved.grants:
            place_of = (grant.key.account.server, grant.key.account.server)
            account = grant.key.account
            await audit.record(engine, "grants.move", target=f"{account.principal}/{account.name}", server=place_of)
    except StoreError as error:
        if not written:
            raise
        raise McpAuthProxyError(
            f"{_place(job)} is written, but whether the logins have ended here is not certain: {error} See "
            f"`mcp-auth-proxy status`."
        ) from None
    finally:
        await engine.close()
    return moved


async def _once_settled(engine: Engine, job: ExportJob, place: Callable[[Export], None]) -> Export:
    """Move once no renewal is under way. Raises McpAuthProxyError after LONGEST_REFRESH."""
    deadline = time.monotonic() + LONGEST_REFRESH
    while True:
        try:
            return await exports.move(engine, job.selection, now=engine.now, place=place)
        except RefreshUnderWay:
            if time.monotonic() > deadline:
                raise McpAuthProxyError("A login is being renewed, and that does not end. Try again later.") from None
        await asyncio.sleep(_RETRY)


def _check_file(job: ExportJob) -> None:
    """Raise McpAuthProxyError if the file can't be written, as far as that can be told now."""
    file = job.file
    if file is None:
        return
    if file.is_dir() or not file.absolute().parent.is_dir():
        what = "is a folder" if file.is_dir() else "is in a folder that does not exist"
        raise McpAuthProxyError(f"{file} {what}.")
    if file.exists() and not job.force:
        raise _exists(file)


def _check_servers(job: ExportJob, found: Export) -> None:
    """Raise an error if a name is that of no server, or if there is nothing to export for it."""
    with_login = {grant.key.account.server for grant in found.grants} | {server.name for server in found.servers}
    for name in job.servers:
        server, account = split(name)
        if server not in with_login and job.known is not None and server not in job.known:
            known = ", ".join(sorted(job.known))
            raise ConfigurationError([ConfigError("", f"There is no server {server!r}. Configured: {known}.")])
        only = Selection([(server, account)])
        if not any(grant.key.account in only for grant in found.grants):
            raise McpAuthProxyError(
                f"There is no login of {name} to export. `mcp-auth-proxy status` shows those there are."
            )


def _write(job: ExportJob, key: FileKey, found: Export) -> None:
    """Write the export durably, as a whole or not at all. Raises McpAuthProxyError."""
    content = key.seal(exports.encode(found))
    if job.secret_name is not None:
        text = secret_manifest.manifest(job.secret_name, content)
        if job.file is None:
            say(*text.splitlines())
            return
        content = text.encode()
    assert job.file is not None
    file = job.file.absolute()
    draft = files.temporary_path(file)
    try:
        files.create(draft, content)
        if job.force:
            files.replace(draft, file)
        elif not files.link_into_place(draft, file):
            raise _exists(job.file)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise McpAuthProxyError(f"{job.file} can't be written ({error.strerror}). Nothing was changed.") from None


def _exists(file: Path) -> McpAuthProxyError:
    return McpAuthProxyError(f"{file} exists already. Choose another name, or replace it with --force.")


def _report(job: ExportJob, found: Export) -> None:
    """Print what was exported, and what is to be known of it."""
    names = owner_names(found.principals)
    if job.as_json:
        say_json(
            {
                "file": str(job.file),
                "moved": job.move,
                "grants": [grant_row(grant, names) for grant in found.grants],
                "registrations": len(found.registrations),
                "oauth_clients": len(found.oauth_clients),
                "servers": len(found.servers),
                "principals": len(found.principals),
                "api_keys": len(found.api_keys),
            }
        )
    else:
        verb = "moved: it has ended here" if job.move else "copied"
        lines = [f"{grant_text(grant, names)}: {verb}" for grant in found.grants]
        lines.append(f"{_place(job)}: {_counted(found)}, sealed with the passphrase")
        say(*lines, err=job.file is None)
    if not job.move:
        complain(ONE_OF_TWO)
    if job.secret_name is not None:
        complain(*secret_manifest.what_next(job.secret_name, job.passphrase_source))


def _place(job: ExportJob) -> str:
    return "The Secret" if job.file is None else str(job.file)


def _counted(found: Export) -> str:
    counts: Iterable[tuple[int, str]] = (
        (len(found.grants), "login"),
        (len(found.registrations), "registered client"),
        (len(found.oauth_clients), "OAuth client"),
        (len(found.servers), "server"),
        (len(found.principals), "principal"),
        (len(found.api_keys), "API key"),
    )
    return ", ".join(f"{count} {what}{'s'[: count != 1]}" for count, what in counts if count or what == "login")
