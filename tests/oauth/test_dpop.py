"""Proofs by RFC 9449 §4.2, and when tokens are to be bound at all."""

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes.dpop_servers import sha256
from mcp_auth_proxy.errors import AuthorizationError
from mcp_auth_proxy.models import DpopUse
from mcp_auth_proxy.oauth import dpop
from mcp_auth_proxy.oauth.discovery import ServerMetadata

NOW = 1_800_000_000.7
KEY = dpop.Key.generate()


def decode(proof: str) -> dict[str, object]:
    jwk = jwt.get_unverified_header(proof)["jwk"]
    return dict(jwt.decode(proof, jwt.PyJWK(jwk), algorithms=["ES256"], options={"verify_iat": False}))


def metadata(*algorithms: str) -> ServerMetadata:
    return ServerMetadata(
        issuer="https://as.example",
        token_endpoint="https://as.example/token",
        dpop_signing_alg_values_supported=algorithms or None,
    )


def test_a_proof_has_the_claims_of_its_request_and_nothing_private() -> None:
    proof = KEY.proof(method="POST", url="https://h.example:8443/a%20b?x=1#y", now=NOW, nonce="n", ath=dpop.digest("t"))
    header = jwt.get_unverified_header(proof)
    assert (header["typ"], header["alg"], set(header["jwk"])) == ("dpop+jwt", "ES256", {"kty", "crv", "x", "y"})
    claims = decode(proof)
    assert len(str(claims.pop("jti"))) >= 16
    assert claims == {
        "htm": "POST",
        "htu": "https://h.example:8443/a%20b",
        "iat": 1_800_000_000,
        "nonce": "n",
        "ath": sha256("t"),
    }


def test_each_proof_has_a_jti_of_its_own_and_no_claim_that_is_empty() -> None:
    proofs = [decode(KEY.proof(method="GET", url="https://h", now=NOW)) for _ in range(50)]
    assert len({str(proof["jti"]) for proof in proofs}) == 50
    assert set(proofs[0]) == {"jti", "htm", "htu", "iat"}
    assert proofs[0]["htu"] == "https://h/"


def test_a_key_is_loaded_from_its_text_and_not_shown() -> None:  # T45
    again = dpop.Key.load(KEY.text)
    assert (again.public, again.thumbprint, again.text) == (KEY.public, KEY.thumbprint, KEY.text)
    assert KEY.text.splitlines()[1] not in repr(KEY) + repr(again)


def test_the_thumbprint_is_that_of_rfc_7638() -> None:
    assert list(KEY.public) == ["crv", "kty", "x", "y"]
    public = "{" + ",".join(f'"{name}":"{value}"' for name, value in KEY.public.items()) + "}"
    assert KEY.thumbprint == sha256(public)


@pytest.mark.parametrize("value", [None, "", 'a"b', "a b", "a\\b", "é", "a\r\nb", "x" * 1025])
def test_an_invalid_nonce_is_ignored(value: str | None) -> None:
    assert dpop.read_nonce(value) == ""


@given(st.text())
def test_reading_a_nonce_never_raises_and_returns_only_valid_ones(value: str) -> None:
    assert all(" " < character <= "~" and character not in '"\\' for character in dpop.read_nonce(value))


@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, b'{"error":"use_dpop_nonce"}', "n1"),
        (401, b'{"error":"use_dpop_nonce"}', "n1"),
        (400, b'{"error":"invalid_grant"}', ""),
        (400, b"<html>", ""),
        (200, b'{"error":"use_dpop_nonce"}', ""),
    ],
)
def test_only_use_dpop_nonce_requires_a_retry(status: int, body: bytes, expected: str) -> None:
    assert dpop.required_nonce(status, {"dpop-nonce": "n1"}, body) == expected
    assert dpop.required_nonce(status, {}, body) == ""


@pytest.mark.parametrize(
    ("use", "algorithms", "challenged", "demanded", "expected"),
    [
        (DpopUse.OFF, ("ES256",), True, False, False),
        (DpopUse.AUTO, ("ES256",), False, False, False),
        (DpopUse.AUTO, ("ES256",), True, False, True),
        (DpopUse.AUTO, ("ES256",), False, True, True),
        (DpopUse.AUTO, (), True, True, False),
        (DpopUse.AUTO, ("RS256",), True, False, False),
        (DpopUse.REQUIRED, (), False, False, True),
        (DpopUse.REQUIRED, ("ES256",), False, False, True),
    ],
)
def test_tokens_are_bound_if_both_servers_and_the_configuration_want_it(
    use: DpopUse, algorithms: tuple[str, ...], challenged: bool, demanded: bool, expected: bool
) -> None:
    found = dpop.decide(use, metadata(*algorithms), challenged=challenged, demanded=demanded, server="s")
    assert found is expected


def test_a_configuration_that_cannot_work_is_refused_and_names_the_key() -> None:
    with pytest.raises(AuthorizationError, match=r"servers\.s\.oauth\.dpop is off") as caught:
        dpop.decide(DpopUse.OFF, metadata("ES256"), challenged=True, demanded=True, server="s")
    assert caught.value.hint is not None
    assert caught.value.hint.key == "oauth.dpop"
    with pytest.raises(AuthorizationError, match="signs with ES256"):
        dpop.decide(DpopUse.REQUIRED, metadata("RS256"), challenged=False, demanded=False, server="s")


def test_a_bound_grant_stays_bound_and_required_binding_is_enforced() -> None:  # T22
    assert dpop.token_types(DpopUse.OFF, bound=False, proved=False) == ("Bearer",)
    assert dpop.token_types(DpopUse.AUTO, bound=False, proved=True) == ("DPoP", "Bearer")
    assert dpop.token_types(DpopUse.AUTO, bound=True, proved=True) == ("DPoP",)
    assert dpop.token_types(DpopUse.REQUIRED, bound=False, proved=True) == ("DPoP",)
