"""The addresses that the proxy listens on, and who can reach them."""

from pathlib import Path

from mcp_auth_proxy.config import values
from mcp_auth_proxy.config.document import parse
from mcp_auth_proxy.config.reader import Context, Section
from mcp_auth_proxy.config.settings import Address, Settings, reachable
from mcp_auth_proxy.errors import ConfigError, ConfigurationError
from mcp_auth_proxy.net import urls

_LISTEN = Address("127.0.0.1", 8787)


def read_listen(section: Section, flag: str | None) -> Address:
    """Return where MCP clients are served; the flag overrides the file."""
    configured = section.parsed("listen", values.address, _LISTEN)
    if flag is None:
        return configured
    return Section({"--listen": flag}, "", section.context).parsed("--listen", values.address_or_port, configured)


def read_health_listen(section: Section, listen: Address) -> Address | None:
    """Return where the health endpoints are served apart from MCP clients, if anywhere."""
    address = section.parsed("health_listen", values.address, None)
    if address is not None and address.port and reachable(address) == reachable(listen):
        section.error("health_listen", f"must be another address than listen ({listen}), which has these routes too")
    return address


def read_health_quit(section: Section, health_listen: Address | None) -> bool:
    """Return whether the process can be ended there."""
    quits = section.boolean("health_quit", default=False)
    if quits and health_listen is None:
        section.error("health_quit", "needs health_listen: /quitquitquit is served there and nowhere else")
    return quits


def exposure_errors(
    settings: Settings, allowed: bool, *, otherwise: str = "give serve the flag --allow-anonymous"
) -> list[ConfigError]:
    """Return an error if others than this machine would reach a listener that identifies nobody.

    ``allowed``: the flag of ``serve``. ``otherwise`` is the other remedy. ``health_listen`` gives access to no grant,
    so it may be anywhere.
    """
    if settings.inbound.modes or settings.inbound.allow_anonymous or allowed or urls.is_loopback(settings.listen.host):
        return []
    problem = (
        f"must be true to listen on {settings.listen} (or {otherwise}). This is not a loopback address, and callers "
        f"are not identified: whoever can reach it can use the proxy's grants. Or set inbound.mode, so that they are"
    )
    return [ConfigError("inbound.allow_anonymous", problem)]


def probed(path: Path) -> Address:
    """Return where the health endpoints of a proxy with this configuration file are reached from its machine.

    Reads nothing else: a proxy keeps running if its file is edited into one with errors, or a secret is gone.
    Raises ConfigurationError.
    """
    try:
        document = parse(path.read_bytes())
    except OSError as error:
        raise ConfigurationError([ConfigError("", f"{path} can't be read ({error.strerror})")]) from None
    except ConfigurationError as error:
        raise ConfigurationError(error.errors, str(path)) from None
    context = Context({}, path.parent)
    section = Section(document.content, "", context)
    listen = read_listen(section, None)
    address = read_health_listen(section, listen) or listen
    if context.errors:
        raise ConfigurationError(context.errors, str(path))
    return reachable(address)
