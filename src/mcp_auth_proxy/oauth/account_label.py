"""Whose account a grant is for, in words: from the token response, its ID token, or the userinfo endpoint.

A label is shown to the grant's owner and decides nothing, so the signature of an ID token is not checked: it comes from
the token endpoint itself (OpenID Connect Core §3.1.3.7).
"""

import base64
import binascii
from collections.abc import Mapping

from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.oauth import jwt_bearer
from mcp_auth_proxy.oauth.documents import parse_object

MAX_PART = 100
"""Characters of a name in a label."""

_PERSON = ("email", "preferred_username", "login", "username", "name")
_PEOPLE = ((), ("user",), ("owner", "user", "person"), ("owner", "user"), ("account",))
"""Where responses have a person: OpenID Connect's claims at the top; ``owner`` is Notion's."""
_GROUPS = ("workspace", "team", "organization")


def of_response(answer: Mapping[str, object]) -> str:
    """Return the label that a token response gives, such as ``me@work.example, workspace Acme``, or ""."""
    id_token = answer.get("id_token")
    claims = _claims(id_token) if isinstance(id_token, str) else {}
    person = of_person(claims) or _person(answer)
    return ", ".join(filter(None, [person, _group(answer)]))


def of_person(claims: Mapping[str, object]) -> str:
    """Return what the claims of an ID token, or of the userinfo endpoint, call the user; "" if they do not."""
    return next((text for name in _PERSON if (text := _text(claims.get(name)))), "")


def _person(answer: Mapping[str, object]) -> str:
    for path in _PEOPLE:
        found: object = answer
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and (person := of_person(found)):
            return person
    return ""


def _group(answer: Mapping[str, object]) -> str:
    """Return the workspace, team or organization: an object with a name, or a text."""
    for kind in _GROUPS:
        value = answer.get(kind)
        name = _text(value.get("name")) if isinstance(value, Mapping) else _text(value)
        if name := name or _text(answer.get(f"{kind}_name")):
            return f"{kind} {name}"
    return ""


def _claims(id_token: str) -> Mapping[str, object]:
    if not jwt_bearer.is_jwt(id_token):
        return {}
    payload = id_token.split(".")[1]
    try:
        return parse_object(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, binascii.Error):
        return {}


def _text(value: object) -> str:
    if not isinstance(value, str):
        return ""
    return excerpt("".join(filter(str.isprintable, " ".join(value.split()))), MAX_PART)
