"""A receiver of webhooks on a real socket. It checks signatures as the specification of Standard Webhooks says."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope, Send

from fakes.http_exchange import FakeResponse, FakeResponses, RecordedRequest, RequestLog, resolve
from fakes.proxy import until
from mcp_auth_proxy.cli.demo_servers.local_server import LocalServer, serve

SECRET = "whsec_" + base64.b64encode(b"a webhook's own secret").decode()


class WebhookReceiver:
    """Answers 204 unless ``answer`` says otherwise."""

    def __init__(self) -> None:
        self.log = RequestLog()
        self.answer: FakeResponses | None = None
        self.local: LocalServer

    @property
    def settings(self) -> dict[str, object]:
        """The section ``events`` of a configuration that posts here."""
        return {"webhook": {"url": f"{self.local.origin}/hook?token=canary-path", "secret": SECRET}}

    @property
    def events(self) -> list[dict[str, Any]]:
        """What was posted, repeated attempts included."""
        return [json.loads(received.body) for received in self.log.requests]

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.events]

    async def until(self, *types: str) -> None:
        """Wait, bounded, until these and no others have been posted."""
        await until(lambda: self.types == list(types), f"{types}, have {self.types}")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        received = await RecordedRequest.read(scope, receive)
        self.log.add(received)
        answer = resolve(self.answer, received) or FakeResponse(status=204)
        await answer.deliver(received, receive, send, self.local.abort)


def is_signed(received: RecordedRequest, secret: str = SECRET) -> bool:
    """Return whether the signature of a webhook is right."""
    key = base64.b64decode(secret.removeprefix("whsec_")) if secret.startswith("whsec_") else secret.encode()
    content = f"{received.header('webhook-id')}.{received.header('webhook-timestamp')}.".encode() + received.body
    wanted = base64.b64encode(hmac.new(key, content, hashlib.sha256).digest()).decode()
    return received.header("webhook-signature") == f"v1,{wanted}"


@asynccontextmanager
async def webhook_receiver() -> AsyncIterator[WebhookReceiver]:
    """Run a receiver until the block ends."""
    receiver = WebhookReceiver()
    async with serve(lambda origin: receiver) as local:
        receiver.local = local
        yield receiver
