"""The conformance run judges ``doctor`` by the suite, and every listed exception still has its reason."""

import asyncio
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from conformance.doctor import SAID, Said
from conformance.judging import DEMANDS_SUCCESS, OUTPUT, Expectations, Outcome, Run, judge_doctor
from conformance.run import HERE
from conformance.scenarios import SERVER, Scenario, write_configuration
from fakes.fixtures import Servers
from mcp_auth_proxy.config.load import load

READY = Said(0, "ready", "It can.")
REFUSED = Said(1, "refused", "It can't.")


def outcome(folder: Path, said: Said | None, *, demanded: bool, listed: bool = False) -> tuple[Outcome, str]:
    (folder / OUTPUT).write_text(f"⚠️  {DEMANDS_SUCCESS} (code 1)\n" if demanded else "OVERALL: PASSED\n")
    if said is not None:
        (folder / SAID).write_text(json.dumps(asdict(said)))
    result = judge_doctor(Run("conformance-0.2", "auth/one"), folder, 1)
    expectations = Expectations({"auth/one": "shows too late"} if listed else {}, {})
    return expectations.outcome(result), result.why


@pytest.mark.parametrize(("said", "demanded"), [(READY, True), (REFUSED, False)])
def test_a_correct_verdict_passes(tmp_path: Path, said: Said, demanded: bool) -> None:
    assert outcome(tmp_path, said, demanded=demanded) == ("pass", "")


@pytest.mark.parametrize(("said", "demanded"), [(READY, False), (REFUSED, True)])
def test_a_wrong_verdict_fails_and_is_reported(tmp_path: Path, said: Said, demanded: bool) -> None:
    found, why = outcome(tmp_path, said, demanded=demanded)
    assert found == "FAIL"
    assert said.summary in why


def test_a_fault_that_appears_too_late_for_doctor_may_be_listed(tmp_path: Path) -> None:
    assert outcome(tmp_path, READY, demanded=False, listed=True)[0] == "expected failure"


@pytest.mark.parametrize(("said", "demanded"), [(READY, True), (REFUSED, False)])
def test_a_listed_scenario_in_which_doctor_is_right_fails(tmp_path: Path, said: Said, demanded: bool) -> None:
    assert outcome(tmp_path, said, demanded=demanded, listed=True)[0] == "UNEXPECTED PASS"


def test_a_refusal_if_a_client_must_succeed_can_not_be_listed(tmp_path: Path) -> None:
    assert outcome(tmp_path, REFUSED, demanded=True, listed=True)[0] == "FAIL"


@pytest.mark.parametrize("demanded", [True, False])
@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("said", [None, Said(1, "", "Traceback"), Said(0, "open", "No token."), Said(1, "ready", "")])
def test_an_invalid_verdict_always_fails(tmp_path: Path, said: Said | None, demanded: bool, listed: bool) -> None:
    assert outcome(tmp_path, said, demanded=demanded, listed=listed)[0] == "FAIL"


def test_an_entry_without_a_scenario_is_stale() -> None:
    expectations = Expectations({"auth/gone": "", "auth/one": ""}, {"sep-9-*": ""})
    assert expectations.stale(["auth/one", "tools"]) == ["auth/gone", "sep-9-*"]


def test_every_exception_has_its_reason() -> None:
    for part in ("proxy", "doctor"):
        expectations = Expectations.read(HERE / "expected-failures.yaml", part)
        assert all([*expectations.failing.values(), *expectations.left_out.values()])


@pytest.mark.parametrize(
    ("changes", "code", "verdict"), [({}, 0, "ready"), ({"issuer": "https://attacker.example.com"}, 1, "refused")]
)
async def test_the_command_writes_what_doctor_said(
    servers: Servers, tmp_path: Path, changes: dict[str, object], code: int, verdict: str
) -> None:
    issuer = await servers.authorization_server(metadata_changes=changes)
    upstream = await servers.mcp_server(issuer)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "conformance.doctor", upstream.url),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "MCP_CONFORMANCE_SCENARIO": "auth/one"},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert await process.wait() == 1
    said = Said.read(tmp_path)
    assert said is not None
    assert (said.code, said.verdict) == (code, verdict)
    assert issuer.authorizations == 0


async def test_the_configuration_of_a_workload_has_the_issuer_that_the_server_names(  # T84
    servers: Servers, tmp_path: Path
) -> None:
    issuer = await servers.authorization_server()
    upstream = await servers.mcp_server(issuer)
    scenario = Scenario("auth/wif-jwt-bearer", upstream.url, context={"valid_jwt": "a.b.c"})
    path = await asyncio.to_thread(write_configuration, scenario, tmp_path, "0s")
    assert load(path, environ={}).servers[SERVER].oauth.issuer == issuer.issuer
