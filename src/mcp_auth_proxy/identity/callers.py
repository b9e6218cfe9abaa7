"""From a request to its caller, in every mode."""

import hashlib
import hmac
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from mcp_auth_proxy.config.settings import InboundSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity.authenticator import Fields, Request
from mcp_auth_proxy.identity.claims import claims_identity
from mcp_auth_proxy.identity.credentials import API_KEY, AUTHORIZATION, MISSING, UNKNOWN, Credential, read_credential
from mcp_auth_proxy.identity.directory import Directory
from mcp_auth_proxy.identity.keys import has_key_form
from mcp_auth_proxy.identity.naming import names_for
from mcp_auth_proxy.identity.trusted_header import TrustedHeader
from mcp_auth_proxy.models import LOCAL_CALLER, LOCAL_PRINCIPAL, Caller, Identity, Principal, Role
from mcp_auth_proxy.oauth.fetch import Fetcher

if TYPE_CHECKING:
    from mcp_auth_proxy.identity.tokens import TokenCallers

_MAX_NAMED = 10_000
"""Callers named by the trusted header that are remembered."""

_ROLE_INTERVAL = 60.0
"""Seconds between two changes of the stored role of a principal."""

_BEARER = b"Bearer "


class _Verdict(NamedTuple):
    """Who calls with a credential, as it was looked up in an epoch of the directory."""

    epoch: object
    until: float | None
    """Unix seconds; None if the credential has no end of its own."""
    caller: Caller


_LOCAL = _Verdict(None, None, LOCAL_CALLER)


