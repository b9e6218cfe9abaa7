"""The errors of the package; no HTTP in them, the edges decide how each is answered.

::

    ProxyError
    ├── AddressInUse                   something else listens on the address already
    ├── RequestRejected                a client's request breaks HTTP or a bound, or asks for what is never served
    ├── BodyTooLarge                   a client's request has a larger body than is allowed
    ├── ClientDisconnected             the client went away before its request was complete
    ├── ConfigurationError             the configuration can't be used; carries every fault at once
    ├── StoreError
    │   ├── StoreRefused               wrong key, foreign or newer database: nothing is started or written
    │   ├── StoreUnavailable           locked, read-only or full: passes, try again
    │   └── SealBroken                 one sealed value does not open; other rows are not concerned
    ├── AuthorizationError             an authorization can't go on
    │   ├── DocumentRefused            a document from the network breaks a rule (names document, URL, clause)
    │   ├── RegistrationImpossible     no way to become a client of this authorization server
    │   ├── AuthorizationDenied        the authorization server, or the user, said no
    │   ├── TokenRefused               the token endpoint answered with a structured OAuth error
    │   └── AuthorizationServerUnavailable   down, slow or answering rubbish: passes, try again
    ├── CallbackRefused                a browser came back with something that no pending flow accounts for
    └── UpstreamError
        ├── UpstreamUnreachable        no connection: no byte of the request left
        ├── UpstreamTimeout            connected, but no response head in time
        ├── UpstreamBroken             the response broke off or broke HTTP
        └── UpstreamBusy               all connections to the origin are taken

``str()`` of each is one or two plain sentences for the user: what is wrong and, where there is one, the
remedy. None of them ever holds a token, code, verifier, secret or state, or a value of a URL's query.
"""

import re
from dataclasses import dataclass

_QUERY = re.compile(r"(https?://[^\s?#\"]*\?)([^\s\"]*[^\s\".,;:!)\]}'])", re.IGNORECASE)


def without_query_values(text: str) -> str:
    """Return text with the values in the queries of its http(s) URLs masked: servers take API keys there."""
    return _QUERY.sub(lambda found: found[1] + "&".join(map(_without_value, found[2].split("&"))), text)


def _without_value(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    return f"{name}=****" if equals else "****" if name else ""


class McpAuthProxyError(Exception):
    """Base of every error raised on purpose by this package."""

    def __init__(self, message: str = "") -> None:
        super().__init__(without_query_values(message))


class AddressInUse(McpAuthProxyError):
    """Something else listens on the address already."""


class RequestRejected(McpAuthProxyError):
    """A client's request breaks HTTP or a bound, or asks for what is never served; ``status`` is the answer."""

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


class BodyTooLarge(McpAuthProxyError):
    """The request body is larger than allowed. ``limit`` is in bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        super().__init__(f"The request body is over {limit} bytes; limits.body allows more.")


class ClientDisconnected(McpAuthProxyError):
    """The client went away before its request was complete: nobody is left to answer."""


@dataclass(frozen=True, slots=True)
class ConfigError:
    """One thing wrong with the configuration: the dotted path of the key, and what is wrong with it."""

    path: str
    problem: str

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}" if self.path else self.problem


class ConfigurationError(McpAuthProxyError):
    """The configuration can't be used. ``faults`` holds everything that is wrong, in file order."""

    def __init__(self, faults: list[ConfigError], source: str = "") -> None:
        self.faults = faults
        self.source = source
        super().__init__("\n".join(str(fault) for fault in faults))


class StoreError(McpAuthProxyError):
    """The store could not do what was asked."""


class StoreRejected(StoreError):
    """The store must not be used as it is: wrong key, not our database, or a newer schema."""


class StoreUnavailable(StoreError):
    """The store can't be read or written now: locked, read-only, disk full."""


class DecryptionError(StoreError):
    """A sealed value does not open: damaged, moved to another row, or sealed under a key we don't have."""


@dataclass(frozen=True, slots=True)
class ConfigHint:
    """What in the configuration would allow what was refused.

    ``key`` is a dotted path: below the server where it begins with ``oauth.``, else from the top. ``value`` is what
    to put there, empty where only the operator can know.
    """

    key: str
    value: str = ""


class AuthorizationError(McpAuthProxyError):
    """An authorization can't go on. A new request may try again. ``remedy`` is None where no key would allow it."""

    def __init__(self, message: str, *, remedy: ConfigHint | None = None) -> None:
        self.remedy = remedy
        super().__init__(message)


class DocumentRefused(AuthorizationError):
    """A document from the network breaks a rule.

    ``document`` is its name in words ("protected resource metadata"), ``url`` where it came from,
    ``problem`` the rule and what was found instead, ``clause`` the RFC section ("RFC 8414 §3.3").
    """

    def __init__(
        self, document: str, url: str, problem: str, clause: str = "", *, remedy: ConfigHint | None = None
    ) -> None:
        self.document = document
        self.url = url
        self.problem = problem
        self.clause = clause
        where = f" at {url}" if url else ""
        rule = f" ({clause})" if clause else ""
        super().__init__(f"The {document}{where} is refused: {problem}{rule}.", remedy=remedy)


class RegistrationImpossible(AuthorizationError):
    """There is no way to become a client of this authorization server; the text names the config keys to set."""

    def __init__(self, message: str) -> None:
        super().__init__(message, remedy=ConfigHint("oauth.client_id"))


class AuthorizationDenied(AuthorizationError):
    """The authorization server, or the user at it, said no. ``error`` is the OAuth error code."""

    def __init__(self, message: str, error: str = "", *, remedy: ConfigHint | None = None) -> None:
        self.error = error
        super().__init__(message, remedy=remedy)


class TokenRefused(AuthorizationError):
    """The token endpoint answered with a structured OAuth error (RFC 6749 §5.2), in ``error``."""

    def __init__(self, error: str, message: str, *, remedy: ConfigHint | None = None) -> None:
        self.error = error
        super().__init__(message, remedy=remedy)


class AuthorizationServerUnavailable(AuthorizationError):
    """The authorization server can't be used now. ``retry_after`` is what a client is told, in seconds.

    ``asked_pause``: the seconds that the server itself wants to be left alone for (Retry-After), 0 where it said none.
    ``maybe_processed``: the request may have arrived and been acted upon, only the answer is missing.
    """

    def __init__(
        self, message: str, retry_after: float = 5.0, *, asked_pause: float = 0.0, maybe_processed: bool = False
    ) -> None:
        self.retry_after = retry_after
        self.asked_pause = asked_pause
        self.maybe_processed = maybe_processed
        super().__init__(message)


class CallbackRefused(McpAuthProxyError):
    """A browser came to the callback with something that no pending flow accounts for; ``status`` suits it."""

    def __init__(self, message: str, status: int = 400) -> None:
        self.status = status
        super().__init__(message)


class UpstreamError(McpAuthProxyError):
    """The upstream MCP server could not be used for this request."""


class UpstreamUnreachable(UpstreamError):
    """No connection could be made: no byte of the request has left."""


class UpstreamTimeout(UpstreamError):
    """Connected, but the response head did not come in time."""


class UpstreamProtocolError(UpstreamError):
    """The response broke off, or broke the rules of HTTP. The request may have been acted upon."""


class UpstreamPoolTimeout(UpstreamError):
    """Every connection allowed to this origin is taken, and none came free in time."""
