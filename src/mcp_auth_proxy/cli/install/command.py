"""``install``: enter servers of the proxy into the configuration file of an MCP client, or take them out."""

import os
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from mcp_auth_proxy.cli.install import undo
from mcp_auth_proxy.cli.install.clients import Client, Machine, Target, endpoint, is_current, is_ours
from mcp_auth_proxy.cli.install.files import ClientFile
from mcp_auth_proxy.cli.terminal import complain, say
from mcp_auth_proxy.config.settings import Settings, StoreSettings, reachable
from mcp_auth_proxy.errors import ConfigError, ConfigurationError, McpAuthProxyError
from mcp_auth_proxy.store import serving

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The proxy that entries lead to."""

    url: str
    """How clients reach it."""
    options: tuple[str, ...] = ()
    """What ``stdio`` has to be given to find it."""
    key_source: str | None = None
    """Where the key for it is: ``env:NAME`` or ``file:PATH``."""

    def target(self, client: Client, server: str) -> Target:
        """Return what the entry of a server leads to."""
        variable = None
        if self.key_source is not None and not client.starts_programs:
            variable = self.key_source.removeprefix("env:")
        options = self.options if self.key_source is None else (*self.options, "--api-key", self.key_source)
        command = (*_program(), "stdio", server, *options) if client.starts_programs else ()
        return Target(server=server, url=endpoint(self.url, server), command=command, variable=variable)


def check_key_source(client: Client, source: str | None) -> None:
    """Check ``--api-key``: the client reads the key itself, whenever it starts. Raises UsageError."""
    if source is None:
        return
    kind, _, name = source.partition(":")
    if kind == "env" and _VARIABLE.fullmatch(name):
        return
    if kind == "file" and name and client.starts_programs:
        return
    ways = "env:NAME or file:PATH" if client.starts_programs else "env:NAME"
    raise click.UsageError(f"--api-key must be {ways} for {client.name}; a key itself would be copied into its file.")


def local_place(settings: Settings, *, key_source: str | None = None) -> Place:
    """Return the proxy of a configuration. Raises McpAuthProxyError if its port can't be known."""
    options = () if settings.source is None else ("--config", str(settings.source.absolute()))
    if settings.inbound.modes and key_source is None and "api_key" in settings.inbound.modes:
        complain("warning: the callers of this proxy are identified (inbound.mode): clients need --api-key env:NAME")
    return Place(url=_local_url(settings), options=options, key_source=key_source)


def _local_url(settings: Settings) -> str:
    if settings.public_url is not None:
        return settings.public_url
    if settings.listen.port:
        return f"http://{reachable(settings.listen)}"
    return served_url(settings.store)


def served_url(store: StoreSettings) -> str:
    """Return the address of the proxy that serves a store now. Raises McpAuthProxyError if none does."""
    served = serving.addresses(store)
    if not served:
        raise McpAuthProxyError(
            f"No proxy is running with the store {store.shown}, so its address is not known. Start one with "
            f"`mcp-auth-proxy serve`, or set 'listen'."
        )
    return f"http://{reachable(served[0])}"


def install(client: Client, servers: Collection[str], place: Place, *, print_only: bool) -> int:
    """Write the entries of servers. Return 0; raise McpAuthProxyError, and then nothing was changed."""
    entries = {client.key(server): client.entry(place.target(client, server)) for server in servers}
    file = _file_of(client)
    if print_only:
        complain(f"{client.title}: {file.path}")
        _print(client, entries)
        return 0
    base = _base(client, file)
    before = _entries(client, file, file.read())

    def change(text: str | None) -> str:
        text = text or ""
        for name, entry in entries.items():
            if not is_current(client.editor.entries(text).get(name), entry):
                text = _checked_put(client, text, name, entry)
        return text

    def keep(text: str) -> bool:
        added = undo.replayed(client.editor, text, base)
        return added is None or not all(is_ours(entry, name) for name, entry in added.items())

    if file.read() is None:
        # It is that of a file that somebody has deleted since.
        file.forget_backup()
        base = None
    changed = file.edit(change, keep=keep)
    for server in servers:
        _say_installed(client, server, place, file, before.get(client.key(server)))
    if changed:
        if file.backup.exists():
            complain(f"The file as it was before: {file.backup}")
        complain(f"Restart {client.title} if it is running.")
        _warn_of_variable(client, place)
    return 0


def _say_installed(client: Client, server: str, place: Place, file: ClientFile, before: object) -> None:
    target = place.target(client, server)
    entry, leads = client.entry(target), target.url
    if client.starts_programs:
        leads = " ".join(target.command)
    if is_current(before, entry):
        say(f"{client.key(server)} is in {file.path} already: {leads}")
        return
    if before is not None and not is_ours(before, client.key(server)):
        complain(f"warning: {client.key(server)} in {file.path} did not lead to this proxy; that entry was replaced")
    say(f"{client.key(server)} is in {file.path}: {leads}")


