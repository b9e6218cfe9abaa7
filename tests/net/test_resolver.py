"""How names are looked up: shared, bounded for each owner, and with the last good answer in reserve (T81)."""

import asyncio
import errno
import gc
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from fakes.names import Names, lookups_out, names
from fakes.proxy import until
from mcp_auth_proxy.errors import UpstreamUnreachable
from mcp_auth_proxy.net import resolver
from mcp_auth_proxy.net.resolver import MAX_PER_OWNER, Resolver

UNANSWERED = "can't be looked up now"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[Names]:
    with names(monkeypatch) as fake:
        yield fake


def look_up(
    resolving: Resolver, host: str, *, owner: str = "a.test:443", timeout: float = 5.0
) -> "asyncio.Task[tuple[str, ...]]":
    async def run() -> tuple[str, ...]:
        return tuple(await resolving.look_up(host, 443, owner=owner, timeout=timeout))

    return asyncio.ensure_future(run())


async def stuck(resolving: Resolver, *hosts: str, owner: str = "evil.test:443") -> None:
    """Begin look-ups without an answer, and leave them."""
    before = lookups_out()
    tasks = [look_up(resolving, host, owner=owner) for host in hosts]
    await until(lambda: lookups_out() == before + len(hosts), "look-ups out")
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_thousand_requests_for_one_name_are_one_look_up(system: Names) -> None:
    system.addresses["hang.test"] = "192.0.2.1"
    resolving = Resolver()
    tasks = [look_up(resolving, "hang.test", owner=f"{number % 7}") for number in range(1000)]
    await until(lambda: system.asked, "a look-up")
    for task in tasks[::2]:
        task.cancel()
    await asyncio.gather(*tasks[::2], return_exceptions=True)
    assert lookups_out() == 1
    system.released.set()
    assert set(await asyncio.gather(*tasks[1::2])) == {("192.0.2.1",)}
    assert system.asked == ["hang.test"]


async def test_the_names_of_one_owner_take_few_threads_and_others_are_looked_up(system: Names) -> None:
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    hostile = [look_up(resolving, f"hang{number}.test", owner="evil.test:443") for number in range(100)]
    await until(lambda: lookups_out() == MAX_PER_OWNER, "look-ups out")
    begun = time.monotonic()
    assert await look_up(resolving, "good.test") == ("192.0.2.1",)
    assert time.monotonic() - begun < 1
    assert len(system.asked) == MAX_PER_OWNER + 1
    for task in hostile:
        task.cancel()
    await asyncio.gather(*hostile, return_exceptions=True)


async def test_a_look_up_beyond_the_bound_of_its_owner_fails_in_time_and_says_why(system: Names) -> None:
    resolving = Resolver()
    await stuck(resolving, *(f"hang{number}.test" for number in range(MAX_PER_OWNER)))
    with pytest.raises(UpstreamUnreachable) as failed:
        await look_up(resolving, "more.test", owner="evil.test:443", timeout=0.05)
    assert str(failed.value) == f"the name more.test {UNANSWERED}, because 4 other look-ups are unanswered"
    assert "more.test" not in system.asked


async def test_a_look_up_beyond_the_bound_begins_when_another_ends(system: Names) -> None:
    system.addresses["more.test"] = "192.0.2.1"
    resolving = Resolver()
    await stuck(resolving, *(f"hang{number}.test" for number in range(MAX_PER_OWNER)))
    task = look_up(resolving, "more.test", owner="evil.test:443")
    await asyncio.sleep(0)
    assert "more.test" not in system.asked
    system.released.set()
    assert await task == ("192.0.2.1",)


