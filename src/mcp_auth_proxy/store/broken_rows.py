"""Rows that are skipped because they can't be decrypted or decoded: each is logged once."""

import logging

from mcp_auth_proxy.observability import metrics

# Whoever can write to the store can make broken rows without end, which must fill neither the log nor the memory.
_MAX_REPORTED = 20
logger = logging.getLogger(__name__)


class BrokenRows:
    """The rows that were reported so far."""

    def __init__(self) -> None:
        self._reported: set[tuple[str, str]] = set()

    def report(self, table: str, uid: str, problem: Exception) -> None:
        """Log, once for each row, that it is skipped."""
        if (table, uid) not in self._reported and len(self._reported) < _MAX_REPORTED:
            self._reported.add((table, uid))
            metrics.store_failures.labels("decryption").inc()
            logger.warning("store: a row of %s is skipped (row %s): %s", table, uid, problem)
            if len(self._reported) == _MAX_REPORTED:
                logger.warning("store: more rows that are skipped are not logged until the proxy is started again")
