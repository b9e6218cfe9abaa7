"""Look up names so that unanswered look-ups delay nobody else.

A look-up is a call of ``getaddrinfo`` in a daemon thread of its own. Only the platform's resolver knows hosts files,
search domains and whatever else is configured, and it can't be interrupted: in a pool of threads, such as that of the
event loop, a few names whose servers do not answer would stop all look-ups, and the end of the process too. Therefore
look-ups are shared by name, bounded by owner, and never cancelled with a request that waits for them. The last good
answer serves while a new look-up is out, as in RFC 8767.
"""

import asyncio
import contextlib
import errno
import socket
import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

from mcp_auth_proxy.errors import UpstreamUnreachable
from mcp_auth_proxy.observability.outages import OutageLog

LOOKUP_TIMEOUT = 8.0
"""Seconds that a request waits for a look-up; a resolver asks a second server after some five."""

FRESH = 5.0
"""Seconds for which a name is not looked up again. It is short, because a container that is replaced has a new address
at once, and a resolver does not say for how long its answer is valid."""

LAST_GOOD = 4 * 3600.0
"""Seconds for which an answer is used if no newer one comes: a token that lasts for an hour is still renewed."""

PATIENCE = 0.03
"""Seconds after the start of a look-up until the last good answer is used instead."""

MAX_LOOKUPS = 256
"""Look-ups at a time, and so threads. If half of them are in use, each owner has only one."""

MAX_PER_OWNER = 4
"""Look-ups at a time for one owner. Documents are fetched one after another, so more are rarely needed."""

MAX_ANSWERS = 16
"""Names whose last good answers are kept for one owner."""

THREAD = "look-up"
"""The name of the threads."""

# What the resolver says of the name itself. All else is a failure of the look-up.
_NO_SUCH_NAME = frozenset({socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)})

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Look up the addresses of a host, for a port. Raises OSError if there are none."""


async def resolve(host: str, port: int) -> Sequence[str]:
    """Look up the addresses of a host, in the order of the system's resolver. Raises OSError and UnicodeError."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[Sequence[str]] = loop.create_future()

    def deliver(addresses: Sequence[str], error: Exception | None) -> None:
        if answer.done():  # cancelled, because the loop is being closed
            return
        if error is None:
            answer.set_result(addresses)
        else:
            answer.set_exception(error)

    def look_up() -> None:
        addresses: Sequence[str] = ()
        failure: Exception | None = None
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
            addresses = tuple(dict.fromkeys(_with_zone(sockaddr) for _, _, _, _, sockaddr in found))
        except Exception as error:  # whatever it is, it belongs to those who wait
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            loop.call_soon_threadsafe(deliver, addresses, failure)

    try:
        threading.Thread(target=look_up, name=THREAD, daemon=True).start()
    except RuntimeError:
        raise OSError(errno.EAGAIN, "no thread can be started") from None
    return await answer


def _with_zone(sockaddr: tuple[object, ...]) -> str:
    """Return the address of a socket address; a link-local one with its zone, without which it can't be dialed."""
    zone = sockaddr[3] if len(sockaddr) > 3 else 0
    address = str(sockaddr[0]).partition("%")[0]
    return f"{address}%{zone}" if zone else address


@dataclass(slots=True)
class _Answer:
    addresses: Sequence[str]
    fresh_until: float
    usable_until: float


@dataclass(slots=True, eq=False)
class _Owner:
    """What one owner has: the number of look-ups that it began, and its last good answers, the oldest first."""

    name: str
    lookups: int = 0
    answers: dict[str, _Answer] = field(default_factory=dict)


class _Lookup:
    """A look-up that is out. ``wanted_by``: the owners that get its answer."""

    def __init__(self, owner: _Owner, begun: float) -> None:
        self.begun = begun
        self.wanted_by = {owner}
        self.task: asyncio.Task[Sequence[str]]


