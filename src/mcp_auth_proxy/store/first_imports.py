"""Take in the exports that ``store.import`` names, each once: what was taken in is remembered by its hash."""

import asyncio
import logging

from mcp_auth_proxy.config.settings import ImportSettings
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, ExportRejected
from mcp_auth_proxy.store import exports
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.imports import ImportedGrant, Outcome, take_in, was_imported
from mcp_auth_proxy.store.sealed_file import open_sealed, read_file

logger = logging.getLogger(__name__)


async def take_in_once(engine: Engine, settings: ImportSettings, *, now: float) -> None:
    """Take in the files that were not before, and log what became of each login.

    Raises ConfigurationError, with the key, for a file that can't be opened; and StoreError.
    """
    if settings.passphrase is None:
        return
    for number, path in enumerate(settings.files):
        try:
            sealed = await asyncio.to_thread(read_file, path)
            if await was_imported(engine, sealed):
                continue
            content = await asyncio.to_thread(open_sealed, sealed, settings.passphrase.value, name=str(path))
            export = exports.decode(content, name=str(path))
        except ExportRejected as error:
            raise ConfigurationError([ConfigError(f"store.import[{number}]", str(error))]) from None
        result = await take_in(engine, export, now=now, remember=sealed)
        # None: another process was faster.
        for each in () if result is None else result.grants:
            _log(each)
        for note in () if result is None else result.notes:
            logger.info("import: %s", note)


def _log(each: ImportedGrant) -> None:
    if each.outcome is Outcome.IMPORTED:
        logger.info("imported the login of server %s%s", each.account.shown, f" {each.reason}" if each.reason else "")
    else:
        logger.warning("the login of server %s was not imported: %s", each.account.shown, each.reason)
