"""Tell clients that a link was used which they were asked to show (MCP 2025-11-25, client/elicitation).

The error -32042 has the id of an elicitation. Once its flow is done, ``notifications/elicitation/complete`` goes to the
GET stream of the session, between the events that the server sends there.
"""

from collections import OrderedDict
from collections.abc import Iterable

from mcp_auth_proxy.models import Account
from mcp_auth_proxy.net.client_request import ClientRequest
from mcp_auth_proxy.proxy.pings import Pings
from mcp_auth_proxy.rpc import events
from mcp_auth_proxy.rpc.encoding import encode

ASKED_KEPT = 1000
"""Accounts with elicitations that are not complete; the oldest is dropped first."""

ASKED_OF_ACCOUNT = 100
"""Elicitations of one account, likewise."""

_Session = tuple[Account, bytes]


class Elicitations:
    """The elicitations that are not complete, and the streams of the sessions. Belongs to one event loop."""

    def __init__(self, pings: Pings) -> None:
        self._pings = pings
        self._asked: OrderedDict[Account, OrderedDict[tuple[str, bytes], None]] = OrderedDict()
        self._owed: OrderedDict[_Session, bytes] = OrderedDict()
        """What is sent as soon as a session opens a stream."""
        self._streams: dict[_Session, ClientRequest] = {}
        self._sessions: dict[ClientRequest, _Session] = {}

    def asked(self, account: Account, session_id: bytes, elicitation_id: str) -> None:
        """Note that the client of a session was asked to show a link."""
        asked = self._asked.setdefault(account, OrderedDict())
        asked[elicitation_id, session_id] = None
        if len(asked) > ASKED_OF_ACCOUNT:
            asked.popitem(last=False)
        if len(self._asked) > ASKED_KEPT:
            self._asked.popitem(last=False)

    def connected(self, account: Account) -> list[bytes]:
        """Tell all clients that were asked here to show a link of this account: its user has authorized.

        Return the sessions that listen here and were not asked here: another process may have done that.
        """
        asked = self._asked.pop(account, OrderedDict())
        for elicitation_id, session_id in asked:
            session, event = (account, session_id), _complete(elicitation_id)
            stream = self._streams.get(session)
            if stream is not None:
                self._pings.insert(stream, event)
                continue
            self._owed[session] = self._owed.get(session, b"") + event
            if len(self._owed) > ASKED_KEPT:
                self._owed.popitem(last=False)
        told = {session_id for _, session_id in asked}
        return [session_id for owner, session_id in self._streams if owner == account and session_id not in told]

    def tell(self, account: Account, session_id: bytes, elicitation_ids: Iterable[str]) -> None:
        """Tell a session that elicitations are complete, if it still listens. Clients ignore those they don't know."""
        stream = self._streams.get((account, session_id))
        if stream is not None:
            for elicitation_id in elicitation_ids:
                self._pings.insert(stream, _complete(elicitation_id))

    def listens(self, account: Account, session_id: bytes, request: ClientRequest) -> None:
        """Note the GET stream of a session; it gets what was not sent before."""
        self._streams[account, session_id] = request
        self._sessions[request] = account, session_id
        owed = self._owed.pop((account, session_id), b"")
        if owed:
            self._pings.insert(request, owed)

    def gone(self, request: ClientRequest) -> None:
        """Forget a stream that has ended. Idempotent."""
        session = self._sessions.pop(request, None)
        if session is not None and self._streams.get(session) is request:
            del self._streams[session]


def _complete(elicitation_id: str) -> bytes:
    message = {
        "jsonrpc": "2.0",
        "method": "notifications/elicitation/complete",
        "params": {"elicitationId": elicitation_id},
    }
    return events.message_event(encode(message))
