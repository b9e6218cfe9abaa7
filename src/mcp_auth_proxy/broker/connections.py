"""The state of each connection, for the command line, pages and the API; and the result of disconnecting."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from mcp_auth_proxy.broker.client_registration import public_url_of
from mcp_auth_proxy.broker.matching import matches, upstream_of
from mcp_auth_proxy.broker.pending import link_of
from mcp_auth_proxy.broker.renewal import renewable
from mcp_auth_proxy.broker.states import GrantStatus, Health, Word, grant_status, word
from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import without_query_values
from mcp_auth_proxy.models import DEFAULT_ACCOUNT, LOCAL, Account, Flow, FlowStatus, Grant, shared_principal
from mcp_auth_proxy.store.catalogs import Catalogs
from mcp_auth_proxy.store.connection_notes import StoredNote, StoredNotes
from mcp_auth_proxy.store.engine import Engine
from mcp_auth_proxy.store.flows import CANCELLED, Flows
from mcp_auth_proxy.store.grants import Grants


class ConnectionState(StrEnum):
    """The state of an account's grant; a pending authorization does not change it."""

    CONNECTED = "connected"
    ENDED = "ended"
    """The grant is over: a user has to authorize again."""
    NOT_CONNECTED = "not connected"
    """Never connected, or disconnected by the user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """What goes wrong with a connection, for a reason that may pass. Times are Unix seconds."""

    what: str
    """What it is, as the beginning of a sentence: "not renewed"."""
    reason: str
    since: float | None = None
    retry_at: float | None = None
    remedy: str = ""
    unreachable: bool = False
    """Whether requests could not connect to the server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """One account of a configured server, without its tokens. Times are Unix seconds."""

    account: Account
    url: str
    """The server's URL, with the values in its query masked."""
    state: ConnectionState = ConnectionState.NOT_CONNECTED
    command_name: str = ""
    """What commands call the server: its name, or its URL if there is no configuration."""
    authorizing: bool = False
    """Whether an authorization waits for its user."""
    unanswered: bool = False
    """Whether an authorization was needed that nobody has given yet, also if its link has expired or it failed."""
    asked_scopes: tuple[str, ...] = ()
    """What it asked for in addition to the scopes of the grant."""
    failure: str = ""
    """Why that authorization failed; empty if it did not."""
    link: str = field(default="", repr=False)
    """Where the user authorizes, if an authorization waits for them."""
    user_code: str = field(default="", repr=False)
    """What they enter there, if that is for another device."""
    issuer: str = ""
    """This field and those below describe the grant; they are empty or None if there is none."""
    granted_at: float | None = None
    token_expires_at: float | None = None
    """When the access token expires; None also if its server did not say."""
    renews_itself: bool = False
    """Whether tokens are renewed without a user."""
    expired: bool = False
    """Whether its token has expired and can't be renewed."""
    scopes: tuple[str, ...] = ()
    reason: str = ""
    """Why the grant has ended."""
    grant_label: str = ""
    """Whose account it is, as far as the authorization server said so."""
    status: GrantStatus | None = None
    last_used_at: float | None = None
    """When a request was last sent with its token, to the hour; None if that is not known."""
    last_error: str | None = None
    """What went wrong last; None if nothing did, or since it has worked again."""
    last_error_at: float | None = None
    remedy: str | None = None
    """What to do about that."""
    unreachable: bool = False
    """Whether the last request could not connect to the server."""
    tools: int | None = None
    """How many tools the account sees, as far as that is remembered."""
    trouble: "Trouble | None" = None
    """What goes wrong with it, as far as a running proxy has said so."""

    @property
    def needs_authorization(self) -> bool:
        """Whether a user has to authorize, as far as the store knows."""
        return self.state is ConnectionState.ENDED or self.expired or self.unanswered

    @property
    def word(self) -> Word:
        """The state in one or two words, for a user."""
        unreachable = self.unreachable or (self.trouble is not None and self.trouble.unreachable)
        return word(self.status, authorizing=self.authorizing, unreachable=unreachable)

    @property
    def label(self) -> str:
        """The same as a text."""
        return self.word


class Revocation(StrEnum):
    """What became of a grant at its authorization server (RFC 7009)."""

    REVOKED = "revoked"
    NOT_OFFERED = "not offered"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgottenGrant:
    """A grant that was deleted from the store."""

    issuer: str
    revocation: Revocation
    reason: str = ""
    """Why the revocation failed, as one or more sentences."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The result of disconnecting an account. Grants that had ended before are not listed."""

    account: Account
    grants: tuple[ForgottenGrant, ...]
    client_forgotten: bool
    """Whether the dynamic registrations were deleted too."""


async def stored_connections(
    servers: Mapping[str, ServerSettings],
    database: Engine | None,
    *,
    now: float,
    owner_of: Callable[[ServerSettings], str] | None = lambda server: LOCAL,
    account: str | None = None,
) -> list[Connection]:
    """Return the connections of all configured servers, in their order, as the store knows them.

    ``owner_of`` says whose accounts at a server are listed, as in ``Account.principal``; without any, the default one
    is. None: those of everybody; without any, the default one of nobody (""). ``account``: the name of the only ones to
    list. ``database`` is None if there is no store yet. Neither the network nor the secrets of the configuration are
    needed. Raises StoreError.
    """
    grants = await Grants(database).all() if database is not None else []
    flows = Flows(database) if database is not None else None
    waiting = await flows.unanswered() if flows is not None else []
    notes = await StoredNotes(database).all() if database is not None else {}
    tools = await Catalogs(database).tool_counts() if database is not None else {}
    everything = {grant.key.account for grant in grants} | {flow.key.account for flow in waiting}
    known = {each for each in everything if account in (None, each.name)}
    found: list[Connection] = []
    for server in servers.values():
        owner = None if owner_of is None else owner_of(server)
        own = [grant for grant in grants if grant.key.account.server == server.name]
        for each in _accounts(server, owner, known, account):
            flow = await flows.newest(each, now) if flows is not None else None
            grant = _current((grant for grant in own if grant.key.account == each), server)
            connection = Connection(
                account=each, url=without_query_values(server.url), command_name=server.command_name
            )
            if flow is not None and matches(flow, server) and not _is_answered(flow, grant, now):
                connection = _with_flow(connection, flow, grant, now)
            note = notes.get(each, StoredNote())
            connection = _with_note(connection, note, tools.get((each, upstream_of(server))))
            found.append(connection if grant is None else _with_grant(connection, grant, now))
    return found


