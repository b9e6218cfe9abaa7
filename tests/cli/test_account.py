"""What ``login`` and ``logout`` say."""

from mcp_auth_proxy.broker import Disconnected, ForgottenGrant, Revocation
from mcp_auth_proxy.cli.account import _logout_lines
from mcp_auth_proxy.models import LOCAL, Account

NOTES = Account(LOCAL, "notes")
ISSUER = "https://as.example"


# logout


def disconnected(*grants: ForgottenGrant, client_forgotten: bool = False) -> Disconnected:
    return Disconnected(account=NOTES, grants=grants, client_forgotten=client_forgotten)


def test_logout_says_what_was_revoked_and_what_could_not_be() -> None:
    done, failed = _logout_lines(
        disconnected(
            ForgottenGrant(issuer=ISSUER, revocation=Revocation.REVOKED),
            ForgottenGrant(issuer=ISSUER, revocation=Revocation.NOT_OFFERED),
            ForgottenGrant(issuer=ISSUER, revocation=Revocation.FAILED, reason="It answered 500."),
            client_forgotten=True,
        )
    )
    assert done == [
        f"notes: forgotten here and revoked at {ISSUER}",
        f"notes: forgotten here; {ISSUER} does not support revocation",
        "notes: the next authorization registers a new client",
    ]
    (line,) = failed
    assert line.startswith(
        f"notes: forgotten here, but not revoked at {ISSUER}: It answered 500. Its tokens stay valid"
    )
    assert "withdraw the access at the provider" in line


def test_logout_without_a_grant_has_no_lines() -> None:
    assert _logout_lines(disconnected()) == ([], [])
