"""Token exchange (RFC 8693): on behalf of a caller, or an ID token for an ID-JAG at an identity provider.

The ID-JAG (identity assertion authorization grant) is defined in draft-ietf-oauth-identity-assertion-authz-grant and
profiled by MCP's enterprise-managed authorization.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from mcp_auth_proxy.oauth import jwt_bearer, scopes, token_endpoint
from mcp_auth_proxy.oauth.documents import Document

GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"


class TokenType(StrEnum):
    """Token type identifiers (RFC 8693 §3)."""

    ACCESS_TOKEN = "urn:ietf:params:oauth:token-type:access_token"
    REFRESH_TOKEN = "urn:ietf:params:oauth:token-type:refresh_token"
    ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"
    ID_JAG = "urn:ietf:params:oauth:token-type:id-jag"


@dataclass(frozen=True, slots=True)
class SubjectToken:
    """The token of the party on whose behalf the request is made (RFC 8693 §2.1)."""

    value: str = field(repr=False)
    type: TokenType = TokenType.ACCESS_TOKEN


@dataclass(frozen=True, slots=True)
class IdJag:
    """An ID-JAG and its scopes; None if they are the ones requested."""

    assertion: str = field(repr=False)
    scopes: tuple[str, ...] | None


def request(subject: SubjectToken, *, resource: str, scopes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the form that exchanges the token of a caller for an access token to ``resource`` (RFC 8693 §2.1)."""
    return [
        *_start(subject, TokenType.ACCESS_TOKEN),
        *_scope(scopes),
        *([("resource", resource)] if resource else []),
    ]


def id_jag_request(
    subject: SubjectToken, *, audience: str, resource: str, scopes: tuple[str, ...]
) -> list[tuple[str, str]]:
    """Return the form that requests an ID-JAG from an identity provider (MCP enterprise-managed authorization §4).

    ``audience`` is the issuer identifier of the MCP server's authorization server.
    """
    return [
        *_start(subject, TokenType.ID_JAG),
        ("audience", audience),
        *([("resource", resource)] if resource else []),
        *_scope(scopes),
    ]


def read_id_jag(
    status: int, headers: Mapping[str, str], body: bytes, *, url: str, secrets: Iterable[str] = ()
) -> IdJag:
    """Return the ID-JAG of an identity provider's response (RFC 8693 §2.2.1). Raises as ``token_endpoint.read_answer``.

    Also raises DocumentRefused for any other token type: an access token of the identity provider must not be sent
    to another server.
    """
    answer = token_endpoint.read_answer(status, headers, body, url=url, clause="RFC 8693 §2.2.1", secrets=secrets)
    document = Document(answer, name="ID-JAG response", url=url, clause="RFC 8693 §2.2.1")
    if document.required_string("issued_token_type") != TokenType.ID_JAG:
        raise document.refusal(f"its issued_token_type is not {TokenType.ID_JAG.value}")
    assertion = document.get("access_token")
    if not isinstance(assertion, str) or len(assertion) > token_endpoint.MAX_TOKEN or not jwt_bearer.is_jwt(assertion):
        raise document.refusal("its access_token is not a JWT")
    given = document.string("scope")
    return IdJag(assertion, None if given is None else scopes.parse(given))


def _start(subject: SubjectToken, requested: TokenType) -> list[tuple[str, str]]:
    return [
        ("grant_type", GRANT_TYPE),
        ("requested_token_type", requested.value),
        ("subject_token", subject.value),
        ("subject_token_type", subject.type.value),
    ]


def _scope(scopes: tuple[str, ...]) -> list[tuple[str, str]]:
    return [("scope", " ".join(scopes))] if scopes else []