def _accounts(server: ServerSettings, owner: str | None, known: Collection[Account], only: str | None) -> list[Account]:
    """Return the accounts of a server to list: those that the store knows and, of one owner, those that are preset."""
    found = {each for each in known if each.server == server.name and owner in (None, each.principal)}
    if not found:
        nobody = shared_principal(server.project) if server.grant_owner == "shared" else ""
        found.add(Account(nobody if owner is None else owner, server.name, only or DEFAULT_ACCOUNT))
    if owner is not None:
        found |= {Account(owner, server.name, name) for name in server.accounts if only in (None, name)}
    return sorted(found, key=lambda each: (each.principal, each.name != DEFAULT_ACCOUNT, each.name))


async def stored_servers(database: Engine) -> dict[str, ServerSettings]:
    """Return the servers that have a grant or need one, by name, as far as the store knows them.

    For a store without a configuration: that of ``serve URL``. Raises StoreError.
    """
    grants, flows = await Grants(database).all(), await Flows(database).unanswered()
    servers: dict[str, ServerSettings] = {}
    both: list[Grant | Flow] = [*grants, *flows]
    for stored in sorted(both, key=_time):
        key = stored.key
        if key.upstream is not None:
            name = key.account.server
            servers[name] = ServerSettings(name=name, url=f"{key.upstream}{key.path or '/'}", from_url=True)
    return servers


def _time(stored: Grant | Flow) -> float:
    return stored.granted_at if isinstance(stored, Grant) else stored.created_at


def _is_answered(flow: Flow, grant: Grant | None, now: float) -> bool:
    """Return whether nothing is left to do for a flow: it was used or cancelled, or its user authorized by another one.

    A grant that was renewed after a flow has failed or expired was not refused: what was asked for was not needed.
    """
    if flow.status is FlowStatus.DONE or flow.reason == CANCELLED:
        return True
    if grant is None or grant.ended_at is not None:
        return False
    renewed = not _is_live(flow, now) and grant.tokens.obtained_at > flow.created_at
    return renewed or grant.granted_at > flow.created_at


def _is_live(flow: Flow, now: float) -> bool:
    return flow.status is FlowStatus.PENDING and flow.expires_at > now


def _with_note(connection: Connection, note: StoredNote, tools: int | None) -> Connection:
    return replace(
        connection,
        last_used_at=note.used_at,
        last_error=note.failure or None,
        last_error_at=note.failed_at,
        remedy=note.remedy or None,
        unreachable=note.unreachable_since is not None,
        tools=tools,
        trouble=_trouble(note),
    )


def _trouble(note: StoredNote) -> Trouble | None:
    if not note.failure:
        return None
    unreachable = note.unreachable_since is not None
    if unreachable:
        what, since = "not reached", note.unreachable_since
    elif note.retrying_since is not None:
        what, since = "not renewed, and tried again", note.retrying_since
    else:
        what, since = "the last error", note.failed_at
    return Trouble(
        what=what,
        reason=note.failure,
        since=since,
        remedy=note.remedy,
        unreachable=unreachable,
    )


def _with_flow(connection: Connection, flow: Flow, grant: Grant | None, now: float) -> Connection:
    held = grant.scopes if grant is not None and grant.ended_at is None else flow.scopes
    connection = replace(
        connection,
        unanswered=True,
        asked_scopes=tuple(scope for scope in flow.scopes if scope not in held),
        failure=flow.reason,
    )
    device = flow.device
    if not _is_live(flow, now):
        return connection
    if device is None:
        link = "" if flow.ends_elsewhere else link_of(flow, public_url_of(flow.redirect_uri))
        return replace(connection, authorizing=True, link=link)
    return replace(connection, authorizing=True, link=device.verification_uri, user_code=device.user_code)


def _current(grants: Iterable[Grant], server: ServerSettings) -> Grant | None:
    """Return the grant in use, else the newest ended one; None if there is none for the server as configured now."""
    usable = [grant for grant in grants if matches(grant, server)]
    return max(usable, key=lambda grant: (grant.ended_at is None, grant.granted_at), default=None)


def _with_grant(connection: Connection, grant: Grant, now: float) -> Connection:
    expires_at, status = grant.tokens.expires_at, grant_status(grant, now=now)
    trouble = connection.trouble
    if status.health is Health.RETRYING and not connection.unreachable:
        trouble = Trouble(
            what="not renewed, and tried again",
            reason=status.reason,
            since=status.since,
            retry_at=status.next_try,
            remedy=connection.remedy or "",
        )
    return replace(
        connection,
        state=ConnectionState.CONNECTED if grant.ended_at is None else ConnectionState.ENDED,
        issuer=grant.key.issuer,
        granted_at=grant.granted_at,
        token_expires_at=expires_at,
        renews_itself=renewable(grant),
        scopes=grant.tokens.scopes,
        expired=expires_at is not None and expires_at <= now and not renewable(grant),
        reason=grant.ended_reason,
        grant_label=grant.label,
        status=status,
        trouble=trouble,
    )
