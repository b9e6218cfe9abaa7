"""The demo's authorization server: OAuth 2.1 with discovery, dynamic registration, PKCE and resource indicators."""

import html
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mcp_auth_proxy.cli.demo_servers.client_requests import (
    basic_credentials,
    read_form,
    registered_redirects,
    requested_scopes,
)
from mcp_auth_proxy.cli.demo_servers.ledger import Client, Issued, Ledger, OAuthError, Rules

CHALLENGE_LENGTH = 43
"""Characters of an S256 challenge (RFC 7636 §4.2)."""
UNAUTHORIZED = 401
PAGE_HEADERS = {"content-security-policy": "default-src 'none'; frame-ancestors 'none'", "cache-control": "no-store"}
NO_STORE = {"cache-control": "no-store"}

Announce = Callable[[str, str], None]
"""Called for each step with its name (``discovery``, ``registration``, ``consent``, ``token``, ``refresh`` …) and a
description without secrets."""


def silent(step: str, words: str) -> None:
    """Announce nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationRequest:
    """A validated request that waits for the user (RFC 6749 §4.1.1)."""

    client: Client
    redirect_uri: str
    state: str
    challenge: str
    resource: str
    scopes: tuple[str, ...]


class AuthorizationServer:
    """An ASGI application. ``issuer`` is its origin, plus a path if one host serves several issuers."""

    auth_methods: tuple[str, ...] = ("none", "client_secret_basic", "client_secret_post")
    grant_types: tuple[str, ...] = ("authorization_code", "refresh_token", "client_credentials")

    def __init__(self, issuer: str, *, rules: Rules | None = None, announce: Announce = silent) -> None:
        self.issuer = issuer
        self.rules = rules or Rules()
        self.ledger = Ledger(self.rules)
        self.announce = announce
        self._waiting: dict[str, AuthorizationRequest] = {}
        self._app = Starlette(routes=self._routes(), exception_handlers={OAuthError: _error_response})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def add_client(
        self,
        *,
        client_id: str,
        auth: str = "client_secret_basic",
        secret: str | None = None,
        redirect_uris: tuple[str, ...] = (),
    ) -> Client:
        """Register a client by hand, as an operator would."""
        client = Client(id=client_id, name=client_id, secret=secret, auth=auth, redirect_uris=redirect_uris)
        self.ledger.clients[client_id] = client
        return client

    def metadata_paths(self) -> tuple[str, ...]:
        """Return the paths of the metadata: RFC 8414 §3.1, and OpenID Connect with the path inserted or appended."""
        path = urlsplit(self.issuer).path
        paths = [f"/.well-known/oauth-authorization-server{path}", f"/.well-known/openid-configuration{path}"]
        if path:
            paths.append(f"{path}/.well-known/openid-configuration")
        return tuple(paths)

    def metadata(self) -> dict[str, object]:
        """Return the metadata document (RFC 8414 §2, RFC 9207 §3)."""
        document: dict[str, object] = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "registration_endpoint": f"{self.issuer}/register",
            "revocation_endpoint": f"{self.issuer}/revoke",
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": list(self.grant_types),
            "token_endpoint_auth_methods_supported": list(self.auth_methods),
            "revocation_endpoint_auth_methods_supported": list(self.auth_methods),
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
        }
        if self.rules.scopes is not None:
            document["scopes_supported"] = list(self.rules.scopes)
        return document

    def callback_iss(self) -> str | None:
        """Return the ``iss`` of authorization responses (RFC 9207 §2); None to omit it."""
        return self.issuer

    def _routes(self) -> list[Route]:
        base = urlsplit(self.issuer).path
        return [
            *(Route(path, self._serve_metadata) for path in self.metadata_paths()),
            Route(f"{base}/register", self._register, methods=["POST"]),
            Route(f"{base}/authorize", self._authorize, methods=["GET"]),
            Route(f"{base}/consent", self._consent, methods=["POST"]),
            Route(f"{base}/token", self._token, methods=["POST"]),
            Route(f"{base}/revoke", self._revoke, methods=["POST"]),
        ]

    async def _serve_metadata(self, request: Request) -> Response:
        self.announce("discovery", f"authorization server metadata read at {request.url.path}")
        return JSONResponse(self.metadata())

    async def _register(self, request: Request) -> Response:
        """Register a client (RFC 7591 §3)."""
        try:
            client_metadata = json.loads(await request.body())
        except ValueError:
            client_metadata = None
        if not isinstance(client_metadata, dict):
            raise OAuthError("invalid_client_metadata", "the body is not a JSON object")
        auth = client_metadata.get("token_endpoint_auth_method", "client_secret_basic")
        if auth not in self.auth_methods:
            raise OAuthError("invalid_client_metadata", "this token_endpoint_auth_method is not supported")
        client = Client(
            id=f"client-{secrets.token_hex(8)}",
            name=str(client_metadata.get("client_name", "")),
            secret=None if auth == "none" else secrets.token_urlsafe(24),
            auth=auth,
            redirect_uris=registered_redirects(client_metadata),
        )
        self.ledger.clients[client.id] = client
        self.announce("registration", f"client {client.id} registered itself as {client.name or 'nameless'}")
        answer = {
            **client_metadata,
            "client_id": client.id,
            "client_id_issued_at": int(time.time()),
            "token_endpoint_auth_method": auth,
        }
        if client.secret is not None:
            answer |= {"client_secret": client.secret, "client_secret_expires_at": 0}
        return JSONResponse(answer, 201, headers=NO_STORE)

    async def find_client(self, client_id: str, redirect_uri: str) -> Client | None:
        """Return the client of an authorization request. ``redirect_uri`` is not validated yet."""
        return self.ledger.clients.get(client_id)

    async def _authorize(self, request: Request) -> Response:
        query = request.query_params
        client = await self.find_client(query.get("client_id", ""), query.get("redirect_uri", ""))
        redirect_uri = query.get("redirect_uri", "")
        # Never redirect to a URI that is not registered (RFC 6749 §4.1.2.1).
        if client is None or redirect_uri not in client.redirect_uris:
            return _page("Not possible", "<p>The client or its redirect URI is not known here.</p>", 400)
        try:
            waiting = self._check_authorization(client, redirect_uri, query)
        except OAuthError as error:
            return self._redirect(
                redirect_uri,
                {"error": error.error, "error_description": error.description, "state": query.get("state", "")},
            )
        return self.ask(waiting)

    def ask(self, waiting: AuthorizationRequest) -> Response:
        """Return the consent page."""
        ticket = secrets.token_urlsafe(16)
        self._waiting[ticket] = waiting
        self.announce("consent", "the consent page is shown")
        return _page(
            "Allow access?",
            f"<p><b>{html.escape(waiting.client.name or waiting.client.id)}</b> asks for"
            f" <b>{html.escape(' '.join(waiting.scopes))}</b> at {html.escape(waiting.resource or 'any resource')}.</p>"
            f'<form method="post" action="{html.escape(urlsplit(self.issuer).path)}/consent">'
            f'<input type="hidden" name="ticket" value="{ticket}">'
            '<button name="decision" value="allow">Allow</button> <button name="decision" value="deny">Deny</button>'
            "</form>",
        )

    async def _consent(self, request: Request) -> Response:
        form = await read_form(request)
        waiting = self._waiting.pop(form.get("ticket", ""), None)
        if waiting is None:
            return _page("Not possible", "<p>This page has been used, start again.</p>", 400)
        return self.decide(waiting, allowed=form.get("decision") == "allow")

    def decide(self, waiting: AuthorizationRequest, *, allowed: bool) -> Response:
        """Return the authorization response for the user's decision."""
        if not allowed:
            self.announce("consent", "the user declined")
            denied = {"error": "access_denied", "error_description": "the user declined", "state": waiting.state}
            return self._redirect(waiting.redirect_uri, denied)
        self.announce("consent", f"the user allowed {' '.join(waiting.scopes)} at {waiting.resource}")
        code = self.ledger.authorize(
            waiting.client,
            redirect_uri=waiting.redirect_uri,
            challenge=waiting.challenge,
            resource=waiting.resource,
            scopes=waiting.scopes,
        )
        return self._redirect(waiting.redirect_uri, {"code": code, "state": waiting.state})

    def _check_authorization(self, client: Client, redirect_uri: str, query: Mapping[str, str]) -> AuthorizationRequest:
        if query.get("response_type") != "code":
            raise OAuthError("unsupported_response_type", "response_type must be code")
        if query.get("code_challenge_method") != "S256" or len(query.get("code_challenge", "")) != CHALLENGE_LENGTH:
            raise OAuthError("invalid_request", "PKCE with S256 is required (RFC 7636)")
        return AuthorizationRequest(
            client=client,
            redirect_uri=redirect_uri,
            state=query.get("state", ""),
            challenge=query["code_challenge"],
            resource=self._resource(query),
            scopes=self.ledger.accepted_scopes(requested_scopes(query)),
        )

    def _redirect(self, redirect_uri: str, params: dict[str, str]) -> Response:
        iss = self.callback_iss()
        if iss is not None:
            params["iss"] = iss
        query = urlencode({key: value for key, value in params.items() if value})
        return RedirectResponse(f"{redirect_uri}{'&' if '?' in redirect_uri else '?'}{query}", 302, headers=NO_STORE)

    async def _token(self, request: Request) -> Response:
        form = await read_form(request)
        client = self.authenticate(request, form)
        grant_type = form.get("grant_type", "")
        if grant_type not in self.grant_types:
            raise OAuthError("unsupported_grant_type", "this grant_type is not supported")
        try:
            issued = self.grant(grant_type, client, form)
        except OAuthError as error:
            self.announce("token", f"{grant_type} refused, {error}")
            raise
        step = "refresh" if grant_type == "refresh_token" else "token"
        self.announce(step, f"{grant_type}: access token issued for {issued.expires_in} s")
        return JSONResponse(self.token_response(issued), headers=NO_STORE)

    def grant(self, grant_type: str, client: Client, form: Mapping[str, str]) -> Issued:
        """Return the tokens for a token request. Raises OAuthError."""
        resource, scopes = self._resource(form), requested_scopes(form)
        match grant_type:
            case "authorization_code":
                return self.ledger.redeem(
                    client,
                    code=form.get("code", ""),
                    redirect_uri=form.get("redirect_uri", ""),
                    verifier=form.get("code_verifier", ""),
                    resource=resource,
                )
            case "refresh_token":
                refresh_token = form.get("refresh_token", "")
                return self.ledger.refresh(client, refresh_token=refresh_token, resource=resource, scopes=scopes)
            case _:
                scopes = self.ledger.accepted_scopes(scopes)
                return self.ledger.client_credentials(client, resource=resource, scopes=scopes)

    def token_response(self, issued: Issued) -> dict[str, object]:
        """Return the JSON of a token response (RFC 6749 §5.1)."""
        answer: dict[str, object] = {
            "access_token": issued.access_token,
            "token_type": "Bearer",
            "expires_in": issued.expires_in,
        }
        if issued.scopes:
            answer["scope"] = " ".join(issued.scopes)
        if issued.refresh_token is not None:
            answer["refresh_token"] = issued.refresh_token
        return answer

    async def _revoke(self, request: Request) -> Response:
        """Revoke a token (RFC 7009 §2)."""
        form = await read_form(request)
        self.ledger.revoke(self.authenticate(request, form), form.get("token", ""))
        self.announce("revocation", "a token was revoked")
        return Response(status_code=200, headers=NO_STORE)

    def authenticate(self, request: Request, form: Mapping[str, str]) -> Client:
        """Return the authenticated client (RFC 6749 §2.3). It must use the method that it is registered for."""
        header = request.headers.get("authorization")
        if header is not None:
            method, (client_id, secret) = "client_secret_basic", basic_credentials(header)
        else:
            client_id, secret = form.get("client_id", ""), form.get("client_secret", "")
            method = "client_secret_post" if "client_secret" in form else "none"
        client = self.ledger.clients.get(client_id)
        if client is None or client.auth != method:
            raise OAuthError("invalid_client", "the client is unknown, or registered for another method", 401)
        if not secrets.compare_digest((client.secret or "").encode(), secret.encode()):
            raise OAuthError("invalid_client", "the client secret is wrong", 401)
        return client

    def _resource(self, params: Mapping[str, str]) -> str:
        """Return the resource parameter: an absolute URI without a fragment (RFC 8707 §2)."""
        resource = params.get("resource", "")
        if not resource and self.rules.require_resource:
            raise OAuthError("invalid_target", "the resource parameter is missing")
        if resource and (not urlsplit(resource).scheme or "#" in resource):
            raise OAuthError("invalid_target", "resource must be an absolute URI without a fragment")
        return resource


def _page(title: str, body: str, status: int = 200) -> Response:
    page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><h1>{title}</h1>{body}</html>'
    return HTMLResponse(page, status, headers=PAGE_HEADERS)


async def _error_response(request: Request, error: Exception) -> Response:
    if not isinstance(error, OAuthError):
        raise error
    headers = dict(NO_STORE)
    if error.status == UNAUTHORIZED and "authorization" in request.headers:
        headers["www-authenticate"] = 'Basic realm="token"'
    return JSONResponse({"error": error.error, "error_description": error.description}, error.status, headers=headers)