class Resolver:
    """Look up names for owners: the configured servers. Belongs to one event loop.

    An owner is named as the log is to name it. It has its own answers and bounds, so what a hostile server names in its
    documents costs no other server its look-ups or its last good answers.
    """

    def __init__(self, resolve: Resolve = resolve) -> None:
        self._resolve = resolve
        self._owners: dict[str, _Owner] = {}
        self._lookups: dict[str, _Lookup] = {}
        """By name."""
        self._ended = asyncio.Event()
        """Set and replaced whenever a look-up ends."""
        self._outages = OutageLog()

    async def look_up(self, host: str, port: int, *, owner: str, timeout: float) -> Sequence[str]:
        """Return the addresses of a host within ``timeout`` seconds.

        Raises UpstreamUnreachable, whose text is the reason and no more.
        """
        if _is_address(host):
            return (host,)
        now = asyncio.get_running_loop().time()
        state = self._owners.setdefault(owner, _Owner(owner))
        last = state.answers.get(host)
        if last is not None and now < last.fresh_until:
            return last.addresses
        if last is None or now >= last.usable_until:
            return await self._new_answer(host, port, state, now + min(timeout, LOOKUP_TIMEOUT))
        lookup = self._lookups.get(host)
        begun = now if lookup is None else lookup.begun
        try:
            return await self._new_answer(host, port, state, begun + PATIENCE)
        except _NoAnswer:
            # None is out if the bounds allow none, or if it has failed.
            if host not in self._lookups or now > begun + LOOKUP_TIMEOUT:
                self._warn(state, host)
            return last.addresses

    def expire(self, host: str, *, owner: str) -> None:
        """Look up a name at its next use, because its addresses can't be reached. They remain its last good answer."""
        state = self._owners.get(owner)
        if state is not None and host in state.answers:
            state.answers[host].fresh_until = 0.0

    async def _new_answer(self, host: str, port: int, owner: _Owner, deadline: float) -> Sequence[str]:
        """Return the answer of the look-up that is out, or of a new one. Raises UpstreamUnreachable, _NoAnswer."""
        task: asyncio.Task[Sequence[str]] | None = None
        try:
            async with asyncio.timeout_at(deadline):
                task = await self._join_or_start(host, port, owner)
                return await asyncio.shield(task)
        except TimeoutError:
            others = owner.lookups or len(self._lookups)
            crowded = "" if task else f", because {others} other look-ups are unanswered"
            raise _NoAnswer(f"the name {host} can't be looked up now{crowded}") from None
        except (OSError, UnicodeError) as error:
            if _is_temporary(error):
                raise _NoAnswer(f"the name {host} can't be looked up now") from None
        raise UpstreamUnreachable(f"the name {host} was not found")

    async def _join_or_start(self, host: str, port: int, owner: _Owner) -> asyncio.Task[Sequence[str]]:
        """Return the task of the look-up that is out or, as soon as the bounds allow one, of a new one."""
        while host not in self._lookups and not self._may_start(owner):
            await self._ended.wait()
        lookup = self._lookups.get(host)
        if lookup is None:
            owner.lookups += 1
            lookup = self._lookups[host] = _Lookup(owner, asyncio.get_running_loop().time())
            lookup.task = asyncio.create_task(self._run(host, port, lookup, owner))
            lookup.task.add_done_callback(_mark_retrieved)
        lookup.wanted_by.add(owner)
        return lookup.task

    def _may_start(self, owner: _Owner) -> bool:
        out = len(self._lookups)
        return out < MAX_LOOKUPS and owner.lookups < (MAX_PER_OWNER if out < MAX_LOOKUPS // 2 else 1)

    async def _run(self, host: str, port: int, lookup: _Lookup, owner: _Owner) -> Sequence[str]:
        """Look up a name, and give the outcome to all owners that want it, whether or not anybody still waits."""
        try:
            addresses = await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            temporary = _is_temporary(error)
            for wanting in lookup.wanted_by:
                if not temporary:
                    wanting.answers.pop(host, None)
                elif host in wanting.answers:
                    self._warn(wanting, host)
            raise
        finally:
            owner.lookups -= 1
            del self._lookups[host]
            self._ended.set()
            self._ended = asyncio.Event()
        for wanting in lookup.wanted_by:
            _remember(wanting, host, addresses)
        return addresses

    def _warn(self, owner: _Owner, host: str) -> None:
        self._outages.warn(owner.name, f"the name {host} can't be looked up now; its last good address is used")


class _NoAnswer(UpstreamUnreachable):
    """A look-up says nothing of the name: it failed, or no answer has come yet."""


def _mark_retrieved(task: asyncio.Task[Sequence[str]]) -> None:
    """Mark the exception of a look-up as retrieved: if nobody waits any more, asyncio would log it."""
    if not task.cancelled():
        task.exception()


def _remember(owner: _Owner, host: str, addresses: Sequence[str]) -> None:
    owner.answers.pop(host, None)
    if not addresses:
        return
    if len(owner.answers) >= MAX_ANSWERS:
        del owner.answers[next(iter(owner.answers))]
    now = asyncio.get_running_loop().time()
    owner.answers[host] = _Answer(addresses, now + FRESH, now + LAST_GOOD)


def _is_temporary(error: OSError | UnicodeError) -> bool:
    """Return whether a look-up failed without a verdict on the name."""
    if isinstance(error, socket.gaierror):
        return error.errno not in _NO_SUCH_NAME
    return isinstance(error, OSError) and error.errno is not None


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True
