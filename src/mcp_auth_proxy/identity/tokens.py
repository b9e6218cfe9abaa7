"""Callers that present a JWT (RFC 7519, RFC 8725): whose issuer is configured, and whose signature holds."""

import base64
import hashlib
import json
import re
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from jwt.exceptions import InvalidKeyError, PyJWKError

from mcp_auth_proxy.config.settings import InboundSettings, JwtSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity.claims import identity_of
from mcp_auth_proxy.identity.credentials import UNKNOWN
from mcp_auth_proxy.identity.key_sets import ALGORITHMS, IssuerKeys, KeySet, KeysUnavailable, VerificationKey
from mcp_auth_proxy.identity.kubernetes import SERVICE_ACCOUNT, KubernetesKeys, own_issuer
from mcp_auth_proxy.models import Caller, Identity, Principal, Role
from mcp_auth_proxy.oauth.fetch import Fetcher

MAX_TOKEN = 8 * 1024
"""Bytes of a token."""

LEEWAY = 30.0
"""Seconds that clocks may differ."""

VERDICT_LIFETIME = 60.0
"""Seconds that a token is not checked again."""

MAX_VERDICTS = 4000
MAX_REMEMBERED = 8 * 1024 * 1024
"""Bytes of all tokens that are remembered."""

_ALGORITHMS = frozenset[str]().union(*ALGORITHMS.values())
_FORM = re.compile(rb"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)")
_TYPES = frozenset({"jwt", "at+jwt", "application/at+jwt", "application/jwt"})
_OWN_KEYS = frozenset({"jku", "jwk", "x5u", "x5c", "crit"})
"""Parameters by which a token brings its own key, or changes what the signature means."""

PrincipalOf = Callable[[Identity, tuple[str, ...], Role | None], Awaitable[Principal]]


class TokenVerdict(NamedTuple):
    """Whose a token is, which was checked."""

    caller: Caller
    until: float
    """Unix seconds."""
    size: int


class Token:
    """A JWT that was parsed but not checked. Raises CallerRefused if it can't be one."""

    def __init__(self, encoded: bytes) -> None:
        found = _FORM.fullmatch(encoded) if len(encoded) <= MAX_TOKEN else None
        if found is None:
            raise CallerRefused(UNKNOWN)
        header = _object(found[1])
        self.claims = _object(found[2])
        self.signed = encoded[: found.end(2)]
        self.signature = _decoded(found[3])
        self.text = encoded.decode()
        algorithm, kid, kind = header.get("alg"), header.get("kid"), header.get("typ", "JWT")
        if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS or header.keys() & _OWN_KEYS:
            raise CallerRefused(UNKNOWN)
        if not isinstance(kid, str | None) or not isinstance(kind, str) or kind.lower() not in _TYPES:
            raise CallerRefused(UNKNOWN)
        self.algorithm: str = algorithm
        self.kid = kid
        self.issuer = self.claims.get("iss")

    def is_signed_by(self, key: VerificationKey) -> bool:
        """Return whether the signature was made with a key."""
        try:
            found = key.for_algorithm(self.algorithm)
            return bool(found.Algorithm.verify(self.signed, found.key, self.signature))
        except (PyJWKError, InvalidKeyError, ValueError, TypeError):
            return False

    def check_claims(self, issuer: str, *audiences: str, now: float) -> float:
        """Return when the token ends (Unix seconds). Raises CallerRefused.

        ``issuer`` is compared as a raw string; one of ``audiences`` must be named.
        """
        aud = self.claims.get("aud")
        named = aud if isinstance(aud, list) else [aud]
        ends = _number(self.claims.get("exp"))
        begins = max(_number(self.claims.get(name)) or 0.0 for name in ("nbf", "iat"))
        # A token that is bound to a key (RFC 7800) must not be taken from whoever presents it.
        if self.issuer != issuer or ends is None or "cnf" in self.claims:
            raise CallerRefused(UNKNOWN)
        if not any(audience in named for audience in audiences):
            raise CallerRefused(UNKNOWN)
        if now >= ends + LEEWAY or now < begins - LEEWAY:
            raise CallerRefused("The token of this request has expired, or is not valid yet.")
        return ends


class Issuer:
    """A configured issuer, with its keys."""

    def __init__(self, settings: JwtSettings, keys: KeySet, *, is_first: bool) -> None:
        self.settings = settings
        self.keys = keys
        self.is_first = is_first
        self._audiences = _spellings(settings.audience)

    async def verify(self, token: Token, *, now: float) -> float:
        """Return when a token of this issuer ends. Raises CallerRefused."""
        ends = token.check_claims(self.settings.issuer, *self._audiences, now=now)
        try:
            keys = await self.keys.find(token.kid, token.algorithm)
        except KeysUnavailable as error:
            raise CallerRefused(
                f"The identity provider {self.settings.issuer} can't be asked for its keys now. Try again later.",
                503,
                retry_after=error.retry_after,
            ) from None
        if not any(token.is_signed_by(key) for key in keys):
            raise CallerRefused(UNKNOWN)
        return ends


