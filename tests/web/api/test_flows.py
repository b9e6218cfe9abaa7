"""``/servers/{id}/flows``, ``/flows/{id}``, complete and verify: from the first link to the list of tools."""

import asyncio
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest

from fakes.fixtures import Servers
from fakes.http_exchange import FakeResponse
from fakes.proxy import link_in
from web.api.api_setup import api_setup, assert_problem
from web.api.made_setup import MadeSetup, administer, consented, made_setup


async def flow_of(client: httpx2.AsyncClient, server: str, **body: object) -> dict[str, Any]:
    response = await client.post(f"/servers/{server}/flows", json=body)
    assert response.status_code in (200, 201), response.text
    flow: dict[str, Any] = response.json()
    return flow


def faults(response: httpx2.Response) -> list[tuple[list[str], str]]:
    return [(it["loc"], it["type"]) for it in assert_problem(response, 422)["errors"]]


async def test_a_flow_is_begun_once_and_its_link_connects(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, local = await setup.make(), setup.api.ben
        first = await local.post(f"/servers/{made['id']}/flows", json={})
        assert first.status_code == 201
        flow = first.json()
        assert first.headers["location"] == f"/api/v1/flows/{flow['id']}"
        assert (flow["status"], flow["mode"], flow["server"], flow["server_name"], flow["account"]) == (
            "pending", "browser", made["id"], "tickets", "default",
        )  # fmt: skip
        assert flow["return_origin"] == setup.api.proxy.origin
        assert flow["authorization_url"] is None
        again = await local.post(f"/servers/{made['id']}/flows", json={})
        assert (again.status_code, again.json()["id"]) == (200, flow["id"])
        async with setup.signed_in("ben") as browser:
            assert (await browser.follow(flow["connect_url"])).status_code == 200
        ended = (await local.get(f"/flows/{flow['id']}")).json()
        assert (ended["status"], ended["connect_url"]) == ("connected", None)
        shown = (await local.get(f"/servers/{made['id']}")).json()
        assert [(it["word"], it["state"]) for it in shown["accounts"]] == [("connected", "active")]


async def test_a_headless_flow_is_completed_with_the_code_by_its_own_principal_only(  # T72
    servers: Servers, tmp_path: Path
) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben, eve = await setup.make(), setup.api.ben, setup.api.eve
        path = f"/servers/{made['id']}/complete"
        flow = await setup.headless(made["id"], ben)
        assert "sends you to" in flow["notice"]
        assert setup.issuer.issuer in flow["notice"]
        # The same address as often as it is asked for.
        assert (await ben.get(f"/flows/{flow['id']}")).json()["authorization_url"] == flow["authorization_url"]
        given = await consented(flow["authorization_url"])
        hers = await setup.headless(made["id"], eve)
        her_state = parse_qs(urlsplit(hers["authorization_url"]).query)["state"][0]
        for refused in (
            await eve.post(path, json=given),
            await ben.post(path, json={**given, "state": "made-up"}),
            await ben.post(path, json={**given, "state": her_state}),
            await ben.post("/servers/notes/complete", json=given),
        ):  # fmt: skip
            assert faults(refused) == [(["body", "state"], "value_error.csrf")]
        assert setup.issuer.token_requests() == 0
        lacking = await ben.post(path, json={"iss": setup.issuer.issuer})
        assert faults(lacking) == [(["body", "code"], "missing"), (["body", "state"], "missing")]
        # The attempt is still good.
        done = await ben.post(path, json=given)
        assert (done.status_code, done.json()["status"]) == (200, "connected"), done.text
        assert_problem(await ben.post(path, json=given), 400, "code-refused")
        assert (await ben.get(f"/flows/{flow['id']}")).json()["status"] == "connected"
        assert_problem(await eve.get(f"/flows/{flow['id']}"), 404)
        assert (await eve.get(f"/flows/{hers['id']}")).json()["status"] == "pending"


async def test_a_code_without_the_promised_iss_is_refused_and_not_used_up(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        flow = await setup.headless(made["id"], ben)
        given = await consented(flow["authorization_url"])
        iss = given.pop("iss")
        path = f"/servers/{made['id']}/complete"
        assert faults(await ben.post(path, json=given)) == [(["body", "iss"], "missing")]
        assert faults(await ben.post(path, json={"code": given["code"]})) == [(["body", "state"], "missing")]
        assert faults(await ben.post(path, json={"state": given["state"]})) == [(["body", "code"], "missing")]
        assert (await ben.post(path, json={**given, "iss": iss})).status_code == 200


async def test_a_code_of_another_issuer_and_a_refused_code_are_400(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        path = f"/servers/{made['id']}/complete"
        for change in ({"iss": "https://evil.example"}, {"code": "made-up"}):
            flow = await setup.headless(made["id"], ben)
            given = await consented(flow["authorization_url"])
            assert_problem(await ben.post(path, json={**given, **change}), 400, "code-refused")
            ended = (await ben.get(f"/flows/{flow['id']}")).json()
            assert ended["status"] == "failed"
            assert ended["reason"]


async def test_a_browsers_attempt_is_never_completed_by_a_post(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ada = await setup.make(), setup.api.ada
        flow = await flow_of(ada, made["id"])
        async with setup.signed_in("ada") as browser:
            url = await browser.stop_before(flow["connect_url"])
        given = {name: value[0] for name, value in parse_qs(urlsplit(url).query).items()}
        refused = await ada.post(f"/servers/{made['id']}/complete", json=given)
        assert faults(refused) == [(["body", "state"], "value_error.csrf")]


async def test_the_callback_accepts_no_headless_state_whatever_the_cookie(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        flow = await setup.headless(made["id"], ben)
        given = await consented(flow["authorization_url"])
        async with httpx2.AsyncClient(trust_env=False) as browser:
            page = await browser.get(f"{setup.api.proxy.origin}/oauth/callback", params=given)
        assert page.status_code == 403
        assert "A program has begun" in page.text
        assert (await ben.post(f"/servers/{made['id']}/complete", json=given)).status_code == 200


async def test_complete_and_verify_list_the_tools_of_a_connected_server(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path, sessions_on=True) as setup:
        made, ben = await setup.make(), setup.api.ben
        path = f"/servers/{made['id']}"
        for action in ("complete", "verify"):
            assert_problem(await ben.post(f"{path}/{action}", json={}), 400, "not-authorized")
        await setup.connect(made["id"], ben)
        for action in ("complete", "verify"):
            done = await ben.post(f"{path}/{action}", json={})
            assert (done.status_code, done.json()["status"]) == (200, "connected"), done.text
            assert "echo" in [tool["name"] for tool in done.json()["tools"]]
        assert setup.upstream.calls("initialize")
        assert setup.upstream.calls("tools/list")
        # Each trial ends its session.
        assert setup.upstream.sessions == {}
        assert_problem(await setup.api.eve.post(f"{path}/verify"), 400, "not-authorized")


@pytest.mark.parametrize("kind", ["sse", "modern", "gone"])
async def test_a_trial_understands_what_servers_answer(servers: Servers, tmp_path: Path, kind: str) -> None:
    async with made_setup(servers, tmp_path, protected=False) as setup:
        made = await setup.make()
        refusal = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32601, "message": "no such method"}}
        match kind:
            case "sse":
                setup.upstream.answer_as = "sse"
            case "modern":
                setup.upstream.answers["initialize"] = FakeResponse.json(refusal)
            case _:
                setup.upstream.answers["initialize"] = FakeResponse(status=500)
                setup.upstream.answers["tools/list"] = FakeResponse(status=500)
        done = await setup.api.ben.post(f"/servers/{made['id']}/verify")
        if kind == "gone":
            assert_problem(done, 502, "upstream-failed")
        else:
            assert "echo" in [tool["name"] for tool in done.json()["tools"]], done.text


async def test_a_server_that_cannot_be_reached_is_502(tmp_path: Path) -> None:
    async with api_setup(tmp_path) as api:
        for action in ("flows", "complete", "verify"):
            assert_problem(await api.ben.post(f"/servers/notes/{action}", json={}), 502, "upstream-failed")


async def test_a_flow_is_cancelled_by_its_owner(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        flow = await setup.headless(made["id"], ben)
        given = await consented(flow["authorization_url"])
        assert_problem(await setup.api.eve.delete(f"/flows/{flow['id']}"), 404)
        assert (await ben.delete(f"/flows/{flow['id']}")).status_code == 204
        assert (await ben.get(f"/flows/{flow['id']}")).json()["status"] == "cancelled"
        refused = await ben.post(f"/servers/{made['id']}/complete", json=given)
        assert_problem(refused, 400)
        assert setup.issuer.token_requests() == 0
        assert (await ben.delete(f"/flows/{flow['id']}")).status_code == 204
        assert_problem(await ben.get("/flows/nothing"), 404)


async def test_a_flow_expires(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        flow = await setup.headless(made["id"], ben)
        given = await consented(flow["authorization_url"])
        setup.api.clock.ahead += 700
        assert (await ben.get(f"/flows/{flow['id']}")).json()["status"] == "expired"
        assert_problem(await ben.post(f"/servers/{made['id']}/complete", json=given), 400)
        another = await ben.post(f"/servers/{made['id']}/flows", json={"mode": "headless"})
        assert (another.status_code, another.json()["id"] != flow["id"]) == (201, True)


async def test_scopes_accounts_and_modes_are_those_that_are_asked_for(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        flow = await setup.headless(made["id"], ben, account="work", scopes=["read", "write"])
        assert (flow["account"], flow["scopes"][:2]) == ("work", ["read", "write"])
        asked = parse_qs(urlsplit(flow["authorization_url"]).query)["scope"][0]
        assert {"read", "write"} <= set(asked.split())
        # A flow of another kind is another flow.
        browser = await flow_of(ben, made["id"], account="work")
        assert (browser["id"] != flow["id"], browser["mode"]) == (True, "browser")
        path = f"/servers/{made['id']}/flows"
        assert faults(await ben.post(path, json={"mode": "device"}))[0][0] == ["body", "mode"]
        for field, value in (
            ("redirect_uri", "https://evil.example/cb"),
            ("return_origin", "https://evil.example"),
            ("account", "No Account"),
            ("scopes", ["a b"]),
        ):
            assert faults(await ben.post(path, json={field: value}))[0][0][:2] == ["body", field]
        wrong = {"mode": "device", "redirect_uri": "https://evil.example/cb", "return_origin": "https://evil.example"}
        assert [loc for loc, _ in faults(await ben.post(path, json=wrong))] == [["body", name] for name in wrong]
        own = f"{setup.api.proxy.origin}/oauth/callback"
        assert (await ben.post(path, json={"redirect_uri": own})).status_code in (200, 201)


async def test_the_origin_that_hears_of_the_end_must_be_allowed(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        administer(setup.api, allow_private=("127.0.0.1",), popup_origins=("https://app.example",))
        assert (await flow_of(ben, made["id"]))["return_origin"] == "https://app.example"
        own = await flow_of(ben, made["id"], return_origin=setup.api.proxy.origin)
        assert own["return_origin"] == setup.api.proxy.origin
        other = await ben.post(f"/servers/{made['id']}/flows", json={"return_origin": "https://other.example"})
        assert faults(other)[0][0] == ["body", "return_origin"]


async def test_a_shared_server_is_authorized_by_admins_only(servers: Servers, tmp_path: Path) -> None:  # T66
    async with made_setup(servers, tmp_path) as setup:
        made = await setup.make(grant_owner="shared")
        path = f"/servers/{made['id']}/flows"
        assert_problem(await setup.api.ben.post(path, json={}), 403, "forbidden")
        assert (await setup.connect(made["id"], setup.api.ada))["status"] == "connected"
        tools = await setup.api.ben.post(f"/servers/{made['id']}/verify")
        assert "echo" in [tool["name"] for tool in tools.json()["tools"]]


async def test_what_needs_no_user_is_a_conflict(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path, protected=False) as setup:
        made = await setup.make()
        refused = await setup.api.ben.post(f"/servers/{made['id']}/flows", json={})
        assert_problem(refused, 409, "no-authorization")
        robot = await setup.make(
            "robot", oauth={"grant": "client_credentials", "client_id": "c", "client_secret": "s"}, grant_owner="caller"
        )
        refused = await setup.api.ben.post(f"/servers/{robot['id']}/flows", json={})
        assert_problem(refused, 409, "no-user-needed")


async def test_two_principals_connect_the_same_server_at_the_same_time(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:  # T75
        made = await setup.make()
        both = await asyncio.gather(*(connected(setup, made["id"], it) for it in (setup.api.ben, setup.api.eve)))
        assert [flow["status"] for flow in both] == ["connected", "connected"]
        assert both[0]["id"] != both[1]["id"]


async def connected(setup: MadeSetup, server: str, client: httpx2.AsyncClient) -> dict[str, Any]:
    return await setup.connect(server, client)


async def test_a_server_that_needs_no_user_is_tried_with_a_token_of_its_own(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        setup.issuer.add_client(client_id="agent", secret="canary-agent-secret")
        setup.upstream.checks_audience = False
        oauth = {"grant": "client_credentials", "client_id": "agent", "client_secret": "canary-agent-secret"}
        made = await setup.make("robot", oauth=oauth)
        assert made["grant_owner"] == "shared"
        for action in ("complete", "verify"):
            tools = await setup.api.ben.post(f"/servers/{made['id']}/{action}", json={})
            assert "echo" in [tool["name"] for tool in tools.json()["tools"]], tools.text


async def test_a_token_that_the_server_refuses_is_renewed_for_a_trial(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        await setup.connect(made["id"], ben)
        for issued in setup.issuer.ledger.tokens.values():
            issued.expires_at = 0
        tools = await ben.post(f"/servers/{made['id']}/verify")
        assert tools.status_code == 200, tools.text
        assert setup.issuer.refreshes == 1
        for issued in setup.issuer.ledger.tokens.values():
            issued.grant.ended = True
        assert_problem(await ben.post(f"/servers/{made['id']}/verify"), 400, "not-authorized")


FRONT = "https://front.example/oauth/callback"


async def with_client(setup: MadeSetup, made: dict[str, Any]) -> None:
    """Register a client by hand, with a redirect URI that is not the proxy's, and give it to the API."""
    issuer, api = setup.issuer, setup.api
    issuer.add_client(client_id="by-hand", secret="canary-secret-of-front", redirect_uris=(FRONT,))
    body = {
        "provider": "front",
        "client_id": "by-hand",
        "client_secret": "canary-secret-of-front",
        "authorization_url": f"{issuer.issuer}/authorize",
        "token_url": f"{issuer.issuer}/token",
        "metadata": {"issuer": issuer.issuer},
        "redirect_uris": [FRONT],
        "server_ids": [made["id"]],
    }
    response = await api.ada.post("/oauth-clients", json=body)
    assert response.status_code == 201, response.text


async def test_a_code_may_go_to_a_redirect_uri_of_the_oauth_client(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        await with_client(setup, made)
        flow = await setup.headless(made["id"], ben, redirect_uri=FRONT)
        assert parse_qs(urlsplit(flow["authorization_url"]).query)["redirect_uri"] == [FRONT]
        assert flow["connect_url"] is None
        assert (await setup.headless(made["id"], ben, redirect_uri=FRONT))["id"] == flow["id"]
        # An MCP client of the same account gets a link of its own, which a browser can finish.
        async with setup.mcp("tickets", "ben") as client:
            link = link_in((await client.call("echo", text="x")).message)
        assert flow["id"] not in link
        async with setup.signed_in("ben") as browser:
            refused = await browser.client.get(f"{setup.api.proxy.origin}/connect/tickets?flow={flow['id']}")
        assert refused.status_code == 403
        given = await consented(flow["authorization_url"])
        done = await ben.post(f"/servers/{made['id']}/complete", json=given)
        assert done.status_code == 200, done.text
        assert (await ben.post(f"/servers/{made['id']}/verify", json={})).status_code == 200


async def test_a_code_goes_to_no_other_redirect_uri(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        path, loc = f"/servers/{made['id']}/flows", [(["body", "redirect_uri"], "value_error")]
        headless = {"mode": "headless", "redirect_uri": FRONT}
        assert faults(await ben.post(path, json=headless)) == loc
        await with_client(setup, made)
        assert faults(await ben.post(path, json={**headless, "redirect_uri": f"{FRONT}/else"})) == loc
        # A browser comes back to the proxy only.
        assert faults(await ben.post(path, json={"redirect_uri": FRONT})) == loc
        assert (await ben.post(path, json=headless)).status_code == 201


async def test_events_name_the_server_of_flows_and_grants(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        await setup.connect(made["id"], ben)
        grant = (await ben.get("/grants")).json()["items"][0]
        assert (await ben.delete(f"/grants/{grant['id']}")).status_code == 200
        events = (await setup.api.ada.get("/events")).json()["items"]
        assert {event["action"] for event in events} >= {"flows.create", "servers.complete", "grants.delete"}
        assert {(event["server"], event["server_name"]) for event in events} == {(made["id"], "tickets")}


async def test_only_valid_requests_count_as_flows(servers: Servers, tmp_path: Path) -> None:
    async with made_setup(servers, tmp_path) as setup:
        made, ben = await setup.make(), setup.api.ben
        for _ in range(20):
            assert_problem(await ben.post(f"/servers/{made['id']}/flows", json={"mode": "no"}), 422)
        answers = [(await ben.post(f"/servers/{made['id']}/flows", json={})).status_code for _ in range(11)]
        assert answers == [201, *[200] * 9, 429]
