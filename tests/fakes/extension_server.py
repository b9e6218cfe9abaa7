"""An authorization server or identity provider with device codes, assertions and token exchange."""

import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import jwt
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fakes.authorization_server import FakeAuthorizationServer
from fakes.http_exchange import changed
from mcp_auth_proxy.cli.demo_servers.client_requests import asked_scopes, read_form
from mcp_auth_proxy.cli.demo_servers.ledger import Client, Issued, OAuthFault, refuse_grant, s256

ASSERTION_TYPE = "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
JWT_BEARER = "urn:ietf:params:oauth:grant-type:jwt-bearer"
TOKEN_EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
DEVICE_CODE = "urn:ietf:params:oauth:grant-type:device_code"
ID_JAG = "urn:ietf:params:oauth:token-type:id-jag"
VERIFIER = "v" * 43

PublicKey = ec.EllipticCurvePublicKey | RSAPublicKey


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> str:
    return str(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode())


def signed(key: ec.EllipticCurvePrivateKey, *, seconds: float = 300, typ: str = "JWT", **claims: object) -> str:
    """Return a signed JWT that expires in ``seconds``."""
    now = int(time.time())
    claims = {"iat": now, "exp": now + seconds, "jti": secrets.token_hex(8), **claims}
    return jwt.encode(claims, key, algorithm="ES256", headers={"typ": typ})


@dataclass(kw_only=True)
class Device:
    """One device authorization. ``code`` is the authorization code that stands for the user's consent."""

    client: Client
    user_code: str
    resource: str
    scopes: tuple[str, ...]
    denied: bool = False
    code: str = ""
    polls: int = 0


