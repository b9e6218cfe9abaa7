"""Who may open a link: the principal that it was made for, and an admin for what a project shares."""

from dataclasses import replace
from pathlib import Path

import pytest

from broker.test_attempts import Setup, cookies_of, linear
from mcp_auth_proxy.broker import ownership
from mcp_auth_proxy.broker.attempts import AuthorizationRedirect
from mcp_auth_proxy.broker.ownership import MayOpen
from mcp_auth_proxy.errors import CallbackRefused
from mcp_auth_proxy.models import Account, Principal, Role, shared_principal
from mcp_auth_proxy.store import open_store
from store.builders import store_settings

ANNA = Principal(id="prn_1", name="anna")
BERT = Principal(id="prn_2", name="bert", role=Role.ADMIN)
SHARED = Account(shared_principal("default"), "linear")


@pytest.mark.parametrize(
    ("may_open", "account", "allowed"),
    [
        (ownership.anyone, SHARED, True),
        (ownership.nobody, Account("prn_1", "linear"), False),
        (ownership.owner(ANNA), Account("prn_1", "linear", "work"), True),
        (ownership.owner(ANNA), Account("prn_2", "linear"), False),
        (ownership.owner(ANNA), Account("anna", "linear"), False),
        (ownership.owner(ANNA), SHARED, False),
        (ownership.owner(BERT), SHARED, True),
        (ownership.owner(BERT), Account("prn_1", "linear"), False),
        (ownership.owner(replace(BERT, project_id="other")), SHARED, False),
    ],
)
def test_a_principal_opens_links_of_its_own_and_an_admin_those_of_its_project(
    may_open: MayOpen, account: Account, allowed: bool
) -> None:
    assert may_open(account) is allowed
    if not allowed:
        with pytest.raises(CallbackRefused) as refused:
            ownership.require(may_open, account)
        assert refused.value.status == 403
        assert ("admin" in str(refused.value)) is (account is SHARED)


async def test_a_refused_visit_begins_nothing_and_a_refused_callback_uses_nothing_up(tmp_path: Path) -> None:
    # T51, T52
    database = await open_store(store_settings(tmp_path))
    setup = Setup(database)
    flow = linear()
    await setup.flows.save(replace(flow, key=replace(flow.key, account=Account(ANNA.id, "linear"))))
    for other in (ownership.owner(BERT), ownership.nobody):
        for visit in (setup.attempts.open, setup.attempts.confirm):
            with pytest.raises(CallbackRefused, match="another user"):
                await visit("linear", "flow-1", other)
    assert await database.fetch_all("SELECT * FROM attempts") == []
    opened = await setup.attempts.open("linear", "flow-1", ownership.owner(ANNA))
    assert isinstance(opened, AuthorizationRedirect)
    state = opened.authorization_url.partition("state=")[2].partition("&")[0]
    params = {"state": [state], "code": ["C"]}
    for other in (ownership.owner(BERT), ownership.nobody):
        with pytest.raises(CallbackRefused, match="another user") as refused:
            await setup.attempts.accept(params, cookies_of(opened), other)
        assert refused.value.status == 403
    assert (await setup.attempts.accept(params, cookies_of(opened), ownership.owner(ANNA))).flow.id == "flow-1"
    await database.close()
