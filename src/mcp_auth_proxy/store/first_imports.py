"""Take in the exports that ``store.import`` names, each once: what was taken in is remembered by its hash."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mcp_auth_proxy.config.settings import ImportSettings, Secret
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, ExportRejected
from mcp_auth_proxy.store import exports
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.imports import ImportedGrant, Outcome, take_in, was_imported
from mcp_auth_proxy.store.sealed_file import open_sealed, read_file

logger = logging.getLogger(__name__)


async def check(settings: ImportSettings) -> None:
    """Raise ConfigurationError, with the key, if a file can't be opened: before a store is made for it."""
    if settings.passphrase is not None:
        for number, path in enumerate(settings.files):
            await _open(number, path, settings.passphrase, await _read(number, path))


async def take_in_once(engine: Engine, settings: ImportSettings, *, now: float) -> None:
    """Take in the files that were not before, and log what became of each login.

    Raises ConfigurationError, with the key, for a file that can't be opened; and StoreError.
    """
    if settings.passphrase is None:
        return
    for number, path in enumerate(settings.files):
        sealed = await _read(number, path)
        if await was_imported(engine, sealed):
            continue
        export = await _open(number, path, settings.passphrase, sealed)
        result = await take_in(engine, export, now=now, remember=sealed)
        # None: another process was faster.
        for each in () if result is None else result.grants:
            _log(each)
        for note in () if result is None else result.notes:
            logger.info("import: %s", note)


async def _read(number: int, path: Path) -> bytes:
    with _named(number):
        return await asyncio.to_thread(read_file, path)


async def _open(number: int, path: Path, passphrase: Secret, sealed: bytes) -> exports.Export:
    with _named(number):
        content = await asyncio.to_thread(open_sealed, sealed, passphrase.value, name=str(path))
        return exports.decode(content, name=str(path))


@contextmanager
def _named(number: int) -> Iterator[None]:
    """Name the key of the file that can't be used."""
    try:
        yield
    except ExportRejected as error:
        raise ConfigurationError([ConfigError(f"store.import[{number}]", str(error))]) from None


def _log(each: ImportedGrant) -> None:
    if each.outcome is Outcome.IMPORTED:
        logger.info("imported the login of server %s%s", each.account.shown, f" {each.reason}" if each.reason else "")
    else:
        logger.warning("the login of server %s was not imported: %s", each.account.shown, each.reason)
