"""Authorization servers with the peculiarities of well-known providers."""

import json
from collections.abc import Mapping
from typing import Any, ClassVar
from urllib.parse import urlencode, urlsplit

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fakes.authorization_server import FakeAuthorizationServer
from fakes.http_exchange import ABSENT, FakeResponse
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationRequest
from mcp_auth_proxy.cli.demo_servers.ledger import Client, Issued, OAuthError

SECRET = "provider-secret"

Quirks = Mapping[str, Any]


class Provider(FakeAuthorizationServer):
    """A server that registers nobody, sends no ``iss`` and consents at once; ``name`` is its heading in the docs."""

    name = ""
    address = ""
    """The issuer in the recipe, which the fake's issuer replaces."""
    appended_only = False
    """Whether OpenID discovery is served only below the issuer's path."""
    changes: ClassVar[Quirks] = {}
    options: ClassVar[Quirks] = {}
    errors: ClassVar[Quirks] = {}
    """The provider's names for standard errors."""

    def __init__(self, issuer: str, **options: Any) -> None:
        self.queries: list[dict[str, str]] = []
        changes = {"authorization_response_iss_parameter_supported": ABSENT, **self.changes}
        ours = {"auto_consent": True, "registration": False, "iss": None, "metadata_changes": changes, **self.options}
        super().__init__(issuer, **{**ours, **options})

    @classmethod
    def path(cls) -> str:
        return urlsplit(cls.address).path

    def metadata_paths(self) -> tuple[str, ...]:
        if self.appended_only:
            return (f"{urlsplit(self.issuer).path}/.well-known/openid-configuration",)
        return super().metadata_paths()

    def _check_authorization(self, client: Client, redirect_uri: str, query: Mapping[str, str]) -> AuthorizationRequest:
        self.queries.append(dict(query))
        return super()._check_authorization(client, redirect_uri, query)


class EntraId(Provider):
    """Microsoft Entra ID, in a tenant whose users may not consent."""

    name = "Entra ID"
    address = "https://login.microsoftonline.com/TENANT-ID/v2.0"
    appended_only = True
    changes: ClassVar[Quirks] = {
        "code_challenge_methods_supported": ABSENT,
        "scopes_supported": ["openid", "profile", "email", "offline_access"],
    }
    options: ClassVar[Quirks] = {
        "scopes": ("api://APPLICATION-ID/.default", "offline_access"),
        "refresh_needs_offline_access": True,
    }

    def _check_authorization(self, client: Client, redirect_uri: str, query: Mapping[str, str]) -> AuthorizationRequest:
        if query.get("prompt") == "consent":
            raise OAuthError("access_denied", "AADSTS90094: The grant requires administrator permission.")
        return super()._check_authorization(client, redirect_uri, query)

    def _resource(self, params: Mapping[str, str]) -> str:
        if "resource" in params:
            words = "The resource parameter provided in the request doesn't match with the requested scopes."
            raise OAuthError("invalid_target", f"AADSTS9010010: {words}")
        return ""

    def grant(self, grant_type: str, client: Client, form: Mapping[str, str]) -> Issued:
        if grant_type == "refresh_token" and not form.get("scope"):
            raise OAuthError("invalid_request", "AADSTS90009: Application is requesting a token for itself.")
        return super().grant(grant_type, client, form)


class Google(Provider):
    """Issues refresh tokens for ``access_type=offline`` only; after the first consent only with ``prompt=consent``."""

    name = "Google"
    address = "https://accounts.google.com"
    options: ClassVar[Quirks] = {"rotate": False, "scopes": ("https://www.googleapis.com/auth/drive.readonly",)}

    def _check_authorization(self, client: Client, redirect_uri: str, query: Mapping[str, str]) -> AuthorizationRequest:
        asks = not self.queries or query.get("prompt") == "consent"
        self.rules.refresh = asks and query.get("access_type") == "offline"
        return super()._check_authorization(client, redirect_uri, query)


class GitHub(Provider):
    """Has no discovery, form-encoded responses by default, errors with HTTP 200, and tokens that do not expire."""

    name = "GitHub"
    address = "https://github.com/login/oauth"
    options: ClassVar[Quirks] = {"serves_metadata": False, "refresh": False, "token_seconds": 1e9}
    errors: ClassVar[Quirks] = {
        "invalid_grant": "bad_verification_code",
        "invalid_client": "incorrect_client_credentials",
    }

    def _routes(self) -> list[Route]:
        return [*super()._routes(), Route(f"{self.path()}/access_token", self._token, methods=["POST"])]

    def _endpoint(self, path: str) -> str:
        return "token" if path.endswith("/access_token") else super()._endpoint(path)

    def token_response(self, issued: Issued) -> dict[str, object]:
        return {
            "access_token": issued.access_token,
            "scope": ",".join(issued.scopes),
            "token_type": "bearer",
        }

    async def _token(self, request: Request) -> Response:
        answer = await _answer(super()._token(request), self.errors)
        if "application/json" in request.headers.get("accept", ""):
            return JSONResponse(answer)
        return Response(urlencode(answer), media_type="application/x-www-form-urlencoded")


