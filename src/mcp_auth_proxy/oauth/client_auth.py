"""How the client proves itself at the token endpoint (RFC 6749 §2.3)."""

import base64
from collections.abc import Sequence
from urllib.parse import quote_plus, urlencode

from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import ClientAuth, Registration


def choose(supported: tuple[str, ...] | None, *, configured: ClientAuth | None, has_secret: bool) -> ClientAuth:
    """Return how a client is to authenticate: as configured; not at all without a secret; else what is supported.

    Basic goes before post (RFC 6749 §2.3.1), and is the default of a server that does not say (RFC 8414 §2).
    """
    if configured is not None:
        return configured
    if not has_secret:
        return ClientAuth.NONE
    if supported is not None and ClientAuth.POST in supported and ClientAuth.BASIC not in supported:
        return ClientAuth.POST
    return ClientAuth.BASIC


def authenticate(
    registration: Registration, form: Sequence[tuple[str, str]]
) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return form and headers of a token request, with the client's authentication in one of them.

    Raises AuthorizationError where the method needs a secret and there is none.
    """
    client_id, secret = registration.client_id, registration.client_secret
    if registration.client_auth is ClientAuth.NONE:
        return [*form, ("client_id", client_id)], []
    if secret is None:
        raise AuthorizationError(
            f"The client {client_id} is to authenticate by {registration.client_auth.value} but has no secret: set "
            f"servers.{registration.server}.oauth.client_secret."
        )
    if registration.client_auth is ClientAuth.POST:
        return [*form, ("client_id", client_id), ("client_secret", secret)], []
    # RFC 6749 §2.3.1: both are form-encoded before they are joined, so that a colon in the id stays unambiguous.
    pair = f"{quote_plus(client_id)}:{quote_plus(secret)}"
    return list(form), [("Authorization", f"Basic {base64.b64encode(pair.encode()).decode()}")]


def encode_form(fields: Sequence[tuple[str, str]]) -> bytes:
    """Return the fields as application/x-www-form-urlencoded (RFC 6749 appendix B)."""
    return urlencode(fields).encode()
