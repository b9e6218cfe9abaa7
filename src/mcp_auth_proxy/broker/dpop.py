"""DPoP state that outlives a single request (RFC 9449): the nonces of each server, and the signers of bound tokens."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import AccessToken, Grant
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth import dpop

MAX_NONCES = 10_000
"""Number of nonces that are remembered; the least recently updated one is dropped first."""


class Nonces:
    """The newest nonce of each token endpoint (by URL) and of each resource (by origin) (RFC 9449 §8.2)."""

    def __init__(self) -> None:
        self._nonces: OrderedDict[str, str] = OrderedDict()

    def get(self, place: str) -> str:
        """Return the nonce to use; empty if none was required so far."""
        return self._nonces.get(place, "")

    def update_nonce(self, place: str, nonce: str) -> None:
        """Remember a nonce. An empty one changes nothing."""
        if not nonce:
            return
        self._nonces[place] = nonce
        self._nonces.move_to_end(place)
        if len(self._nonces) > MAX_NONCES:
            self._nonces.popitem(last=False)


class TokenSigner:
    """Sign the proofs for requests with one token. ``once`` is a nonce for the next proof only."""

    def __init__(
        self, key: dpop.Key, *, origin: str, ath: str, nonces: Nonces, clock: Callable[[], float], once: str = ""
    ) -> None:
        self._key = key
        self._origin = origin
        self._ath = ath
        self._nonces = nonces
        self._clock = clock
        self._once = once

    def prove(self, method: bytes, target: bytes) -> bytes:
        """Return the proof for one request (RFC 9449 §7)."""
        return self._key.proof(
            method=method.decode("ascii"),
            url=f"{self._origin}{target.decode('latin-1')}",
            now=self._clock(),
            nonce=self._once or self._nonces.get(self._origin),
            ath=self._ath,
        ).encode("ascii")

    def update_nonce(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Remember the nonce of a response; successful responses have one too (RFC 9449 §8.2)."""
        self._once = ""
        for name, value in headers:
            if name.lower() == b"dpop-nonce":
                self._nonces.update_nonce(self._origin, dpop.read_nonce(value.decode("latin-1")))

    def with_nonce(self, nonce: str) -> "TokenSigner":
        """Return a copy that uses this nonce for its next proof.

        Other requests do not replace it in the meantime: some servers accept a nonce only once.
        """
        return TokenSigner(
            self._key, origin=self._origin, ath=self._ath, nonces=self._nonces, clock=self._clock, once=nonce
        )


def access_token(
    grant: Grant, server: ServerSettings, generation: int, *, nonces: Nonces, clock: Callable[[], float]
) -> AccessToken:
    """Return a grant's token as the data plane sees it."""
    tokens = grant.tokens
    header = f"{tokens.token_type} {tokens.access_token}".encode("ascii")
    if tokens.token_type != dpop.TOKEN_TYPE or grant.dpop_key is None:
        return AccessToken(header, generation)
    signer = TokenSigner(
        dpop.Key.load(grant.dpop_key),
        origin=urls.parse(server.url).origin.serialized,
        ath=dpop.digest(tokens.access_token),
        nonces=nonces,
        clock=clock,
    )
    return AccessToken(header, generation, signer)


def with_new_nonce(
    used: AccessToken, *, server: ServerSettings, challenge: Sequence[bytes], nonce: Sequence[bytes], repeated: bool
) -> AccessToken | None:
    """Return the same token with the nonce that a resource requires (RFC 9449 §9); None if it requires none.

    Raises AuthorizationError if this is ``repeated``: the last proof had the nonce that the server asked for.
    """
    if not isinstance(used.signer, TokenSigner) or not challenges.wants_nonce(challenge):
        return None
    values = [read for value in nonce if (read := dpop.read_nonce(value.decode("latin-1")))]
    if not values:
        return None
    if repeated:
        raise AuthorizationError(
            f"Server {server.name} refuses the proof that its token is sent with, although it has the nonce that the "
            f"server asked for (RFC 9449 §9). Check this machine's clock, and the address in {server.key('url')}."
        )
    return replace(used, signer=used.signer.with_nonce(values[-1]))
