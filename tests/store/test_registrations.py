"""Registrations, and the issuers that configured clients are bound to."""

from dataclasses import replace

import pytest

from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.registrations import Registrations
from store.builders import registration

ISSUER = "https://as.example"
CALLBACK = "http://127.0.0.1:8787/oauth/callback"


@pytest.fixture
def registrations(engine: Engine) -> Registrations:
    return Registrations(engine)


async def test_a_registration_is_found_by_server_issuer_and_redirect_uri(registrations: Registrations) -> None:
    await registrations.save(registration())
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()
    assert await registrations.find("warehouse", ISSUER, CALLBACK) is None
    assert await registrations.find("linear", ISSUER + "/", CALLBACK) is None
    assert await registrations.find("linear", ISSUER, CALLBACK + "2") is None


async def test_a_new_registration_replaces_the_old_one(registrations: Registrations) -> None:
    await registrations.save(registration())
    new = replace(registration(), client_id="other", client_secret=None)
    await registrations.save(new)
    assert await registrations.find("linear", ISSUER, CALLBACK) == new


async def test_delete_removes_one_issuer_or_all(registrations: Registrations) -> None:
    for issuer in (ISSUER, "https://b.example", "https://c.example"):
        await registrations.save(registration(issuer=issuer))
    await registrations.delete("linear", ISSUER)
    assert await registrations.find("linear", ISSUER, CALLBACK) is None
    assert await registrations.find("linear", "https://b.example", CALLBACK)
    await registrations.delete("linear")
    assert await registrations.find("linear", "https://b.example", CALLBACK) is None


async def test_each_account_of_a_server_has_a_registration_of_its_own(registrations: Registrations) -> None:
    work = registration(account="work", client_id="client of work")
    await registrations.save(registration())
    await registrations.save(work)
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()
    assert await registrations.find("linear", ISSUER, CALLBACK, account="work") == work
    await registrations.delete("linear", account="work")
    assert await registrations.find("linear", ISSUER, CALLBACK, account="work") is None
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()
    await registrations.delete("linear", ISSUER, account="work")
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()


async def test_a_client_is_bound_to_the_first_issuer_it_was_used_with(registrations: Registrations) -> None:  # T11
    assert await registrations.bind_client("linear", "c", ISSUER) == ISSUER
    assert await registrations.bind_client("linear", "c", "https://evil.example") == ISSUER
    assert await registrations.bind_client("linear", "other", "https://b.example") == "https://b.example"
    await registrations.delete("linear")
    assert await registrations.bind_client("linear", "c", "https://evil.example") == ISSUER


async def test_a_registration_that_cannot_be_decrypted_counts_as_missing(
    registrations: Registrations, engine: Engine
) -> None:  # T47
    await registrations.save(registration())
    async with engine.transaction() as transaction:
        await transaction.execute("UPDATE registrations SET client_secret = 'plain'")
    assert await registrations.find("linear", ISSUER, CALLBACK) is None
    await registrations.save(registration())
    assert await registrations.find("linear", ISSUER, CALLBACK) == registration()


async def test_of_two_that_register_the_second_uses_the_first(registrations: Registrations) -> None:
    first, second = registration(client_id="first"), registration(client_id="second")
    assert await registrations.add(first, replaces=None) == first
    assert await registrations.add(second, replaces=None) == first
    assert await registrations.add(second, replaces="forgotten") == first
    # One that can't be used any more is replaced, once.
    assert await registrations.add(second, replaces="first") == second
    assert await registrations.add(registration(client_id="third"), replaces="first") == second
    assert await registrations.find("linear", ISSUER, CALLBACK) == second


async def test_a_registration_that_something_else_has_changed_is_replaced(
    registrations: Registrations, engine: Engine
) -> None:
    await registrations.add(registration(client_id="first"), replaces=None)
    async with engine.transaction() as transaction:
        await transaction.execute("UPDATE registrations SET client_id = 'forged'")
    second = registration(client_id="second")
    assert await registrations.add(second, replaces=None) == second
