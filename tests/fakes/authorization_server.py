"""The demo's authorization server, with options that tests set and a log of every request."""

import base64
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Self
from urllib.parse import urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fakes.http_exchange import (
    FakeResponse,
    FakeResponses,
    RecordedRequest,
    RequestLog,
    changed,
    finished_before_leaving,
    resolve,
)
from mcp_auth_proxy.cli.demo_servers.authorization_server import AuthorizationRequest, AuthorizationServer
from mcp_auth_proxy.cli.demo_servers.ledger import Client, Issued, Rules
from mcp_auth_proxy.cli.demo_servers.local_server import LocalServer, serve

AUTO = "auto"


class FakeAuthorizationServer(AuthorizationServer):
    """Behaves as its attributes say; a test may change them at any time.

    ``rules`` has lifetimes, scopes, rotation and refresh tokens. ``answers`` replaces the response of an endpoint
    (metadata, register, authorize, consent, token, revoke, userinfo); ``outage`` that of all of them. ``gates`` holds
    requests to an endpoint until their event is set.
    """

    def __init__(self, issuer: str, **options: Any) -> None:
        self.log = RequestLog()
        self.local: LocalServer
        self.auto_consent = False
        self.serves_metadata = True
        """False: no metadata and only the default endpoints, as a server of MCP 2025-03-26 may have."""
        self.metadata_changes: dict[str, object] = {}
        self.token_changes: dict[str, object] = {}
        """Changes to every successful token response."""
        self.jwt_seconds: float | None = None
        """Access tokens are JWTs whose ``exp`` is so many seconds from now; None: they are opaque."""
        self.answers: dict[str, FakeResponses] = {}
        self.outage: FakeResponses | None = None
        self.gates: dict[str, Any] = {}
        self.lost_responses: set[str] = set()
        """Endpoints that process a request and then drop the connection without a response."""
        self.authorize_error: tuple[str, str] | None = None
        """Error code and description with which every authorization fails."""
        self.iss: str | None = AUTO
        """The ``iss`` of authorization responses: AUTO sends the issuer, None omits it."""
        self.registration = True
        self.client_documents = False
        """Whether a client may be the URL of a Client ID Metadata Document; advertised in the metadata."""
        rules = options.pop("rules", None) or Rules(scopes=None, default_scopes=())
        super().__init__(issuer, rules=rules)
        self.configure(**options)

    @classmethod
    @asynccontextmanager
    async def running(cls, path: str = "", *, port: int = 0, **options: Any) -> AsyncIterator[Self]:
        """Run a server on loopback until the block ends; its issuer is its origin followed by ``path``."""
        made: list[Self] = []

        def make(origin: str) -> ASGIApp:
            made.append(cls(f"{origin}{path}", **options))
            return made[0]

        async with serve(make, port=port) as local:
            made[0].local = local
            yield made[0]

    def configure(self, **options: Any) -> None:
        """Set several attributes; a name that belongs to ``rules`` is set there."""
        for name, value in options.items():
            target = self.rules if name in Rules.__slots__ else self
            if not hasattr(target, name):
                raise TypeError(f"no knob {name}")
            setattr(target, name, value)

    # requests so far

    @property
    def requests(self) -> list[RecordedRequest]:
        return self.log.requests

    def seen(self, endpoint: str, **form: str) -> list[RecordedRequest]:
        """Return the requests to one endpoint whose form (the query of a GET) has these values."""
        return [
            received
            for received in self.requests
            if received.endpoint == endpoint and form.items() <= received.form.items()
        ]

    @property
    def discoveries(self) -> int:
        return len(self.seen("metadata"))

    @property
    def registrations(self) -> int:
        return len(self.seen("register"))

    @property
    def authorizations(self) -> int:
        return len(self.seen("authorize"))

    @property
    def revocations(self) -> int:
        return len(self.seen("revoke"))

    @property
    def refreshes(self) -> int:
        return self.token_requests("refresh_token")

    def token_requests(self, grant_type: str | None = None) -> int:
        """Return the number of token requests, of one grant type or in all."""
        return len(self.seen("token", **({} if grant_type is None else {"grant_type": grant_type})))

    def secrets(self) -> set[str]:
        """Return every secret that was issued or received here: none may appear in a log or a file."""
        ledger = self.ledger
        sent = {
            received.form[name]
            for received in self.requests
            for name in ("code", "code_verifier", "refresh_token", "client_secret", "state")
            if received.form.get(name)
        }
        clients = {client.secret for client in ledger.clients.values() if client.secret}
        return sent | clients | {*ledger.tokens, *ledger.refresh_tokens, *ledger.codes}

    # events in its life

    def forget_clients(self) -> None:
        """Forget all clients: each is answered ``invalid_client`` from now on."""
        self.ledger.clients.clear()

    def end_grants(self) -> None:
        """End all grants: access tokens are invalid, a refresh is answered ``invalid_grant``."""
        self.ledger.end_grants()

    def end_access_tokens(self) -> int:
        """Invalidate every access token, but no refresh token; return how many were valid."""
        return self.ledger.end_access_tokens()

    def issue(self, *, resource: str, scopes: tuple[str, ...] = (), client_id: str = "by-hand") -> str:
        """Issue a valid access token without a flow."""
        client = Client(id=client_id, auth="client_secret_post", secret="by-hand")
        return self.ledger.client_credentials(client, resource=resource, scopes=scopes).access_token

    # the ASGI application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = await RecordedRequest.read(scope, receive)
        received.endpoint = self._endpoint(received.path)
        self.log.add(received)
        gate = self.gates.get(received.endpoint)
        if gate is not None and not await finished_before_leaving(gate.wait(), received, receive):
            return
        answer = resolve(self.outage, received) or resolve(self.answers.get(received.endpoint), received)
        answer = answer or self._own_answer(received)
        if answer is not None:
            await answer.deliver(received, receive, send, self.local.abort)
        elif received.endpoint in self.lost_responses:
            await super().__call__(scope, _body_again(received), _discard)
            await FakeResponse.drop().deliver(received, receive, send, self.local.abort)
        else:
            await super().__call__(scope, _body_again(received), send)

    def _own_answer(self, received: RecordedRequest) -> FakeResponse | None:
        if received.endpoint == "metadata" and not self.serves_metadata:
            return FakeResponse.html("not found", 404)
        if received.endpoint == "register" and not self.registration:
            return FakeResponse.html("not found", 404)
        return None

    def _endpoint(self, path: str) -> str:
        if path in self.metadata_paths():
            return "metadata"
        name = path.removeprefix(urlsplit(self.issuer).path).removeprefix("/")
        return name if name in ("register", "authorize", "consent", "token", "revoke", "userinfo") else "other"

    def owns(self, path: str) -> bool:
        """Return whether this issuer, of several on one host, serves the path."""
        return self._endpoint(path) != "other"

    # hooks of the demo's server

    def metadata(self) -> dict[str, object]:
        document = super().metadata()
        if not self.registration:
            del document["registration_endpoint"]
        if self.client_documents:
            document["client_id_metadata_document_supported"] = True
        return changed(document, self.metadata_changes)

    def callback_iss(self) -> str | None:
        return super().callback_iss() if self.iss == AUTO else self.iss

    def token_response(self, issued: Issued) -> dict[str, object]:
        if self.jwt_seconds is not None:
            issued = self._as_jwt(issued, self.jwt_seconds)
        return changed(super().token_response(issued), self.token_changes)

    def _as_jwt(self, issued: Issued, seconds: float) -> Issued:
        """Return the access token as a JWT, whose signature nobody checks; both are accepted."""
        parts = ({"alg": "RS256"}, {"exp": int(time.time() + seconds), "jti": issued.access_token})
        encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
        token = ".".join([*encoded, "c2ln"])
        self.ledger.tokens[token] = self.ledger.tokens[issued.access_token]
        return replace(issued, access_token=token)

    async def find_client(self, client_id: str, redirect_uri: str) -> Client | None:
        if self.client_documents and client_id.startswith("https://") and client_id not in self.ledger.clients:
            # The document can't be fetched in tests: nothing listens at the proxy's public https URL.
            self.add_client(client_id=client_id, auth="none", redirect_uris=(redirect_uri,))
        return await super().find_client(client_id, redirect_uri)

    def ask(self, waiting: AuthorizationRequest) -> Response:
        if self.authorize_error is not None:
            error, description = self.authorize_error
            params = {"error": error, "error_description": description, "state": waiting.state}
            return self._redirect(waiting.redirect_uri, params)
        return self.decide(waiting, allowed=True) if self.auto_consent else super().ask(waiting)


class Tenants:
    """Several issuers on one origin, each with its own path."""

    def __init__(self, origin: str, paths: tuple[str, ...], options: Mapping[str, Any]) -> None:
        self.servers = [FakeAuthorizationServer(f"{origin}{path}", **options) for path in paths]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        owner = next((server for server in self.servers if server.owns(scope["path"])), self.servers[0])
        await owner(scope, receive, send)

    @classmethod
    @asynccontextmanager
    async def running(cls, *paths: str, **options: Any) -> AsyncIterator[list[FakeAuthorizationServer]]:
        """Run issuers with these paths on one loopback origin until the block ends."""
        made: list[Tenants] = []

        def make(origin: str) -> ASGIApp:
            made.append(cls(origin, paths, options))
            return made[0]

        async with serve(make) as local:
            for server in made[0].servers:
                server.local = local
            yield made[0].servers


def _body_again(received: RecordedRequest) -> Callable[[], Any]:
    async def receive() -> Message:
        return {"type": "http.request", "body": received.body, "more_body": False}

    return receive


async def _discard(message: Message) -> None:
    """Discard an ASGI message."""
