"""A hostile server repeats the secrets that it was sent: they are masked in every text of the proxy's own."""

import base64
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from fakes.fixtures import Servers
from fakes.headless import consent
from fakes.http_exchange import FakeResponse, RecordedRequest
from fakes.proxy_setup import proxy_setup

Spelling = Callable[[str], str]

SPELLINGS: dict[str, Spelling] = {
    "as it is": str,
    "glued to other text": lambda secret: f"xx{secret}yy",
    "percent-encoded": lambda secret: quote(f"{secret} {secret}", safe=""),
    "base64": lambda secret: base64.b64encode(secret.encode()).decode(),
    "base64 of the field": lambda secret: base64.urlsafe_b64encode(f"Bearer {secret}".encode()).decode(),
    "hexadecimal": lambda secret: secret.encode().hex(),
    "cut off by the server": lambda secret: secret[:20],
    "cut off by the proxy": lambda secret: "x " * 90 + secret,
}


def traces(secret: str) -> list[str]:
    """What would show a secret: its beginning, in each spelling."""
    data = secret.encode()
    shifted = [base64.b64encode(bytes(shift) + data).decode()[4:20] for shift in range(3)]
    return [secret[:12], secret[12:24], quote(secret, safe="")[:14], data.hex()[:24], *shifted]


def assert_nowhere(secrets: set[str], *texts: str) -> None:
    assert secrets
    for text in texts:
        assert [trace for secret in secrets for trace in traces(secret) if trace in text] == [], text


@pytest.mark.parametrize("spelling", SPELLINGS)
async def test_an_access_token_in_a_challenge_is_masked(  # T89
    servers: Servers, tmp_path: Path, spelling: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        tokens: set[str] = set()

        def echo(received: RecordedRequest) -> FakeResponse | None:
            if "/echo/" in received.path:
                spelled = SPELLINGS[spelling](next(iter(tokens)))
                return FakeResponse.json({"resource": f"https://other.example/{spelled}"})
            if received.bearer is None:
                return None
            tokens.add(received.bearer)
            text = quote(SPELLINGS[spelling](received.bearer), safe="%")
            challenge = f'Bearer error="invalid_token", resource_metadata="{setup.upstream.origin}/echo/{text}"'
            return FakeResponse(status=401, headers=(("www-authenticate", challenge),))

        setup.upstream.intercept = echo
        setup.issuer.answers["token"] = FakeResponse.json({"error": "invalid_grant"}, 400)
        answer = (await setup.ask()).body.decode()
        assert "https://other.example/" in answer
        assert "https://other.example/" in caplog.text
        assert_nowhere(tokens, answer, caplog.text)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("member", ["error", "error_description"])
async def test_a_refresh_token_in_an_error_is_masked(  # T89
    servers: Servers, tmp_path: Path, spelling: str, member: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with proxy_setup(servers, tmp_path) as setup:
        await setup.connect()
        tokens: set[str] = set()

        def echo(received: RecordedRequest) -> FakeResponse:
            tokens.add(received.form["refresh_token"])
            text = SPELLINGS[spelling](received.form["refresh_token"])
            return FakeResponse.json({"error": "invalid_grant", member: text}, 400)

        setup.issuer.answers["token"] = echo
        setup.issuer.end_access_tokens()
        answer = (await setup.ask()).body.decode()
        assert_nowhere(tokens, answer, caplog.text)
        assert "renew" in caplog.text or "ended" in caplog.text


async def test_a_token_that_was_refused_is_masked_too(  # T89
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    issued = "never-accepted-0123456789-abcdefghij"
    async with proxy_setup(servers, tmp_path) as setup:
        answer = {"access_token": issued, "token_type": "Bearer", "error": f"x{issued}"}
        setup.issuer.answers["token"] = FakeResponse.json(answer)
        page = await consent(await setup.link())
        assert page.status_code == 502
        assert_nowhere({issued}, page.text, caplog.text)


async def test_a_code_and_a_verifier_in_an_error_are_masked(  # T89
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sent: set[str] = set()

    def echo(received: RecordedRequest) -> FakeResponse:
        sent.update(received.form[name] for name in ("code", "code_verifier"))
        return FakeResponse.json({"error": "invalid_grant", "error_description": " and ".join(sent)}, 400)

    async with proxy_setup(servers, tmp_path, issuer={"answers": {"token": echo}}) as setup:
        page = await consent(await setup.link())
        assert page.status_code == 502
        assert_nowhere(sent, page.text, caplog.text, (await setup.ask()).body.decode())


async def test_a_client_secret_in_metadata_is_masked(  # T89
    servers: Servers, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "of-the-client-0123456789+/abcdefghij"
    oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": secret}
    async with proxy_setup(servers, tmp_path, oauth=oauth) as setup:
        for text in (secret, base64.b64encode(f"agent:{secret}".encode()).decode()):
            setup.issuer.metadata_changes["issuer"] = f"https://as.example/{text}"
            answer = (await setup.ask()).body.decode()
            assert "as.example" in answer
            assert_nowhere({secret}, answer, caplog.text)
