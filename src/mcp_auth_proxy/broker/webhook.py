"""Post what happens to grants to the operator's webhook, signed as Standard Webhooks does.

The specification is that of https://www.standardwebhooks.com: ``webhook-id`` is the same in each attempt, and
``webhook-signature`` is ``v1,`` and the HMAC-SHA256, in base64, of id, timestamp and body with dots between them. The
process that makes a change posts it, so each change is posted once.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import random
import secrets
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime

from mcp_auth_proxy.broker.connection_notes import Happening, authorize_again
from mcp_auth_proxy.config.settings import ServerSettings, WebhookSettings
from mcp_auth_proxy.errors import MAX_MESSAGE, AuthorizationError, excerpt
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.net import urls
from mcp_auth_proxy.net.addresses import AddressPolicy
from mcp_auth_proxy.oauth.fetch import Fetcher

logger = logging.getLogger(__name__)

DELAYS = (1.0, 5.0, 25.0, 120.0, 600.0)
"""Seconds before each further attempt to post an event; up to a fifth more at random. Then it is dropped."""

MAX_WAITING = 1000
"""Events that wait; beyond it, the oldest one is dropped."""

CLOSING_SECONDS = 1.0
"""Seconds at the end of the process for events that wait, unless the webhook can't be reached anyway."""

_PREFIX = "whsec_"

_TYPES = {
    Happening.DEGRADED: "degraded",
    Happening.RENEWED: "recovered",
    Happening.ENDED: "ended",
    Happening.NEEDS_CONSENT: "needs-consent",
}


@dataclass(frozen=True, slots=True)
class WebhookEvent:
    """One event. ``id`` is the same in each attempt; no secret is in ``body``."""

    id: str
    body: bytes


def signature(secret: str, event_id: str, timestamp: int, body: bytes) -> str:
    """Return the value of ``webhook-signature``."""
    key = base64.b64decode(secret.removeprefix(_PREFIX)) if secret.startswith(_PREFIX) else secret.encode()
    signed = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return f"v1,{base64.b64encode(signed).decode()}"


class Webhook:
    """Post events in the background, one after the other. Belongs to one event loop."""

    def __init__(
        self,
        settings: WebhookSettings | None,
        *,
        servers: Mapping[str, ServerSettings],
        fetcher: Fetcher,
        clock: Callable[[], float],
        delays: tuple[float, ...] = DELAYS,
    ) -> None:
        """``servers`` may change at any time. ``settings``: None if nothing is posted."""
        self._settings = settings
        self._servers = servers
        self._fetcher = fetcher
        self._clock = clock
        self._delays = delays
        self._waiting: deque[WebhookEvent] = deque(maxlen=MAX_WAITING)
        self._dropped = 0
        self._failing = False
        self._task: asyncio.Task[None] | None = None

    def configure(self, settings: WebhookSettings | None) -> None:
        """Change where events are posted; those that wait are posted there."""
        if settings == self._settings:
            return
        self._settings = settings
        if settings is None:
            self._waiting.clear()
        if self._task is not None:
            # It may wait for the old one.
            self._task.cancel()
            self._task = None
        self._wake()

    async def aclose(self) -> None:
        """Post what waits, for a moment."""
        if self._task is None:
            return
        if self._failing:
            self._task.cancel()
        with suppress(TimeoutError, asyncio.CancelledError):
            await asyncio.wait_for(self._task, CLOSING_SECONDS)

    def heard(self, account: Account, happening: Happening, reason: str) -> None:
        """Post what has happened to an account, if it is of the kind. Does not wait."""
        kind = _TYPES.get(happening)
        if self._settings is None or kind is None:
            return
        if len(self._waiting) == MAX_WAITING:
            self._dropped += 1
        self._waiting.append(WebhookEvent(f"msg_{secrets.token_hex(16)}", self._body(account, kind, reason)))
        self._wake()

    def _body(self, account: Account, kind: str, reason: str) -> bytes:
        server = self._servers.get(account.server)
        remedy = None if kind == "recovered" else authorize_again(account, server)
        data = {
            "server": account.server if server is None else server.server_id,
            "server_name": account.server,
            "account": account.name,
            "owner": account.principal,
            "reason": excerpt(reason, MAX_MESSAGE) or None,
            "remedy": remedy,
        }
        at = datetime.fromtimestamp(self._clock(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return json.dumps({"type": kind, "timestamp": at, "data": data}, separators=(",", ":")).encode()

    def _wake(self) -> None:
        if self._waiting and self._settings is not None and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            event = self._waiting[0]
            posted = await self._post_with_retries(event)
            if self._waiting and self._waiting[0] is event:
                self._waiting.popleft()
            self._dropped += not posted

    async def _post_with_retries(self, event: WebhookEvent) -> bool:
        for delay in (*self._delays, None):
            settings = self._settings
            if settings is None or settings.secret is None:
                return False
            failure = await self._post(settings, settings.secret.value, event)
            if not failure:
                self._works()
                return True
            self._fails(settings, failure)
            if delay is not None:
                await asyncio.sleep(delay * (1 + random.random() / 5))
        return False

    async def _post(self, settings: WebhookSettings, secret: str, event: WebhookEvent) -> str:
        """Post an event once; return why that failed, or nothing."""
        now = int(self._clock())
        headers = [
            ("webhook-id", event.id),
            ("webhook-timestamp", str(now)),
            ("webhook-signature", signature(secret, event.id, now, event.body)),
        ]
        try:
            response = await self._fetcher.post(
                settings.url,
                body=event.body,
                content_type="application/json",
                headers=headers,
                document="answer of the webhook",
                policy=AddressPolicy.for_upstream(settings.url),
            )
        except AuthorizationError as error:
            # Path and query may be a secret of the receiver.
            return str(error).replace(excerpt(settings.url), _origin(settings)).rstrip(".")
        return "" if 200 <= response.status < 300 else f"it answers {response.status}"

    def _fails(self, settings: WebhookSettings, failure: str) -> None:
        if not self._failing:
            self._failing = True
            logger.warning("events.webhook: %s can't be used, and is tried again: %s", _origin(settings), failure)

    def _works(self) -> None:
        if self._failing or self._dropped:
            logger.info("events.webhook: it works again; %d events were dropped", self._dropped)
        self._failing, self._dropped = False, 0


def _origin(settings: WebhookSettings) -> str:
    return urls.parse(settings.url).origin.serialized
