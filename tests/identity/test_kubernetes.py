"""The Kubernetes preset: issuer, certificate authority and keys come from the pod's own service account."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from bench import certificates
from identity.idp import AUDIENCE, IdentityProvider, identity_provider
from identity.setup import Clock, identifying
from mcp_auth_proxy.config.settings import InboundSettings, JwtSettings
from mcp_auth_proxy.errors import CallerRefused
from mcp_auth_proxy.identity.tokens import TokenCallers
from mcp_auth_proxy.oauth.fetch import Fetcher

ISSUER = "https://kubernetes.default.svc.cluster.local"
SUBJECT = "system:serviceaccount:team:agent"
INBOUND = InboundSettings(modes=("jwt",), jwt=(JwtSettings(issuer="", audience=AUDIENCE, kubernetes=True),))


@asynccontextmanager
async def in_a_pod(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[TokenCallers, IdentityProvider]]:
    """Yield what tells the callers of tokens in a pod without a service account, and the API server of its cluster."""
    files = certificates.create(folder)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(files.certificate, files.key)
    async with (
        identity_provider(tls) as api_server,
        identifying(folder, InboundSettings(modes=("api_key",))) as setup,
    ):
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", api_server.issuer.rpartition(":")[2])
        account = folder / "serviceaccount"
        account.mkdir()
        callers = TokenCallers(
            INBOUND, setup.callers.principal_of, fetcher=Fetcher(), clock=Clock(), service_account=account
        )
        (account / "ca.crt").write_bytes(files.authority.read_bytes())
        yield callers, api_server
        await callers.aclose()


async def test_service_accounts_of_the_cluster_are_callers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with in_a_pod(tmp_path, monkeypatch) as (callers, api_server):
        token = api_server.token(iss=ISSUER, sub=SUBJECT).encode()
        # Before the kubelet has put the token there, nobody knows the issuer.
        with pytest.raises(CallerRefused) as caught:
            await callers.identify(token)
        assert caught.value.status == 401
        own = api_server.token(iss=ISSUER, sub="system:serviceaccount:team:proxy", aud="api-server")
        (tmp_path / "serviceaccount" / "token").write_text(f"{own}\n")
        caller = await callers.identify(token)
        assert (caller.principal.name, caller.credential) == (SUBJECT, f"jwt:{ISSUER}")
        assert api_server.paths == ["/openid/v1/jwks"]
        assert api_server.authorization == [f"Bearer {own}"]
        # The pod's own token was made for the API server.
        with pytest.raises(CallerRefused):
            await callers.identify(own.encode())


async def test_an_api_server_that_can_not_be_trusted_is_one_that_is_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with in_a_pod(tmp_path, monkeypatch) as (callers, api_server):
        (tmp_path / "serviceaccount" / "token").write_text(api_server.token(iss=ISSUER))
        (tmp_path / "serviceaccount" / "ca.crt").write_text("nonsense")
        with pytest.raises(CallerRefused) as caught:
            await callers.identify(api_server.token(iss=ISSUER, sub=SUBJECT).encode())
        assert caught.value.status == 503
        assert callers.problems()
        assert api_server.paths == []
