"""An authorization server and an MCP server that require DPoP and check every proof (RFC 9449 §4.3)."""

import base64
import hashlib
import json
import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jwt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fakes.authorization_server import FakeAuthorizationServer
from fakes.http_exchange import FakeResponse, RecordedRequest, changed
from fakes.mcp_server import JSON, WELL_KNOWN, FakeMcpServer
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationRequest
from mcp_auth_proxy.cli.demo_servers.client_requests import read_form
from mcp_auth_proxy.cli.demo_servers.ledger import Client, Issued


class InvalidProof(Exception):
    """Raised with the OAuth error code as its text."""


def sha256(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()


class ProofChecker:
    """Checks the proofs of one server, and remembers every ``jti``; a nonce is required if ``nonce`` is set."""

    def __init__(self) -> None:
        self.nonce = ""
        self.previous = ""
        self.once = False
        """True: each nonce is valid for one request, and each refusal gives a new one."""
        self.given: set[str] = set()
        self.seen: set[str] = set()
        self.keys: list[str] = []
        """The key thumbprint of every valid proof, in order."""

    def rotate(self) -> None:
        """Make a new nonce; the previous one becomes invalid."""
        self.nonce, self.previous = secrets.token_urlsafe(12), ""

    def rotate_gently(self) -> None:
        """Make a new nonce; the previous one stays valid, and a response to it carries the new one."""
        self.nonce, self.previous = secrets.token_urlsafe(12), self.nonce

    def _use_up(self, nonce: str | None) -> None:
        if nonce not in self.given:
            self.rotate()
            self.given.add(self.nonce)
            raise InvalidProof("use_dpop_nonce")
        self.given.remove(nonce)

    def check(self, fields: Sequence[str], *, method: str, url: str, token: str = "") -> str:
        """Return the thumbprint of the proof's key. Raises InvalidProof."""
        if len(fields) != 1:
            raise InvalidProof("invalid_dpop_proof")
        header = jwt.get_unverified_header(fields[0])
        jwk = header["jwk"]
        if header["typ"] != "dpop+jwt" or header["alg"] != "ES256" or set(jwk) != {"kty", "crv", "x", "y"}:
            raise InvalidProof("invalid_dpop_proof")
        claims = jwt.decode(fields[0], jwt.PyJWK(jwk), algorithms=["ES256"], options={"verify_iat": False})
        sound = (
            claims["htm"] == method
            and claims["htu"] == url
            and abs(claims["iat"] - time.time()) < 30
            and claims["jti"] not in self.seen
            and claims.get("ath", "") == (sha256(token) if token else "")
        )
        if not sound:
            raise InvalidProof("invalid_dpop_proof")
        self.seen.add(claims["jti"])
        if self.once:
            self._use_up(claims.get("nonce"))
        elif self.nonce and claims.get("nonce") not in {self.nonce, self.previous} - {""}:
            raise InvalidProof("use_dpop_nonce")
        thumbprint = sha256(json.dumps(jwk, sort_keys=True, separators=(",", ":")))
        self.keys.append(thumbprint)
        return thumbprint


class DpopAuthorizationServer(FakeAuthorizationServer):
    """Binds codes, refresh tokens and access tokens to the key; ``bound`` maps each token to its key."""

    def __init__(self, issuer: str, **options: Any) -> None:
        self.proofs = ProofChecker()
        self.token_type = "DPoP"
        self.algorithms: tuple[str, ...] | None = ("ES256", "EdDSA")
        self.bound: dict[str, str] = {}
        self._code_keys: dict[str, str] = {}
        self._key = ""
        super().__init__(issuer, **options)

    def metadata(self) -> dict[str, object]:
        known = {} if self.algorithms is None else {"dpop_signing_alg_values_supported": list(self.algorithms)}
        return {**super().metadata(), **known}

    def _check_authorization(self, client: Client, redirect_uri: str, query: Mapping[str, str]) -> AuthorizationRequest:
        self._code_keys[query.get("code_challenge", "")] = query.get("dpop_jkt", "")
        return super()._check_authorization(client, redirect_uri, query)

    async def _token(self, request: Request) -> Response:
        form = await read_form(request)
        fields = request.headers.getlist("dpop")
        if not fields and self.token_type == "Bearer":
            return await super()._token(request)
        try:
            self._key = self.proofs.check(fields, method="POST", url=f"{self.issuer}/token")
            code = self.ledger.codes.get(form.get("code", ""))
            if code is not None and self._code_keys[code.challenge] != self._key:
                raise InvalidProof("invalid_dpop_proof")
            if self.bound.get(form.get("refresh_token", ""), self._key) != self._key:
                raise InvalidProof("invalid_grant")
        except InvalidProof as refused:
            return JSONResponse({"error": str(refused)}, 400, headers=self._nonce())
        response = await super()._token(request)
        if self.proofs.previous:
            response.headers.update(self._nonce())
        return response

    def _nonce(self) -> dict[str, str]:
        return {"dpop-nonce": self.proofs.nonce} if self.proofs.nonce else {}

    def token_response(self, issued: Issued) -> dict[str, object]:
        self.bound[issued.access_token] = self._key
        if issued.refresh_token:
            self.bound[issued.refresh_token] = self._key
        return changed({**super().token_response(issued), "token_type": self.token_type}, self.token_changes)


class DpopMcpServer(FakeMcpServer):
    """Accepts bound tokens of one authorization server, with a proof in each request."""

    def __init__(self, origin: str, authorization_servers: Sequence[DpopAuthorizationServer], **options: Any) -> None:
        self.issuer = authorization_servers[0]
        self.proofs = ProofChecker()
        self.asks: Literal["metadata", "challenge", "nothing"] = "metadata"
        """Where it announces DPoP: in the challenge, in the metadata, or nowhere."""
        self.endless_nonce = False
        self.refusals: list[str] = []
        super().__init__(origin, authorization_servers, **options)
        if self.asks == "metadata":
            self.metadata_changes = {**self.metadata_changes, "dpop_bound_access_tokens_required": True}

    def _challenge(self, received: RecordedRequest) -> FakeResponse | None:
        scheme, _, token = (received.header("authorization") or "").partition(" ")
        try:
            if scheme != "DPoP":
                raise InvalidProof("invalid_token" if scheme else "")
            key = self.proofs.check(received.all("dpop"), method=received.method, url=self.url, token=token)
            if self.endless_nonce:
                raise InvalidProof("use_dpop_nonce")
            found = self.find_token(token)
            if found is None or self.issuer.bound.get(token) != key:
                raise InvalidProof("invalid_token")
        except InvalidProof as refused:
            return self._refuse_proof(str(refused))
        needed = self.step_up.get(f"tools/call:{received.tool}", ())
        if not set(needed) <= set(found.scopes):
            ours = f'Bearer error="insufficient_scope", scope="{" ".join(needed)}"'
            return FakeResponse(status=403, headers=(("www-authenticate", ours), *JSON), body=b"{}")
        # A nonce that the request did not use yet goes out with the response.
        self.response_headers = (("dpop-nonce", self.proofs.nonce),) if self.proofs.previous else ()
        return None

    def _refuse_proof(self, error: str) -> FakeResponse:
        self.refusals.append(error)
        scheme = "Bearer" if self.asks == "nothing" and not error else "DPoP"
        params = {"error": error, "resource_metadata": f"{self.origin}{WELL_KNOWN}{self.path}"}
        challenge = f"{scheme} " + ", ".join(f'{name}="{value}"' for name, value in params.items() if value)
        if self.endless_nonce:
            self.proofs.rotate()
        nonce = (("dpop-nonce", self.proofs.nonce),) if error == "use_dpop_nonce" else ()
        return FakeResponse(
            status=401, headers=(("www-authenticate", challenge), *nonce, *JSON), body=b'{"error":"no"}'
        )
