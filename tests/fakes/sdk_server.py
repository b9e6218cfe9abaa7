"""The MCP SDK's server with the SDK's authorization server in it, as FastMCP and others run them."""

import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

from mcp.server.auth.provider import (
    AccessToken,
    AuthorizationCode,
    AuthorizationParams,
    OAuthAuthorizationServerProvider,
    RefreshToken,
    construct_redirect_uri,
)
from mcp.server.auth.settings import AuthSettings, ClientRegistrationOptions, RevocationOptions
from mcp.server.mcpserver import MCPServer
from mcp.shared.auth import OAuthClientInformationFull, OAuthToken
from pydantic import AnyHttpUrl, AnyUrl
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fakes.http_exchange import RecordedRequest
from mcp_auth_proxy.cli.demo_servers.local_server import serve


class Provider(OAuthAuthorizationServerProvider[AuthorizationCode, RefreshToken, AccessToken]):
    """An in-memory provider that consents to everything."""

    def __init__(self) -> None:
        self.clients: dict[str, OAuthClientInformationFull] = {}
        self.codes: dict[str, AuthorizationCode] = {}
        self.access: dict[str, AccessToken] = {}
        self.refresh: dict[str, RefreshToken] = {}

    async def get_client(self, client_id: str) -> OAuthClientInformationFull | None:
        return self.clients.get(client_id)

    async def register_client(self, client_info: OAuthClientInformationFull) -> None:
        assert client_info.client_id is not None
        self.clients[client_info.client_id] = client_info

    async def authorize(self, client: OAuthClientInformationFull, params: AuthorizationParams) -> str:
        assert client.client_id is not None
        code = AuthorizationCode(
            code=secrets.token_urlsafe(32),
            scopes=params.scopes or [],
            expires_at=time.time() + 60,
            client_id=client.client_id,
            code_challenge=params.code_challenge,
            redirect_uri=params.redirect_uri,
            redirect_uri_provided_explicitly=params.redirect_uri_provided_explicitly,
            resource=params.resource,
        )
        self.codes[code.code] = code
        return construct_redirect_uri(str(params.redirect_uri), code=code.code, state=params.state)

    async def load_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: str
    ) -> AuthorizationCode | None:
        return self.codes.get(authorization_code)

    async def exchange_authorization_code(
        self, client: OAuthClientInformationFull, authorization_code: AuthorizationCode
    ) -> OAuthToken:
        code = self.codes.pop(authorization_code.code)
        return self._issue(code.client_id, code.scopes, code.resource)

    async def load_refresh_token(self, client: OAuthClientInformationFull, refresh_token: str) -> RefreshToken | None:
        return self.refresh.get(refresh_token)

    async def exchange_refresh_token(
        self, client: OAuthClientInformationFull, refresh_token: RefreshToken, scopes: list[str]
    ) -> OAuthToken:
        held = self.refresh.pop(refresh_token.token)
        return self._issue(held.client_id, scopes, held.resource)

    async def load_access_token(self, token: str) -> AccessToken | None:
        return self.access.get(token)

    async def revoke_token(self, token: AccessToken | RefreshToken) -> None:
        self.access.clear()
        self.refresh.clear()

    def _issue(self, client_id: str, scopes: list[str], resource: str | None) -> OAuthToken:
        access, refresh = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        self.access[access] = AccessToken(token=access, client_id=client_id, scopes=scopes, resource=resource)
        self.refresh[refresh] = RefreshToken(token=refresh, client_id=client_id, scopes=scopes, resource=resource)
        return OAuthToken(access_token=access, refresh_token=refresh, expires_in=3600, scope=" ".join(scopes))


class SdkServer:
    """``url`` is its MCP endpoint; ``requests`` are those to its authorization server."""

    def __init__(self, origin: str) -> None:
        self.url = f"{origin}/mcp"
        self.provider = Provider()
        self.requests: list[RecordedRequest] = []
        server = MCPServer(
            "sdk",
            auth_server_provider=self.provider,
            auth=AuthSettings(
                issuer_url=AnyHttpUrl(origin),
                resource_server_url=AnyHttpUrl(self.url),
                validate_token_resource=True,
                required_scopes=["read"],
                client_registration_options=ClientRegistrationOptions(
                    enabled=True, valid_scopes=["read"], default_scopes=["read"]
                ),
                revocation_options=RevocationOptions(enabled=True),
            ),
            log_level="ERROR",
        )

        @server.tool()
        def echo(text: str) -> str:
            return text

        self._app = server.streamable_http_app(stateless_http=True)

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[Self]:
        made: list[Self] = []

        def make(origin: str) -> ASGIApp:
            made.append(cls(origin))
            return made[0]

        async with serve(make, lifespan="on"):
            yield made[0]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/mcp":
            await self._app(scope, receive, send)
            return
        received = await RecordedRequest.read(scope, receive)
        received.endpoint = scope["path"].removeprefix("/")
        self.requests.append(received)

        async def again() -> Message:
            return {"type": "http.request", "body": received.body, "more_body": False}

        await self._app(scope, again, send)

    def seen(self, endpoint: str) -> list[RecordedRequest]:
        return [received for received in self.requests if received.endpoint == endpoint]

    def add_client(self, client_id: str, *, secret: str, auth: str, redirect_uri: str) -> None:
        """Add a client that was registered by hand."""
        self.provider.clients[client_id] = OAuthClientInformationFull.model_validate(
            {
                "client_id": client_id,
                "client_secret": secret,
                "token_endpoint_auth_method": auth,
                "redirect_uris": [AnyUrl(redirect_uri)],
                "grant_types": ["authorization_code", "refresh_token"],
                "scope": "read",
            }
        )
