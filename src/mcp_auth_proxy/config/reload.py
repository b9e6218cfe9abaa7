"""Hot reload: notice that the configuration was changed, read it again, and apply what differs.

Files are polled, not watched: Kubernetes swaps symbolic links, editors rename files or write them in pieces, and a poll
every second notices all of these. Nothing is read while a file is still being saved.
"""

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from mcp_auth_proxy.config.changes import SettingsChange, compare
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.oauth import first_contact_warning
from mcp_auth_proxy.config.settings import Settings, StoreSettings
from mcp_auth_proxy.errors import ConfigurationError, StoreError
from mcp_auth_proxy.observability import metrics

logger = logging.getLogger(__name__)

POLL_INTERVAL = 1.0
"""Seconds between two checks of the files."""

SETTLE_TIME = 0.4
"""Seconds that all files must stay unchanged before they are read: half a file can be valid, with half the servers."""

Stamp = tuple[int, int, int, int] | None
"""Device, inode, size and modification time of a file, symbolic links followed; None if it does not exist."""


class ConfigFile:
    """A configuration file that is read repeatedly, and the secret files that it names.

    The command line flags ``listen`` and ``allow_anonymous`` override the file each time; ``programs`` is that of
    ``load``. The methods block on files: call them in a thread.
    """

    def __init__(
        self,
        path: Path,
        *,
        environ: Mapping[str, str] = os.environ,
        listen: str | None = None,
        allow_anonymous: bool = False,
        programs: bool = True,
    ) -> None:
        self.path = path
        self._environ = environ
        self._listen = listen
        self._allow_anonymous = allow_anonymous
        self._programs = programs
        self._read: dict[Path, Stamp] = {path: None}

    def read(self) -> Settings:
        """Return the settings as they are now. Raises ConfigurationError.

        Even if it raises, the files named so far count as read: the error may be in one of them.
        """
        # Before reading: a file that changes meanwhile differs from its stamp, and is read once more.
        before = self.stamps()
        named: set[Path] = set()
        try:
            settings = load(
                self.path,
                environ=self._environ,
                listen=self._listen,
                allow_anonymous=self._allow_anonymous,
                secret_files=named,
                programs=self._programs,
            )
        except ConfigurationError:
            # A file that can't be parsed names no secrets: keep polling those named last time.
            named |= self._read.keys()
            raise
        finally:
            self._read = {path: before[path] if path in before else _stamp(path) for path in {self.path, *named}}
        return settings

    def stamps(self) -> dict[Path, Stamp]:
        """Return the stamps of the file and of the secret files as they are now."""
        return {path: _stamp(path) for path in self._read}

    def has_changed(self) -> bool:
        """Return whether any of the files differs from the one that was read."""
        return self.stamps() != self._read


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


class Reloader:
    """Read the configuration again when its files change or on request, and apply what differs.

    ``settings`` are those that the proxy runs with, as read from ``file``. ``apply`` must not raise. ``validate``
    raises ConfigurationError for what is wrong only in this process. If the configuration has errors, each is logged on
    a line of its own, and nothing changes. ``renew_keys`` reads the keys of the store again, and returns whether they
    are others now; if it raises StoreError, that is logged, and the rest is applied.
    """

    def __init__(
        self,
        file: ConfigFile,
        settings: Settings,
        apply: Callable[[SettingsChange], None],
        *,
        validate: Callable[[Settings], Awaitable[None]] | None = None,
        renew_keys: Callable[[StoreSettings], Awaitable[bool]] | None = None,
        poll_interval: float = POLL_INTERVAL,
        settle_time: float = SETTLE_TIME,
    ) -> None:
        self._file = file
        self._settings = settings
        self._apply = apply
        self._validate = validate
        self._renew_keys = renew_keys
        self._poll_interval = poll_interval
        self._settle_time = settle_time
        self._requested = asyncio.Event()

    def request(self) -> None:
        """Read the configuration again soon, whether or not a change can be seen."""
        self._requested.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            try:
                await asyncio.wait_for(self._requested.wait(), self._poll_interval)
            except TimeoutError:
                if not await asyncio.to_thread(self._file.has_changed):
                    continue
            requested = self._requested.is_set()
            self._requested.clear()
            await self._until_settled()
            try:
                await self.reload(requested=requested)
            except Exception:  # a bug; the proxy must keep serving, and the next change is read again
                logger.exception("the configuration could not be reloaded")

    async def reload(self, *, requested: bool = False) -> None:
        """Read the configuration once, and apply what differs.

        ``requested``: also ask the commands and the keyring that the keys of the store come from.
        """
        try:
            settings = await asyncio.to_thread(self._file.read)
            if self._validate is not None:
                await self._validate(settings)
        except ConfigurationError as error:
            metrics.reloads.labels("rejected").inc()
            metrics.last_reload_successful.labels().value = 0
            for line in error.lines():
                logger.error("configuration not reloaded: %s", line)
            return
        change, problem = compare(self._settings, settings), None
        try:
            if await self._has_new_keys(change.store, requested=requested):
                change = change.with_store_keys()
        except StoreError as error:
            problem = error
            logger.error("store.keys: the keys stay as they were: %s", error)
        self._settings = change.settings
        if change:
            self._apply(change)
        metrics.reloads.labels("rejected" if problem else "applied" if change else "unchanged").inc()
        metrics.last_reload_successful.labels().value = int(problem is None)
        logger.info("configuration reloaded: %s", summary(change))
        if change.servers and (warning := first_contact_warning(settings.servers)):
            logger.warning("%s", warning)
        if change.needs_restart:
            logger.warning("configuration: restart the proxy to apply the new %s", ", ".join(change.needs_restart))

    async def _has_new_keys(self, store: StoreSettings, *, requested: bool) -> bool:
        """Read the keys of the store, and return whether the proxy uses others now. Raises StoreError."""
        if self._renew_keys is None:
            return False
        sources_changed = store.keys != self._settings.store.keys
        # Commands and keyrings take time, and may ask somebody.
        quick = all(source.kind in ("env", "file") for source in store.keys)
        if not (requested or sources_changed or quick):
            return False
        return await self._renew_keys(store) or sources_changed

    async def _until_settled(self) -> None:
        """Wait until the files have not changed for a moment: editors save in pieces, or by renaming."""
        stamps = await asyncio.to_thread(self._file.stamps)
        while True:
            await asyncio.sleep(self._settle_time)
            before, stamps = stamps, await asyncio.to_thread(self._file.stamps)
            if stamps == before:
                return


def summary(change: SettingsChange) -> str:
    """Return what a reload has changed, for one line of the log."""
    parts = [str(change.servers)] if change.servers else []
    if change.applied:
        parts.append(f"applied {', '.join(change.applied)}")
    return "; ".join(parts) or "nothing has changed"
