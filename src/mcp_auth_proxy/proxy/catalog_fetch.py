"""Ask a server for what is remembered of it: what it says of itself, and its lists."""

import asyncio
from collections.abc import Collection, Mapping
from contextlib import aclosing, suppress
from typing import Any

from mcp_auth_proxy.errors import MethodRefused, UpstreamProtocolError, UpstreamTimeout
from mcp_auth_proxy.models import AccessToken, Catalog
from mcp_auth_proxy.proxy.probe import PROTOCOL_VERSION
from mcp_auth_proxy.proxy.routes import Route
from mcp_auth_proxy.proxy.server_client import Challenged, ServerClient
from mcp_auth_proxy.proxy.upstream_client import UpstreamClient

DEADLINE = 30.0
"""Seconds for everything."""

OLDER_REVISIONS = ("2025-06-18", "2025-03-26")
"""The other revisions with sessions. What the server answers to a client that asks for one can't be derived."""

_LISTS = (
    ("tools", "tools/list", "tools"),
    ("prompts", "prompts/list", "prompts"),
    ("resources", "resources/list", "resources"),
    ("resources", "resources/templates/list", "resourceTemplates"),
)
"""The capability that a list needs, its method, and the member of the result that has the items."""


class CatalogFetch:
    """One fetch, with one token. What was found stays if something fails later."""

    def __init__(self, upstream: UpstreamClient, route: Route, token: AccessToken | None) -> None:
        self._upstream = upstream
        self._route = route
        self._token = token
        self._initialize: dict[str, Mapping[str, Any]] = {}
        self._discover: Mapping[str, Any] | None = None
        self._lists: dict[str, list[Mapping[str, Any]]] = {}
        self.complete = False
        """Whether the server has answered everything, if only with an error."""

    def found(self, *, fetched_at: float) -> Catalog:
        """Return what has been found so far."""
        return Catalog(initialize=self._initialize, discover=self._discover, lists=self._lists, fetched_at=fetched_at)

    @property
    def is_empty(self) -> bool:
        """Whether the server has not said anything yet."""
        return not self._initialize and self._discover is None

    async def run(self) -> None:
        """Ask for everything. Raises Challenged if the server refuses the token, and UpstreamError."""
        try:
            async with asyncio.timeout(DEADLINE):
                self.complete = await self._ask()
        except TimeoutError:
            raise UpstreamTimeout(f"it did not say what it offers within {DEADLINE:.0f} s.") from None

    async def _ask(self) -> bool:
        try:
            complete = await self._ask_in_session(PROTOCOL_VERSION, lists=True)
        except UpstreamProtocolError as refused:
            # Servers of the revision without sessions know no initialize.
            complete = await self._ask_without_session(lists=True)
            if self._discover is None:
                raise refused from None
            return complete
        await self._ask_without_session(lists=False)
        for revision in OLDER_REVISIONS:
            with suppress(UpstreamProtocolError):
                await self._ask_in_session(revision, lists=False)
        return complete

    async def _ask_in_session(self, revision: str, *, lists: bool) -> bool:
        """Begin a session and end it; return whether each list that was asked for was answered."""
        async with aclosing(self._client()) as client:
            result = await client.initialize(revision)
            self._initialize[revision] = result
            if not lists:
                return True
            with suppress(MethodRefused):
                await client.initialized()
            return await self._ask_for_lists(client, result)

    async def _ask_without_session(self, *, lists: bool) -> bool:
        client = self._client()
        client.modern = True
        try:
            self._discover = await client.request("server/discover", {})
        except UpstreamProtocolError:
            return False
        except Challenged:
            if self._initialize:
                return False
            raise
        return await self._ask_for_lists(client, self._discover) if lists else True

    async def _ask_for_lists(self, client: ServerClient, described: Mapping[str, Any]) -> bool:
        """Ask for the lists of the capabilities that a server has declared; return whether it has answered.

        Lists that it refuses are left out.
        """
        answered = True
        capabilities = described.get("capabilities")
        declared: Collection[Any] = capabilities if isinstance(capabilities, Mapping) else ()
        for capability, method, member in _LISTS:
            if capability not in declared:
                continue
            try:
                self._lists[member] = await client.list(method, member)
            except MethodRefused:
                pass
            except UpstreamProtocolError:
                answered = False
            except Challenged as challenged:
                # 403: the token is good, but not for this list.
                if challenged.status != 403:
                    raise
        return answered

    def _client(self) -> ServerClient:
        return ServerClient(self._upstream, self._route, self._token)