async def test_many_hostile_owners_leave_room_for_others(system: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_LOOKUPS", 24)
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    for owner in range(10):
        for number in range(MAX_PER_OWNER):
            look_up(resolving, f"hang{number}.of{owner}.test", owner=str(owner))
    # Three have all of theirs; half of the threads are in use by then, and each of the others has one.
    await until(lambda: lookups_out() == 3 * MAX_PER_OWNER + 7, "look-ups out")
    assert await look_up(resolving, "good.test", timeout=1) == ("192.0.2.1",)


async def test_all_look_ups_together_are_bounded(system: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "MAX_LOOKUPS", 8)
    resolving = Resolver()
    for owner in range(8):
        await stuck(resolving, f"hang{owner}.test", owner=str(owner))
    with pytest.raises(UpstreamUnreachable, match=f"{UNANSWERED}, because 8 other look-ups are unanswered"):
        await look_up(resolving, "good.test", timeout=0.05)
    assert lookups_out() == 8


async def test_a_look_up_that_nobody_waited_for_has_an_answer_for_the_next_request(system: Names) -> None:
    system.addresses["hang.test"] = "192.0.2.1"
    resolving = Resolver()
    with pytest.raises(UpstreamUnreachable, match=UNANSWERED):
        await look_up(resolving, "hang.test", timeout=0.05)
    system.released.set()
    await until(lambda: lookups_out() == 0, "the end of the look-up")
    assert await look_up(resolving, "hang.test") == ("192.0.2.1",)
    assert len(system.asked) == 1


async def test_a_look_up_that_nobody_waited_for_may_fail(system: Names, caplog: pytest.LogCaptureFixture) -> None:
    resolving = Resolver()
    await stuck(resolving, "hang.test")
    system.released.set()
    await until(lambda: lookups_out() == 0, "the end of the look-up")
    with pytest.raises(UpstreamUnreachable, match="was not found"):
        await look_up(resolving, "hang.test")
    gc.collect()
    assert caplog.messages == []


# The last good answer


@pytest.fixture
def never_fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "FRESH", -1.0)


async def test_an_answer_is_fresh_for_a_while(system: Names) -> None:
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    for _ in range(3):
        assert await look_up(resolving, "good.test") == ("192.0.2.1",)
    assert len(system.asked) == 1
    resolving.expire("good.test", owner="a.test:443")
    system.addresses["good.test"] = "192.0.2.2"
    await until_answered(resolving, "192.0.2.2")


async def until_answered(resolving: Resolver, address: str) -> None:
    """Look up ``good.test``, bounded, until it has this address: on a busy machine, the last good one may be first."""
    found: set[str] = set()
    async with asyncio.timeout(5):
        while address not in found:
            found.update(await look_up(resolving, "good.test"))


@pytest.mark.usefixtures("never_fresh")
async def test_the_last_good_answer_is_used_while_a_look_up_is_out(system: Names) -> None:
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    await look_up(resolving, "good.test")
    system.hanging.add("good.test")
    for _ in range(20):
        begun = time.monotonic()
        assert await look_up(resolving, "good.test") == ("192.0.2.1",)
        assert time.monotonic() - begun < 1
    assert lookups_out() == 1
    system.addresses["good.test"] = "192.0.2.2"
    system.released.set()
    await until_answered(resolving, "192.0.2.2")


@pytest.mark.usefixtures("never_fresh")
async def test_the_last_good_answer_is_used_if_the_bound_is_reached(
    system: Names, caplog: pytest.LogCaptureFixture
) -> None:
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    await look_up(resolving, "good.test", owner="evil.test:443")
    await stuck(resolving, *(f"hang{number}.test" for number in range(MAX_PER_OWNER)))
    for _ in range(3):
        assert await look_up(resolving, "good.test", owner="evil.test:443") == ("192.0.2.1",)
    assert system.asked.count("good.test") == 1
    assert len(caplog.messages) == 1
    assert "server evil.test:443: the name good.test" in caplog.text


@pytest.mark.usefixtures("never_fresh")
async def test_a_failing_look_up_is_logged_once_while_the_last_good_answer_is_used(
    system: Names, caplog: pytest.LogCaptureFixture
) -> None:
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    await look_up(resolving, "good.test")
    system.addresses.clear()
    system.failure = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    for _ in range(5):
        assert await look_up(resolving, "good.test") == ("192.0.2.1",)
    await until(lambda: lookups_out() == 0 and caplog.messages, "a log line")
    assert caplog.messages == [
        "server a.test:443: the name good.test can't be looked up now; its last good address is used"
    ]