class Callers:
    """The ``Authenticator`` of a running proxy, which also tells who uses the API.

    ``start`` and ``aclose`` must be awaited. Belongs to one event loop.
    """

    def __init__(
        self,
        inbound: InboundSettings,
        directory: Directory,
        *,
        fetcher: Fetcher,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.directory = directory
        self.anonymous = not inbound.modes
        self.credential_fields: frozenset[bytes] = frozenset()
        self._fetcher = fetcher
        self._clock = clock
        self._token_digest: bytes | None = None
        self._named: dict[bytes, Caller] = {}
        self._roles_stored_at: dict[str, float] = {}
        self._tokens: TokenCallers | None = None
        directory.on_change(self._forget)
        self.configure(inbound)

    def configure(self, inbound: InboundSettings) -> None:
        """Apply changed settings. The modes stay those of the start (``config.changes``)."""
        self._inbound = inbound
        self._keys = "api_key" in inbound.modes
        is_trusted = inbound.trusted_header is not None and "trusted_header" in inbound.modes
        self._header = TrustedHeader(inbound.trusted_header) if is_trusted and inbound.trusted_header else None
        self._named = {}
        if "jwt" in inbound.modes:
            # Only here: signatures take 1.6 MiB that the other modes do without.
            from mcp_auth_proxy.identity.tokens import TokenCallers  # noqa: PLC0415

            known = self._tokens
            self._tokens = TokenCallers(inbound, self.principal_of, fetcher=self._fetcher, clock=self._clock)
            if known is not None:
                self._tokens.adopt_keys(known)
        names = frozenset({AUTHORIZATION, API_KEY}) | (self._header.fields if self._header else frozenset())
        self.credential_fields = names if inbound.modes else frozenset()
        authorization = {AUTHORIZATION} if self._keys or self._tokens else set()
        self._watched = frozenset(authorization | ({API_KEY} if self._keys else set())) | (
            self._header.fields if self._header else frozenset()
        )
        self.directory.end_epoch()

    async def start(self) -> None:
        """Read the principals and keys, and watch for changes. Raises StoreError."""
        await self.directory.start()

    def warm_up(self) -> None:
        """Ask identity providers for their keys now, in the background: whether that works is known then, too."""
        if self._tokens is not None:
            self._tokens.fetch_keys()

    async def aclose(self) -> None:
        """Stop watching."""
        await self.directory.aclose()
        if self._tokens is not None:
            await self._tokens.aclose()

    def accept_token(self, token: str) -> None:
        """Accept the key of the ``api-token`` file as that of ``local``, at the API in mode ``none``."""
        self._token_digest = hashlib.sha256(token.encode()).digest()

    def on_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each principal that may no longer call, within a second of the change."""
        self.directory.on_refused(callback)

    def on_key_refused(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the id of each API key that was revoked or has expired, within a second."""
        self.directory.on_key_refused(callback)

    def problems(self) -> list[str]:
        """Return in sentences why some callers can't be identified now."""
        return self._tokens.problems() if self._tokens is not None else []

    # The data plane

    def recognize(self, request: Request) -> Caller | None:
        """Return the caller if it is known without waiting; None if ``identify`` has to be awaited.

        What is found out is kept with the fields: the next request of the connection mostly has the same.
        """
        fields = request.fields
        verdict = fields.verdict
        if verdict.__class__ is _Verdict:
            epoch, until, caller = verdict
            if epoch is self.directory.epoch and (until is None or self._clock() < until):
                return caller
        fields.verdict = found = self._look_up(fields.headers, request.peer)
        return None if found is None else found.caller

    def _look_up(self, fields: Fields, peer: str) -> _Verdict | None:
        if self.anonymous:
            return _LOCAL
        watched = self._watched
        seen = [field for field in fields if field[0] in watched]
        if len(seen) == 1:
            name, value = seen[0]
            if name == AUTHORIZATION:
                if not value.startswith(_BEARER):
                    return None
                value = value[7:]
            if name in (AUTHORIZATION, API_KEY):
                return self._verdict(hashlib.sha256(value).digest())
        if self._header is not None and seen:
            named = self._header.value_nowait(seen, peer)
            caller = None if named is None else self._named.get(named)
            return None if caller is None else _Verdict(self.directory.epoch, None, caller)
        return None

    async def identify(self, fields: Fields, peer: str) -> Caller:
        """Return the caller. Raises CallerRefused, and StoreError if it can't be looked up now."""
        if self.anonymous:
            return LOCAL_CALLER
        jwts = self._tokens is not None
        credential = read_credential(fields, peer, keys=self._keys, jwts=jwts, header=self._header)
        if credential is None:
            raise CallerRefused(MISSING)
        if credential.kind == "key":
            return await self._key_caller(credential.value, self._known)
        return await self._other_caller(credential)

    def _known(self, digest: bytes) -> Caller | None:
        verdict = self._verdict(digest)
        return None if verdict is None else verdict.caller

    def _verdict(self, digest: bytes) -> _Verdict | None:
        """Return whose an API key or token is, by its SHA-256, if that is known."""
        directory = self.directory
        if self._keys:
            caller = directory.callers.get(digest)
            if caller is not None:
                ends = directory.expiries.get(digest)
                if ends is not None and ends <= self._clock():
                    return None
                if digest not in directory.used:
                    directory.used.add(digest)
                return _Verdict(directory.epoch, ends, caller)
        known = None if self._tokens is None else self._tokens.known(digest)
        return None if known is None else _Verdict(directory.epoch, known.until, known.caller)

    # The API

    async def identify_api(self, fields: Fields, peer: str) -> Caller | None:
        """Return who uses the API; None if the request has no credential, apart from cookies.

        API keys are accepted in every mode. Raises CallerRefused, and StoreError if it can't be looked up now.
        """
        jwts = self._tokens is not None
        credential = read_credential(fields, peer, keys=True, jwts=jwts, header=self._header)
        if credential is None:
            return None
        if credential.kind == "key":
            return await self._key_caller(credential.value, self._known_to_api)
        return await self._other_caller(credential)

    async def caller_of_key(self, key: str) -> Caller:
        """Return the caller of an API key that was pasted, whatever its scopes. Raises CallerRefused, StoreError."""
        return await self._key_caller(key.strip().encode(), self._known_to_api)

    async def caller_of_claims(self, issuer: str, claims: Mapping[str, object]) -> Caller:
        """Return the caller that the verified claims of an ID token name. Raises CallerRefused, StoreError."""
        named = claims_identity(self._inbound, issuer, claims)
        principal = await self.principal_of(named.identity, named.names, named.role)
        return Caller(principal=principal, credential=named.identity.source)

    def _known_to_api(self, digest: bytes) -> Caller | None:
        directory = self.directory
        if self.anonymous and self._token_digest is not None and hmac.compare_digest(digest, self._token_digest):
            return Caller(principal=LOCAL_PRINCIPAL, credential="token")
        caller = directory.callers.get(digest) or directory.other_callers.get(digest)
        ends = directory.expiries.get(digest)
        if caller is None or (ends is not None and ends <= self._clock()):
            return None
        directory.used.add(digest)
        return caller

    # Both

    async def _key_caller(self, key: bytes, known: Callable[[bytes], Caller | None]) -> Caller:
        digest = hashlib.sha256(key).digest()
        caller = known(digest)
        if caller is None and has_key_form(key):
            # A key that was made a moment ago works at once.
            await self.directory.heed_changes()
            caller = known(digest)
        if caller is None:
            raise CallerRefused(UNKNOWN)
        return caller

    async def _other_caller(self, credential: Credential) -> Caller:
        if credential.kind == "jwt" and self._tokens is not None:
            return await self._tokens.identify(credential.value)
        if credential.kind == "header" and self._header is not None:
            return await self._named_caller(self._header, credential.value)
        raise CallerRefused(UNKNOWN)

    async def _named_caller(self, header: TrustedHeader, value: bytes) -> Caller:
        caller = self._named.get(value)
        if caller is None:
            subject = header.subject(value)
            identity = Identity(header.source, subject)
            principal = await self.principal_of(identity, names_for(subject, header.settings.name, plain=True), None)
            caller = Caller(principal=principal, credential=header.source)
            if header is self._header:
                if len(self._named) >= _MAX_NAMED:
                    del self._named[next(iter(self._named))]
                self._named[value] = caller
        return caller

    async def principal_of(self, identity: Identity, names: tuple[str, ...], role: Role | None) -> Principal:
        """Return the principal of an identity, as ``inbound.provision`` says. Raises CallerRefused, StoreError.

        ``names``: what a new one is called, the best first. ``role``: None if the credential says nothing about it.
        """
        listed = self._inbound.provision == "listed"
        principal = await self.directory.find(identity)
        if principal is None and not listed:
            principal = await self.directory.provision(identity, names, role or Role.MEMBER)
        if principal is None or (listed and not principal.listed):
            shown = f"{identity.source}={identity.subject}"
            raise CallerRefused(
                f"This proxy does not know {shown!r}. An administrator can add it: "
                f"mcp-auth-proxy principals add NAME --identity {shown!r}",
                403,
            )
        if not principal.is_active:
            raise CallerRefused(UNKNOWN)
        if role is not None and role is not principal.role:
            await self._store_role(principal, role)
            now = self.directory.principal(principal.id)
            if now is None or not now.is_active:
                # Disabled meanwhile: whoever remembers the caller would not be told again.
                raise CallerRefused(UNKNOWN)
            principal = replace(now, role=role)
        return principal

    async def _store_role(self, principal: Principal, role: Role) -> None:
        """Store what the identity provider says about a principal, which holds for its keys and sessions too.

        Not for each token: those of one principal may say different things.
        """
        now = self._clock()
        if abs(now - self._roles_stored_at.get(principal.id, 0.0)) >= _ROLE_INTERVAL:
            if len(self._roles_stored_at) >= _MAX_NAMED:
                self._roles_stored_at.clear()
            self._roles_stored_at[principal.id] = now
            await self.directory.change(principal.id, role=role)

    def _forget(self, principals: frozenset[str]) -> None:
        for value in [value for value, caller in self._named.items() if caller.principal.id in principals]:
            del self._named[value]
        if self._tokens is not None:
            self._tokens.forget(principals)
