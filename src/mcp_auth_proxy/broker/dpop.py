"""DPoP between the steps (RFC 9449): nonces as they come and go, and the proofs that accompany a bound token."""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from mcp_auth_proxy.config.settings import ServerSettings
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import AccessToken, DpopUse, Flow, Grant
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.oauth import challenge as challenges
from mcp_auth_proxy.oauth import dpop

MAX_NONCES = 10_000
"""Places whose nonce is remembered; the one that was heard of longest ago goes first."""


class Nonces:
    """The newest nonce of each place: a token endpoint's URL, or a resource's origin (RFC 9449 §8.2)."""

    def __init__(self) -> None:
        self._nonces: OrderedDict[str, str] = OrderedDict()

    def get(self, place: str) -> str:
        """Return the nonce to use, empty where none has been asked for."""
        return self._nonces.get(place, "")

    def update_nonce(self, place: str, nonce: str) -> None:
        """Remember a nonce; an empty one changes nothing."""
        if not nonce:
            return
        self._nonces[place] = nonce
        self._nonces.move_to_end(place)
        if len(self._nonces) > MAX_NONCES:
            self._nonces.popitem(last=False)


class TokenSigner:
    """Proofs for the requests that carry one token. ``once`` is a nonce meant for the next of them alone."""

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
        """Take in the nonce of an answer, a good one's too (RFC 9449 §8.2)."""
        self._once = ""
        for name, value in headers:
            if name.lower() == b"dpop-nonce":
                self._nonces.update_nonce(self._origin, dpop.read_nonce(value.decode("latin-1")))

    def with_nonce(self, nonce: str) -> "TokenSigner":
        """Return one that uses this nonce next, whatever other requests hear meanwhile: some are good only once."""
        return TokenSigner(
            self._key, origin=self._origin, ath=self._ath, nonces=self._nonces, clock=self._clock, once=nonce
        )


def access_token(
    grant: Grant, server: ServerSettings, generation: int, *, nonces: Nonces, clock: Callable[[], float]
) -> AccessToken:
    """Return what the data plane may hold of a grant."""
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
    used: AccessToken, *, server: str, challenge: Sequence[bytes], nonce: Sequence[bytes], again: bool
) -> AccessToken | None:
    """Return the same token with the nonce that a resource asks for (RFC 9449 §9); None where that is not the matter.

    Raises AuthorizationError where it is asked for ``again`` with the nonce just given.
    """
    if not isinstance(used.signer, TokenSigner) or not challenges.wants_nonce(challenge):
        return None
    values = [given for value in nonce if (given := dpop.read_nonce(value.decode("latin-1")))]
    if not values:
        return None
    if again:
        raise AuthorizationError(
            f"Server {server} refuses the proof that its token is sent with, although it has the nonce that the server "
            f"asked for (RFC 9449 §9). Look at this machine's clock, and at the address in servers.{server}.url."
        )
    return replace(used, signer=used.signer.with_nonce(values[-1]))


def fits(origin: Grant | Flow, server: ServerSettings) -> bool:
    """Whether what is stored is bound as the configuration wants it by now."""
    match server.oauth.dpop:
        case DpopUse.OFF:
            return not _bound(origin)
        case DpopUse.REQUIRED:
            return _bound(origin)
        case _:
            return True


def _bound(origin: Grant | Flow) -> bool:
    if isinstance(origin, Flow):
        return origin.dpop_key is not None
    return origin.tokens.token_type == dpop.TOKEN_TYPE
