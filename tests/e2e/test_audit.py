"""The audit trail: what is done by pages and commands leaves events, as what the API does."""

import time
from pathlib import Path

from fakes.fixtures import Servers
from fakes.headless import Browser
from fakes.proxy import proxy_process, run_command, write_config
from fakes.team import Team, add_member, post, team
from mcp_auth_proxy.config.load import load
from mcp_auth_proxy.identity.keys import make_key
from mcp_auth_proxy.models import ALL_SCOPES, DEFAULT_PROJECT, Principal, Role
from mcp_auth_proxy.store import open_store
from mcp_auth_proxy.store.events import Event, Events

BAD = f"mapk_000000000000_{'A' * 43}"


async def events_of(setup: Team, project: str = DEFAULT_PROJECT) -> list[Event]:
    """Return the audit trail, oldest first."""
    api = setup.proxy.application.site.api
    assert api is not None
    found, _ = await Events(api.context.database).page(project, before=None, count=200)
    return found[::-1]


def summary(events: list[Event]) -> list[tuple[str, str]]:
    return [(event.action, event.outcome) for event in events]


def principal(setup: Team, name: str) -> str:
    directory = setup.proxy.application.callers.directory
    return next(each.id for each in directory.principals() if each.name == name)


async def test_sign_ins_and_sign_outs_leave_events(servers: Servers, tmp_path: Path) -> None:
    root = await add_member(tmp_path, "root", role=Role.ADMIN)
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        await post(browser, f"{setup.proxy.origin}/sign-in", key=BAD)
        await setup.sign_in(browser, "anna")
        await setup.sign_out(browser)
        await setup.sign_out(browser)
        events = await events_of(setup)
        assert summary(events) == [
            ("sessions.create", "refused"), ("sessions.create", "ok"), ("sessions.delete", "ok")
        ]  # fmt: skip
        failed, begun, ended = events
        anna, key = principal(setup, "anna"), setup.keys["anna"].split("_")[1]
        assert (failed.principal, failed.credential) == ("", "")
        assert (begun.principal, begun.credential) == (anna, f"key:{key}")
        assert ended.principal == anna
        assert ended.credential.startswith("session:")
        assert {event.address for event in events} == {"127.0.0.1"}
        assert all(event.request_id for event in events)
        assert BAD not in str(events)
        # The API shows them in the same shape.
        page = await browser.client.get(f"{setup.proxy.origin}/api/v1/events", headers={"x-api-key": root})
        assert [item["action"] for item in page.json()["items"]] == [event.action for event in reversed(events)]
        assert {tuple(sorted(item)) for item in page.json()["items"]} == {tuple(sorted(page.json()["items"][0]))}


async def test_failed_sign_ins_do_not_push_others_out_of_the_trail(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup, Browser() as browser:
        for _ in range(30):
            await post(browser, f"{setup.proxy.origin}/sign-in", key=BAD)
        await setup.sign_in(browser, "anna")
        events = summary(await events_of(setup))
        assert events[-1] == ("sessions.create", "ok")
        assert 5 <= len(events) <= 12


async def test_consents_leave_events_also_if_they_are_refused(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna", "bert") as setup, Browser() as browser, Browser() as berts:
        setup.issuer.auto_consent = False
        await setup.sign_in(browser, "anna")
        assert (await browser.follow(await setup.link("anna"), allow=False)).status_code == 400
        setup.issuer.auto_consent = True
        link = await setup.link("anna")
        callback = await browser.stop_before(link)
        # Somebody else's browser.
        await setup.sign_in(berts, "bert")
        assert (await berts.open(callback)).status_code == 403
        assert (await browser.follow(callback)).status_code == 200
        found = [event for event in await events_of(setup) if event.action.startswith("consents.")]
        assert summary(found) == [
            ("consents.refuse", "ok"), ("consents.give", "callback-refused"), ("consents.give", "ok")
        ]  # fmt: skip
        anna, bert = principal(setup, "anna"), principal(setup, "bert")
        assert [event.principal for event in found] == [anna, bert, anna]
        assert {(event.server, event.server_name) for event in found} == {("notes", "notes")}
        assert found[1].target == found[2].target == link.partition("flow=")[2]
        assert "code=" not in str(found)


async def test_who_comes_from_elsewhere_leaves_events_in_the_project_of_the_server(
    servers: Servers, tmp_path: Path
) -> None:  # T65
    async with team(servers, tmp_path, "anna", server={"project": "blue", "allow": ["*"]}) as setup:
        directory = setup.proxy.application.callers.directory
        bert = Principal(id="prn_bert", name="bert", project_id="blue")
        await directory.add(bert)
        key, setup.keys["bert"] = make_key(principal=bert.id, name="", scopes=ALL_SCOPES, now=time.time())
        await directory.add_key(key)
        async with Browser() as berts, Browser() as annas:
            await setup.sign_in(berts, "bert")
            await setup.sign_in(annas, "anna")
            callback = await berts.stop_before(await setup.link("bert"))
            assert (await annas.open(callback)).status_code == 403
        assert [event.action for event in await events_of(setup)] == ["sessions.create"]
        found = await events_of(setup, "blue")
        assert [(event.action, event.principal) for event in found][1:] == [("consents.give", principal(setup, "anna"))]


async def test_commands_leave_events(servers: Servers, tmp_path: Path) -> None:
    async with team(servers, tmp_path, "anna") as setup:
        config = str(tmp_path / "mcp-auth-proxy.yaml")

        async def run(*arguments: str) -> str:
            code, out, err = await run_command(*arguments, "--config", config)
            assert code == 0, err
            return out.strip()

        key = await run("api-keys", "create", "carl", "--role", "admin")
        await run("api-keys", "create", "anna", "--role", "admin", "--change-role")
        await run("principals", "disable", "carl")
        await run("api-keys", "revoke", key.split("_")[1])
        await run("principals", "add", "dora", "--identity", "jwt:https://idp.example=1")
        events = await events_of(setup)
        assert [event.action for event in events] == [
            "principals.create", "keys.create",
            "principals.change", "keys.create",
            "principals.change",
            "keys.delete",
            "principals.create", "principals.change",
        ]  # fmt: skip
        assert {event.principal for event in events} == {"local"}
        assert {event.outcome for event in events} == {"ok"}
        assert all(event.credential.startswith("command:") for event in events)
        assert events[1].target == events[5].target == key.split("_")[1]
        assert key not in str(events)


async def test_the_link_of_dashboard_and_the_session_that_it_opens_leave_events(tmp_path: Path) -> None:
    config = write_config(tmp_path, {"notes": "http://127.0.0.1:9/mcp"})
    async with proxy_process(config), Browser() as browser:
        code, link, err = await run_command("dashboard", "--config", str(config))
        assert code == 0, err
        for status in (303, 303, 303):
            assert (await browser.open(link.strip())).status_code == status
        async with Browser() as other:
            assert (await other.open(link.strip())).status_code == 403
    engine = await open_store(load(config).store)
    try:
        events, _ = await Events(engine).page(DEFAULT_PROJECT, before=None, count=10)
    finally:
        await engine.close()
    assert summary(events[::-1]) == [("links.create", "ok"), ("sessions.create", "ok"), ("sessions.create", "refused")]
    assert events[1].principal == events[2].principal == "local"
    assert link.strip().partition("link=")[2] not in str(events)
