"""The errors of the package. They know nothing of HTTP: the edges decide how each one is answered.

::

    McpAuthProxyError
    ├── AddressInUse                   another program listens on the address already
    ├── RequestRejected                a client's request breaks HTTP or a limit, or uses a method that is not served
    ├── BodyTooLarge                   a client's request has a larger body than allowed
    ├── Overloaded                     the memory for buffered bytes, or the number of held requests, is used up
    ├── LoopDetected                   a client's request has come through too many proxies
    ├── ClientDisconnected             the client went away before its request was complete
    ├── ConfigurationError             the configuration is invalid; lists all errors at once
    ├── NotConnected                   a server needs its user's authorization first
    ├── StoreError
    │   ├── StoreRejected              foreign, damaged or newer database: nothing is started or written
    │   │   └── KeyRejected            the store's key is missing, malformed, or not the one it was made with
    │   ├── StoreUnavailable           locked, read-only or full: temporary, try again
    │   │   ├── StoreMigrated          a newer version has migrated the store while this one was using it
    │   │   └── KeyUnavailable         the command or the keyring that has the store's key fails
    │   ├── NameTaken                  a row of that name, or for that identity, exists already
    │   ├── LastAdmin                  a project would have no admin any more
    │   ├── ExportRejected             a file of exported grants that can't be opened, or its passphrase
    │   └── DecryptionError            one encrypted value can't be decrypted; other rows are not affected
    ├── AuthorizationError             an authorization can't continue
    │   ├── DocumentRefused            a document from the network breaks a rule (names document, URL, clause)
    │   ├── RegistrationImpossible     no way to become a client of this authorization server
    │   ├── ClientNotActive            the OAuth client for this server was made inactive, or revoked
    │   ├── RedirectRefused            a code was to go to a redirect URI that the OAuth client does not have
    │   ├── TooManyAccounts            a principal has named too many accounts of a server
    │   ├── AuthorizationDenied        the authorization server or the user refused
    │   ├── TokenRefused               the token endpoint answered with a structured OAuth error
    │   └── AuthorizationServerUnavailable   down, slow or not speaking OAuth: temporary, try again
    │       └── RefreshRateExceeded    more tokens are to be renewed than its authorization server is sent
    ├── GrantUnusable                  a grant that has ended, or that can't be renewed
    ├── AddressRefused                 an address that a user has pasted can't be used
    ├── CallbackRefused                a callback request that matches no pending flow
    │   ├── StateRefused               its state is not one of the caller's own flows
    │   └── IssuerMissing              it has no iss, which the authorization server promises
    ├── ServerConflict                 a server can't be made or changed at run time as things are
    ├── CallerRefused                  a request whose caller is not known, or may not call
    │   └── SignInNeeded               a page that only users see who have signed in
    ├── SessionNotFound                a session id that was not given to this caller
    │   └── OwnSession                 the id of a session that the proxy began itself: see ``proxy.own_sessions``
    └── UpstreamError
        ├── UpstreamUnreachable        no connection: no byte of the request was sent
        ├── UpstreamTimeout            connected, but no response head in time
        ├── UpstreamProtocolError      the response was cut off or is not valid HTTP
        │   └── MethodRefused          the server answers a request of the proxy's own with an error
        └── UpstreamPoolTimeout        all connections to the origin are in use

``str()`` of each is one or two plain sentences for the user: what is wrong and, if there is one, the
remedy. No error ever contains a token, code, verifier, secret or state (``secret_values`` masks those that a server
repeats), or a value from a URL's query. Whoever puts a text from outside into a message cuts it (``excerpt``): it goes
to the log and to every client that asks.
"""

import re
from dataclasses import dataclass

from mcp_auth_proxy import secret_values

MAX_FOREIGN = 200
"""Characters of one text from outside in a message of ours."""

MAX_MESSAGE = 1200
"""Characters of the message of an AuthorizationError, which may hold several texts from outside."""

_BEYOND = 64
"""Characters after the cut that are searched for secrets too. Long texts are not searched as a whole, to save time."""

