"""The section ``events``: where to post, and with which secret."""

from pathlib import Path

import pytest
import yaml

from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.config.settings import Settings, WebhookSettings
from mcp_auth_proxy.errors import ConfigurationError

URL = "https://hooks.example/mcp"


def loaded(folder: Path, webhook: object, **options: object) -> Settings:
    path = folder / "mcp-auth-proxy.yaml"
    servers = {"notes": {"url": "https://notes.example/mcp"}}
    path.write_text(yaml.safe_dump({"servers": servers, "events": {"webhook": webhook}}))
    return load(path, environ={"HOOK": "canary"}, **options)  # type: ignore[arg-type]


def test_a_webhook_has_a_url_and_a_secret(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"url": URL, "secret": "env:HOOK"}).events.webhook
    assert found is not None
    assert found.secret is not None
    assert (found.url, found.secret.value) == (URL, "canary")
    assert "canary" not in repr(found)
    assert loaded(tmp_path, None).events.webhook is None


def test_http_is_for_loopback(tmp_path: Path) -> None:
    for url in ("http://127.0.0.1:8000/hook", "http://localhost:8000/"):
        assert loaded(tmp_path, {"url": url, "secret": "s"}).events.webhook is not None


def test_commands_that_post_nothing_need_no_secret(tmp_path: Path) -> None:
    found = loaded(tmp_path, {"url": URL, "secret": "env:MISSING"}, secrets_of=()).events.webhook
    assert found == WebhookSettings(url=URL, secret=None)


@pytest.mark.parametrize(
    ("webhook", "key", "problem"),
    [
        ({"url": "http://hooks.example/", "secret": "s"}, "url", "must be https unless its host is loopback"),
        ({"url": "hooks.example", "secret": "s"}, "url", "must"),
        ({"secret": "s"}, "url", "is needed"),
        ({"url": URL}, "secret", "is needed"),
        ({"url": URL, "secret": "env:MISSING"}, "secret", "is not set"),
        ({"url": URL, "secret": "whsec_"}, "secret", "at least 16 bytes"),  # T91
        ({"url": URL, "secret": "whsec_c2hvcnQ="}, "secret", "at least 16 bytes"),
        ({"url": URL, "secret": "whsec_not base64"}, "secret", "must be base64 behind whsec_"),
        ({"url": URL, "secret": "s", "retries": 3}, "retries", "unknown key"),
    ],
)
def test_a_faulty_webhook_is_an_error_with_its_path(
    tmp_path: Path, webhook: dict[str, object], key: str, problem: str
) -> None:
    with pytest.raises(ConfigurationError) as raised:
        loaded(tmp_path, webhook)
    (error,) = raised.value.errors
    assert str(error.path) == f"events.webhook.{key}"
    assert problem in str(error)
    assert "not base64" not in str(error)


@pytest.mark.parametrize(("text", "seconds"), [("7d", 604_800.0), ("0", 0.0), ("36h", 129_600.0), ("0.5d", 43_200.0)])
def test_the_time_after_which_a_grant_is_kept_alive(tmp_path: Path, text: str, seconds: float) -> None:
    path = tmp_path / "mcp-auth-proxy.yaml"
    path.write_text(f"servers: {{a: {{url: 'https://a.example/mcp'}}}}\nauthorization: {{keep_alive: {text}}}\n")
    assert load(path, environ={}).authorization.keep_alive == seconds
