"""The audit trail of commands: what they change in the store leaves an event, as what the API does."""

import os
import pwd

from mcp_auth_proxy.models import DEFAULT_PROJECT, LOCAL
from mcp_auth_proxy.store import Engine
from mcp_auth_proxy.store.events import OK, Event, Events


async def record(
    engine: Engine,
    action: str,
    *,
    target: str,
    project: str = DEFAULT_PROJECT,
    server: tuple[str, str] = ("", ""),
) -> None:
    """Store an event of the user who runs a command. ``server``: id and name. Raises StoreError."""
    event = Event(
        at=engine.now(),
        project_id=project,
        principal=LOCAL,
        credential=f"command:{_user()}",
        action=action,
        target=target,
        server=server[0],
        server_name=server[1],
        outcome=OK,
        address="",
        request_id="",
    )
    await Events(engine).add(event)


def _user() -> str:
    """Return the name of the user of this process, its number if it has none. The environment could say anything."""
    number = os.getuid()
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)