@pytest.mark.usefixtures("never_fresh")
async def test_a_look_up_that_stays_unanswered_is_logged_once(
    system: Names, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    await look_up(resolving, "good.test")
    system.hanging.add("good.test")
    await look_up(resolving, "good.test")
    assert caplog.messages == []
    monkeypatch.setattr(resolver, "LOOKUP_TIMEOUT", 0.0)
    for _ in range(5):
        assert await look_up(resolving, "good.test") == ("192.0.2.1",)
    assert len(caplog.messages) == 1
    assert "server a.test:443: the name good.test" in caplog.text


@pytest.mark.usefixtures("never_fresh")
async def test_a_name_that_no_longer_exists_has_no_last_good_answer(
    system: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolver, "PATIENCE", 5.0)
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    await look_up(resolving, "good.test")
    del system.addresses["good.test"]
    with pytest.raises(UpstreamUnreachable, match=r"the name good\.test was not found"):
        await look_up(resolving, "good.test")
    system.hanging.add("good.test")
    with pytest.raises(UpstreamUnreachable, match=UNANSWERED):
        await look_up(resolving, "good.test", timeout=0.05)


@pytest.mark.usefixtures("never_fresh")
async def test_the_last_good_answer_is_not_used_for_ever(system: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "LAST_GOOD", -1.0)
    system.addresses["good.test"] = "192.0.2.1"
    resolving = Resolver()
    await look_up(resolving, "good.test")
    system.hanging.add("good.test")
    with pytest.raises(UpstreamUnreachable, match=UNANSWERED):
        await look_up(resolving, "good.test", timeout=0.05)


async def test_each_owner_has_its_own_answers(system: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "FRESH", 60.0)
    resolving = Resolver()
    for number in range(100):
        system.addresses[f"{number}.test"] = "192.0.2.9"
    system.addresses["good.test"] = "192.0.2.1"
    await look_up(resolving, "good.test")
    for number in range(100):
        await look_up(resolving, f"{number}.test", owner="evil.test:443")
    await look_up(resolving, "good.test")
    assert system.asked.count("good.test") == 1
    await look_up(resolving, "0.test", owner="evil.test:443")
    assert system.asked.count("0.test") == 2  # only so many are kept


# Threads


@pytest.mark.parametrize("host", ["192.0.2.7", "2001:db8::7", "::ffff:192.0.2.7"])
async def test_an_address_is_not_looked_up(system: Names, host: str) -> None:
    assert await look_up(Resolver(), host) == (host,)
    assert system.asked == []


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        (socket.gaierror(socket.EAI_NONAME, "unknown"), "was not found"),
        (socket.gaierror(socket.EAI_FAIL, "failed"), UNANSWERED),
        (OSError(errno.EMFILE, "Too many open files"), UNANSWERED),
        (UnicodeError("label too long"), "was not found"),
    ],
)
async def test_a_name_that_does_not_exist_is_told_from_a_resolver_that_fails(
    system: Names, failure: Exception, reason: str
) -> None:
    system.failure = failure  # type: ignore[assignment]
    with pytest.raises(UpstreamUnreachable, match=reason):
        await look_up(Resolver(), "x.test")


async def test_a_thread_that_cannot_be_started_is_a_failure_of_the_look_up(
    system: Names, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    resolving = Resolver()
    system.addresses["x.test"] = "192.0.2.1"
    with monkeypatch.context() as patched, pytest.raises(UpstreamUnreachable, match=UNANSWERED):
        patched.setattr(threading.Thread, "start", refuse)
        await look_up(resolving, "x.test")
    assert await look_up(resolving, "x.test") == ("192.0.2.1",)


def test_a_look_up_without_an_answer_delays_no_exit() -> None:
    code = """
import asyncio, socket, threading, uvloop
from mcp_auth_proxy.errors import UpstreamUnreachable
from mcp_auth_proxy.net.resolver import Resolver

socket.getaddrinfo = lambda *_, **__: threading.Event().wait()

async def main():
    look_ups = [Resolver().look_up(f"{number}.test", 1, owner="o", timeout=0.1) for number in range(8)]
    print(*await asyncio.gather(*look_ups, return_exceptions=True), sep="\\n")

with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
    runner.run(main())
"""
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=20)
    assert time.monotonic() - begun < 10
    assert done.stdout.count(UNANSWERED) == 8
    assert done.stderr == ""
