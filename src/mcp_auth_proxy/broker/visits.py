"""Decide which visit of a link goes on directly: the first one after the link was opened in the user's browser.

Other local users may see the link, in the list of processes for example. Every later visit meets a page that says what
it leads to, so that nobody carries on an authorization without noticing, and the user notices if somebody was first.
"""

from collections.abc import Callable

from mcp_auth_proxy.models import Flow

DIRECT_SECONDS = 5.0
"""How long after a link was opened its first visit goes on directly."""


class LinkVisits:
    """The links that were opened or visited in the last seconds. Belongs to one event loop."""

    def __init__(self, *, clock: Callable[[], float], first_only: bool) -> None:
        """``first_only``: whether only first visits go on directly. If no browser is ever opened, all visits do."""
        self.first_only = first_only
        self._clock = clock
        self._awaited: dict[str, tuple[float, bool]] = {}
        """By flow id: until when this is known, and whether the next visit is the first."""

    def started(self, flow: Flow) -> None:
        """Note a flow that this process has started: nobody has opened its link yet."""
        self._note(flow, awaited=False)

    def opened(self, flow: Flow) -> None:
        """Note that a flow's link is about to be opened in a browser."""
        self._note(flow, awaited=True)

    def is_direct(self, flow: Flow) -> bool:
        """Return whether a visit goes on directly, and note the visit.

        A flow that another process has started is ``login``'s, which opens the link as soon as it has one.
        """
        if not self.first_only:
            return True
        now = self._clock()
        known_until, awaited = self._awaited.get(flow.id, (0.0, False))
        first = awaited if known_until >= now else flow.created_at <= now <= flow.created_at + DIRECT_SECONDS
        self._note(flow, awaited=False)
        return first

    def _note(self, flow: Flow, *, awaited: bool) -> None:
        now = self._clock()
        for flow_id in [flow_id for flow_id, (until, _) in self._awaited.items() if until < now]:
            del self._awaited[flow_id]
        self._awaited[flow.id] = now + DIRECT_SECONDS, awaited
