"""The keys that an issuer signs with (JWK Sets, RFC 7517), fetched when they are needed and kept for some minutes."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import jwt
from jwt.exceptions import InvalidKeyError, PyJWKError

from mcp_auth_proxy.config.settings import JwtSettings
from mcp_auth_proxy.errors import AuthorizationError, AuthorizationServerUnavailable, DocumentRefused, excerpt
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.oauth.discovery import SERVER_METADATA, authorization_server_metadata_urls
from mcp_auth_proxy.oauth.documents import Document
from mcp_auth_proxy.oauth.fetch import Fetcher, Response

KEY_SET = "key set"
"""The name of the document, for errors."""

LIFETIME = 300.0
"""Seconds that keys are used for. A key that its issuer withdraws is trusted that long."""

UNKNOWN_KEY_INTERVAL = 30.0
"""Seconds between two requests because of a key id that is not in the set."""

RETRY_INTERVAL = 5.0
"""Seconds after a request that failed until the next one."""

BACKGROUND_RETRY = 30.0
"""Seconds after which keys that could not be had are asked for again although nobody needs them now."""

MAX_KEYS = 100

ALGORITHMS: Mapping[str, frozenset[str]] = {
    "RSA": frozenset({"RS256", "RS384", "RS512", "PS256", "PS384", "PS512"}),
    "EC": frozenset({"ES256", "ES384", "ES512"}),
    "OKP": frozenset({"EdDSA"}),
}
"""The algorithms for each type of key. All are asymmetric (RFC 8725 §3.1, §3.2)."""

_MIN_RSA_BITS = 2048
_CURVES = {"P-256": "ES256", "P-384": "ES384", "P-521": "ES512"}

logger = logging.getLogger(__name__)


class KeysUnavailable(Exception):
    """The keys of an issuer can't be had now. ``retry_after`` is in seconds."""

    def __init__(self, retry_after: float) -> None:
        self.retry_after = retry_after
        super().__init__()


class VerificationKey:
    """One key of a set, and the algorithms that it may be used with."""

    def __init__(self, kid: str | None, algorithms: frozenset[str], values: Mapping[str, object]) -> None:
        self.kid = kid
        self.algorithms = algorithms
        self._values = dict(values)
        self._keys: dict[str, jwt.PyJWK] = {}

    def for_algorithm(self, algorithm: str) -> jwt.PyJWK:
        """Return the key for an algorithm. Raises PyJWKError, InvalidKeyError."""
        if algorithm not in self._keys:
            self._keys[algorithm] = jwt.PyJWK(self._values, algorithm=algorithm)
        return self._keys[algorithm]


class KeySource(Protocol):
    """Fetch the keys of one issuer."""

    async def fetch(self) -> list[VerificationKey]:
        """Return the keys. Raises AuthorizationError."""


class IssuerKeys:
    """Where the keys of a configured issuer are: at ``jwks``, or where the issuer's metadata say.

    The configuration names the issuer, so it may have a private address. Other hosts may not.
    """

    def __init__(self, settings: JwtSettings, fetcher: Fetcher) -> None:
        self._settings = settings
        self._fetcher = fetcher

    async def fetch(self) -> list[VerificationKey]:
        """Return the keys. Raises AuthorizationError."""
        if self._settings.jwks != "auto":
            url, policy = self._settings.jwks, AddressPolicy.for_upstream(self._settings.jwks)
        else:
            policy = AddressPolicy.for_upstream(self._settings.issuer)
            url = await self._discover(policy)
        response = await self._fetcher.get(url, document=KEY_SET, policy=policy)
        return read_key_set(checked(response, KEY_SET))

    async def _discover(self, policy: AddressPolicy) -> str:
        """Return the URL of the keys from the issuer's metadata (RFC 8414 §2, jwks_uri)."""
        issuer = self._settings.issuer
        response: Response | None = None
        # Most identity providers have the document of OpenID Connect, which comes last otherwise.
        for url in sorted(authorization_server_metadata_urls(issuer), key=lambda url: "openid" not in url):
            response = await self._fetcher.get(url, document=SERVER_METADATA, policy=policy)
            if response.status in (200, 429) or response.status >= 500:
                break
        assert response is not None
        body = checked(response, SERVER_METADATA)
        document = Document.parse(body.body, name=SERVER_METADATA, url=body.url, clause="RFC 8414 §2")
        stated = document.required_string("issuer")
        if stated != issuer:
            raise document.refusal(f"its issuer is {excerpt(stated)}, not {excerpt(issuer)}", "RFC 8414 §3.3")
        return document.required_string("jwks_uri")


