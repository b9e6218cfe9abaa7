"""What ``keys rotate`` and ``keys list`` do."""

import asyncio
import time
from contextlib import closing

from mcp_auth_proxy.cli.table import Line, lay_out
from mcp_auth_proxy.cli.terminal import ProgressLine, complain, say, say_json, window_width
from mcp_auth_proxy.config.settings import Settings, StoreSettings
from mcp_auth_proxy.errors import McpAuthProxyError
from mcp_auth_proxy.store import keys, open_store, open_store_read_only, serving, store_exists
from mcp_auth_proxy.store.cipher import load_keys
from mcp_auth_proxy.store.rotation import Progress
from mcp_auth_proxy.store.rotation import rotate as rotate_rows
from mcp_auth_proxy.store.sealed_tables import rows_by_key
from mcp_auth_proxy.store.serving import Served

MAX_NAMED = 100
"""Rows that can't be read, and are named."""

_TAKE_UP_SECONDS = 10.0
_POLL = 0.25


async def list_keys(settings: Settings, *, as_json: bool) -> int:
    """Print the keys of the store, and how many rows need each. Return 0; raise StoreError."""
    uses = await _uses(settings.store)
    if as_json:
        say_json([{"id": use.id, "source": _source(use), "rows": use.rows, "droppable": use.droppable} for use in uses])
        return 0
    lines = [
        Line((use.id, _source(use) or "-", f"{use.rows} row{'s'[: use.rows != 1]}"), _remark(use, first=not number))
        for number, use in enumerate(uses)
    ]
    say(*lay_out(lines, width=window_width(), headers=("id", "source", "rows", "")))
    return 0


async def _uses(store: StoreSettings) -> list[keys.KeyUse]:
    if not store_exists(store):
        # A default key is made with the store.
        loaded = () if store.default_key else await asyncio.to_thread(load_keys, store)
        return keys.key_uses(store, [key.id for key in loaded], {}) if loaded else []
    engine = await open_store_read_only(store)
    try:
        return keys.key_uses(store, engine.cipher.given, await rows_by_key(engine))
    finally:
        await engine.close()


def _source(use: keys.KeyUse) -> str | None:
    if use.source is None:
        return None
    return use.source.written or str(use.source)


def _remark(use: keys.KeyUse, *, first: bool) -> str:
    if use.source is None:
        return "missing in store.keys: these rows can't be read"
    if first:
        return "seals"
    return "droppable: remove it from store.keys" if use.droppable else "needed: run `mcp-auth-proxy keys rotate`"


async def rotate(settings: Settings, *, as_json: bool) -> int:
    """Seal the store again with its first key. Return the exit code; raise McpAuthProxyError."""
    store = settings.store
    if not store_exists(store):
        raise McpAuthProxyError(f"There is no store {store.shown} yet: its first start makes it with the first key.")
    engine = await open_store(store, announce=complain)
    try:
        await _wait_for_proxies(store, engine.cipher.key_ids[0])
        with closing(ProgressLine()) as line:
            done = await rotate_rows(engine, lambda progress: line.show(_so_far(progress)))
        uses = keys.key_uses(store, engine.cipher.given, await rows_by_key(engine))
    finally:
        await engine.close()
    _warn(store, done)
    if as_json:
        say_json(_document(done, uses))
    else:
        _report(done, uses)
    return 1 if done.broken or done.left else 0


async def _wait_for_proxies(store: StoreSettings, key_id: str) -> None:
    """Wait until each proxy on this machine can open what the key seals. Raises McpAuthProxyError after some seconds.

    To a proxy without the key, the rows would count as missing.
    """
    deadline = time.monotonic() + _TAKE_UP_SECONDS
    told = False
    while lacking := [served for served in await _served(store) if key_id not in served.keys]:
        addresses = ", ".join(str(served.address) for served in lacking)
        if time.monotonic() > deadline:
            raise McpAuthProxyError(
                f"The proxy at {addresses} does not have the key {key_id}, and could not read what it seals: send it "
                "SIGHUP or restart it, then try again. Nothing was changed."
            )
        if not told:
            told = True
            complain(f"waiting until the proxy at {addresses} has taken up the key {key_id}")
        await asyncio.sleep(_POLL)


async def _served(store: StoreSettings) -> list[Served]:
    return await asyncio.to_thread(serving.processes, store)


def _so_far(done: Progress) -> str:
    return f"{done.resealed + done.skipped + len(done.broken)} of {done.total} rows"


def _warn(store: StoreSettings, done: Progress) -> None:
    """Say which rows stay as they were, and who still seals with another key."""
    for row in list(done.broken.values())[:MAX_NAMED]:
        complain(f"warning: the row {row.uid} of {row.table} stays as it is: {row.problem}")
    if len(done.broken) > MAX_NAMED:
        complain(f"warning: so do {len(done.broken) - MAX_NAMED} more")
    others = [str(served.address) for served in serving.processes(store) if served.keys[:1] != (done.key,)]
    who = f"the proxy at {', '.join(others)}" if others else "a running proxy"
    if others or done.late:
        complain(
            f"warning: {who} still seals with another key: send it SIGHUP or restart it, then run "
            "`mcp-auth-proxy keys rotate` again"
        )


def _document(done: Progress, uses: list[keys.KeyUse]) -> dict[str, object]:
    broken = [{"table": row.table, "row": row.uid, "problem": row.problem} for row in done.broken.values()]
    return {
        "key": done.key,
        "resealed": done.resealed,
        "skipped": done.skipped,
        "failed": len(done.broken),
        "left": done.left,
        "failures": broken[:MAX_NAMED],
        "droppable": [use.id for use in uses if use.droppable],
    }


def _report(done: Progress, uses: list[keys.KeyUse]) -> None:
    say(f"key {done.key} seals the store: {done.resealed} rows sealed again, {done.skipped} were already")
    for use in uses:
        if use.droppable:
            say(f"key {use.id} is not needed any more: remove {_source(use)} from store.keys")
    if done.left:
        say(f"{done.left} rows turned up with another key, and may do so again")
    if done.broken:
        complain(f"error: {len(done.broken)} rows can't be read, and stay as they were; see above")
