"""Registrations and the issuers that configured clients belong to."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.store.database import Database
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import registration

ISSUER = "https://as.example"
CALLBACK = "http://127.0.0.1:8787/oauth/callback"


@pytest.fixture
def registrations(database: Database) -> Registrations:
    return Registrations(database)


async def test_a_registration_is_found_by_server_issuer_and_redirect_uri(registrations: Registrations) -> None:
    await registrations.save(registration())
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()
    assert await registrations.find("warehouse", ISSUER, CALLBACK) is None
    assert await registrations.find("linear", ISSUER + "/", CALLBACK) is None
    assert await registrations.find("linear", ISSUER, CALLBACK + "2") is None


async def test_a_new_registration_takes_the_place_of_the_old(registrations: Registrations) -> None:
    await registrations.save(registration())
    new = replace(registration(), client_id="other", client_secret=None)
    await registrations.save(new)
    assert await registrations.find("linear", ISSUER, CALLBACK) == new


async def test_delete_forgets_one_issuer_or_all(registrations: Registrations) -> None:
    for issuer in (ISSUER, "https://b.example", "https://c.example"):
        await registrations.save(registration(issuer=issuer))
    await registrations.delete("linear", ISSUER)
    assert await registrations.find("linear", ISSUER, CALLBACK) is None
    assert await registrations.find("linear", "https://b.example", CALLBACK)
    await registrations.delete("linear")
    assert await registrations.find("linear", "https://b.example", CALLBACK) is None


async def test_a_client_belongs_to_the_first_issuer_it_was_used_with(registrations: Registrations) -> None:  # T11
    assert await registrations.bind_client("linear", "c", ISSUER) == ISSUER
    assert await registrations.bind_client("linear", "c", "https://evil.example") == ISSUER
    assert await registrations.bind_client("linear", "other", "https://b.example") == "https://b.example"
    await registrations.delete("linear")
    assert await registrations.bind_client("linear", "c", "https://evil.example") == ISSUER


async def test_a_registration_that_does_not_open_is_as_good_as_none(
    registrations: Registrations, database: Database
) -> None:  # T47
    await registrations.save(registration())
    async with database.transaction() as transaction:
        await transaction.execute("UPDATE registrations SET client_secret = 'plain'")
    assert await registrations.find("linear", ISSUER, CALLBACK) is None
    await registrations.save(registration())
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()