# Neither part is ever given back (*+), and the first ends where the next URL begins: no character is read twice.
_QUERY = re.compile(r"(https?://(?:(?!https?://)[^\s?#\"])*+\?)([^\s\"]*+)", re.IGNORECASE)
_PUNCTUATION = ".,;:!)]}'"


def excerpt(text: str, limit: int = MAX_FOREIGN) -> str:
    """Return a text from outside as a message may show it: its first ``limit`` characters, "…" if that is not all.

    Our own secrets in it are masked, before it is cut: half a secret might not be recognized.
    """
    shown = secret_values.masked(text[: limit + _BEYOND])
    return shown if len(text) <= limit else f"{shown[:limit]}…"


def without_query_values(text: str) -> str:
    """Mask the query values of all http(s) URLs in ``text``: some servers take API keys there."""
    return _QUERY.sub(_masked, text)


def _masked(found: re.Match[str]) -> str:
    query = found[2].rstrip(_PUNCTUATION)
    return found[1] + "&".join(map(_without_value, query.split("&"))) + found[2][len(query) :]


def _without_value(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    return f"{name}=****" if equals else "****" if name else ""


class McpAuthProxyError(Exception):
    """Base of every error raised on purpose by this package."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_query_values(secret_values.masked(message)))


class AddressInUse(McpAuthProxyError):
    """Another program listens on the address already."""


class RequestRejected(McpAuthProxyError):
    """A client's request breaks HTTP or a limit, or uses a method that is not served; ``status`` is the answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class BodyTooLarge(McpAuthProxyError):
    """The request body is larger than allowed. ``limit`` is in bytes, ``key`` the configuration key that sets it.

    ``start`` is the start of the body, if some of it has arrived: the id of the request may be there.
    """

    def __init__(self, limit: int, key: str = "limits.body", *, start: bytes = b"") -> None:
        self.limit = limit
        self.start = start
        # A limit that is set for a test, maybe.
        size = f"{limit / 2**20:,.2f}".rstrip("0").removesuffix(".") + " MiB" if limit >= 2**20 else f"{limit} bytes"
        super().__init__(f"The request body is over {size}; {key} allows more.")


class Overloaded(McpAuthProxyError):
    """Other requests use all that the configuration key ``key`` allows: temporary, try again."""

    def __init__(self, key: str) -> None:
        self.key = key
        super().__init__(f"The proxy has too much to do: {key} is used up. Try again later.")


class LoopDetected(McpAuthProxyError):
    """The request has come through too many proxies: some server's URL leads back to one of them."""


class ClientDisconnected(McpAuthProxyError):
    """The client went away before its request was complete: nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class ConfigError:
    """One error in the configuration: the dotted path of the key, and the problem with it.

    ``line`` is that of the key in its file, or of the section that lacks it; 0 if it is not known.
    """

    path: str
    problem: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class ConfigurationError(McpAuthProxyError):
    """The configuration is invalid. ``errors`` lists everything that is wrong, in file order."""

    def __init__(self, errors: list[ConfigError], source: str = "") -> None:
        self.errors = errors
        self.source = source
        super().__init__("\n".join(str(error) for error in errors))

    def lines(self) -> list[str]:
        """Return each error as a text of its own, ``FILE:LINE: key: problem`` as far as file and line are known."""
        return [f"{self._place(error)}{error}" for error in self.errors]

    def _place(self, error: ConfigError) -> str:
        return f"{self.source}{f':{error.line}' if error.line else ''}: " if self.source else ""


class StoreError(McpAuthProxyError):
    """The store failed to read or write."""


class StoreRejected(StoreError):
    """The store must not be used: wrong key, not our database, or a newer schema."""


class KeyRejected(StoreRejected):
    """The key of the store is missing, malformed, or not the one that the store was made with."""


class StoreUnavailable(StoreError):
    """The store can't be read or written now: locked, read-only, or the disk is full."""


class StoreOutOfReach(StoreUnavailable):
    """The server of the store can't be reached, or was lost: it may soon be back."""


class StoreMigrated(StoreUnavailable):
    """The store has another schema than when it was opened: this process can neither read nor write its rows."""


class KeyUnavailable(StoreUnavailable):
    """The command that prints the store's key fails or hangs, or the keyring that holds it can't be asked."""


class NameTaken(StoreError):
    """A row can't be added, because another one has its name. ``existing_id`` is the id of that one."""

    def __init__(self, message: str, existing_id: str) -> None:
        self.existing_id = existing_id
        super().__init__(message)


class LastAdmin(StoreError):
    """A principal can't be disabled, or lose its role, because its project has no other active admin."""


class ExportRejected(StoreError):
    """A file of exported grants is foreign, damaged or newer, or its passphrase is not right. Nothing was changed."""


class DecryptionError(StoreError):
    """An encrypted value can't be decrypted: damaged, moved to another row, or encrypted with a missing key."""


@dataclass(frozen=True, slots=True)
class ConfigHint:
    """The configuration key that would allow what was refused.

    ``key`` is a dotted path: relative to the server if it starts with ``oauth.``, otherwise from the top level.
    ``value`` is what to set it to; empty if only the operator can know.
    """

    key: str
    value: str = ""


@dataclass(frozen=True, slots=True)
class Pause:
    """The pause after a failure. Times are Unix seconds; ``reason`` is the text of the failure."""

    ends: float
    asked: float
    """When it ends as the server's own Retry-After asks; 0 if there was none."""
    reason: str


class AuthorizationError(McpAuthProxyError):
    """An authorization can't continue. ``hint`` is None if no key would allow it.

    A new request may try again after ``retry_after`` seconds, at once if that is None. ``server_retry_after`` is the
    server's own Retry-After in seconds, 0 if it sent none. ``pause`` is what the failure has begun, if anything.
    """

    def __init__(self, message: str, *, hint: ConfigHint | None = None) -> None:
        self.hint = hint
        self.retry_after: float | None = None
        self.server_retry_after = 0.0
        self.pause: Pause | None = None
        super().__init__(excerpt(message, MAX_MESSAGE))


class DocumentRefused(AuthorizationError):
    """A document from the network breaks a rule.

    ``document`` is its name in words ("protected resource metadata"), ``url`` where it was fetched from,
    ``problem`` the rule and what was found instead, ``clause`` the RFC section ("RFC 8414 §3.3").
    """

    def __init__(
        self, document: str, url: str, problem: str, clause: str = "", *, hint: ConfigHint | None = None
    ) -> None:
        self.document = document
        self.url = url
        self.problem = problem
        self.clause = clause
        where = f" at {excerpt(url)}" if url else ""
        rule = f" ({clause})" if clause else ""
        super().__init__(f"The {document}{where} is refused: {problem}{rule}.", hint=hint)


class RegistrationImpossible(AuthorizationError):
    """There is no way to become a client of this authorization server. The text names the keys to set."""

    def __init__(self, message: str) -> None:
        super().__init__(message, hint=ConfigHint("oauth.client_id"))


class ClientNotActive(AuthorizationError):
    """The OAuth client that the API has for a server can't be used. ``status`` is ``inactive`` or ``revoked``."""

    def __init__(self, server: str, provider: str, status: str) -> None:
        self.status = status
        remedy = "make it active again" if status == "inactive" else "delete it and make a new one"
        super().__init__(
            f"The OAuth client for {excerpt(provider)}, which server {server} uses, is {status}. An admin can {remedy}."
        )


class RedirectRefused(AuthorizationError):
    """The code of a headless authorization was to go to a redirect URI that the OAuth client does not have."""


class TooManyAccounts(AuthorizationError):
    """A principal has too many accounts of a server that the configuration does not name."""


class AuthorizationDenied(AuthorizationError):
    """The authorization server or its user refused. ``error`` is the OAuth error code."""

    def __init__(self, message: str, error: str = "", *, hint: ConfigHint | None = None) -> None:
        self.error = error
        super().__init__(message, hint=hint)


class TokenRefused(AuthorizationError):
    """The token endpoint answered with a structured OAuth error (RFC 6749 §5.2). ``error`` is its code."""

    def __init__(self, error: str, message: str, *, hint: ConfigHint | None = None) -> None:
        self.error = error
        super().__init__(message, hint=hint)


class AuthorizationServerUnavailable(AuthorizationError):
    """The authorization server can't be used now.

    ``maybe_processed``: the request may have been processed, and only the response was lost. ``timed_out``: it did not
    answer in time.
    """

    def __init__(
        self,
        message: str,
        retry_after: float = 5.0,
        *,
        server_retry_after: float = 0.0,
        maybe_processed: bool = False,
        timed_out: bool = False,
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.server_retry_after = server_retry_after
        self.maybe_processed = maybe_processed
        self.timed_out = timed_out


class RefreshRateExceeded(AuthorizationServerUnavailable):
    """The authorization server has not failed: more refreshes wait than ``limits.refresh_rate`` lets through."""


class AddressRefused(McpAuthProxyError):
    """An address that a user has pasted can't be used. Nothing was used up: another may be pasted."""


class GrantUnusable(McpAuthProxyError):
    """A grant can't be renewed. ``ended``: it is over, and only a person can mend it."""

    def __init__(self, message: str, *, ended: bool) -> None:
        self.ended = ended
        super().__init__(message)


class CallbackRefused(McpAuthProxyError):
    """A callback request matches no pending flow. ``status`` is the HTTP status to answer with."""

    def __init__(self, message: str, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


class CopyAddress(CallbackRefused):
    """A callback belongs to an authorization that a program has begun. Nothing was used up."""

    def __init__(self) -> None:
        super().__init__(
            "A program has begun this authorization, and waits for the address of this page. Copy it from the address "
            "bar, and paste it into the terminal in which `login --paste` waits, or into the program. Nothing was used "
            "up here.",
            403,
        )


class StateRefused(CallbackRefused):
    """A code was brought with a state that belongs to no headless flow of the caller. Nothing was used up."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 422)


class IssuerMissing(CallbackRefused):
    """A code was brought without ``iss``, which its authorization server always sends. Nothing was used up."""

    def __init__(self, message: str) -> None:
        super().__init__(message, 422)


class NotConnected(McpAuthProxyError):
    """A server can't be asked yet: its user has to authorize first."""


class ServerConflict(McpAuthProxyError):
    """A server can't be made, changed or deleted at run time as things are.

    ``kind`` is a word for programs: ``config-owned``, ``name-taken``, ``changed`` or ``too-many``.
    """

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


class CallerRefused(McpAuthProxyError):
    """A request's caller is not known, or may not call.

    ``status`` is the HTTP status to answer with: 400 if there are several credentials, 401 if there is none that holds,
    403 if the principal may not call, 503 if that can't be found out now; then ``retry_after`` is in seconds.
    """

    def __init__(self, message: str, status: int = 401, *, retry_after: float | None = None) -> None:
        self.status = status
        self.retry_after = retry_after
        super().__init__(message)


class SignInNeeded(CallerRefused):
    """A browser has opened a page that its user has to sign in for."""

    def __init__(self) -> None:
        super().__init__("Sign in first.")


class SessionNotFound(McpAuthProxyError):
    """A request has an Mcp-Session-Id that its caller was not given, at this server and account."""

    def __init__(self) -> None:
        super().__init__("There is no such session. Begin a new one with initialize, without Mcp-Session-Id.")


class OwnSession(SessionNotFound):
    """A request has the id of a session that the proxy itself began, so it can't be forwarded as it is."""

    def __init__(self, session_id: bytes) -> None:
        super().__init__()
        self.session_id = session_id


class UpstreamError(McpAuthProxyError):
    """The upstream MCP server could not be used for this request."""


class UpstreamUnreachable(UpstreamError):
    """No connection could be made: no byte of the request was sent."""


class UpstreamTimeout(UpstreamError):
    """Connected, but the response head did not come in time."""


class UpstreamProtocolError(UpstreamError):
    """The response was cut off or is not valid HTTP. The request may have been processed.

    ``reset``: the connection was reset before any of the response. If nothing stands between, the server ended without
    reading all of the request.
    """

    def __init__(self, message: str = "", *, reset: bool = False) -> None:
        self.reset = reset
        super().__init__(message)


class MethodRefused(UpstreamProtocolError):
    """The server answers a request of the proxy's own with an error: maybe it does not have the method."""


class UpstreamPoolTimeout(UpstreamError):
    """All connections to this origin are in use, and none became free in time."""
