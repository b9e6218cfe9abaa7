"""An identity provider on loopback: its metadata, its keys, and tokens signed with them."""

import asyncio
import base64
import hashlib
import hmac
import json
import re
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from jwt.algorithms import ECAlgorithm, RSAAlgorithm

from store.builders import NOW

AUDIENCE = "https://proxy.example"


class IdentityProvider:
    """``paths`` has what was asked for. ``down``: the status that it answers everything with."""

    def __init__(self) -> None:
        self.issuer = ""
        self.paths: list[str] = []
        self.authorization: list[str] = []
        self.down = 0
        self.metadata: dict[str, Any] = {}
        self._rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self._ec = ec.generate_private_key(ec.SECP256R1())
        self.keys: list[dict[str, Any]] = [
            json.loads(RSAAlgorithm.to_jwk(self._rsa.public_key())) | {"kid": "rsa", "use": "sig"},
            json.loads(ECAlgorithm.to_jwk(self._ec.public_key())) | {"kid": "ec"},
        ]

    @property
    def public_pem(self) -> bytes:
        return self._rsa.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Return the claims of a good token; a change to None leaves one out."""
        claims = {
            "iss": self.issuer,
            "aud": AUDIENCE,
            "sub": "alice",
            "exp": int(NOW) + 600,
            "iat": int(NOW),
            **changes,
        }
        return {name: value for name, value in claims.items() if value is not None}

    def token(self, header: dict[str, Any] | None = None, *, algorithm: str = "RS256", **changes: Any) -> str:
        """Return a token with these claims. ``header``: further parameters."""
        key = self._ec if algorithm == "ES256" else self._rsa
        kid = "ec" if algorithm == "ES256" else "rsa"
        return jwt.encode(self.claims(**changes), key, algorithm=algorithm, headers={"kid": kid, **(header or {})})

    def rotate(self) -> None:
        """Sign with a new key from now on, under a new id."""
        self._rsa = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        self.keys = [json.loads(RSAAlgorithm.to_jwk(self._rsa.public_key())) | {"kid": "rsa-2"}]

    def answer(self, path: str) -> tuple[int, dict[str, Any]]:
        self.paths.append(path)
        if self.down:
            return self.down, {}
        if path == "/.well-known/openid-configuration":
            return 200, {"issuer": self.issuer, "jwks_uri": f"{self.issuer}/keys", **self.metadata}
        return (200, {"keys": self.keys}) if path in ("/keys", "/openid/v1/jwks") else (404, {})


@asynccontextmanager
async def identity_provider(tls: ssl.SSLContext | None = None) -> AsyncIterator[IdentityProvider]:
    """Run one until the block ends."""
    provider = IdentityProvider()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            provider.authorization += re.findall(r"\r\nAuthorization: (.*)\r\n", head.decode())
            status, document = provider.answer(head.split(b" ")[1].decode())
            body = json.dumps(document).encode()
            writer.write(
                b"HTTP/1.1 %d X\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%b" % (status, len(body), body)
            )
            await writer.drain()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    provider.issuer = f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server:
        yield provider


def forged(header: dict[str, Any], claims: dict[str, Any], secret: bytes | None = None) -> str:
    """Return a token that no library would make; with ``secret``, the HMAC (SHA-256) is its signature."""
    signed = ".".join(_encoded(json.dumps(part).encode()) for part in (header, claims))
    signature = b"" if secret is None else hmac.digest(secret, signed.encode(), hashlib.sha256)
    return f"{signed}.{_encoded(signature)}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
