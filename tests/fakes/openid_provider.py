"""An identity provider that browsers sign in at: OpenID Connect with a code, PKCE and a client secret."""

import base64
import hashlib
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self
from urllib.parse import parse_qs, urlencode

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route

from mcp_auth_proxy.cli.demo_servers.local_server import serve

CLIENT, SECRET = "proxy", "canary-sign-in-secret"


class OpenIdProvider:
    """Signs ``subject`` in at once, or after a click if ``asks``; its answers follow the other attributes."""

    def __init__(self, issuer: str) -> None:
        self.issuer = issuer
        self.subject = "anna"
        self.asks = False
        self.claims: dict[str, Any] = {}
        """Claims of the ID token that differ from the right ones; None leaves one out."""
        self.response: dict[str, str] = {}
        """The same for the parameters of the way back."""
        self.metadata: dict[str, Any] = {}
        self.status = 200
        """Of everything but the sign-in page."""
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.signing_key = self.key
        """Another one makes signatures that do not hold."""
        self.requests: list[dict[str, str]] = []
        """The authentication requests."""
        self.redeemed: list[dict[str, str]] = []
        self.documents = 0
        """Requests for the metadata."""
        self._codes: dict[str, dict[str, str]] = {}

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[Self]:
        made: list[Self] = []

        def make(origin: str) -> Starlette:
            made.append(cls(origin))
            return made[0]._app()

        async with serve(make):
            yield made[0]

    def settings(self, **keys: Any) -> dict[str, Any]:
        """Return the section ``inbound.sign_in`` for this provider."""
        return {"issuer": self.issuer, "client_id": CLIENT, "client_secret": SECRET, **keys}

    def token(self, audience: str, nonce: str = "") -> str:
        """Return a JWT for the subject."""
        now = int(time.time())
        claims = {
            "iss": self.issuer, "sub": self.subject, "aud": audience, "nonce": nonce, "iat": now, "exp": now + 300,
            **self.claims,
        }  # fmt: skip
        given = {name: value for name, value in claims.items() if value is not None}
        return jwt.encode(given, self.signing_key, algorithm="ES256", headers={"kid": "1"})

    def _app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", self._metadata),
                Route("/keys", self._keys),
                Route("/authorize", self._authorize, methods=["GET", "POST"]),
                Route("/token", self._token, methods=["POST"]),
            ]
        )

    async def _metadata(self, request: Request) -> Response:
        self.documents += 1
        document = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
            "scopes_supported": ["openid", "profile", "groups"],
            "authorization_response_iss_parameter_supported": True,
            **self.metadata,
        }
        return JSONResponse(document, status_code=self.status)

    async def _keys(self, request: Request) -> Response:
        key = {**ECAlgorithm.to_jwk(self.key.public_key(), as_dict=True), "kid": "1", "use": "sig"}
        return JSONResponse({"keys": [key]}, status_code=self.status)

    async def _authorize(self, request: Request) -> Response:
        params = dict(request.query_params)
        if self.asks and request.method == "GET":
            return HTMLResponse(
                "<link rel=icon href='data:,'><form method=post><button value=allow>Sign in</button></form>"
            )
        self.requests.append(params)
        code = secrets.token_urlsafe(16)
        self._codes[code] = params
        answer = {"code": code, "state": params["state"], "iss": self.issuer, **self.response}
        query = urlencode({name: value for name, value in answer.items() if value})
        return RedirectResponse(f"{params['redirect_uri']}?{query}", status_code=303)

    async def _token(self, request: Request) -> Response:
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        self.redeemed.append(form)
        basic = base64.b64encode(f"{CLIENT}:{SECRET}".encode()).decode()
        asked = self._codes.pop(form["code"], None)
        if request.headers.get("authorization") != f"Basic {basic}":
            return JSONResponse({"error": "invalid_client"}, status_code=401)
        if asked is None or asked["code_challenge"] != _challenge(form["code_verifier"]):
            return JSONResponse({"error": "invalid_grant"}, status_code=400)
        answer = {
            "access_token": "canary-access",
            "token_type": "Bearer",
            "id_token": self.token(CLIENT, asked["nonce"]),
        }
        return JSONResponse(answer, status_code=self.status)


def _challenge(verifier: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
