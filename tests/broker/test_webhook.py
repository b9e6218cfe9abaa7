"""The webhook for events of grants: how it is signed, tried again, bounded and changed."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from fakes.http_exchange import FakeResponse
from fakes.proxy import until
from fakes.webhook_receiver import SECRET, WebhookReceiver, is_signed, webhook_receiver
from mcp_auth_proxy.broker.connection_notes import Happening
from mcp_auth_proxy.broker.webhook import MAX_WAITING, Webhook, signature
from mcp_auth_proxy.config.settings import Secret, WebhookSettings
from mcp_auth_proxy.models import Account
from mcp_auth_proxy.oauth.fetch import Fetcher

NOTES = Account("prn_ada", "notes", "work")
NOW = 1_800_000_000.5


@asynccontextmanager
async def posting(
    *, secret: str = SECRET, delays: tuple[float, ...] = (0.01, 0.02)
) -> AsyncIterator[tuple[Webhook, WebhookReceiver]]:
    async with webhook_receiver() as hook:
        settings = WebhookSettings(url=f"{hook.local.origin}/hook", secret=Secret(secret))
        webhook = Webhook(settings, servers={}, fetcher=Fetcher(deadline=2), clock=lambda: NOW, delays=delays)
        yield webhook, hook
        await webhook.aclose()


def test_the_signature_is_that_of_the_specification() -> None:
    # The example of https://github.com/standard-webhooks/standard-webhooks.
    secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"
    body = b'{"test": 2432232314}'
    found = signature(secret, "msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, body)
    assert found == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


@pytest.mark.parametrize("secret", [SECRET, "a secret that is no base64"])
async def test_an_event_is_posted_with_its_reason_and_remedy(secret: str) -> None:
    async with posting(secret=secret) as (webhook, hook):
        webhook.heard(NOTES, Happening.ENDED, "It was revoked.")
        webhook.heard(NOTES, Happening.NOT_RENEWED, "It is down.")
        webhook.heard(NOTES, Happening.CONNECTED, "")
        webhook.heard(NOTES, Happening.RENEWED, "")
        await hook.until("ended", "recovered")
        received = hook.log.requests[0]
        assert is_signed(received, secret)
        assert (received.method, received.header("content-type")) == ("POST", "application/json")
        assert received.header("webhook-timestamp") == "1800000000"
        assert json.loads(received.body) == {
            "type": "ended",
            "timestamp": "2027-01-15T08:00:00.500Z",
            "data": {
                "server": "notes",
                "server_name": "notes",
                "account": "work",
                "owner": "prn_ada",
                "reason": "It was revoked.",
                "remedy": "To authorize again, run `mcp-auth-proxy login notes@work`, or open the link that the next "
                "request gets.",
            },
        }
        assert hook.events[1]["data"]["remedy"] is None


@pytest.mark.parametrize(
    "answer",
    [FakeResponse.json({}, 500), FakeResponse.drop(), FakeResponse.redirect("/elsewhere"), FakeResponse.json({}, 404)],
    ids=["500", "drop", "redirect", "404"],
)
async def test_an_event_is_tried_a_bounded_number_of_times_and_then_dropped(
    answer: FakeResponse, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with posting() as (webhook, hook):
        hook.answer = answer
        webhook.heard(NOTES, Happening.ENDED, "1")
        await until(lambda: webhook._task is not None and webhook._task.done())
        assert hook.types == ["ended"] * 3
        assert len({received.header("webhook-id") for received in hook.log.requests}) == 1
        hook.answer = None
        webhook.heard(NOTES, Happening.DEGRADED, "2")
        await until(lambda: "it works again; 1 events were dropped" in caplog.text)
    lines = [record for record in caplog.records if "events.webhook" in record.message]
    assert [record.levelname for record in lines] == ["WARNING", "INFO"]
    assert "/hook" not in caplog.text


async def test_events_that_wait_are_bounded_and_the_newest_are_kept() -> None:  # T91
    async with posting(delays=(60.0,)) as (webhook, hook):
        hook.answer = FakeResponse.json({}, 500)
        for number in range(MAX_WAITING + 10):
            webhook.heard(NOTES, Happening.ENDED, str(number))
        await until(lambda: len(hook.events) == 1)
        assert len(webhook._waiting) == MAX_WAITING
        assert json.loads(webhook._waiting[-1].body)["data"]["reason"] == str(MAX_WAITING + 9)


async def test_a_changed_webhook_gets_what_waits_for_the_old_one() -> None:
    async with posting(delays=(60.0,)) as (webhook, hook), webhook_receiver() as other:
        hook.answer = FakeResponse.json({}, 500)
        webhook.heard(NOTES, Happening.ENDED, "1")
        await hook.until("ended")
        webhook.configure(WebhookSettings(url=f"{other.local.origin}/", secret=Secret(SECRET)))
        await other.until("ended")
        webhook.configure(None)
        webhook.heard(NOTES, Happening.ENDED, "2")
        assert not webhook._waiting
