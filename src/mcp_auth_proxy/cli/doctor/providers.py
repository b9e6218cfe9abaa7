"""What is known of some authorization servers and can't be read in their metadata: docs/providers.md in short.

A provider is recognised by the host of its issuer, which no other can have; Keycloak, which everybody hosts for
themselves, by the paths of its endpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from mcp_auth_proxy.oauth.discovery import ServerMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """``oauth`` are keys that it needs, ``asks`` such that only the operator can decide on or fill in; ``metadata`` is
    what stands in for discovery where it offers none.
    """

    name: str
    advice: str
    hosts: tuple[str, ...] = ()
    """Patterns of ``fnmatch``."""
    oauth: Mapping[str, object] = field(default_factory=dict)
    asks: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] | None = None


_KEYCLOAK = Provider(
    name="Keycloak",
    advice="Its issuer is the realm's URL: a realm that was renamed or has moved is another issuer. Dynamic "
    "registration is limited by the realm's client registration policies (trusted hosts); where it is refused, "
    "register a client by hand. The audience of its tokens comes from a mapper in a client scope, not from the "
    "resource parameter.",
)

PROVIDERS = (
    Provider(
        name="Microsoft Entra ID",
        hosts=(
            "login.microsoftonline.com",
            "login.microsoftonline.us",
            "login.partner.microsoftonline.cn",
            "sts.windows.net",
        ),
        advice="It refuses the resource parameter beside its v2.0 scopes, registers no clients by itself and does not "
        "advertise PKCE, which it supports. The issuer needs the tenant's id: that of /common and /organizations is a "
        "template, in the place of which the tenant's metadata is given by hand. Where only administrators may "
        "consent, prompt=consent fails. An http redirect URI may be on localhost only, unless it is put into the "
        "application's manifest.",
        oauth={"resource": "omit", "authorization_params": {"prompt": "select_account"}},
        asks={"scopes": ["api://APPLICATION-ID/.default"]},
    ),
    Provider(
        name="Google",
        hosts=("accounts.google.com",),
        advice="It gives a refresh token only for access_type=offline, and for a second consent only with "
        "prompt=consent. It registers no clients by itself, and its web and desktop clients need their secret. The "
        "refresh tokens of an application in testing die after 7 days.",
        oauth={"authorization_params": {"access_type": "offline", "prompt": "consent"}},
        asks={"scopes": ["SCOPE"]},
    ),
    Provider(
        name="GitHub",
        hosts=("github.com",),
        advice="It registers no clients by itself: make an OAuth app or a GitHub App. The tokens of OAuth apps never "
        "expire, those of GitHub Apps do.",
        asks={"scopes": ["SCOPE"]},
        metadata={
            "issuer": "https://github.com/login/oauth",
            "authorization_endpoint": "https://github.com/login/oauth/authorize",
            "token_endpoint": "https://github.com/login/oauth/access_token",
        },
    ),
    Provider(
        name="Okta",
        hosts=("*.okta.com", "*.oktapreview.com", "*.okta-emea.com"),
        advice="Tokens for an API come from a custom authorization server (an issuer like …/oauth2/default); those of "
        "the organisation's own issuer are good for Okta alone. Their audience is set at the authorization server. It "
        "lists a registration endpoint but wants an API token there: make an application by hand. Where it answers "
        "invalid_client to a good private_key_jwt, set client_assertion_audience: endpoint.",
        asks={"client_id": "CLIENT-ID", "scopes": ["SCOPE"]},
    ),
    Provider(
        name="Auth0",
        hosts=("*.auth0.com",),
        advice="Its issuer ends in a slash, which counts. Without the audience parameter many tenants issue opaque "
        "tokens that no API accepts; newer ones take the resource parameter for it.",
        asks={
            "authorization_params": {"audience": "THE-API-IDENTIFIER"},
            "token_params": {"audience": "THE-API-IDENTIFIER"},
        },
    ),
    Provider(
        name="Amazon Cognito",
        hosts=("cognito-idp.*.amazonaws.com", "*.amazoncognito.com"),
        advice="It does not advertise PKCE, which it supports, and registers no clients by itself. It refuses the "
        "resource parameter where the pool has no resource binding, and knows no offline_access. The app client needs "
        "each of the scopes enabled.",
        asks={"resource": "omit", "scopes": ["openid", "RESOURCE-SERVER/SCOPE"]},
    ),
    Provider(
        name="Slack",
        hosts=("slack.com", "mcp.slack.com"),
        advice="It reports errors with HTTP 200, which the proxy understands. It registers no clients by itself: make "
        "an app with user scopes, whose secret is needed. Where its tokens have no scopes, name them in "
        "authorization_params as user_scope too. It gives refresh tokens only with token rotation.",
        asks={"scopes": ["SCOPE"]},
    ),
)


def recognise(issuer: str, metadata: ServerMetadata | None) -> Provider | None:
    """Return what is known of an authorization server by its issuer; None for one like any other."""
    host = (urlsplit(issuer).hostname or "").lower()
    for provider in PROVIDERS:
        if any(fnmatchcase(host, pattern) for pattern in provider.hosts):
            return provider
    if metadata is not None and "/realms/" in issuer and "/protocol/openid-connect/" in metadata.token_endpoint:
        return _KEYCLOAK
    return None
