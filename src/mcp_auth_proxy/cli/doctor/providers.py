"""What some authorization servers need but do not say in their metadata: docs/providers.md in short.

A provider is recognized by the host of its issuer. Keycloak is self-hosted, so it is recognized by the paths of its
endpoints.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from mcp_auth_proxy.oauth.discovery import ServerMetadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """What a provider needs: ``oauth`` are the keys to set, ``suggests`` keys that the operator must decide or fill in.

    ``metadata`` replaces discovery if the provider publishes none.
    """

    name: str
    notes: str
    hosts: tuple[str, ...] = ()
    """Patterns of ``fnmatch``."""
    oauth: Mapping[str, object] = field(default_factory=dict)
    suggests: Mapping[str, object] = field(default_factory=dict)
    metadata: Mapping[str, object] | None = None


_KEYCLOAK = Provider(
    name="Keycloak",
    notes="Its issuer is the realm's URL, so a renamed or moved realm is another issuer. The realm's client "
    "registration policies (trusted hosts) limit dynamic registration; if it is refused, register a client by hand. "
    "The audience of its tokens comes from a mapper in a client scope, not from the resource parameter.",
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
        notes="It refuses the resource parameter together with its v2.0 scopes, has no dynamic registration, and "
        "supports PKCE without advertising it. The issuer needs the tenant's id: the issuer of /common and "
        "/organizations is a template, so set the tenant's metadata by hand instead. If only administrators may "
        "consent, prompt=consent fails. An http redirect URI must be on localhost, unless it is added to the "
        "application's manifest.",
        oauth={"resource": "omit", "authorization_params": {"prompt": "select_account"}},
        suggests={"scopes": ["api://APPLICATION-ID/.default"]},
    ),
    Provider(
        name="Google",
        hosts=("accounts.google.com",),
        notes="It issues a refresh token only with access_type=offline, and at a second consent only with "
        "prompt=consent. It has no dynamic registration, and its web and desktop clients need their secret. The "
        "refresh tokens of an application in testing expire after 7 days.",
        oauth={"authorization_params": {"access_type": "offline", "prompt": "consent"}},
        suggests={"scopes": ["SCOPE"]},
    ),
    Provider(
        name="GitHub",
        hosts=("github.com",),
        notes="It has no dynamic registration: create an OAuth app or a GitHub App. The tokens of OAuth apps never "
        "expire, those of GitHub Apps do.",
        suggests={"scopes": ["SCOPE"]},
        metadata={
            "issuer": "https://github.com/login/oauth",
            "authorization_endpoint": "https://github.com/login/oauth/authorize",
            "token_endpoint": "https://github.com/login/oauth/access_token",
        },
    ),
    Provider(
        name="Okta",
        hosts=("*.okta.com", "*.oktapreview.com", "*.okta-emea.com"),
        notes="Tokens for an API come from a custom authorization server (an issuer like …/oauth2/default); those of "
        "the organization's own issuer are valid for Okta only. Their audience is set at the authorization server. Its "
        "registration endpoint needs an API token, so create an application by hand. If it answers invalid_client to "
        "a correct private_key_jwt, set client_assertion_audience: endpoint.",
        suggests={"client_id": "CLIENT-ID", "scopes": ["SCOPE"]},
    ),
    Provider(
        name="Auth0",
        hosts=("*.auth0.com",),
        notes="Its issuer ends with a slash, which is significant. Without the audience parameter, many tenants issue "
        "opaque tokens that no API accepts; newer tenants use the resource parameter for it.",
        suggests={
            "authorization_params": {"audience": "THE-API-IDENTIFIER"},
            "token_params": {"audience": "THE-API-IDENTIFIER"},
        },
    ),
    Provider(
        name="Amazon Cognito",
        hosts=("cognito-idp.*.amazonaws.com", "*.amazoncognito.com"),
        notes="Its sign-in page is on another site than its issuer, which oauth.issuer must pin. It supports PKCE "
        "without advertising it, and has no dynamic registration. It refuses the resource "
        "parameter if the pool has no resource binding, and has no offline_access. Each scope must be enabled for the "
        "app client.",
        suggests={"resource": "omit", "scopes": ["openid", "RESOURCE-SERVER/SCOPE"]},
    ),
    Provider(
        name="Slack",
        hosts=("slack.com", "mcp.slack.com"),
        notes="It reports errors with HTTP 200, which the proxy understands. It has no dynamic registration: create "
        "an app with user scopes; its secret is needed. If the tokens have no scopes, set them as user_scope in "
        "authorization_params too. It issues refresh tokens only with token rotation.",
        suggests={"scopes": ["SCOPE"]},
    ),
)


def recognize(issuer: str, metadata: ServerMetadata | None) -> Provider | None:
    """Return the provider of an issuer; None if it is not a known one."""
    host = (urlsplit(issuer).hostname or "").lower()
    for provider in PROVIDERS:
        if any(fnmatchcase(host, pattern) for pattern in provider.hosts):
            return provider
    if metadata is not None and "/realms/" in issuer and "/protocol/openid-connect/" in metadata.token_endpoint:
        return _KEYCLOAK
    return None