def checked(response: Response, document: str) -> Response:
    """Return a response with status 200. Raises DocumentRefused, or AuthorizationServerUnavailable for 429 and 5xx."""
    if response.status == 200:
        return response
    if response.status == 429 or response.status >= 500:
        raise AuthorizationServerUnavailable(
            f"Could not fetch the {document} from {excerpt(response.url)}: it answers {response.status}."
        )
    raise DocumentRefused(document, response.url, f"it answers {response.status}")


def read_key_set(response: Response) -> list[VerificationKey]:
    """Return the keys in a document that signatures may be checked with. Raises DocumentRefused.

    Keys of other types, for other uses, or too weak, are left out (RFC 7517 §5).
    """
    document = Document.parse(response.body, name=KEY_SET, url=response.url, clause="RFC 7517 §5")
    found = document.get("keys")
    if not isinstance(found, list):
        raise document.refusal("it has no list of keys")
    keys = [key for value in found[:MAX_KEYS] if isinstance(value, dict) and (key := _read_key(value)) is not None]
    if not keys:
        raise document.refusal("it has no key that a signature can be checked with")
    return keys


def _read_key(values: Mapping[str, object]) -> VerificationKey | None:
    algorithms = ALGORITHMS.get(str(values.get("kty")), frozenset())
    if values.get("kty") == "EC":
        algorithms &= {_CURVES.get(str(values.get("crv")), "")}
    if isinstance(values.get("alg"), str):
        algorithms &= {str(values["alg"])}
    operations = values.get("key_ops")
    if values.get("use", "sig") != "sig" or (isinstance(operations, list) and "verify" not in operations):
        return None
    kid = values.get("kid")
    if not algorithms or not isinstance(kid, str | None):
        return None
    key = VerificationKey(kid, algorithms, values)
    try:
        size = getattr(key.for_algorithm(min(algorithms)).key, "key_size", _MIN_RSA_BITS)
    except (PyJWKError, InvalidKeyError, ValueError, TypeError, KeyError):
        return None
    return None if values.get("kty") == "RSA" and size < _MIN_RSA_BITS else key


class KeySet:
    """The keys of one issuer. One request for them runs at a time, whoever waits for it."""

    def __init__(self, name: str, source: KeySource, *, clock: Callable[[], float] = time.monotonic) -> None:
        """``name``: the issuer, for the log. ``clock`` is monotonic, in seconds."""
        self._name = name
        self._source = source
        self._clock = clock
        self._keys: list[VerificationKey] = []
        self._fetched_at: float | None = None
        self._failed_at: float | None = None
        self._task: asyncio.Task[None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self.problem = ""
        """Why the last request failed; empty if it did not."""

    async def find(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        """Return the keys that may have made a signature. Raises KeysUnavailable."""
        if self._fetched_at is None or self._clock() - self._fetched_at >= LIFETIME:
            await self._refresh()
        found = self._matching(kid, algorithm)
        if not found and self._fetched_at is not None and self._clock() - self._fetched_at >= UNKNOWN_KEY_INTERVAL:
            await self._refresh()
            found = self._matching(kid, algorithm)
        return found

    def fetch_soon(self) -> None:
        """Ask for the keys in the background unless that is done already."""
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._fetch())

    def cancel(self) -> None:
        """End a request that is running, and send none in the background any more."""
        if self._retry is not None:
            self._retry.cancel()
        if self._task is not None:
            self._task.cancel()

    async def aclose(self) -> None:
        """Do what ``cancel`` does, and wait until it is done."""
        self.cancel()
        if self._task is not None:
            await asyncio.gather(self._task, return_exceptions=True)

    def _matching(self, kid: str | None, algorithm: str) -> list[VerificationKey]:
        return [key for key in self._keys if algorithm in key.algorithms and (kid is None or key.kid in (kid, None))]

    async def _refresh(self) -> None:
        pause = self._pause()
        if pause > 0:
            raise KeysUnavailable(pause)
        self.fetch_soon()
        assert self._task is not None
        # Whoever stops waiting must not end it for the others.
        await asyncio.shield(self._task)
        if self._failed_at is not None:
            raise KeysUnavailable(max(self._pause(), 1.0))

    def _pause(self) -> float:
        """Return the seconds until the next request may be sent."""
        return 0.0 if self._failed_at is None else self._failed_at + RETRY_INTERVAL - self._clock()

    async def _fetch(self) -> None:
        try:
            self._keys = await self._source.fetch()
        except AuthorizationError as error:
            self._failed_at = self._clock()
            if not self.problem:
                logger.warning("callers with tokens of %s can't be identified: %s", self._name, error)
            self.problem = str(error)
            if self._retry is not None:
                self._retry.cancel()
            self._retry = asyncio.get_running_loop().call_later(BACKGROUND_RETRY, self.fetch_soon)
            return
        if self.problem:
            logger.warning("callers with tokens of %s can be identified again", self._name)
        self._fetched_at, self._failed_at, self.problem = self._clock(), None, ""