class Okta(Provider):
    """A custom authorization server: ``audience`` is configured, and only administrators may register clients."""

    name = "Okta"
    address = "https://ORG.okta.com/oauth2/default"
    appended_only = True
    options: ClassVar[Quirks] = {
        "registration": True,
        "scopes": ("notes.read", "offline_access"),
        "refresh_needs_offline_access": True,
    }

    def __init__(self, issuer: str, **options: Any) -> None:
        self.audience = ""
        super().__init__(issuer, **options)
        refusal = {"errorCode": "E0000005", "errorSummary": "Invalid session", "errorCauses": []}
        self.answers["register"] = FakeResponse.json(refusal, 401)

    def _resource(self, params: Mapping[str, str]) -> str:
        return self.audience


class Auth0(Provider):
    """Reads ``audience`` and ignores ``resource``."""

    name = "Auth0"
    address = "https://TENANT.auth0.com/"

    def metadata_paths(self) -> tuple[str, ...]:
        return ("/.well-known/oauth-authorization-server", "/.well-known/openid-configuration")

    def metadata(self) -> dict[str, object]:
        return {
            name: value.replace(f"{self.issuer}/", self.issuer) if isinstance(value, str) else value
            for name, value in super().metadata().items()
        }

    def _routes(self) -> list[Route]:
        return [Route(r.path.replace("//", "/"), r.endpoint, methods=list(r.methods or ())) for r in super()._routes()]

    def _resource(self, params: Mapping[str, str]) -> str:
        return params.get("audience", "")


class Cognito(Provider):
    """A user pool without resource binding, with its sign-in page on another site than its issuer."""

    name = "Cognito"
    address = "https://cognito-idp.us-east-1.amazonaws.com/POOL-ID"
    appended_only = True
    changes: ClassVar[Quirks] = {"code_challenge_methods_supported": ABSENT}
    options: ClassVar[Quirks] = {"rotate": False, "scopes": ("openid", "notes/read")}

    def metadata(self) -> dict[str, object]:
        sign_in = self.issuer.replace("127.0.0.1", "localhost")
        return {**super().metadata(), "authorization_endpoint": f"{sign_in}/authorize"}

    def _resource(self, params: Mapping[str, str]) -> str:
        if "resource" in params:
            raise OAuthError("invalid_request", "resource is not supported")
        return ""


class Keycloak(Provider):
    """A realm in which clients may register."""

    name = "Keycloak"
    address = "https://KEYCLOAK-HOST/realms/REALM"
    appended_only = True
    options: ClassVar[Quirks] = {"registration": True, "iss": "auto"}
    changes: ClassVar[Quirks] = {"authorization_response_iss_parameter_supported": True}


class Slack(Provider):
    """Sends errors with HTTP 200, and the user's tokens inside ``authed_user``."""

    name = "Slack"
    address = "https://mcp.slack.com"
    errors: ClassVar[Quirks] = {"invalid_grant": "invalid_refresh_token", "invalid_client": "invalid_client_id"}

    def token_response(self, issued: Issued) -> dict[str, object]:
        user = {**super().token_response(issued), "token_type": "user", "scope": ",".join(issued.scopes)}
        return {"ok": True, "app_id": "A1", "authed_user": {"id": "U1", **user}, "team": {"id": "T1"}}

    async def _token(self, request: Request) -> Response:
        answer = await _answer(super()._token(request), self.errors)
        return JSONResponse({"ok": False, **answer} if "error" in answer else answer)


async def _answer(answering: Any, errors: Mapping[str, str]) -> dict[str, Any]:
    """Return the response of the standard token endpoint as an object; errors have the provider's names."""
    try:
        response = await answering
    except OAuthError as fault:
        return {"error": errors.get(fault.error, fault.error), "error_description": fault.description}
    answer: dict[str, Any] = json.loads(response.body)
    return answer


PROVIDERS: tuple[type[Provider], ...] = (EntraId, Google, GitHub, Okta, Auth0, Cognito, Keycloak, Slack)