class TokenCallers:
    """Tell the callers of JWTs. A token that was checked is known for a minute, but not beyond its end."""

    def __init__(
        self,
        inbound: InboundSettings,
        principal_of: PrincipalOf,
        *,
        fetcher: Fetcher,
        clock: Callable[[], float] = time.time,
        service_account: Path = SERVICE_ACCOUNT,
    ) -> None:
        self._principal_of = principal_of
        self._clock = clock
        self._service_account = service_account
        self._issuers: dict[str, Issuer] = {}
        self._kubernetes: Issuer | None = None
        for number, settings in enumerate(inbound.jwt):
            source = KubernetesKeys(service_account) if settings.kubernetes else IssuerKeys(settings, fetcher)
            keys = KeySet("the Kubernetes API server" if settings.kubernetes else settings.issuer, source)
            issuer = Issuer(settings, keys, is_first=number == 0)
            if settings.kubernetes:
                self._kubernetes = issuer
            else:
                self._issuers[settings.issuer] = issuer
        self._verdicts: dict[bytes, TokenVerdict] = {}
        self._remembered = 0

    def adopt_keys(self, other: "TokenCallers") -> None:
        """Take over the keys of issuers that are configured as they were. ``other`` must not be used any more."""
        for name, issuer in self._issuers.items():
            before = other._issuers.get(name)
            if before is not None and before.settings.jwks == issuer.settings.jwks:
                issuer.keys = before.keys
        if self._kubernetes is not None and other._kubernetes is not None:
            self._kubernetes.keys = other._kubernetes.keys
        adopted = {id(issuer.keys) for issuer in self._all()}
        for issuer in other._all():
            if id(issuer.keys) not in adopted:
                issuer.keys.cancel()

    def fetch_keys(self) -> None:
        """Ask for the keys of every issuer in the background, so that the first token need not wait for them."""
        for issuer in self._all():
            issuer.keys.fetch_soon()

    async def aclose(self) -> None:
        """End the requests for keys that are running."""
        for issuer in self._all():
            await issuer.keys.aclose()

    def problems(self) -> list[str]:
        """Return in sentences which issuers' keys could not be had."""
        return [issuer.keys.problem for issuer in self._all() if issuer.keys.problem]

    def known(self, digest: bytes) -> TokenVerdict | None:
        """Return the verdict on a token that was checked within the last minute, by the SHA-256 of the token."""
        verdict = self._verdicts.get(digest)
        return verdict if verdict is not None and self._clock() < verdict.until else None

    async def identify(self, encoded: bytes) -> Caller:
        """Return the caller of a token. Raises CallerRefused, StoreError."""
        digest = hashlib.sha256(encoded).digest()
        verdict = self.known(digest)
        if verdict is not None:
            return verdict.caller
        token = Token(encoded)
        issuer = self._issuer_of(token)
        ends = await issuer.verify(token, now=self._clock())
        named = identity_of(issuer.settings.issuer, token.claims, issuer.settings, is_first=issuer.is_first)
        principal = await self._principal_of(named.identity, named.names, named.role)
        caller = Caller(principal=principal, credential=named.identity.source, jwt=token.text)
        self._remember(digest, caller, min(self._clock() + VERDICT_LIFETIME, ends), len(encoded))
        return caller

    def forget(self, principals: frozenset[str]) -> None:
        """Check the tokens of some principals again at their next request."""
        for digest, verdict in [*self._verdicts.items()]:
            if verdict.caller.principal.id in principals:
                self._drop(digest)

    def _issuer_of(self, token: Token) -> Issuer:
        """Return the issuer that a token names. Raises CallerRefused."""
        if not isinstance(token.issuer, str):
            raise CallerRefused(UNKNOWN)
        if token.issuer not in self._issuers and self._kubernetes is not None:
            # Not before: the file may not be there yet when the proxy starts.
            issuer, self._kubernetes = self._kubernetes, None
            name = own_issuer(self._service_account)
            if name is None:
                self._kubernetes = issuer
            else:
                issuer.settings = replace(issuer.settings, issuer=name)
                self._issuers.setdefault(name, issuer)
        found = self._issuers.get(token.issuer)
        if found is None:
            raise CallerRefused(UNKNOWN)
        return found

    def _all(self) -> list[Issuer]:
        return [*self._issuers.values(), *([self._kubernetes] if self._kubernetes is not None else [])]

    def _remember(self, digest: bytes, caller: Caller, until: float, size: int) -> None:
        self._drop(digest)
        self._verdicts[digest] = TokenVerdict(caller, until, size)
        self._remembered += size
        while len(self._verdicts) > MAX_VERDICTS or self._remembered > MAX_REMEMBERED:
            self._drop(next(iter(self._verdicts)))

    def _drop(self, digest: bytes) -> None:
        verdict = self._verdicts.pop(digest, None)
        if verdict is not None:
            self._remembered -= verdict.size


def _spellings(audience: str) -> tuple[str, ...]:
    """Return how an audience may be written: if it is the URL of an origin, with a slash at its end and without.

    They are equivalent (RFC 3986 §6.2.3). Some MCP clients add the slash to the ``resource`` that they request a token
    for, because JavaScript's ``URL`` does.
    """
    bare = audience.removesuffix("/")
    is_origin = bare.startswith(("https://", "http://")) and bare.count("/") == 2
    return (bare, f"{bare}/") if is_origin and not {"?", "#"}.intersection(bare) else (audience,)


def _object(encoded: bytes) -> dict[str, object]:
    """Return the JSON object in a part of a token. Raises CallerRefused, also for a name that stands there twice."""
    try:
        value = json.loads(_decoded(encoded), object_pairs_hook=_distinct, parse_constant=_refuse)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise CallerRefused(UNKNOWN)
    return value


def _distinct(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _refuse(constant: str) -> object:
    raise ValueError(f"{constant} is not JSON")


def _decoded(encoded: bytes) -> bytes:
    try:
        return base64.urlsafe_b64decode(encoded + b"=" * (-len(encoded) % 4))
    except ValueError:
        raise CallerRefused(UNKNOWN) from None


def _number(value: object) -> float | None:
    """Return a NumericDate (RFC 7519 §2); None if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