class ExtensionServer(FakeAuthorizationServer):
    """Issues tokens for device codes, assertions and subject tokens.

    ``client_keys`` are the public keys of clients by id, ``trusted`` those of assertion issuers by issuer.
    ``device_changes`` are made to every device authorization response; the first ``slow_downs`` polls are answered
    ``slow_down``.
    """

    grant_types = (*FakeAuthorizationServer.grant_types, JWT_BEARER, TOKEN_EXCHANGE, DEVICE_CODE)
    auth_methods = (*FakeAuthorizationServer.auth_methods, "private_key_jwt")

    def __init__(self, issuer: str, **options: Any) -> None:
        self.client_keys: dict[str, PublicKey] = {}
        self.trusted: dict[str, PublicKey] = {}
        self.subject_tokens: dict[str, str] = {}
        """Callers by the token that identifies them."""
        self.key = new_key()
        """As an identity provider: the key that signs ID tokens and ID-JAGs."""
        self.resource_clients: dict[str, str] = {}
        """As an identity provider: the ids of its clients at other authorization servers."""
        self.jag_scopes: tuple[str, ...] | None = None
        self.jag_changes: dict[str, object] = {}
        self.device_changes: dict[str, object] = {}
        self.slow_downs = 0
        self.devices: dict[str, Device] = {}
        self._used: set[str] = set()
        super().__init__(issuer, **options)

    @property
    def device_requests(self) -> int:
        return len(self.seen("device_authorization"))

    @property
    def polls(self) -> int:
        return self.token_requests(DEVICE_CODE)

    def id_token(self, client_id: str, user: str = "ada", **options: Any) -> str:
        return signed(self.key, iss=self.issuer, sub=user, aud=client_id, **options)

    def metadata(self) -> dict[str, object]:
        ours = {
            "device_authorization_endpoint": f"{self.issuer}/device_authorization",
            "token_endpoint_auth_signing_alg_values_supported": ["ES256", "RS256"],
        }
        return changed({**super().metadata(), **ours}, self.metadata_changes)

    def secrets(self) -> set[str]:
        sent = {
            received.form[name]
            for received in self.requests
            for name in ("client_assertion", "assertion", "subject_token", "device_code")
            if received.form.get(name)
        }
        return super().secrets() | sent | set(self.devices)

    def _endpoint(self, path: str) -> str:
        name = path.removeprefix(urlsplit(self.issuer).path).removeprefix("/")
        return name if name in ("device_authorization", "device") else super()._endpoint(path)

    def _routes(self) -> list[Route]:
        base = urlsplit(self.issuer).path
        return [
            *super()._routes(),
            Route(f"{base}/device_authorization", self._authorize_device, methods=["POST"]),
            Route(f"{base}/device", self._device_page, methods=["GET", "POST"]),
        ]

    # clients

    def authenticate(self, request: Request, form: Mapping[str, str]) -> Client:
        if "client_assertion" in form:
            return self._by_assertion(form)
        if not request.headers.get("authorization") and not form.get("client_id") and "assertion" in form:
            return Client(id="", auth="assertion")
        return super().authenticate(request, form)

    def _by_assertion(self, form: Mapping[str, str]) -> Client:
        """Authenticate a client by its assertion (RFC 7523 §3): its audience is the issuer alone, its jti is new."""
        if form.get("client_assertion_type") != ASSERTION_TYPE:
            raise OAuthFault("invalid_client", "unknown client_assertion_type", 401)
        try:
            subject = str(jwt.decode(form["client_assertion"], options={"verify_signature": False})["sub"])
            claims = self._claims(form["client_assertion"], self.client_keys[subject])
        except (jwt.InvalidTokenError, KeyError) as error:
            raise OAuthFault(
                "invalid_client", f"the client_assertion is not good: {type(error).__name__}", 401
            ) from None
        client = self.ledger.clients.get(subject)
        if client is None or client.auth != "private_key_jwt" or claims["iss"] != subject:
            raise OAuthFault("invalid_client", "the client is unknown, or registered for another method", 401)
        if claims["exp"] - time.time() > 300:
            raise OAuthFault("invalid_client", "the assertion lives too long", 401)
        return client

    def _claims(self, token: str, key: PublicKey) -> dict[str, Any]:
        needed = ["iss", "sub", "aud", "exp", "iat", "jti"]
        claims: dict[str, Any] = jwt.decode(
            token, key, algorithms=["ES256", "RS256"], audience=self.issuer, options={"require": needed}
        )
        if claims["jti"] in self._used:
            raise jwt.InvalidTokenError("the jti was used before")
        self._used.add(claims["jti"])
        return claims

    # grants

    async def _token(self, request: Request) -> Response:
        form = await read_form(request)
        if form.get("grant_type") == TOKEN_EXCHANGE and form.get("requested_token_type") == ID_JAG:
            return self._issue_id_jag(self.authenticate(request, form), form)
        return await super()._token(request)

    def grant(self, grant_type: str, client: Client, form: Mapping[str, str]) -> Issued:
        resource, scopes = self._resource(form), asked_scopes(form)
        match grant_type:
            case "urn:ietf:params:oauth:grant-type:jwt-bearer":
                return self._by_jwt_bearer(client, form["assertion"], resource, scopes)
            case "urn:ietf:params:oauth:grant-type:token-exchange":
                subject = self.subject_tokens.get(form.get("subject_token", ""))
                if subject is None:
                    refuse_grant("the subject token is unknown")
                return self._issue(f"{client.id} for {subject}", resource, scopes)
            case "urn:ietf:params:oauth:grant-type:device_code":
                return self._by_device_code(client, form.get("device_code", ""), resource)
            case _:
                return super().grant(grant_type, client, form)

    def _by_jwt_bearer(self, client: Client, assertion: str, resource: str, scopes: tuple[str, ...]) -> Issued:
        try:
            issuer = str(jwt.decode(assertion, options={"verify_signature": False})["iss"])
            claims = self._claims(assertion, self.trusted[issuer])
        except (jwt.InvalidTokenError, KeyError) as error:
            refuse_grant(f"the assertion is not good: {type(error).__name__}")
        if jwt.get_unverified_header(assertion)["typ"] == "oauth-id-jag+jwt":
            if (claims["client_id"], claims["resource"]) != (client.id, resource):
                refuse_grant("the ID-JAG is for another client or resource")
            if not set(scopes) <= set(str(claims.get("scope", "")).split()):
                raise OAuthFault("invalid_scope", "more than the ID-JAG allows")
        return self._issue(claims["sub"], resource, scopes)

    def _issue(self, subject: str, resource: str, scopes: tuple[str, ...]) -> Issued:
        client = Client(id=subject, auth="assertion")
        return self.ledger.client_credentials(client, resource=resource, scopes=scopes)

    def _issue_id_jag(self, client: Client, form: Mapping[str, str]) -> Response:
        """Issue an ID-JAG as an identity provider; the subject token must be issued to this client."""
        if form.get("subject_token_type") == "urn:ietf:params:oauth:token-type:refresh_token":
            user = self.subject_tokens.get(form.get("subject_token", ""))
        else:
            try:
                claims = jwt.decode(
                    form["subject_token"], self.key.public_key(), algorithms=["ES256"], audience=client.id
                )
            except jwt.InvalidTokenError as error:
                refuse_grant(f"the ID token is not good: {type(error).__name__}")
            user = str(claims["sub"])
        if user is None or not form.get("audience") or not form.get("resource"):
            refuse_grant("the subject token, audience or resource is missing")
        scopes = asked_scopes(form) if self.jag_scopes is None else self.jag_scopes
        assertion = signed(
            self.key,
            typ="oauth-id-jag+jwt",
            iss=self.issuer,
            sub=user,
            aud=form["audience"],
            resource=form["resource"],
            client_id=self.resource_clients[client.id],
            scope=" ".join(scopes),
        )
        answer = {"access_token": assertion, "issued_token_type": ID_JAG, "token_type": "N_A", "expires_in": 300}
        if self.jag_scopes is not None:
            answer["scope"] = " ".join(scopes)
        return JSONResponse(changed(answer, self.jag_changes))

    # devices

    async def _authorize_device(self, request: Request) -> Response:
        """Answer a device authorization request (RFC 8628 §3.2)."""
        form = await read_form(request)
        client = self.authenticate(request, form)
        device_code, user_code = secrets.token_urlsafe(24), f"{secrets.token_hex(2)}-{secrets.token_hex(2)}".upper()
        scopes = self.ledger.accepted_scopes(asked_scopes(form))
        self.devices[device_code] = Device(
            client=client, user_code=user_code, resource=self._resource(form), scopes=scopes
        )
        answer: dict[str, object] = {
            "device_code": device_code,
            "user_code": user_code,
            "verification_uri": f"{self.issuer}/device",
            "verification_uri_complete": f"{self.issuer}/device?user_code={user_code}",
            "expires_in": 300,
            "interval": 1,
        }
        return JSONResponse(changed(answer, self.device_changes))

    async def _device_page(self, request: Request) -> Response:
        """Serve the page on which the user enters the code and decides."""
        if request.method == "GET":
            code = request.query_params.get("user_code", "")
            field = f'<input name="user_code" value="{code}">'
            buttons = (
                '<button name="decision" value="allow">Allow</button><button name="decision" value="deny">No</button>'
            )
            return HTMLResponse(f'<form method="post">{field}{buttons}</form>')
        form = await read_form(request)
        decided = self.decide_device(form["user_code"], allowed=form["decision"] == "allow")
        return HTMLResponse("done" if decided else "unknown code", 200 if decided else 400)

    def decide_device(self, user_code: str, *, allowed: bool = True) -> bool:
        """Decide as the user does on another device; return False if the code is unknown."""
        found = next((device for device in self.devices.values() if device.user_code == user_code), None)
        if found is None:
            return False
        found.denied = not allowed
        if allowed:
            found.code = self.ledger.authorize(
                found.client, redirect_uri="", challenge=s256(VERIFIER), resource=found.resource, scopes=found.scopes
            )
        return True

    def _by_device_code(self, client: Client, device_code: str, resource: str) -> Issued:
        """Redeem a device code (RFC 8628 §3.5); a code that is used again ends its tokens."""
        found = self.devices.get(device_code)
        if found is None or found.client.id != client.id:
            refuse_grant("the device code is unknown")
        found.polls += 1
        if found.denied:
            raise OAuthFault("access_denied", "the user declined")
        if found.polls <= self.slow_downs:
            raise OAuthFault("slow_down", "not so fast")
        if not found.code:
            raise OAuthFault("authorization_pending", "the user has not decided yet")
        return self.ledger.redeem(client, code=found.code, redirect_uri="", verifier=VERIFIER, resource=resource)


def audience_of(token: str) -> object:
    """Return the ``aud`` of a JWT without verifying it."""
    return jwt.decode(token, options={"verify_signature": False})["aud"]


def header_of(token: str) -> dict[str, Any]:
    """Return the header of a JWT without verifying it."""
    return dict(jwt.get_unverified_header(token))


def claims_of(token: str) -> dict[str, Any]:
    """Return the claims of a JWT without verifying it."""
    claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    return claims
