"""The field in which a web server in front names the caller that it has identified."""

import hmac
from collections.abc import Iterator
from itertools import product

from mcp_auth_proxy.config.settings import TrustedHeaderSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity.authenticator import Fields
from mcp_auth_proxy.net.peers import is_in, parse_address

MAX_SUBJECT = 255
"""Characters of a caller's name."""

_MAX_PEERS = 1000


class TrustedHeader:
    """Read the caller's name from a request, if whoever sent it may name callers."""

    def __init__(self, settings: TrustedHeaderSettings) -> None:
        self.settings = settings
        self.source = f"header:{settings.name}"
        self.name = settings.name.encode()
        self._secret_name = (settings.secret_header or "").encode()
        self._secret = settings.secret.value.encode() if settings.secret is not None else None
        self._names = frozenset(_spellings(settings.name))
        self._secret_names = frozenset(_spellings(settings.secret_header)) if settings.secret_header else frozenset()
        # Commands read the configuration without the secrets that they do not need, and may listen for a while.
        self._secret_is_missing = settings.secret_header is not None and settings.secret is None
        self._peers: dict[str, bool] = {}

    @property
    def fields(self) -> frozenset[bytes]:
        """The names of the fields that it reads, and those that some server may take for them."""
        return self._names | self._secret_names

    def value(self, fields: Fields, peer: str) -> bytes | None:
        """Return the caller's name as it was sent; None if the request names nobody. Raises CallerRefused.

        A name that is spelled with ``_`` may be a client's own: web servers and applications take it for the other.
        """
        named = [field for field in fields if field[0] in self._names and field[1].strip()]
        if not named:
            return None
        secrets = [field for field in fields if field[0] in self._secret_names]
        if len(named) != 1 or named[0][0] != self.name or not self.believes(peer):
            raise CallerRefused(f"The field {self.settings.name} is not accepted from here.")
        if self._secret is not None and not (
            len(secrets) == 1 and secrets[0][0] == self._secret_name and self.is_secret(secrets[0][1])
        ):
            raise CallerRefused(f"The field {self.settings.name} is not accepted from here.")
        return named[0][1]

    def value_nowait(self, seen: list[tuple[bytes, bytes]], peer: str) -> bytes | None:
        """Return what ``value`` does, if ``seen`` has the two fields, or the one, that are expected; else None."""
        if self._secret is None:
            if len(seen) != 1:
                return None
            name, value = seen[0]
        else:
            if len(seen) != 2:
                return None
            (name, value), secret = seen if seen[0][0] == self.name else (seen[1], seen[0])
            if secret[0] != self._secret_name or not self.is_secret(secret[1]):
                return None
        return value if name == self.name and self.believes(peer) else None

    def is_secret(self, value: bytes) -> bool:
        """Return whether a value is the secret, in constant time."""
        return self._secret is not None and hmac.compare_digest(value, self._secret)

    def believes(self, peer: str) -> bool:
        """Return whether the peer may name callers."""
        if self._secret_is_missing:
            return False
        known = self._peers.get(peer)
        if known is None:
            try:
                known = is_in(parse_address(peer), self.settings.sources)
            except ValueError:
                known = False
            if len(self._peers) >= _MAX_PEERS:
                self._peers.clear()
            self._peers[peer] = known
        return known

    @staticmethod
    def subject(value: bytes) -> str:
        """Return the name in a value. Raises CallerRefused."""
        try:
            text = value.decode().strip()
        except UnicodeDecodeError:
            text = ""
        if not text or len(text) > MAX_SUBJECT or not text.isprintable():
            raise CallerRefused("The name of the caller is not printable text of at most 255 characters.")
        return text


def _spellings(name: str) -> Iterator[bytes]:
    """Yield a name with each of its hyphens also as an underscore."""
    parts = name.split("-")
    for separators in product("-_", repeat=len(parts) - 1):
        yield "".join(part + separator for part, separator in zip(parts, (*separators, ""), strict=True)).encode()
