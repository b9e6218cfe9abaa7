"""Notice that another version of the program has migrated the store while this process was using it.

A process reads and writes the rows of one schema. After a migration it must do neither: what it can't decode would
count as missing, and what it writes would have the shape of an older schema. So each engine compares the schema within
every transaction that writes, and after every read: an unchanged schema then shows that the rows were of ours.
"""

import logging

from mcp_auth_proxy.errors import StoreMigrated

logger = logging.getLogger(__name__)


class SchemaGuard:
    """The schema that a process has opened a store with."""

    def __init__(self, store: str, schema: int) -> None:
        """``store`` names the store in messages, without a password."""
        self._store = store
        self._schema = schema
        self._reported = False

    def check(self, found: int) -> None:
        """Raise StoreMigrated, and log one line the first time, if ``found`` is another schema."""
        if found == self._schema:
            self._reported = False
            return
        error = StoreMigrated(self._text(found))
        if not self._reported:
            self._reported = True
            logger.error(
                "%s Until then it is not ready, renews nothing, and serves the tokens that it has until they end.",
                error,
            )
        raise error

    def _text(self, found: int) -> str:
        if found > self._schema:
            return (
                f"The store {self._store} was migrated to schema {found} by a newer version of mcp-auth-proxy, and "
                f"this process reads schema {self._schema}. Restart this one, with that version."
            )
        return (
            f"The store {self._store} was replaced by one of schema {found} while in use, and this process reads "
            f"schema {self._schema}. Restart this one."
        )
