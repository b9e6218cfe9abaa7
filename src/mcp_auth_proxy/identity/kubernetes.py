"""The Kubernetes preset: service-account tokens of the cluster that the proxy runs in.

The pod's own service account says who the issuer is; the API server has its keys, and shows them to service accounts.
"""

import asyncio
import base64
import json
import os
from collections.abc import Mapping
from pathlib import Path

from mcp_auth_proxy.errors import AuthorizationServerUnavailable, ConfigurationError
from mcp_auth_proxy.identity.key_sets import KEY_SET, VerificationKey, checked, read_key_set
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.net.dial import Dialer
from mcp_auth_proxy.oauth.fetch import Fetcher

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet puts the token of the pod, and the certificate authority of the API server."""

_KEYS_PATH = "/openid/v1/jwks"


class KubernetesKeys:
    """Fetch the keys of the cluster from its API server, as the pod's service account."""

    def __init__(self, folder: Path = SERVICE_ACCOUNT, environ: Mapping[str, str] = os.environ) -> None:
        self._folder = folder
        self._environ = environ

    async def fetch(self) -> list[VerificationKey]:
        """Return the keys. Raises AuthorizationError. Token and certificates are read each time: they are renewed."""
        token = await asyncio.to_thread(_read_token, self._folder)
        host, port = (self._environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
        if not token or not host:
            raise AuthorizationServerUnavailable(
                f"inbound.jwt has kubernetes: true, but this is no pod with a service account: there is no token in "
                f"{self._folder}, or $KUBERNETES_SERVICE_HOST is not set."
            )
        url = f"https://{f'[{host}]' if ':' in host else host}:{port or 443}{_KEYS_PATH}"
        try:
            dialer = await asyncio.to_thread(Dialer, ca_bundle=self._folder / "ca.crt")
        except ConfigurationError as error:
            raise AuthorizationServerUnavailable(f"{error.errors[0].problem}.") from None
        fetcher = Fetcher(dialer)
        try:
            response = await fetcher.get(
                url,
                headers=[("Authorization", f"Bearer {token}")],
                document=KEY_SET,
                policy=AddressPolicy.for_upstream(url),
            )
        finally:
            await fetcher.aclose()
        return read_key_set(checked(response, KEY_SET))


def own_issuer(folder: Path = SERVICE_ACCOUNT) -> str | None:
    """Return the issuer of the pod's own token; None if there is none. The kubelet put it there, so it is believed."""
    try:
        payload = _read_token(folder).split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        issuer = claims["iss"]
    except (IndexError, ValueError, KeyError, TypeError):
        return None
    return issuer if isinstance(issuer, str) else None


def _read_token(folder: Path) -> str:
    try:
        return (folder / "token").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