def _warn_of_variable(client: Client, place: Place) -> None:
    source = place.key_source
    if source is None or not source.startswith("env:"):
        return
    name = source.removeprefix("env:")
    if client.starts_programs:
        complain(f"{client.title} hands few variables on: if ${name} is not found, use --api-key file:PATH.")
    else:
        complain(f"{client.title} reads the key from ${name}: set it where {client.title} is started.")


def remove(client: Client, servers: Collection[str], known: Collection[str] | None, *, print_only: bool) -> int:
    """Take the entries of servers out. Return 0; raise McpAuthProxyError, and then nothing was changed.

    ``known`` are the servers of the configuration, None if there is none.
    """
    file = _file_of(client)
    text, base = file.read(), _base(client, file)
    there = _entries(client, file, text)
    present = [server for server in servers if client.key(server) in there]
    missing = [server for server in servers if server not in present]
    for server in missing:
        if known is not None and server.partition("@")[0] not in known:
            raise _unknown(server, {*known, *_installed(client, there)})
    foreign = [server for server in present if not is_ours(there[client.key(server)], client.key(server))]
    if foreign:
        raise McpAuthProxyError(
            f"{', '.join(map(client.key, foreign))} in {file.path} does not lead to this proxy, so nothing was removed."
        )
    if print_only:
        complain(f"{client.title}: {file.path}, without:")
        _print(client, {client.key(server): there[client.key(server)] for server in present})
        return 0
    names = [client.key(server) for server in present]

    def change(text: str | None) -> str | None:
        if text is None or not names:
            return text
        left = undo.without(client.editor, text, base, names, is_ours)
        _check_same(client, text, left or "", names)
        return left

    if file.edit(change, keep=lambda text: False) and base is not None and file.read() == base:
        file.forget_backup()
    for server in servers:
        gone = "was removed from" if server in present else "is not in"
        say(f"{client.key(server)} {gone} {file.path}")
    return 0


def _installed(client: Client, entries: Mapping[str, Any]) -> list[str]:
    return [name for name, entry in entries.items() if is_ours(entry, name)]


def _unknown(server: str, known: Collection[str]) -> ConfigurationError:
    return ConfigurationError(
        [ConfigError("", f"There is no server {server!r}. Known: {', '.join(sorted(known)) or 'none'}.")]
    )


def _base(client: Client, file: ClientFile) -> str | None:
    """Return the file as it was before entries were added; None if that is not known."""
    try:
        text = file.before()
        client.editor.entries(text or "")
    except (undo.InvalidDocument, McpAuthProxyError):
        return None
    return text


def _entries(client: Client, file: ClientFile, text: str | None) -> dict[str, Any]:
    """Return the entries of a file. Raises FileProblem."""
    found: dict[str, Any] = {}

    def look(text: str | None) -> str | None:
        found.update(client.editor.entries(text or ""))
        return text

    file.edit(look, keep=lambda text: False)
    return found


def _checked_put(client: Client, text: str, name: str, entry: Mapping[str, Any]) -> str:
    changed = undo.put(client.editor, text, name, entry)
    if repr(client.editor.entries(changed)[name]) != repr(dict(entry)):
        raise undo.InvalidDocument(f"an entry {name} can't be added")
    _check_same(client, text, changed, [name])
    return changed


def _check_same(client: Client, before: str, after: str, names: Collection[str]) -> None:
    """Check that two texts differ in some entries only, whatever an editor has done. Raises InvalidDocument."""

    def rest(text: str) -> str:
        content = dict(client.editor.content(text))
        entries = {name: entry for name, entry in client.editor.entries(text).items() if name not in names}
        content.pop(client.editor.container, None)
        return repr((content, entries))

    if rest(before) != rest(after):
        raise undo.InvalidDocument("something else would be changed too; edit it by hand")


def _print(client: Client, entries: Mapping[str, Mapping[str, Any]]) -> None:
    text = ""
    for name, entry in entries.items():
        text = undo.put(client.editor, text, name, entry)
    say(*text.rstrip("\n").split("\n"))


def _file_of(client: Client) -> ClientFile:
    try:
        home = Path.home()
    except RuntimeError:
        raise McpAuthProxyError("This user has no home folder, where clients keep their files: set $HOME.") from None
    return ClientFile(client.path(Machine(home, sys.platform, os.environ)))


def _program() -> tuple[str, ...]:
    """Return how a client starts this program, wherever it runs."""
    from mcp_auth_proxy.cli import service

    try:
        return (str(service.program()),)
    except McpAuthProxyError:
        return (sys.executable, "-m", "mcp_auth_proxy")
