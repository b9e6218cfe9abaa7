"""Which identity the verified claims of a token name, what its principal is called, and whether it is an admin."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from mcp_auth_proxy.config.settings import InboundSettings, JwtSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.models import Identity, Role

MAX_SUBJECT = 255
"""Characters of the claim that names the principal (OpenID Connect Core §2 for ``sub``)."""


class NamedCaller(NamedTuple):
    """What claims say about the caller."""

    identity: Identity
    names: tuple[str, ...]
    """What a new principal is called, the best first."""
    role: Role | None
    """None if the claims say nothing about it."""


def claims_identity(inbound: InboundSettings, issuer: str, claims: Mapping[str, object]) -> NamedCaller:
    """Return who the claims of an issuer name. Raises CallerRefused.

    An ID token of an issuer under ``inbound.jwt`` names the same identity as its JWTs. Only the first issuer's callers
    are called by their subject alone: the same subject of another issuer is somebody else.
    """
    settings = next((each for each in inbound.jwt if each.issuer == issuer), None)
    return identity_of(issuer, claims, settings, is_first=issuer == _first_issuer(inbound))


def identity_of(
    issuer: str, claims: Mapping[str, object], settings: JwtSettings | None, *, is_first: bool
) -> NamedCaller:
    """Return who claims name, as the settings of their issuer say. Raises CallerRefused."""
    claim = settings.principal if settings is not None else "sub"
    subject = claims.get(claim)
    if not isinstance(subject, str) or not 0 < len(subject) <= MAX_SUBJECT or not subject.isprintable():
        raise CallerRefused(f"The token names nobody in its claim {claim}.")
    qualified = f"{subject}@{issuer.partition('://')[2]}"
    role = None
    if settings is not None and settings.roles_claim is not None:
        is_admin = any(value in settings.roles_admin for value in _texts(claims.get(settings.roles_claim)))
        role = Role.ADMIN if is_admin else Role.MEMBER
    return NamedCaller(Identity(f"jwt:{issuer}", subject), (subject, qualified) if is_first else (qualified,), role)


def _first_issuer(inbound: InboundSettings) -> str:
    if inbound.jwt:
        return inbound.jwt[0].issuer
    return inbound.sign_in.issuer if inbound.sign_in is not None else ""


def _texts(value: object) -> Sequence[object]:
    """Return the values of a claim that is a list, or a text with one of them or several (as ``scope`` has)."""
    if isinstance(value, str):
        return [value, *value.split()]
    return value if isinstance(value, list) else []
